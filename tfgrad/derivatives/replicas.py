"""A compiled function run on copies of its variables: nothing of the user's is written.

A check evaluates a function more often than the user asked for, and at other points. So
what it reads by itself is read from copies, and what it writes is written to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.soundness import every
from tfgrad.diagnosis.graphs import writes


class Replica:
    """A concrete function on copies of the variables that it writes, and of others.

    Args:
        concrete: The function.
        moving: Variables to give other values, too.
        part: From an answer to the part that is wanted, if all else is not to be
            computed.
    """

    def __init__(
        self,
        concrete: Any,
        moving: Sequence[tf.Variable] = (),
        part: Callable[[Any], Any] | None = None,
    ) -> None:
        self._concrete = concrete
        self._call = self._call_on_copies
        if part is not None:  # the call in it is inlined, and what is left out pruned
            self._call = tf.function(
                lambda tensors: part(self._call_on_copies(tensors)), autograph=False
            )
        handles = {id(handle) for handle in concrete.captured_inputs}
        written = any(map(writes, every(concrete.graph.get_operations())))
        self._writes = written
        read = concrete.graph.variables if written else ()
        known = {id(v.handle): v for v in (*read, *moving) if id(v.handle) in handles}
        self._originals: Mapping[int, tf.Variable] = known
        self._copies: dict[int, tf.Variable] = {}

    def __call__(
        self, tensors: Sequence[Any], values: Mapping[int, tf.Tensor] = {}
    ) -> Any:
        """Return the answer to `tensors`.

        Args:
            tensors: What the function takes.
            values: Those of variables, by the id of their handles; the others have the
                values that they have now.
        """
        for key, original in self._originals.items():
            value = values.get(key)
            value = original.read_value() if value is None else value
            if key in self._copies:
                self._copies[key].assign(value)
            else:
                self._copies[key] = tf.Variable(value, trainable=False)
        return self._call(tensors)

    def is_steady(self, tensors: Sequence[Any]) -> bool:
        """Return whether its answer does not depend on what it writes."""
        if not self._writes:
            return True
        first = self(tensors)
        second = self._call(tensors)
        pairs = zip(*map(tf.nest.flatten, (first, second)), strict=True)
        return all(bool(tf.reduce_all(tf.equal(a, b))) for a, b in pairs)

    def _call_on_copies(self, tensors: Sequence[Any]) -> Any:
        captured = self._concrete.captured_inputs
        if self._copies:
            handles = {key: copy.handle for key, copy in self._copies.items()}
            captured = [handles.get(id(handle), handle) for handle in captured]
        flat = tf.nest.flatten(list(tensors), expand_composites=True)
        # There is no public way to choose what is captured, for one call only.
        return self._concrete._call_flat(flat, captured)
