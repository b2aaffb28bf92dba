"""The function under check, at its point: traced, run and compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.checks.modes import Derivatives
from tfgrad.checks.scalar import Point
from tfgrad.derivatives.soundness import (
    UnverifiableGradientError,
    may_drop,
    require_whole,
)
from tfgrad.diagnosis.graphs import following, handle_of, leading_to, trace
from tfgrad.diagnosis.lines import line_of_error
from tfgrad.diagnosis.path import missing_gradients
from tfgrad.diagnosis.report import no_gradient_error
from tfgrad.diagnosis.sources import Sources
from tfgrad.differences import EPSILONS, Array
from tfgrad.errors import InvalidArgumentError

_SAME = 100
"""Machine epsilons by which two evaluations of the same function may differ."""


class Subject:
    """A function at the point where it is checked.

    Args:
        sources: The function, and what it is differentiated with respect to.

    Attributes:
        call: The function of what it is differentiated by.
        name: What to call it.
        point: Where.
        notes: What could not be checked, and why.
    """

    def __init__(self, sources: Sources) -> None:
        self.call, self.name = sources.call, nested.name_of(sources.f)
        self.point = Point(sources)
        self.notes: list[str] = []
        self._sources = sources
        self._specs = [tf.TensorSpec(x.shape, x.dtype) for x in sources.tensors]
        self._traced: Any = None
        with contextlib.suppress(Exception):  # a function that only runs eagerly
            self._traced = trace(sources.call, self._specs)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that the checks, or the function itself, assign to."""
        read = self._traced.variables if self._traced else ()
        return list({v.ref(): v for v in (*self._sources.variables, *read)}.values())

    def require_connected(self) -> None:
        """Refuse a function whose gradient is cut, as `tfgrad.grad` does.

        Raises:
            NoGradientError: If it is.
        """
        if self._traced is None:  # it runs eagerly only: differences will tell
            return
        inputs = self._sources.tensors, self._sources.variables
        self.require_uncut(by_op=True)
        if may_drop(self._traced.graph.get_operations()):
            with contextlib.suppress(UnverifiableGradientError):
                require_whole(self.call, *inputs, self.name, self.point.names)

    def require_uncut(
        self, *, by_op: bool = False, cause: Exception | None = None
    ) -> None:
        """Refuse a gradient that is cut.

        Args:
            by_op: Only if an op cuts it, and not where there is no path at all.
            cause: What showed that it is.

        Raises:
            NoGradientError: If there is one.
        """
        inputs = self._sources.tensors, self._sources.variables
        cuts = missing_gradients(self.call, *inputs)
        for argument, cut in zip(self.point.names, cuts, strict=True):
            if cut is not None and (cut.op or not by_op):
                raise no_gradient_error(self.name, argument, cut) from cause

    def output(self, epsilon: float) -> Array:
        """Return the output at the point, or refuse the function."""
        arguments = self.point.at(self.point.arrays)
        outputs = [self.call(*arguments) for _ in range(2)]
        if not _is_float_tensor(outputs[0]):
            raise InvalidArgumentError(
                "The function to check must return one float tensor.",
                got=f"`{self.name}` returned {nested.describe(outputs[0])}",
                hint="return the one tensor to check; is a `return` missing?",
            )
        first, second = (np.asarray(output, np.float64) for output in outputs)
        if not np.all(np.isfinite(first)):
            raise InvalidArgumentError(
                "The function to check must be finite at the point.",
                got=f"`{self.name}` returned "
                f"{np.count_nonzero(~np.isfinite(first))} NaN "
                f"or infinite numbers of {first.size}",
                hint=f"tfgrad.explain({self.name}, ...), which says where they "
                "come from",
            )
        gap = float(np.max(np.abs(first - second), initial=0.0))
        if gap > _SAME * epsilon * float(np.max(np.abs(first))):
            raise InvalidArgumentError(
                "The function to check must return the same for the same arguments.",
                got=f"two calls of `{self.name}` that differ by {gap:.3g}",
                hint="training=False, a fixed seed (tf.random.stateless_*), and no "
                "variable that the function itself changes",
            )
        return first

    def dtypes(self) -> set[tf.DType]:
        """Return the float dtypes from the arguments to the output."""
        found = {leaf.dtype for leaf in self.point.leaves}
        if self._traced is None:
            return found
        graph = self._traced.graph
        roots = list(self._traced.inputs[: len(self._specs)])
        roots += [handle_of(v, self._traced) for v in self._sources.variables]
        leads = leading_to(graph, self._traced.outputs)
        for root in (root for root in roots if root is not None):
            between = leads & following(graph, root)
            tensors = (t for op in graph.get_operations() for t in op.outputs)
            found |= {t.dtype for t in tensors if t.ref() in between}
        return found & EPSILONS.keys()

    def runner(self, function: Callable[..., Any]) -> Derivatives:
        """Return `function` from arrays to numbers."""
        point = self.point

        def run(arrays: Sequence[Array]) -> tuple[float, list[Array]]:
            value, gradient = function(*point.at(arrays))
            return float(value), [np.asarray(g, np.float64) for g in gradient]

        return run

    def compiled(self, function: Any, order: int, mode: str) -> Derivatives | None:
        """Return the compiled function; None, with a note, if there is none."""
        jit = mode == "xla" or None
        compiled = tf.function(function, autograph=False, jit_compile=jit)
        try:
            concrete = compiled.get_concrete_function(*self._specs)
            if mode == "xla":
                concrete(*self.point.at(self.point.arrays))
        except Exception as error:  # an op may refuse in any way
            self.skip(order, mode, error)
            return None
        return self.runner(concrete)

    def compilable(self) -> Callable[..., Any] | None:
        """Return the call in a form that can be traced; None if there is none."""
        failure: Exception | None = None
        # The second one applies AutoGraph: a Python `if` on a tensor needs it.
        for f in (self._sources.f, tf.function(self._sources.f)):
            call = replace(self._sources, f=f).call
            try:
                tf.function(call, autograph=False).get_concrete_function(*self._specs)
            except Exception as error:  # the user's function may raise anything
                failure = failure or error
            else:
                return call
        assert failure is not None
        self.skip(1, "compiled", failure)
        return None

    def skip(self, order: int, mode: str, error: Exception) -> None:
        """Note that a mode cannot be checked."""
        line = line_of_error(error)
        place = f"at {line}" if line else str(error).strip().splitlines()[0][:100]
        kind = type(error).__name__
        self.notes.append(f"{mode}, order {order}: not checked, {kind} {place}")


def _is_float_tensor(output: Any) -> bool:
    if not isinstance(output, tf.Tensor | tf.Variable):
        return False
    return bool(output.dtype.is_floating)
