"""A solver under rules: what a step becomes once its evaluation is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.optimize import stopping
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.solvers import Solver, State
from tfgrad.optimize.stopping import RUNNING, Step, Tolerances, code_of, judge


class Ruled(NamedTuple):
    """A solver whose steps the rules look at.

    Attributes:
        solver: What takes a step.
        tolerances: The rules that were asked for.
    """

    solver: Solver
    tolerances: Tolerances

    @property
    def key(self) -> Any:
        """All that the rules depend on."""
        return self.tolerances, stopping.RULES, self.solver.knows_solutions

    def first(self, fun: Any, grad_max: Any, expected: Any, first: Any) -> tf.Tensor:
        """Return the code of the rules at a start."""
        expected = self._believed(expected)
        return judge(
            Step(
                fun, grad_max, [fun], expected, first, fun, [fun], expected,
                tf.constant(True), self.tolerances,
            )
        )  # fmt: skip

    def step(self, state: State, evaluation: Evaluation, *inputs: Any) -> State:
        """Return the state after a step, given the evaluation of it."""
        new = self.solver.accept(state, evaluation)
        judged = judge(self._step(state, new))
        is_asked = (
            new.accepted & (new.code != code_of("nonfinite")) & (judged != RUNNING)
        )
        new = new._replace(code=tf.where(is_asked, judged, new.code))
        return self.solver.move(state, new, evaluation, *inputs)

    def _step(self, old: State, new: State) -> Step:
        """Return what the rules look at."""
        x: tuple[list[Any], list[Any]] = ([], [])
        if self.tolerances.xtol is not None:
            x = self.solver.way(old, new)
        return Step(
            fun=new.evaluation.value,
            grad_max=new.evaluation.grad_max,
            x=x[0],
            expected=self._believed(new.expected),
            first=new.first,
            before_fun=old.evaluation.value,
            before_x=x[1],
            before_expected=old.expected,
            is_start=new.step == 0,
            tolerances=self.tolerances,
        )

    def _believed(self, expected: tf.Tensor) -> tf.Tensor | None:
        """Return the fall that a rule may believe in; None where none is told.

        An optimizer tells none, nor does a method that looks for solutions itself.
        """
        return expected if self.solver.lag and not self.solver.knows_solutions else None
