"""A pure method (`methods.protocol.Method`) at work on a problem of one vector."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.signatures import signature
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import either, ravel, unravel
from tfgrad.optimize.compiled import compiled, kept, shapes_of
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.evaluator import SMALL, Evaluation, flat
from tfgrad.optimize.methods.bounded import Bounds
from tfgrad.optimize.methods.convergence import at_precision
from tfgrad.optimize.methods.protocol import Bindable, Explained, Method, Move, Point
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.saddle import point_beside
from tfgrad.optimize.solvers import NO_XLA, Form, Solver, State
from tfgrad.optimize.stopping import RUNNING, code_of
from tfgrad.optimize.traced import blame, for_xla, operations, others, written

NOT_FOR_XLA = (
    "Random", "Multinomial", "PyFunc", "Conv", "Pool", "Assert", "CheckNumerics",
    "Unique",
)  # fmt: skip
"""Parts of op names: what XLA draws otherwise, drops, cannot compile, or runs slower on
a CPU."""

COMPILATION = 1.0, 2e-3
"""Seconds that it takes to compile a loop with XLA: in any case, and for each op of the
function. Measured on functions of 30 to 500 ops."""

SAVED = 2e-4, 1e-7
"""Seconds that an evaluation then takes less: in any case, and for each parameter."""


AT_ONCE = 20
"""The number of evaluations up to which XLA that would pay later begins at once."""

VECTOR = "x as a vector"
"""The column of points until their leaves have names."""


class Memory(NamedTuple):
    """What a pure method needs for the next step.

    Attributes:
        trial: Where to evaluate next, shape `[n]`.
        method: What the method has to remember.
    """

    trial: tf.Tensor
    method: Any


class Start(NamedTuple):
    """What a run begins from: an evaluated point, and what was counted before it."""

    x: tf.Tensor
    evaluation: Evaluation
    first: tf.Tensor
    step: tf.Tensor
    evaluations: tf.Tensor

    @classmethod
    def at(
        cls, x: tf.Tensor, evaluation: Evaluation, before: State | None = None
    ) -> Start:
        """Return the start at a point, after the run until there, if there was one."""
        return cls(
            x,
            evaluation._replace(aux={}),
            evaluation.value if before is None else before.first,
            tf.constant(0) if before is None else before.step + 1,
            tf.constant(1) if before is None else before.evaluations + 1,
        )


class PureSolver(Solver):
    """Evaluate the trial, ask the method what to make of it.

    Args:
        problem: What to minimise.
        method: How.
        limits: Bounds of x, for a method that has `within(bounds)`; None for none.

    Raises:
        InvalidArgumentError: If the leaves of the point have several dtypes.
    """

    lag = 1

    def __init__(
        self, problem: Problem, method: Method, limits: Limits | None = None
    ) -> None:
        """Find the variables; move the start into the bounds; evaluate nothing."""
        self.name = method.name
        self.problem = problem
        problem.find()
        self._like = problem.leaves
        self._limits = limits if limits is not None and limits.are_any else None
        _check_unconstrained(self.name, problem, self._limits)
        if self._limits is not None:
            within: Any = method
            method = within.within((self._limits.lower, self._limits.upper))
        dtypes = {leaf.dtype.name for leaf in self._like}
        if len(dtypes) > 1:
            raise InvalidArgumentError(
                f"`{self.name}` works on one vector of one dtype.",
                got=f"leaves of {' and '.join(sorted(dtypes))}",
                hint="cast them to one dtype, or a Keras optimizer such as 'adam'",
            )
        self._given = self._method = method
        self.failure = code_of(getattr(method, "failure", "linesearch"))
        self._others: list[Any] = []
        self.blamed: tuple[list[tf.Tensor], tuple[Any, ...]] = [], ()

    @property
    def knows_solutions(self) -> bool:
        """Whether the method says itself where a solution is."""
        return _knows_solutions(self._method)

    def kept(self) -> tuple[Any, Any]:
        """Return where updates are kept: with the function if they depend on it."""
        settings = getattr(self._given, "settings", None)
        key = self._given if settings is None else (type(self._given), settings)
        is_bound = self._method is not self._given
        return (self.problem.evaluator.kept if is_bound else None), key

    def kept_with_f(self) -> tuple[Any, Any]:
        """Return where compiled loops are kept: with the function."""
        return self.problem.evaluator.kept, (self.kept()[1], signature(self._like))

    def init(self) -> tuple[State, Evaluation | None]:
        """Evaluate the start, and ask where to look next."""
        start = self.problem.start()
        if self._limits is not None:
            x = ravel(start)
            start = unravel(self._box(x).clip(x), self._like)
        return self.begin(start)

    def begin(self, x: list[tf.Tensor], before: State | None = None) -> Any:
        """Evaluate a point and let the method begin there.

        Args:
            x: The leaves of the point.
            before: The run until there.
        """
        evaluation = flat(self.problem.evaluate(x))
        if isinstance(self._given, Bindable):
            self._method = self._given.bind(self.problem)
        start = Start.at(ravel(x), evaluation, before)
        self._watch()
        if not tf.executing_eagerly():  # it is part of another trace
            return self.begun(start), evaluation
        place, key = self.kept()
        key = "start", key, shapes_of(start)
        begun = kept(place, key, lambda: compiled(self.begun, start))
        return begun(*tf.nest.flatten(start)), evaluation

    def begun(self, start: Start) -> State:
        """Return where a run begins: the method's first move is part of it."""
        x, evaluation = start.x, start.evaluation
        move = self._method.init(_point(x, evaluation))
        value = evaluation.value
        is_bad = ~(tf.math.is_finite(value) & tf.math.is_finite(evaluation.grad_max))
        return State(
            x,
            _carried(self._projected(x, evaluation)),
            Memory(move.x, tf.nest.map_structure(tf.convert_to_tensor, move.state)),
            tf.constant(True),
            tf.where(is_bad, code_of("nonfinite"), RUNNING),
            start.step,
            start.evaluations,
            _expected(move, evaluation),
            start.first,
        )

    def query(self, state: State) -> Any:
        """Return the trial."""
        return state.memory.trial

    def evaluate(self, query: Any) -> Evaluation:
        """Return the function at the trial."""
        return self.problem.at(query)

    def row(self, x: Any, evaluation: Evaluation) -> dict[str, Any]:
        """Return value, gradient and aux values, and the point while it is small."""
        row = {"fun": evaluation.value, "grad_max": evaluation.grad_max}
        if x is not None and x.shape[0] <= SMALL:
            row[VECTOR] = x
        return {**row, **evaluation.aux}

    def named(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns with the leaves of the points."""
        if VECTOR not in columns:
            return columns
        shapes: list[Any] = [tuple(leaf.shape) for leaf in self._like]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(columns[VECTOR], ends, axis=1)
        pairs = zip(parts, shapes, strict=True)
        leaves = [part.reshape(len(part), *shape) for part, shape in pairs]
        rest = {name: c for name, c in columns.items() if name != VECTOR}
        return {**rest, **self.problem.named(leaves)}

    def accept(self, state: State, evaluation: Evaluation) -> State:
        """Let the method decide on the trial."""
        trial, remembered = state.memory
        old = _point(state.x, state.evaluation)
        move = self._method.update(_point(trial, evaluation), old, remembered)
        evaluation = self._projected(trial, evaluation)
        value = evaluation.value
        is_finite = tf.math.is_finite(value) & tf.math.is_finite(evaluation.grad_max)
        accepted = tf.convert_to_tensor(move.accepted)
        taken = accepted & is_finite
        here = either(taken, (trial, _carried(evaluation)), (state.x, state.evaluation))
        expected = _expected(move, here[1])
        told = _told(move.expected, value.dtype)
        is_hidden = at_precision(here[1].value, told, state.first)
        failure = tf.where(is_hidden, code_of("converged"), self.failure)
        code = tf.where(move.failed, failure, RUNNING)
        is_bad = accepted & ~is_finite
        return State(
            here[0],
            here[1],
            # A point that is not finite is kept: what made it so will be asked.
            Memory(tf.where(is_bad, trial, move.x), move.state),
            accepted,
            tf.where(is_bad, code_of("nonfinite"), code),
            state.step + tf.cast(taken, tf.int32),
            state.evaluations + 1,
            tf.where(accepted, expected, state.expected),
            state.first,
        )

    def way(self, old: State, new: State) -> tuple[list[Any], list[Any]]:
        """Return the current point and the one before."""
        return [new.x], [old.x]

    def settle(self, state: State) -> None:
        """Put the user's variables to the current point."""
        if self.problem.variables:
            self.problem.assign(self.point(state))

    def recover(self, state: State) -> tuple[State, str]:
        """Ask what made the trial not finite, or the start; see to the variables."""
        is_start = not np.isfinite(state.evaluation.grad_max)
        trial = unravel(state.x if is_start else state.memory.trial, self._like)
        self.blamed = trial, ()
        found = blame(self.problem, trial)
        self.settle(state)
        return state, found

    def escape(self, state: State) -> tuple[State, Evaluation | None]:
        """Begin anew at a lower point beside a maximum or a saddle, if this is one."""
        is_bound = self._method is not self._given
        lower = None
        if self._limits is None:  # beside them, a lower point may be forbidden
            lower = point_beside(self.problem, state, products=is_bound)
        self.settle(state)
        if lower is None:
            return state, None
        found: tuple[State, Evaluation] = self.begin(unravel(lower, self._like), state)
        return found

    def refresh(self, state: State) -> State:
        """Begin anew where the variables are if one that f reads was changed."""
        if self._is_as_it_was(state):
            return state
        variables = self.problem.variables
        x = self.problem.start() if variables else self.point(state)
        fresh, _ = self.begin(x, state)
        return fresh._replace(step=state.step)

    def point(self, state: State) -> list[tf.Tensor]:
        """Return the leaves of the current point."""
        return unravel(state.x, self._like)

    def gradient(self, evaluation: Evaluation) -> list[tf.Tensor]:
        """Return the leaves of the gradient."""
        return unravel(evaluation.gradient, self._like)

    def variables(self) -> list[tf.Variable]:
        """Return what else f reads: seeds, averages."""
        return others(self.problem)

    def why(self, state: State) -> tuple[str, str] | None:
        """Return what the method says about its memory."""
        method: Any = self._method
        has_failed = int(state.code) in (self.failure, code_of("converged"))
        is_own = has_failed and _knows_solutions(method)
        return method.why(state.memory.method) if is_own else None

    def form(self, state: State, planned: int, jit: bool | str) -> Form:
        """Return XLA from the evaluation on at which it pays."""
        is_kept_from = self.problem.evaluator.kept.get(NO_XLA) and jit == "auto"
        if is_kept_from or self.problem.source is not None:
            return Form("calls")
        types = operations(self.problem)
        if not types or jit is False:  # it runs eagerly, or shall
            return Form("calls")
        if jit is True:
            return Form("xla")
        if any(part in op for op in types for part in NOT_FOR_XLA):
            return Form("calls")
        size = sum(leaf.shape.num_elements() for leaf in self._like)
        once = COMPILATION[0] + COMPILATION[1] * len(types)
        pays = int(once / (SAVED[0] + SAVED[1] * size))
        pays = 0 if pays < AT_ONCE else pays
        return Form("xla") if int(state.evaluations) >= pays else Form("calls", pays)

    def for_xla(self) -> Solver | None:
        """Return the solver in a form that XLA compiles once; None if there is none."""
        problem = for_xla(self.problem, is_bound=self._method is not self._given)
        if problem is None or problem is self.problem:
            return self if problem is not None else None
        solver = PureSolver(problem, self._given)
        solver._limits = self._limits
        if isinstance(self._given, Bindable):
            solver._method = self._given.bind(problem)
        return solver

    def _projected(self, x: tf.Tensor, evaluation: Evaluation) -> Evaluation:
        """Return the evaluation with the slope of what no bound holds."""
        if self._limits is None:
            return evaluation
        free = self._box(x).reduced(_point(x, evaluation))
        return evaluation._replace(grad_max=free.grad_max)

    def _box(self, x: tf.Tensor) -> Bounds:
        assert self._limits is not None
        return Bounds(*(tf.cast(b, x.dtype) for b in self._limits.sides))

    def _watch(self) -> None:
        """Remember the variables that f reads and does not write, as they are."""
        own = {id(variable) for variable in written(self.problem)}
        rest = [v for v in others(self.problem) if id(v) not in own]
        self._others = [(variable, variable.read_value()) for variable in rest]

    def _is_as_it_was(self, state: State) -> bool:
        """Return whether those, and the variables that are moved, are as they were."""
        moved = zip(self.problem.variables, self.point(state), strict=False)
        pairs = [*moved, *self._others]
        return all(bool(tf.reduce_all(v.read_value() == value)) for v, value in pairs)


def _knows_solutions(method: Method) -> bool:
    is_told = isinstance(method, Explained)
    return is_told and getattr(method, "knows_solutions", True)


def _check_unconstrained(name: str, problem: Problem, limits: Limits | None) -> None:
    """Refuse variables with a constraint that neither method nor bounds heed."""
    end = 0
    for owner, leaf in zip(problem.owners, problem.leaves, strict=False):
        start, end = end, end + (leaf.shape.num_elements() or 0)
        constraint = getattr(owner, "constraint", None)
        if constraint is None:
            continue
        kind = getattr(constraint, "__name__", type(constraint).__name__)
        is_sign = kind.lower() in ("nonneg", "non_neg", "nonnegative")
        if is_sign and limits is not None and np.all(limits.lower[start:end] >= 0):
            continue
        bounds = "bounds=(0, None)" if is_sign else "a variable without it"
        raise InvalidArgumentError(
            f"`{name}` does not apply the constraint of a variable.",
            got=f"{owner.name!r} with the constraint {kind}",
            hint=f'{bounds}, or an optimizer of Keras such as method="adam"',
        )


def _point(x: tf.Tensor, evaluation: Evaluation) -> Point:
    """Return what the method sees of an evaluation."""
    linear = getattr(evaluation.linear, "matrix", ())
    value = tf.cast(evaluation.value, x.dtype)
    return Point(x, value, evaluation.gradient, linear)


def _expected(move: Move, evaluation: Evaluation) -> tf.Tensor:
    """Return the fall that a rule may believe in: 0 where the gradient vanishes."""
    dtype = evaluation.value.dtype
    expected = _told(move.expected, dtype)
    return tf.where(evaluation.grad_max == 0, tf.zeros([], dtype), expected)


def _carried(evaluation: Evaluation) -> Evaluation:
    return evaluation._replace(aux={}, linear=())


def _told(expected: Any, dtype: tf.DType) -> tf.Tensor:
    """Return the expected fall; the dtype's largest number if it is not told."""
    if isinstance(expected, float) and not expected < float(dtype.max):
        return tf.constant(dtype.max, dtype)
    return tf.minimum(tf.cast(expected, dtype), dtype.max)
