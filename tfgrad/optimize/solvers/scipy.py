"""SciPy's methods in the place of the loop: an iteration is a step.

SciPy runs in its own loop and calls back after each iteration. In `minimize`, that call
hands the step on; `descend`, which is asked for one step at a time, has SciPy run in a
thread. What SciPy keeps between two iterations is out of reach: a run that goes on
starts SciPy anew from its last point.

>>> import numpy as np
>>> import tfgrad
>>> result = tfgrad.minimize(
...     lambda x: (x[0] - 3) ** 2 + (x[1] - 2) ** 2, np.zeros(2), method="scipy:slsqp",
...     bounds=(0.0, None),
...     constraints={"type": "ineq", "fun": lambda x: 4 - x[0] - x[1]},  # is >= 0
... )
>>> print(result.status, result.success, result.x.numpy().round(6))
scipy True [2.5 1.5]

References:
    SciPy's documentation of `scipy.optimize.minimize`, for each of the methods.
"""

from __future__ import annotations

import queue
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.nested import ravel, unravel
from tfgrad.optimize.constraints import Array, Limits
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.history import Rows
from tfgrad.optimize.methods import bounded
from tfgrad.optimize.methods.protocol import Move
from tfgrad.optimize.methods.scipy import SciPyMethod
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.saddle import point_beside
from tfgrad.optimize.solvers import State
from tfgrad.optimize.solvers.pure import PureSolver
from tfgrad.optimize.stopping import (
    Step,
    Tolerances,
    code_of,
    judge,
)
from tfgrad.optimize.traced import blame
from tfgrad.runs.values import as_array

FEASIBLE = 1e-6
"""By how much a point may break a limit and be called a solution: what SciPy's methods
hold themselves to."""

KEPT = 16
"""Evaluations kept: SciPy's iteration mostly ends at one of its last."""

BEYOND = 10.0
"""How many times the height of the current point over the lowest one a point lies over
it that has no value: line searches interpolate there, and come back."""


class _Still:
    """The method of a point that stays where it is, until SciPy moves it."""

    name = "scipy"

    def __init__(self, bounds: Any = None) -> None:
        self._bounds = bounds

    @property
    def settings(self) -> tuple[Any, ...]:
        """What the slope at the start depends on."""
        return (bounded.settings(self._bounds),)

    def init(self, start: Any) -> Move:
        """Return the start."""
        return Move(start.x)

    def update(self, new: Any, old: Any, state: Any) -> Move:
        """Return the point."""
        return Move(new.x)

    def within(self, bounds: Any) -> _Still:
        """Return the method within bounds, which SciPy heeds."""
        return _Still(bounds)


class _LeftError(Exception):
    """Raised within SciPy where the run has ended."""


