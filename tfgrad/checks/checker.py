"""One gradient check under way: what it evaluates, order by order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.checks import modes
from tfgrad.checks.modes import Derivatives, Level, Setting
from tfgrad.checks.report import Check
from tfgrad.checks.scalar import (
    Point,
    Scalar,
    inner,
    value_and_gradient,
    weighted_gradient,
    weighted_output,
)
from tfgrad.derivatives.soundness import (
    UnverifiableGradientError,
    may_drop,
    require_whole,
)
from tfgrad.derivatives.verification import ASKED_RTOL
from tfgrad.diagnosis.graphs import following, handle_of, leading_to, trace
from tfgrad.diagnosis.lines import line_of_error
from tfgrad.diagnosis.path import missing_gradients
from tfgrad.diagnosis.report import no_gradient_error
from tfgrad.diagnosis.sources import Sources
from tfgrad.differences import EPSILONS, Array
from tfgrad.errors import InvalidArgumentError

_SAME = 100
"""Machine epsilons by which two evaluations of the same function may differ."""


class Function(NamedTuple):
    """A scalar function of one order, in the forms that its checks need.

    Attributes:
        scalar: To be run eagerly.
        graph: To be compiled; None if it cannot be.
        evaluate: From arrays to a number.
        magnitude: The size of the terms that it sums.
    """

    scalar: Scalar
    graph: Scalar | None
    evaluate: Callable[[Sequence[Array]], float]
    magnitude: float


class Checker:
    """The checks of one function at one point.

    Args:
        sources: The function, and what it is differentiated with respect to.
        chosen: The modes to check.
        directions: How many directions per argument and order.
        rtol: The relative disagreement that is allowed; None for `ASKED_RTOL`.
        full: Look at every element of an argument that fails.
        seed: Of the random directions and weights.
    """

    def __init__(
        self,
        sources: Sources,
        chosen: Sequence[str],
        *,
        directions: int,
        rtol: float | None,
        full: bool,
        seed: int,
    ) -> None:
        """Trace the function; evaluate nothing yet."""
        self.notes: list[str] = []
        self._sources = sources
        self._chosen = chosen
        self._point = Point(sources)
        self._specs = [tf.TensorSpec(x.shape, x.dtype) for x in sources.tensors]
        self._generator = np.random.default_rng(seed)
        self._traced: Any = None
        with contextlib.suppress(Exception):  # a function that only runs eagerly
            self._traced = trace(sources.call, self._specs)
        coarsest = max(self._dtypes(), key=lambda dtype: EPSILONS[dtype])
        self._setting = Setting(
            self._point,
            [
                [self._unit(a.shape) for _ in range(directions)]
                for a in self._point.arrays
            ],
            EPSILONS[coarsest],
            ASKED_RTOL[coarsest] if rtol is None else rtol,
            full,
        )

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
        inputs, name = self._inputs(), nested.name_of(self._sources.f)
        cuts = missing_gradients(self._sources.call, *inputs)
        for argument, cut in zip(self._point.names, cuts, strict=True):
            if cut is not None and cut.op:
                raise no_gradient_error(name, argument, cut)
        if may_drop(self._traced.graph.get_operations()):
            with contextlib.suppress(UnverifiableGradientError):
                require_whole(self._sources.call, *inputs, name, self._point.names)

    def _inputs(self) -> tuple[Sequence[tf.Tensor], Sequence[tf.Variable]]:
        return self._sources.tensors, self._sources.variables

    def checks(self, order: int) -> Iterator[Check]:
        """Yield the checks up to `order`."""
        last = function = self._function()
        weights: list[Array] = []
        for number in range(1, order + 1):
            try:
                level, derive, rows = self._level(number, function)
            except Exception as error:  # an op may refuse in any way
                self._give_up(number, error)
                return
            yield from rows
            if "reverse" in self._chosen:
                yield from modes.reverse(level, self._setting)
                if number == 2:
                    yield self._symmetry(level, last, weights)
            if "forward" in self._chosen:
                yield from self._forward(level)
            weights = [self._unit(array.shape) for array in self._point.arrays]
            last, function = function, self._next(function, level, derive, weights)

    def _function(self) -> Function:
        """Return the function of the first order: the weighted output."""
        output = self._output()
        weights = np.ones(()) if output.size == 1 else self._weights(output.shape)
        scalar = weighted_output(self._sources.call, weights)
        call = self._compilable()
        graph = None if call is None else weighted_output(call, weights)
        values = self._runner(lambda *arguments: (scalar(*arguments), []))
        size = float(np.linalg.norm(weights * output))
        return Function(scalar, graph, lambda arrays: values(arrays)[0], size)

    def _next(
        self,
        function: Function,
        level: Level,
        derive: Derivatives,
        weights: list[Array],
    ) -> Function:
        """Return the function of the next order: the weighted gradient."""
        scalar = weighted_gradient(function.scalar, self._point, weights)
        graph = function.graph
        if graph is not None:
            graph = weighted_gradient(graph, self._point, weights)
        terms = [w * g for w, g in zip(weights, level.gradient, strict=True)]
        size = float(np.linalg.norm([np.linalg.norm(term) for term in terms]))

        def evaluate(arrays: Sequence[Array]) -> float:
            pairs = zip(weights, derive(arrays)[1], strict=True)
            return sum(inner(w, g) for w, g in pairs)

        return Function(scalar, graph, evaluate, size)

    def _level(
        self, number: int, function: Function
    ) -> tuple[Level, Derivatives, list[Check]]:
        """Return one order, the fastest way to its gradient, and the compiled modes."""
        eager = self._runner(value_and_gradient(function.scalar, self._point))
        derive = eager
        value, gradient = eager(self._point.arrays)
        scalar, evaluate, size = function.scalar, function.evaluate, function.magnitude
        level = Level(number, scalar, evaluate, eager, value, gradient, size)
        rows: list[Check] = []
        for mode in ("compiled", "xla"):
            if function.graph is None or mode not in self._chosen:
                continue
            both = value_and_gradient(function.graph, self._point)
            compiled = self._compile(both, number, mode)
            if compiled is None:
                continue
            found = modes.compiled(level, self._setting, mode, compiled)
            rows += found
            if mode == "compiled" and all(row.verdict == "pass" for row in found):
                derive = compiled
        return self._faster(level, function, derive is not eager), derive, rows

    def _faster(self, level: Level, function: Function, is_same: bool) -> Level:
        """Return the level, evaluated compiled if that is known to be the same."""
        graph = function.graph
        if level.order > 1 or not is_same or graph is None:
            return level  # a gradient is evaluated by `derive` of the order before
        run = self._compile(lambda *arguments: (graph(*arguments), []), 1, "compiled")
        return replace(level, evaluate=lambda arrays: run(arrays)[0]) if run else level

    def _symmetry(self, level: Level, last: Function, weights: list[Array]) -> Check:
        """Compare u.Hv with v.Hu: a Hessian is symmetric."""
        others = [directions[-1] for directions in self._setting.directions]
        scalar = weighted_gradient(last.scalar, self._point, others)
        run = self._runner(value_and_gradient(scalar, self._point))
        return modes.symmetry(level, self._setting, weights, run)

    def _forward(self, level: Level) -> list[Check]:
        """Return the checks of forward mode, if the function has one."""
        try:
            return modes.forward(level, self._setting)
        except Exception as error:  # an op may refuse in any way
            self._skip(level.order, "forward", error)
            return []

    def _compile(self, function: Any, order: int, mode: str) -> Derivatives | None:
        """Return the compiled function; None, with a note, if there is none."""
        jit = mode == "xla" or None
        compiled = tf.function(function, autograph=False, jit_compile=jit)
        try:
            concrete = compiled.get_concrete_function(*self._specs)
            if mode == "xla":
                concrete(*self._point.at(self._point.arrays))
        except Exception as error:  # an op may refuse in any way
            self._skip(order, mode, error)
            return None
        return self._runner(concrete)

    def _compilable(self) -> Callable[..., Any] | None:
        """Return the call in a form that can be traced; None if there is none."""
        failure: Exception | None = None
        if not {"compiled", "xla"} & set(self._chosen):
            return None
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
        self._skip(1, "compiled", failure)
        return None

    def _give_up(self, order: int, error: Exception) -> None:
        """Raise if there is no gradient; note that there is none of higher order."""
        if order > 1:
            self._skip(order, "reverse", error)
            return
        if isinstance(error, LookupError):  # an op without a gradient
            cuts = missing_gradients(self._sources.call, *self._inputs())
            for name, cut in zip(self._point.names, cuts, strict=True):
                if cut is not None:
                    raise no_gradient_error(
                        nested.name_of(self._sources.f), name, cut
                    ) from error
        raise error

    def _skip(self, order: int, mode: str, error: Exception) -> None:
        """Note that a mode cannot be checked."""
        line = line_of_error(error)
        place = f"at {line}" if line else str(error).strip().splitlines()[0][:100]
        kind = type(error).__name__
        self.notes.append(f"{mode}, order {order}: not checked, {kind} {place}")

    def _runner(self, function: Callable[..., Any]) -> Derivatives:
        """Return `function` from arrays to numbers."""
        point = self._point

        def run(arrays: Sequence[Array]) -> tuple[float, list[Array]]:
            value, gradient = function(*point.at(arrays))
            return float(value), [np.asarray(g, np.float64) for g in gradient]

        return run

    def _output(self) -> Array:
        """Return the output at the point, or refuse the function."""
        name = nested.name_of(self._sources.f)
        arguments = self._point.at(self._point.arrays)
        outputs = [self._sources.call(*arguments) for _ in range(2)]
        if not _is_float_tensor(outputs[0]):
            raise InvalidArgumentError(
                "The function to check must return one float tensor.",
                got=f"`{name}` returned {nested.describe(outputs[0])}",
                hint="return the one tensor to check; is a `return` missing?",
            )
        first, second = (np.asarray(output, np.float64) for output in outputs)
        if not np.all(np.isfinite(first)):
            raise InvalidArgumentError(
                "The function to check must be finite at the point.",
                got=f"`{name}` returned {np.count_nonzero(~np.isfinite(first))} NaN or "
                f"infinite numbers of {first.size}",
                hint=f"tfgrad.explain({name}, ...), which says where they come from",
            )
        gap = float(np.max(np.abs(first - second), initial=0.0))
        if gap > _SAME * self._setting.epsilon * float(np.max(np.abs(first))):
            raise InvalidArgumentError(
                "The function to check must return the same for the same arguments.",
                got=f"two calls of `{name}` that differ by {gap:.3g}",
                hint="training=False, a fixed seed (tf.random.stateless_*), and no "
                "variable that the function itself changes",
            )
        return first

    def _dtypes(self) -> set[tf.DType]:
        """Return the float dtypes from the arguments to the output."""
        found = {leaf.dtype for leaf in self._point.leaves}
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

    def _unit(self, shape: tuple[int, ...]) -> Array:
        """Return a random direction of length 1."""
        normal = self._generator.normal(size=shape)
        return normal / (np.linalg.norm(normal) or 1.0)

    def _weights(self, shape: tuple[int, ...]) -> Array:
        """Return random weights of both signs, none of which is close to zero."""
        signs = self._generator.choice([-1.0, 1.0], size=shape)
        return signs * self._generator.uniform(0.5, 1.5, size=shape)


def _is_float_tensor(output: Any) -> bool:
    if not isinstance(output, tf.Tensor | tf.Variable):
        return False
    return bool(output.dtype.is_floating)
