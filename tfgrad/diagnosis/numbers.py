"""Where a number goes wrong: the first NaN, infinity or zero, forward and backward.

A copy of the traced graph is run once, to count the NaNs, infinities and non-zero
numbers in each tensor and in its gradient. The origin forward is the op with a bad
output and clean inputs. Backward it is the op that clean gradients arrive at, and bad
ones leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.diagnosis.causes import Culprit
from tfgrad.diagnosis.graphs import bodies, counterparts, leading_to
from tfgrad.diagnosis.lines import line_of
from tfgrad.diagnosis.number_causes import cause_of_nonfinite, cause_of_zero
from tfgrad.diagnosis.path import find_cuts_inside
from tfgrad.diagnosis.replay import Turn, replay, turn_inside

_SOURCES = {"Placeholder", "ReadVariableOp"}


class Counts(NamedTuple):
    """What kinds of numbers a tensor holds."""

    nan: int
    infinite: int
    nonzero: int
    size: int

    @property
    def spoiled(self) -> bool:
        """Whether any of them is not finite."""
        return self.nan + self.infinite > 0

    @property
    def zero(self) -> bool:
        """Whether there are some, and all of them are exactly zero."""
        return self.size > 0 and self.nonzero == 0


class Numbers:
    """The numbers in every tensor of a graph and in its gradient, counted.

    `inputs` has a value for each input of the graph, captured ones included;
    `cotangents` are the weights of the `outputs` that are differentiated.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Sequence[Any],
        outputs: Sequence[tf.Tensor],
        cotangents: Sequence[Any] | None = None,
    ) -> None:
        self._graph = graph
        self._inputs = inputs
        self._outputs = outputs
        self._cotangents = cotangents or [None for _ in outputs]
        needed = leading_to(graph, outputs)
        ops = graph.get_operations()
        tensors = [t for op in ops for t in op.outputs if t.ref() in needed]
        run = replay(graph, tensors, outputs, _count)
        values, slopes = run(self._inputs, self._cotangents)
        refs = [tensor.ref() for tensor in tensors]
        self._values = dict(zip(refs, map(_to_counts, values), strict=True))
        self._slopes = dict(zip(refs, map(_to_counts, slopes), strict=True))
        self._sources = [t for t in tensors if t.op.type in _SOURCES]

    def value(self, tensor: tf.Tensor) -> Counts | None:
        """Return what is in `tensor`; None if it holds no float numbers."""
        return self._values.get(tensor.ref())

    def slope(self, tensor: tf.Tensor) -> Counts | None:
        """Return what is in the gradient of `tensor`; None if it has none."""
        return self._slopes.get(tensor.ref())

    def origin_of_value(self, tensor: tf.Tensor) -> Culprit:
        """Return where the NaN or infinity in `tensor` comes from."""
        # A NaN that comes in may be hidden on its way: tf.nn.max_pool drops it.
        spoiled = [t for t in self._sources if _has_nan(self.value(t))][:1] or [tensor]
        while spoiled:
            op = spoiled[0].op
            spoiled = [t for t in op.inputs if _is_spoiled(self.value(t))]
        turn = self._turn_inside(op, backward=False)
        inner = Numbers(*turn) if turn else self
        for end in turn.outputs if turn else ():
            if _is_spoiled(inner.value(end)):
                return inner.origin_of_value(end).within(line_of(op))
        return _culprit(op, backward=False)

    def origin_of_slope(self, tensor: tf.Tensor) -> Culprit | None:
        """Return where the NaN or infinity in the gradient of `tensor` comes from."""
        later = [tensor]
        while later:
            tensor = later[0]
            users = self._users(tensor)
            ends = [end for op in users for end in op.outputs]
            later = [end for end in ends if _is_spoiled(self.slope(end))]
            later = later or self._further(users)
        blamed = [op for op in users if len(users) == 1 or self._spoils(op, tensor)]
        if not blamed:
            return None
        op = blamed[0]
        turn = self._turn_inside(op, backward=True)
        inner = Numbers(*turn) if turn else self
        for root in turn.body.inputs if turn else ():
            found = _is_spoiled(inner.slope(root)) and inner.origin_of_slope(root)
            if found:
                return found.within(line_of(op))
        return _culprit(op, backward=True)

    def origin_of_zero(self, tensor: tf.Tensor) -> Culprit | None:
        """Return where the gradient of `tensor` becomes zero in every element."""
        while True:
            users = self._users(tensor)
            ends = [(op, end) for op in users for end in op.outputs if self.slope(end)]
            alive = [op for op, end in ends if not _is_zero(self.slope(end))]
            later = [end for _, end in ends] or self._further(users)
            if alive or not later:
                break
            tensor = later[0]
        if not users:
            return None
        op = alive[0] if alive else users[0]
        turn = self._turn_inside(op, backward=True)
        inner = Numbers(*turn) if turn else self
        for root in counterparts(op, turn.body, {tensor.ref()}) if turn else ():
            found = _is_zero(inner.slope(root)) and inner.origin_of_zero(root)
            if found:
                return found.within(line_of(op))
        lively = {end.ref() for _, end in ends if not _is_zero(self.slope(end))}
        for cut in filter(None, find_cuts_inside(op, {tensor.ref(), *lively})):
            return cut
        return Culprit(op.type, line_of(op), *cause_of_zero(op))

    def _users(self, tensor: tf.Tensor) -> list[tf.Operation]:
        """Return the ops that `tensor` gets a gradient from."""
        users = [op for op in tensor.consumers() if any(map(self.slope, op.outputs))]
        return users or [op for op in tensor.consumers() if self._lists(op)]

    def _lists(self, op: tf.Operation) -> list[tf.Tensor]:
        """Return the lists of tensors that `op` makes on the way to the output.

        The numbers in a list, as tf.map_fn and tf.scan use it, cannot be counted; so
        the search goes on to the ops that use the list, up to the loop that may be to
        blame.
        """
        return [
            t for t in op.outputs if t.dtype == tf.variant and t.ref() in self._values
        ]

    def _further(self, users: list[tf.Operation]) -> list[tf.Tensor]:
        """Return the lists to go on to, which no loop has made."""
        return [end for op in users if not bodies(op) for end in self._lists(op)]

    def _spoils(self, op: tf.Operation, tensor: tf.Tensor) -> bool:
        """Return whether `op` alone makes the gradient of `tensor` not finite."""
        ends = [end for end in op.outputs if self.slope(end)]
        run = replay(self._graph, ends, self._outputs, tf.identity)
        _, slopes = run(self._inputs, self._cotangents)
        return _is_spoiled(
            Numbers(self._graph, self._inputs, ends, slopes).slope(tensor)
        )

    def _turn_inside(self, op: tf.Operation, *, backward: bool) -> Turn | None:
        """Return the run of a body of `op` in which a number goes wrong."""
        if not bodies(op):
            return None
        tensors = [*op.inputs, *op.outputs]
        run = replay(self._graph, tensors, self._outputs, tf.identity)
        values, slopes = run(self._inputs, self._cotangents)
        storage = zip(self._graph.inputs, self._inputs, strict=True)
        handles = {place.ref(): value for place, value in storage}
        pairs = zip(tensors, values, strict=True)
        known = [handles.get(t.ref()) if v is None else v for t, v in pairs]
        return turn_inside(op, known, slopes[len(op.inputs) :], backward=backward)