class SciPyLoop:
    """A run of one of SciPy's methods, from iteration to iteration.

    Args:
        problem: What to minimise.
        method: Which method of SciPy's.
        limits: Bounds and constraints.
        tolerances: The rules to ask after every iteration; SciPy has its own besides.
        clock: Returns the seconds since the run began.

    Attributes:
        solver: What evaluates.
        visit: Called with each state and its row; returns whether to go on. None: a
            call of `advance` takes one iteration, and SciPy runs in a thread.
        bad: A row that is not finite, where that ended the run.
        blame: Which op and line made it so, if that was found.
        verdict: SciPy's own: whether it succeeded, and its last words.
    """

    def __init__(
        self,
        problem: Problem,
        method: SciPyMethod,
        limits: Limits,
        tolerances: Tolerances,
        clock: Callable[[], float],
    ) -> None:
        """Evaluate nothing."""
        self.solver = PureSolver(problem, _Still(), limits)
        self.visit: Callable[[State, Rows], bool] | None = None
        self.bad: Rows | None = None
        self.blame = ""
        self.verdict = False, ""
        self._method, self._limits, self._clock = method, limits, clock
        self._tolerances = tolerances
        self._known: OrderedDict[bytes, Evaluation] = OrderedDict()
        self._hand: _Hand | None = None
        self._is_feasible = True

    def start(self) -> tuple[State, Rows]:
        """Evaluate the start, moved into the bounds."""
        problem = self.solver.problem
        x = np.asarray(ravel(problem.start()), np.float64)
        inside = self._limits.clip(x)
        self._limits.check(inside)
        if np.any(inside != x):
            problem.restart(self._leaves(inside))
        state, evaluation = self.solver.init()
        assert evaluation is not None
        state, row = state, self._row(state, evaluation)
        if int(state.code):
            self.bad = row
            state, self.blame = self.solver.recover(state)
            return state, row
        rules = self._tolerances._replace(ftol=None, xtol=None)
        return state._replace(code=self._code(state, state, rules)), row

    def advance(self, state: State, limit: int) -> tuple[State, Rows]:
        """Let SciPy iterate: to its end, or once."""
        if self.visit is not None:
            return self._run(state, self.visit), Rows({})
        if self._hand is None:
            self._hand = _Hand(lambda visit: self._run(state, visit))
        found = self._hand.next()
        if found is not None:
            return found
        ended: State = self._hand.outcome
        return ended, Rows({})

    def escape(self, state: State) -> tuple[State, Rows]:
        """Leave a maximum or a saddle where no limit may be what holds the point."""
        if self._limits.are_any:
            return state, Rows({})
        lower = point_beside(self.solver.problem, state, products=False)
        if lower is None:
            self.solver.settle(state)
            return state, Rows({})
        self.close()
        leaves = self._leaves(np.asarray(lower, np.float64))
        state, evaluation = self.solver.begin(leaves, state)
        return state, self._row(state, evaluation)

    def finish(self, state: State) -> tuple[State, Rows]:
        """Put the variables to the last point."""
        self.solver.settle(state)
        return state, Rows({})

    @property
    def succeeded(self) -> bool:
        """Whether SciPy says so, and no limit is broken."""
        return self.verdict[0] and self._is_feasible

    def close(self) -> None:
        """Leave SciPy where it is."""
        if self._hand is not None:
            self._hand.close()
            self._hand = None

    def why(self, state: State) -> tuple[str, str] | None:
        """Return the status and the sentence of a run that SciPy ended."""
        if int(state.code) not in (code_of("scipy"), code_of("infeasible")):
            return None
        broken = self._limits.violation(np.asarray(state.x, np.float64))
        self._is_feasible = broken <= FEASIBLE
        said = f"SciPy ended: {self.verdict[1].rstrip('.')}."
        if broken > FEASIBLE:
            return "infeasible", f"{said} A limit is broken by {broken:.2g}."
        return "scipy", said

    def _run(self, state: State, visit: Callable[[State, Rows], bool]) -> State:
        """Let SciPy run until it ends, or until a visit ends it."""
        from scipy.optimize import minimize

        session = _Session(self, state, visit)
        method, second = self._method, self._method.second
        functions = {"hessp": session.hessp, "hess": session.hess}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the status of the run says it all
            try:
                found = minimize(
                    session.fun,
                    np.asarray(state.x, np.float64),
                    method=method.own_name,
                    jac=True if method.gradient else None,
                    bounds=self._limits.bounds_for_scipy(),
                    constraints=self._limits.for_scipy(),
                    callback=session.iteration,
                    options=dict(method.options),
                    **({second: functions[second]} if second else {}),
                )
            except _LeftError:
                return session.state
            except tf.errors.OpError:
                raise
            except Exception as error:
                if session.error is not None:
                    raise session.error from None
                found, self.verdict = None, (False, str(error))
        if found is not None:
            is_clean = not session.was_bad
            message = str(found.message)
            if session.was_bad:
                message = "f has no finite value at a point that it went on to"
            self.verdict = bool(found.success) and is_clean, message
            last = np.asarray(found.x, np.float64)
            if np.array_equal(last, session.x):
                return self._ended(session.state)
            session.finish(last)
        return self._ended(session.state)

    def _ended(self, state: State) -> State:
        return state._replace(code=tf.constant(code_of("scipy")))

    def moved(self, state: State, x: Array) -> tuple[State, Rows]:
        """Return the state at SciPy's point, the rules asked, and its row."""
        evaluation = self.at(x)
        new = state._replace(
            x=tf.constant(x, state.x.dtype),
            evaluation=evaluation._replace(aux={}, linear=()),
            step=state.step + 1,
        )
        row = self._row(new, evaluation)
        stands = np.array_equal(np.asarray(state.x), np.asarray(new.x))
        rules = self._tolerances
        if stands:  # as where a simplex turns about its best corner
            rules = rules._replace(ftol=None, xtol=None)
        new = new._replace(code=self._code(state, new, rules))
        if int(new.code) == code_of("nonfinite"):
            self.bad = row
            leaves = self._leaves(x)
            self.solver.problem.assign(leaves)
            self.solver.blamed = leaves, ()
            self.blame = blame(self.solver.problem, leaves)
            new = state._replace(code=new.code)
            return new, Rows({})
        return new, row

    def at(self, x: Array) -> Evaluation:
        """Return the evaluation at x; SciPy asks for the same points again."""
        key = x.tobytes()
        if key not in self._known:
            self._known[key] = self.solver.problem.at(self._vector(x))
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _code(self, old: State, new: State, rules: Tolerances) -> tf.Tensor:
        if self._limits.violation(np.asarray(new.x, np.float64)) > FEASIBLE:
            rules = Tolerances()  # no point to stop at
        elif self._limits.are_any:
            rules = rules._replace(gtol=None)  # limits hold the gradient up
        step = Step(
            fun=new.evaluation.value,
            grad_max=new.evaluation.grad_max,
            x=[new.x],
            expected=new.expected,
            first=new.first,
            before_fun=old.evaluation.value,
            before_x=[old.x],
            before_expected=old.expected,
            is_start=new.step == 0,
            tolerances=rules,
        )
        code: tf.Tensor = judge(step)
        return code

    def _row(self, state: State, evaluation: Evaluation) -> Rows:
        row = self.solver.row(state.x, evaluation)
        columns = {name: as_array(value)[None] for name, value in row.items()}
        columns = self.solver.named(columns)
        now = self._clock()
        return Rows({"step": np.array([int(state.step)]), **columns}).timed(now, now)

    def _vector(self, x: Array) -> tf.Tensor:
        return tf.constant(x, self.solver.problem.leaves[0].dtype)

    def _leaves(self, x: Array) -> list[tf.Tensor]:
        return unravel(self._vector(x), self.solver.problem.leaves)


