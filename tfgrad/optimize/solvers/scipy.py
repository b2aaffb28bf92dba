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

import functools
import queue
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.nested import ravel, unravel
from tfgrad.optimize.constraints import Array, Limits
from tfgrad.optimize.evaluator import Evaluation, measured
from tfgrad.optimize.history import Rows
from tfgrad.optimize.methods import bounded
from tfgrad.optimize.methods.protocol import Move
from tfgrad.optimize.methods.scipy import SciPyMethod
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.saddle import look_around
from tfgrad.optimize.solvers import Ruled, State, Visit
from tfgrad.optimize.solvers.pure import PureSolver
from tfgrad.optimize.stopping import Tolerances, code_of
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


class _Function:
    """A problem as SciPy asks for it: at vectors of float64, again and again."""

    def __init__(self, problem: Problem) -> None:
        self._problem, dtype = problem, problem.x.leaves[0].dtype

        @functools.lru_cache(KEPT)
        def known(x: bytes) -> Evaluation:
            return problem.at(tf.constant(np.frombuffer(x), dtype))

        self._known = known

    def at(self, x: Array) -> Evaluation:
        """Return the evaluation at x; SciPy asks for the same points again."""
        return self._known(np.asarray(x, np.float64).tobytes())

    def hvp(self, x: Array, v: Array) -> Array:
        """Return the Hessian times v."""
        product = self._problem.hvp(self.vector(x), self.vector(v))
        return np.asarray(product, np.float64)

    def vector(self, x: Array) -> tf.Tensor:
        """Return a point in the dtype of the problem."""
        return tf.constant(x, self._problem.x.leaves[0].dtype)

    def leaves(self, x: Array) -> list[tf.Tensor]:
        """Return the leaves of a point."""
        return unravel(self.vector(x), self._problem.x.leaves)


