"""What TensorFlow 2.21 has wrong or lacks: the entries of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

Gradient = Callable[..., Any]


class Repair(NamedTuple):
    """One entry of the table.

    Attributes:
        gradient: The right one: takes the op and the gradients of its outputs.
        reason: What is wrong with TensorFlow's.
        first: Whether it is wrong at the first order, or only where differentiated.
        applies: Takes an op, returns whether TensorFlow's is wrong for it.
        leads: Takes an op, returns whether TensorFlow's is right for it, and that of
            its gradient may be wrong.
    """

    gradient: Gradient
    reason: str
    first: bool
    applies: Callable[[tf.Operation], bool]
    leads: Callable[[tf.Operation], bool]


TABLE: dict[str, Repair] = {}
"""From the type of an op to its repair."""


def repairs(
    *kinds: str,
    reason: str,
    first: bool = True,
    applies: Callable[[tf.Operation], bool] = lambda op: True,
    leads: Callable[[tf.Operation], bool] = lambda op: False,
) -> Callable[[Gradient], Gradient]:
    """Put a gradient into the table, see `Repair`."""

    def register(gradient: Gradient) -> Gradient:
        repair = Repair(gradient, reason, first, applies, leads)
        TABLE.update(dict.fromkeys(kinds, repair))
        return gradient

    return register


def is_complex(op: tf.Operation) -> bool:
    """Return whether the last output of an op is complex."""
    return bool(op.outputs[-1].dtype.is_complex)
