"""One gradient check under way: what it evaluates, order by order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tfgrad.checks import modes
from tfgrad.checks.modes import Derivatives, Level, Setting
from tfgrad.checks.report import Check
from tfgrad.checks.scalar import (
    Scalar,
    inner,
    value_and_gradient,
    weighted_gradient,
    weighted_output,
)
from tfgrad.checks.subject import Subject
from tfgrad.derivatives.verification import random_weights
from tfgrad.differences import EPSILONS, TOLERANCES, Array


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
        subject: The function, and where.
        chosen: The modes to check.
        directions: How many directions per argument and order.
        rtol: The relative disagreement that is allowed; None for that of the dtype.
        full: Look at every element of an argument that fails.
        seed: Of the random directions and weights.
    """

    def __init__(
        self,
        subject: Subject,
        chosen: Sequence[str],
        *,
        directions: int,
        rtol: float | None,
        full: bool,
        seed: int,
    ) -> None:
        self._subject, self._point = subject, subject.point
        self._chosen = chosen
        self._generator = np.random.default_rng(seed)
        coarsest = max(subject.dtypes(), key=lambda dtype: EPSILONS[dtype])
        self._setting = Setting(
            self._point,
            [
                [self._unit(a.shape) for _ in range(directions)]
                for a in self._point.arrays
            ],
            EPSILONS[coarsest],
            TOLERANCES[coarsest].asked if rtol is None else rtol,
            full,
        )

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
        output = self._subject.output(self._setting.epsilon)
        weights = np.ones(())
        if output.size != 1:
            weights = random_weights(self._generator, output.shape)
        scalar = weighted_output(self._subject.call, weights)
        is_compiled = bool({"compiled", "xla"} & set(self._chosen))
        call = self._subject.compilable() if is_compiled else None
        graph = None if call is None else weighted_output(call, weights)
        values = self._subject.runner(lambda *arguments: (scalar(*arguments), []))
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
        eager = self._subject.runner(value_and_gradient(function.scalar, self._point))
        derive = eager
        value, gradient = eager(self._point.arrays)
        scalar, evaluate, size = function.scalar, function.evaluate, function.magnitude
        level = Level(number, scalar, evaluate, eager, value, gradient, size)
        rows: list[Check] = []
        for mode in ("compiled", "xla"):
            if function.graph is None or mode not in self._chosen:
                continue
            both = value_and_gradient(function.graph, self._point)
            compiled = self._subject.compiled(both, number, mode)
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
        run = self._subject.compiled(
            lambda *arguments: (graph(*arguments), []), 1, "compiled"
        )
        return replace(level, evaluate=lambda arrays: run(arrays)[0]) if run else level

    def _symmetry(self, level: Level, last: Function, weights: list[Array]) -> Check:
        """Compare u.Hv with v.Hu: a Hessian is symmetric."""
        others = [directions[-1] for directions in self._setting.directions]
        scalar = weighted_gradient(last.scalar, self._point, others)
        run = self._subject.runner(value_and_gradient(scalar, self._point))
        return modes.symmetry(level, self._setting, weights, run)

    def _forward(self, level: Level) -> list[Check]:
        """Return the checks of forward mode, if the function has one."""
        try:
            return modes.forward(level, self._setting)
        except Exception as error:  # an op may refuse in any way
            self._subject.skip(level.order, "forward", error)
            return []

    def _give_up(self, order: int, error: Exception) -> None:
        """Raise if there is no gradient; note that there is none of higher order."""
        if order > 1:
            self._subject.skip(order, "reverse", error)
            return
        if isinstance(error, LookupError):  # an op without a gradient
            self._subject.require_uncut(cause=error)
        raise error

    def _unit(self, shape: tuple[int, ...]) -> Array:
        """Return a random direction of length 1."""
        normal = self._generator.normal(size=shape)
        return normal / (np.linalg.norm(normal) or 1.0)