class SciPyLoop:
    """A run of one of SciPy's methods, from iteration to iteration; see `Loop`.

    Attributes:
        verdict: SciPy's own, no limit being broken: whether it succeeded, and its last
            words.
    """

    def __init__(
        self,
        problem: Problem,
        method: SciPyMethod,
        limits: Limits,
        tolerances: Tolerances,
        clock: Callable[[], float],
    ) -> None:
        self.solver = PureSolver(problem, _Still(), limits)
        self.bad: Rows | None = None
        self.blame = ""
        self.verdict = False, ""
        self._method, self._clock = method, clock
        self._limits, self._tolerances = limits, tolerances
        self._function = _Function(problem)
        self._hand: _Hand | None = None

    def start(self) -> tuple[State, Rows]:
        """Evaluate the start, moved into the bounds."""
        problem = self.solver.problem
        x = np.asarray(ravel(problem.x.start()), np.float64)
        inside = self._limits.clip(x)
        self._limits.check(inside)
        if np.any(inside != x):
            problem.x.restart(self._function.leaves(inside))
        state, evaluation = self.solver.init()
        row = self._row(state, evaluation)
        if int(state.code):
            self.bad = row
            state, self.blame = self.solver.recover(state)
            return state, row
        return state._replace(code=self._code(state, state)), row

    def advance(
        self, state: State, limit: int, visit: Visit | None = None
    ) -> tuple[State, Rows]:
        """Let SciPy iterate, and call `visit` after each iteration until the end.

        Without one, there is one iteration, and SciPy waits in a thread. `visit` says
        where it is to end: `limit` is not heeded.
        """
        if visit is not None:
            return self._run(state, visit), Rows({})
        if self._hand is None:
            self._hand = _Hand(lambda visit: self._run(state, visit))
        return self._hand.next()

    def escape(self, state: State) -> tuple[State, Rows]:
        """Leave a maximum or a saddle, unless a constraint may hold the point."""
        if self._limits.functions:
            return state, Rows({})
        # Its tolerances are SciPy's own: Newton's step may go beyond them.
        solver, scale = self.solver, self.solver.scale(state)
        look = look_around(
            solver.problem, state, scale,
            products=False, leaps=False, bounds=self._limits.bounds,
        )  # fmt: skip
        if look.lower is None:
            solver.settle(state)
            return state, Rows({})
        self.close()
        leaves = self._function.leaves(np.asarray(look.lower, np.float64))
        state, evaluation = self.solver.init(leaves, state)
        return state, self._row(state, evaluation)

    def finish(self, state: State) -> tuple[State, Rows]:
        """Put the variables to the last point."""
        self.solver.settle(state)
        return state, Rows({})

    @property
    def succeeded(self) -> bool:
        """Whether SciPy reports success, and no limit is broken."""
        return self.verdict[0]

    def close(self) -> None:
        """Leave SciPy where it is."""
        if self._hand is not None:
            self._hand.close()
            self._hand = None

    def why(self, state: State) -> tuple[str, str] | None:
        """Return the status and the sentence of a run that SciPy ended."""
        if int(state.code) not in (code_of("scipy"), code_of("infeasible")):
            return None
        said = f"SciPy ended: {self.verdict[1].rstrip('.')}."
        broken = self._violation(state)
        if broken > FEASIBLE:
            return "infeasible", f"{said} A limit is broken by {broken:.2g}."
        return "scipy", said

    def _run(self, state: State, visit: Visit) -> State:
        """Let SciPy run until it ends, or until a visit ends it."""
        from scipy.optimize import Bounds, minimize

        def moved(state: State, x: Array) -> tuple[State, bool]:
            state, rows = self._moved(state, x)
            return state, visit(state, rows)

        method, limits = self._method, self._limits
        bounds = limits.bounds and Bounds(*limits.bounds)
        session = _Session(self._function, state, moved, method.gradient)
        self.verdict = False, ""  # that of an earlier run is not of this one
        second = {"hessp": session.hessp, "hess": session.hess}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the status of the run says it all
            try:
                found = minimize(
                    session.fun if method.gradient else lambda x: session.fun(x)[0],
                    np.asarray(state.x, np.float64),
                    method=method.name,
                    jac=True if method.gradient else None,
                    bounds=bounds,
                    constraints=[each.for_scipy() for each in limits.functions],
                    callback=session.iteration,
                    options=dict(method.options),
                    **({method.second: second[method.second]} if method.second else {}),
                )
                session.end(np.asarray(found.x, np.float64))
            except _LeftError:
                return session.state
            except tf.errors.OpError:
                raise
            except Exception as error:
                if session.error is not None:
                    raise session.error from None
                self.verdict = False, str(error)
            else:
                self.verdict = bool(found.success), str(found.message)
                if session.doubts:
                    words = "f has no finite value at a point that it went on to"
                    self.verdict = False, words
                elif session.has_met:  # no word of convergence of such a run
                    self.verdict = self.verdict[0], "some points had no finite value"
        ended = session.state._replace(code=tf.constant(code_of("scipy")))
        if self._violation(ended) > FEASIBLE:
            self.verdict = False, self.verdict[1]
        return ended

    def _moved(self, state: State, x: Array) -> tuple[State, Rows]:
        """Return the state at SciPy's point, the rules asked, and its row."""
        evaluation = measured(self._function.at(x))
        new = state._replace(
            x=tf.constant(x, state.x.dtype),
            evaluation=evaluation._replace(aux={}, linear=()),
            step=state.step + 1,
        )
        row = self._row(new, evaluation)
        new = new._replace(code=self._code(state, new))
        if int(new.code) == code_of("nonfinite"):
            self.bad = row
            leaves = self._function.leaves(x)
            self.solver.problem.x.assign(leaves)
            self.solver.blamed = leaves, ()
            self.blame = blame(self.solver.problem, leaves)
            return state._replace(code=new.code), Rows({})
        return new, row

    def _code(self, old: State, new: State) -> tf.Tensor:
        """Ask the rules about an iteration, where no limit speaks against them."""
        rules = self._tolerances
        if new is old or np.array_equal(np.asarray(old.x), np.asarray(new.x)):
            # It stands, as where a simplex turns about its best corner.
            rules = rules._replace(ftol=None, xtol=None)
        if self._violation(new) > FEASIBLE:
            rules = Tolerances()  # no point to stop at
        elif self._limits.are_any:
            rules = rules._replace(gtol=None)  # at a limit the gradient need not vanish
        return Ruled(self.solver.stepper, rules).code(old, new)

    def _violation(self, state: State) -> float:
        return self._limits.violation(np.asarray(state.x, np.float64))

    def _row(self, state: State, evaluation: Evaluation) -> Rows:
        row = self.solver.stepper.row(state.x, evaluation)
        columns = {name: as_array(value)[None] for name, value in row.items()}
        columns = self.solver.named(columns)
        now = self._clock()
        return Rows({"step": np.array([int(state.step)]), **columns}).timed(now, now)


