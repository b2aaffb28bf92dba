"""Where a number goes wrong: the first NaN, infinity or zero, forward and backward.

A copy of the traced graph is run once, to count the NaNs, the infinities and the non-zero
numbers in each tensor and in its gradient. The origin forward is the op with a bad output
and clean inputs. Backward it is the op that clean gradients arrive at, and bad ones leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.diagnosis.causes import Culprit, cause_of_nonfinite, cause_of_zero
from tfgrad.diagnosis.graphs import bodies, carries, gradients, leading_to
from tfgrad.diagnosis.lines import line_of

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


@dataclass(frozen=True)
class Origin(Culprit):
    """Where a zero, NaN or infinity first arises.

    Attributes:
        backward: Whether it arises in a gradient that the op passes on, not in its value.
    """

    backward: bool


class Numbers:
    """The numbers in every tensor of a graph and in its gradient, counted.

    Args:
        graph: A traced graph.
        inputs: One value for each of its inputs, captured ones included.
        outputs: The float tensors to differentiate.
        cotangents: Their weights; None means ones.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Sequence[Any],
        outputs: Sequence[tf.Tensor],
        cotangents: Sequence[Any] | None = None,
    ) -> None:
        """Run a copy of the graph."""
        self._graph = graph
        self._inputs = inputs
        self._outputs = outputs
        self._cotangents = cotangents or [None for _ in outputs]
        needed = leading_to(graph, outputs)
        ops = graph.get_operations()
        tensors = [t for op in ops for t in op.outputs if t.ref() in needed]
        values, slopes = self._run(tensors, _count)
        refs = [tensor.ref() for tensor in tensors]
        self._values = dict(zip(refs, map(_to_counts, values), strict=True))
        self._slopes = dict(zip(refs, map(_to_counts, slopes), strict=True))

    def value(self, tensor: tf.Tensor) -> Counts | None:
        """Return what is in `tensor`; None if it holds no float numbers."""
        return self._values.get(tensor.ref())

    def slope(self, tensor: tf.Tensor) -> Counts | None:
        """Return what is in the gradient of `tensor`; None if it has none."""
        return self._slopes.get(tensor.ref())

    def origin_of_value(self, tensor: tf.Tensor) -> Culprit:
        """Return where the NaN or infinity in `tensor` comes from."""
        spoiled = [tensor]
        while spoiled:
            op = spoiled[0].op
            spoiled = [t for t in op.inputs if _spoiled(self.value(t))]
        turn = self._inside(op, backward=False)
        if turn is not None:
            inner = Numbers(*turn[:3])
            for end in turn.outputs:
                if _spoiled(inner.value(end)):
                    return inner.origin_of_value(end).within(line_of(op))
        return Culprit(op.type, line_of(op), *cause_of_nonfinite(op, backward=False))

    def origin_of_slope(self, tensor: tf.Tensor) -> Culprit | None:
        """Return where the NaN or infinity in the gradient of `tensor` comes from."""
        users = self._users(tensor)
        later = [t for op in users for t in op.outputs if _spoiled(self.slope(t))]
        if later:
            return self.origin_of_slope(later[0])
        op = next((op for op in users if self._spoils(op, tensor, users)), None)
        if op is None:
            return None
        turn = self._inside(op, backward=True)
        if turn is not None:
            inner, root = Numbers(*turn), _counterpart(op, tensor, turn)
            if root is not None and _spoiled(inner.slope(root)):
                found = inner.origin_of_slope(root)
                if found is not None:
                    return found.within(line_of(op))
        return Culprit(op.type, line_of(op), *cause_of_nonfinite(op, backward=True))

    def origin_of_zero(self, tensor: tf.Tensor) -> Culprit | None:
        """Return where the gradient of `tensor` becomes zero in every element."""
        users = self._users(tensor)
        if not users:
            return None
        alive = [op for op in users if not self._is_dead(op)]
        if not alive:
            ends = [t for t in users[0].outputs if self.slope(t) is not None]
            return self.origin_of_zero(ends[0])
        op = alive[0]
        cut = cut_inside(op, {tensor.ref()}) if bodies(op) else None
        if cut is not None:
            return cut
        turn = self._inside(op, backward=True) if 