class _Session:
    """What SciPy calls, and where it is.

    Attributes:
        state: Where the run is.
        x: The point of it, in float64.
        error: What a function of the user's raised.
        was_bad: Whether a point since the last iteration had no finite value.
    """

    def __init__(
        self, loop: SciPyLoop, state: State, visit: Callable[[State, Rows], bool]
    ) -> None:
        self.state, self.x = state, np.asarray(state.x, np.float64)
        self.error: BaseException | None = None
        self.was_bad = False
        self._loop, self._visit = loop, visit
        self._highest = self._lowest = float(state.evaluation.value)

    def fun(self, x: Array) -> Any:
        """Return value and gradient; a finite stand-in where f has none."""
        at = self._guarded(self._loop.at, np.array(x))
        value, grad = float(at.value), np.asarray(at.gradient, np.float64)
        self.state = self.state._replace(evaluations=self.state.evaluations + 1)
        is_bad = not np.isfinite(value) or not np.all(np.isfinite(grad))
        self.was_bad |= is_bad
        if np.isfinite(value):
            self._lowest = min(value, self._lowest)
            self._highest = max(value, self._highest)
        else:
            height = self._highest - self._lowest
            value = self._highest + BEYOND * max(height, abs(self._highest), 1e-300)
        if not self._loop._method.gradient:
            return value
        return value, np.where(np.isfinite(grad), grad, 0.0)

    def hessp(self, x: Array, v: Array) -> Array:
        """Return the Hessian times v."""
        problem, vector = self._loop.solver.problem, self._loop._vector
        product = self._guarded(problem.hvp, vector(x), vector(v))
        return np.asarray(product, np.float64)

    def hess(self, x: Array) -> Array:
        """Return the Hessian."""
        matrix = np.stack([self.hessp(x, unit) for unit in np.eye(len(x))], axis=1)
        return (matrix + matrix.T) / 2

    def iteration(self, x: Array, *_: Any) -> None:
        """Hand on a step; leave SciPy if the run has ended.

        Some methods iterate at points that have no value: they are no steps.
        """
        x = np.array(x, np.float64)
        if not np.isfinite(self._guarded(self._loop.at, x).value):
            return
        self.was_bad = False
        self.finish(x)

    def finish(self, x: Array) -> None:
        """Hand on where SciPy ended."""
        self.x = x
        self.state, rows = self._guarded(self._loop.moved, self.state, self.x)
        if not self._guarded(self._visit, self.state, rows):
            raise _LeftError

    def _guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; keep what it raises, which SciPy may swallow."""
        try:
            return function(*args)
        except BaseException as error:
            self.error = error
            raise


class _Hand:
    """A run in a thread, which is asked for one step at a time.

    Args:
        run: Takes a `visit`, returns the outcome.

    Attributes:
        outcome: What `run` returned.
    """

    def __init__(self, run: Callable[[Callable[..., bool]], Any]) -> None:
        self.outcome: Any = None
        self._run = run
        self._error: BaseException | None = None
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def next(self) -> Any:
        """Return the next step; None at the end.

        Raises:
            Exception: What the run raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._orders.put(True)
        step = self._steps.get()
        if self._error is not None:
            raise self._error
        return step

    def close(self) -> None:
        """Leave the run where it is."""
        if self._thread.is_alive():
            self._orders.put(False)

    def _work(self) -> None:
        try:
            self.outcome = self._run(self._visited)
        except BaseException as error:  # it is raised where the step was asked for
            self._error = error
        self._steps.put(None)

    def _visited(self, *step: Any) -> bool:
        self._steps.put(step)
        return self._orders.get()