class _Session:
    """What SciPy calls, and where it is.

    Attributes:
        state: Where the run is.
        error: What a function of the user's raised.
        has_met: Whether some point had no finite value.
        doubts: Iterations until SciPy's word is believed again: after such a point, a
            search with gradients may end at a short step, which SciPy takes for
            convergence.
    """

    def __init__(
        self,
        function: _Function,
        state: State,
        moved: Callable[[State, Array], tuple[State, bool]],
        searches: bool,
    ) -> None:
        self._most_doubts = 2 if searches else 1
        self.state, self.has_met, self.doubts = state, False, 0
        self.error: BaseException | None = None
        self._function, self._moved = function, moved
        self._x = np.asarray(state.x, np.float64)
        self._lowest = self._highest = float(state.evaluation.value)

    def fun(self, x: Array) -> tuple[float, Array]:
        """Return value and gradient; a finite stand-in where f has none."""
        at = self._guarded(self._function.at, np.array(x))
        value, grad = float(at.value), np.asarray(at.gradient, np.float64)
        self.state = self.state._replace(evaluations=self.state.evaluations + 1)
        is_bad = not np.isfinite(value) or not np.all(np.isfinite(grad))
        if is_bad:
            self.has_met, self.doubts = True, self._most_doubts
        if np.isfinite(value):
            self._lowest = min(value, self._lowest)
            self._highest = max(value, self._highest)
        else:
            # Above all that was seen, it rises from the last iterate like a parabola: a
            # method that goes on to it in spite of its height, as SLSQP does after ten
            # trials, comes back.
            size = max(self._highest - self._lowest, abs(self._highest), 1e-300)
            value = self._highest + BEYOND * size
            way = np.asarray(x, np.float64) - self._x
            rise = value - float(self.state.evaluation.value)
            grad = 2 * rise * way / max(float(way @ way), 1e-300)
        return value, np.where(np.isfinite(grad), grad, 0.0)

    def hessp(self, x: Array, v: Array) -> Array:
        """Return the Hessian times v."""
        return np.asarray(self._guarded(self._function.hvp, x, v))

    def hess(self, x: Array) -> Array:
        """Return the Hessian."""
        matrix = np.stack([self.hessp(x, unit) for unit in np.eye(len(x))], axis=1)
        return (matrix + matrix.T) / 2

    def iteration(self, x: Array, *_: Any) -> None:
        """Hand on a step; leave SciPy if the run has ended.

        Some methods iterate at points that have no value: they are no steps.
        """
        x = np.array(x, np.float64)
        if not np.isfinite(float(self._guarded(self._function.at, x).value)):
            return
        self.doubts = max(self.doubts - 1, 0)
        self._hand_on(x)

    def _hand_on(self, x: Array) -> None:
        self._x = x
        self.state, goes_on = self._guarded(self._moved, self.state, x)
        if not goes_on:
            raise _LeftError

    def end(self, x: Array) -> None:
        """Hand on the last point, unless it was."""
        if not np.array_equal(x, self._x):
            self._hand_on(x)

    def _guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; keep what it raises, which SciPy may swallow."""
        try:
            return function(*args)
        except BaseException as error:
            self.error = error
            raise


class _Hand:
    """A run in a thread, which is asked for one step at a time."""

    def __init__(self, run: Callable[[Visit], State]) -> None:
        self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def visited(state: State, rows: Rows) -> bool:
            self._steps.put((state, rows))
            return self._orders.get()

        def work() -> None:
            try:
                self._steps.put((run(visited), Rows({})))
            except BaseException as error:  # to be raised where the step is asked for
                self._steps.put(error)

        self._thread = threading.Thread(target=work, daemon=True)

    def next(self) -> tuple[State, Rows]:
        """Return the next step, or the end; raise what the run raised."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._orders.put(True)
        step = self._steps.get()
        if isinstance(step, BaseException):
            raise step
        return step

    def close(self) -> None:
        """Leave the run where it is."""
        if self._thread.is_alive():
            self._orders.put(False)
