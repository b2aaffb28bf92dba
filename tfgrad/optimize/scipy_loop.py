"""SciPy's methods behind the interface of the loop: an iteration is a step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.nested import ravel, unravel
from tfgrad.optimize.limits import Array, Limits
from tfgrad.optimize.loop import NOTHING, Loop, Rows, Since
from tfgrad.optimize.methods.scipy import SciPyMethod, Session
from tfgrad.optimize.objective import Evaluation, Objective
from tfgrad.optimize.snapshot import Snapshot
from tfgrad.optimize.stopping import GIVEN_UP, NONFINITE, RUNNING, Step, Stopping
from tfgrad.optimize.transcript import Transcript, went_another_way
from tfgrad.optimize.turns import Turns

FEASIBLE = 1e-9
"""By how much a point may break a limit at which the run ends, whatever `gtol` is."""

KEPT = 16
"""Evaluations kept: SciPy's iteration mostly ends at one of its last."""


class SciPyLoop(Loop):
    """A run of one of SciPy's methods, from iteration to iteration.

    Args:
        objective: What to minimise.
        make_turns: Returns the method at work on the objective.
        stopping: The rules to ask after every iteration. With bounds or constraints the
            gradient is the projected one, or the Lagrangian's, and a point is judged
            only where it keeps to them.
        method: Which method of SciPy's.
        bounds: As for `minimize`.
        constraints: As for `minimize`.
        steps: How many steps are planned.
        since: What was done before, by another method.

    Attributes:
        says: Sentences of its own, by status.
    """

    def __init__(
        self,
        objective: Objective,
        make_turns: Callable[[Objective], Turns],
        stopping: Stopping,
        *,
        method: SciPyMethod,
        bounds: Any,
        constraints: Any,
        steps: int,
        since: Since = NOTHING,
    ) -> None:
        """Evaluate the start, moved into the bounds, which is row 0."""
        if not objective.variables:
            objective.evaluate()
            since = since._replace(evaluations=since.evaluations + 1)
        self.says: dict[str, str] = {}
        self._method = method
        self._limits = Limits(objective, bounds, constraints)
        start = np.asarray(ravel(objective.read()), np.float64)
        if np.any(self._limits.clip(start) != start):
            self._put(objective, self._limits.clip(start))
        self._known: OrderedDict[bytes, Evaluation] = OrderedDict()
        self._session: Session | None = None
        self._transcript: Transcript | None = None
        self._here = start
        self._least, self._idle = np.inf, 0
        self._answers: dict[str, Callable[..., Any]] = {
            "fun": self._fun,
            "hessp": self._hessp,
            "hess": self._hess,
            "constraint": self._constraint,
        }
        super().__init__(
            objective,
            make_turns,
            stopping,
            steps=steps,
            jit=False,
            since=since,
        )

    def _advance(self, most: int) -> Rows:
        """Let SciPy take one iteration."""
        session = self._session or self._begin()
        assert self._transcript is not None
        is_running = session.iterate(self._transcript.noting(self._answers))
        self._transcript.iterations += 1
        moved = not np.array_equal(session.x, self._here)
        is_step = is_running or moved
        rows = self._move(session.x, moved) if is_step else self.here().first(0)
        if self.code == RUNNING and not is_running:
            self.code = self._code_of_end()
            last_words = session.message.rstrip(".")
            self.says["scipy"] = f"SciPy ended: {last_words}. {self._how_far()}"
        return rows

    def close(self) -> None:
        """Leave SciPy where it is."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def _standing_code(self, facts: Mapping[str, Any]) -> int:
        return RUNNING  # SciPy says again how it ended

    def _code_of_end(self) -> int:
        """Return why SciPy ended where no rule of ours holds."""
        if self._limits.are_any:  # where the size of the gradient says nothing
            return GIVEN_UP
        return int(self._code_of_failure(self.at, np.inf))

    def _how_far(self) -> str:
        """Return what is wrong with the current point, as a sentence."""
        gtol = self.stopping.gtol or 0.0
        if (violation := self._limits.violation(self._here)) > self._slack:
            return f"A limit is broken by {violation:.2g}."
        grad = np.asarray(ravel(self.at.gradient), np.float64)
        slope = self._limits.slope(self._here, grad, gtol)
        return f"{self._what()} is {slope:.2g}."

    def snapshot(self) -> Snapshot:
        """Return where it is, and what SciPy has to be told again to be there."""
        plain, transcript = super().snapshot(), self._transcript
        if transcript is None:
            return plain
        points = np.stack([np.frombuffer(key) for key in self._known])
        known = tf.nest.map_structure(lambda *y: tf.stack(y), *self._known.values())
        return replace(
            plain,
            facts={
                **plain.facts,
                "iterations": transcript.iterations,
                "patience": [self._least, self._idle],
            },
            told=[*transcript.tensors(), tf.constant(points), *tf.nest.flatten(known)],
            is_whole=transcript.is_whole,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go to where such a loop was; SciPy follows when it is asked to go on."""
        super().restore(snapshot)
        self._here = np.asarray(ravel(self.point()), np.float64)
        if not snapshot.told:
            return
        *transcript, points = snapshot.told[:4]
        iterations = snapshot.facts["iterations"]
        self._transcript = Transcript.of(transcript, iterations)
        self._least, self._idle = snapshot.facts["patience"]
        rows = zip(*map(tf.unstack, snapshot.told[4:]), strict=True)
        for x, row in zip(points.numpy(), rows, strict=True):
            self._known[x.tobytes()] = tf.nest.pack_sequence_as(self.at, list(row))

    def _begin(self) -> Session:
        bounds, limits = None, self._limits
        if self._method.bounds and np.any(np.isfinite([limits.lower, limits.upper])):
            from scipy.optimize import Bounds

            bounds = Bounds(limits.lower, limits.upper)
        if self._transcript is None:
            self._here = np.asarray(ravel(self.point()), np.float64)
            self._known[self._here.tobytes()] = self.at
            self._transcript = Transcript(self._here)
        start = self._transcript.origin
        self._session = Session(
            self._method, start, bounds=bounds, constraints=limits.for_scipy
        )
        if self._transcript.iterations:
            self._tell_again(self._session, self._transcript)
        return self._session

    def _tell_again(self, session: Session, transcript: Transcript) -> None:
        """Bring SciPy to where it was when its answers were put away."""
        answers = transcript.again(self._constraint)
        for _ in range(transcript.iterations):
            session.iterate(answers)
        dtype = self._objective.variables[0].dtype
        there = np.asarray(tf.cast(session.x, dtype), np.float64)
        if not np.array_equal(there, self._here):
            raise went_another_way()
        self._here = session.x

    def _move(self, x: Array, moved: bool) -> Rows:
        """Go to where SciPy is, ask the rules, and return the row."""
        before, previous = self.at, self.point()
        at = self._at(x)
        vector = tf.constant(x, self._objective.variables[0].dtype)
        self._go_to(at, self._state._replace(trial=vector, x=vector))
        self.turns.settle(self._state)
        self._here = x
        self.step += 1
        rows = self.here()
        self.code = self._judge(previous, before, moved)
        if self.code != NONFINITE:
            return rows
        self._forget()
        return self._without_last(rows, previous)

    def _judge(self, x: list[tf.Tensor], before: Evaluation, moved: bool) -> int:
        """Return the code of the first rule that holds."""
        step = self._between(x, before, self._state, self.at)
        rules = self.stopping
        if not moved:  # as where a simplex turns about its best corner
            rules = Stopping(rules.gtol, None, None, rules.target)
        code = self._code(rules, step)
        if code == RUNNING and self._is_lost():
            self.says["infeasible"] = (
                f"The least violation of the limits, {self._least:.2g}, did not fall "
                f"in {self._idle} iterations. {self._how_far()}"
            )
            return GIVEN_UP
        return code

    def _is_lost(self) -> bool:
        """Count iterations that brought no point nearer to the limits, if none is."""
        if self._method.patience is None or not self._limits.functions:
            return False
        violation = self._limits.violation(self._here)
        if violation <= 0.9 * self._least:
            self._least, self._idle = violation, 0
            return False
        self._idle += 1
        return self._least > self._slack and self._idle >= self._method.patience

    @property
    def _slack(self) -> float:
        """By how much a point may break a limit and still end the run."""
        return max(self.stopping.gtol or 0.0, FEASIBLE)

    def why(self) -> tuple[str, str] | None:
        """Return that the limits are broken, where the run was given up for nothing."""
        if self.code != GIVEN_UP or self._limits.violation(self._here) <= self._slack:
            return None
        said = self.says.get("infeasible") or self.says.get("scipy", "")
        return "infeasible", said or self._how_far()

    def _code_of_start(self) -> int:
        row, rules = self.at.row, self.stopping
        rules = Stopping(rules.gtol, None, None, rules.target)
        return self._code(rules, Step(row["fun"], row["grad_norm"], [], row["fun"], []))

    def _code(self, rules: Stopping, step: Step) -> int:
        limits, gtol = self._limits, rules.gtol or 0.0
        if not limits.are_any or not np.isfinite(step.grad_norm):
            return int(rules.code(step))
        x = np.asarray(ravel(self.point()), np.float64)
        if limits.violation(x) > self._slack:
            return int(Stopping().code(step))  # no point to stop at
        grad = np.asarray(ravel(self.at.gradient), np.float64)
        slope = tf.constant(limits.slope(x, grad, gtol), step.grad_norm.dtype)
        self.says["gtol"] = f"{self._what()} is no larger than {gtol}."
        return int(rules.code(replace(step, grad_norm=slope)))

    def _what(self) -> str:
        if self._limits.functions:
            return "The largest element of the gradient of the Lagrangian"
        is_projected = "projected " if self._limits.are_any else ""
        return f"The largest element of the {is_projected}gradient"

    def _look_around(self) -> None:
        if not self._limits.are_any:  # beside them, a lower point may be forbidden
            super()._look_around()

    def _leave(self) -> Rows:
        self._forget()
        return super()._leave()

    def _forget(self) -> None:
        """Let SciPy begin anew from where the loop is."""
        self.close()
        self._known.clear()
        self._transcript = None

    def _at(self, x: Array) -> Evaluation:
        """Return the evaluation at x; SciPy asks for the same points again."""
        key = x.tobytes()
        if key not in self._known:
            self._put(self._objective, x)
            self._known[key] = self._evaluate()
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _fun(self, x: Array) -> Any:
        at = self._at(x)
        fun = float(at.row["fun"])
        fun = np.inf if np.isnan(fun) else fun  # SciPy compares, and NaN is never worse
        if not self._method.gradient:
            return fun
        return fun, np.asarray(ravel(at.gradient), np.float64)

    def _constraint(self, number: int, x: Array) -> tuple[Array, Array]:
        return self._limits.functions[number].at(x)

    def _hessp(self, x: Array, v: Array) -> Array:
        self._put(self._objective, x)
        return self._times(v)

    def _hess(self, x: Array) -> Array:
        self._put(self._objective, x)
        columns = [self._times(unit) for unit in np.eye(len(x))]
        matrix = np.stack(columns, axis=1)
        return (matrix + matrix.T) / 2

    def _times(self, v: Array) -> Array:
        variables = self._objective.variables
        leaves = unravel(tf.constant(v, variables[0].dtype), variables)
        return np.asarray(ravel(self._objective.hvp(leaves)), np.float64)

    @staticmethod
    def _put(objective: Objective, x: Array) -> None:
        vector = tf.constant(x, objective.variables[0].dtype)
        objective.assign(unravel(vector, objective.variables))