def _culprit(op: tf.Operation, *, backward: bool) -> Culprit:
    cause = cause_of_nonfinite(op, backward=backward)
    return Culprit(op.type, line_of(op), *cause, op.name)


def _count(tensor: tf.Tensor) -> tf.Tensor:
    """Return the fields of `Counts`; nothing is counted where there are no floats."""
    if tensor.dtype.is_complex:
        tensor = tf.abs(tensor)
    if not tensor.dtype.is_floating:
        return tf.zeros([0], tf.int64)
    tensor = tf.reshape(tensor, [-1])  # tf.py_function may lie about its shape
    kinds = [tf.math.is_nan(tensor), tf.math.is_inf(tensor), tf.not_equal(tensor, 0)]
    counts = [tf.math.count_nonzero(kind) for kind in kinds]
    return tf.stack([*counts, tf.size(tensor, tf.int64)])


def _to_counts(counted: tf.Tensor | None) -> Counts | None:
    if counted is None or not counted.shape.num_elements():
        return None
    return Counts(*map(int, counted.numpy()))


def _has_nan(counts: Counts | None) -> bool:
    return counts is not None and counts.nan > 0


def _is_spoiled(counts: Counts | None) -> bool:
    return counts is not None and counts.spoiled


def _is_zero(counts: Counts | None) -> bool:
    return counts is not None and counts.zero
