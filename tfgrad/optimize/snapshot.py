"""Where a run is: all that it needs to go on from there, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import describe


@dataclass(frozen=True)
class Snapshot:
    """What a loop needs to go on.

    Attributes:
        facts: Counts and names: what JSON can hold.
        variables: The values of the variables, the method's included.
        memory: The current evaluation, and what a pure method remembers.
        lower: The point to step to from a saddle; empty if it is not at one.
        told: What has to be told again to a method that does not tell what it keeps.
        is_whole: Whether that is all of it; if not, nothing can go on from here.
    """

    facts: Mapping[str, Any]
    variables: Sequence[tf.Tensor]
    memory: Sequence[tf.Tensor]
    lower: Sequence[tf.Tensor]
    told: Sequence[tf.Tensor] = ()
    is_whole: bool = True

    def check_like(self, other: Snapshot) -> None:
        """Refuse a snapshot of which some tensor is of another shape or dtype.

        Raises:
            InvalidArgumentError: If there is one.
        """
        for name in ("variables", "memory"):
            ours, theirs = ([*map(describe, getattr(s, name))] for s in (self, other))
            if ours != theirs:
                pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
                here, there = pairs[0] if pairs else (len(ours), len(theirs))
                raise InvalidArgumentError(
                    "A run goes on with the function and the method it began with.",
                    got=f"{name} of {here} there, of {there} here",
                    hint="the call as it was, or minimize(f, result.x) to start anew",
                )
