"""A pure method (`methods.protocol.Method`) at work on a problem of one vector."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.signatures import signature
from tfgrad.diagnosis.graphs import DRAWS, has
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import either, ravel, unravel
from tfgrad.optimize.compiled import compiled, kept, shapes_of
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.evaluator import SMALL, Evaluation, measured
from tfgrad.optimize.history import split
from tfgrad.optimize.methods.bounded import Bounds
from tfgrad.optimize.methods.convergence import at_precision
from tfgrad.optimize.methods.protocol import Method, Point
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.saddle import look_around, scale_of
from tfgrad.optimize.solvers import NO_XLA, Form, Forms, Solver, State, Stepper
from tfgrad.optimize.stopping import RUNNING, code_of
from tfgrad.optimize.traced import blame, for_xla, operations, others, written

NOT_FOR_XLA = (
    *DRAWS, "PyFunc", "Conv", "Pool", "Assert", "CheckNumerics", "Unique",
)  # fmt: skip
"""Parts of the names of ops that XLA computes with other random numbers, drops, cannot
compile, or runs slower on a CPU."""

COMPILATION = 1.0, 2e-3
"""Seconds that it takes to compile a loop with XLA: in any case, and for each op of the
function. Measured on functions of 30 to 500 ops."""

SAVED = 2e-4, 1e-7
"""Seconds that an evaluation then takes less: in any case, and for each parameter."""


AT_ONCE = 20
"""The number of evaluations up to which XLA that would pay later begins at once."""

MOST_LEAPS = 2
"""How often a method goes on from Newton's step, or another, beside where it ended."""

VECTOR = "x as a vector"
"""The column of points until their leaves have names."""


class Memory(NamedTuple):
    """What a pure method needs for the next step.

    Attributes:
        trial: Where to evaluate next, shape `[n]`.
        method: What the method has to remember.
        bounds: Of x, a lower and an upper tensor: here, and not constants of what is
            compiled, so that it serves other bounds, too. Empty if there are none.
    """

    trial: tf.Tensor
    method: Any
    bounds: Any = ()


class Start(NamedTuple):
    """What a run begins from: an evaluated point, and what was counted before it."""

    x: tf.Tensor
    evaluation: Evaluation
    first: tf.Tensor
    step: tf.Tensor
    evaluations: tf.Tensor
    bounds: Any = ()

    @classmethod
    def at(
        cls,
        x: tf.Tensor,
        evaluation: Evaluation,
        before: State | None = None,
        bounds: Any = (),
    ) -> Start:
        """Return the start at a point, after the run until there, if there was one."""
        return cls(
            x,
            seen(evaluation)._replace(aux={}),
            evaluation.value if before is None else before.first,
            tf.constant(0) if before is None else before.step + 1,
            tf.constant(1) if before is None else before.evaluations + 1,
            bounds,
        )


class PureStepper(Stepper):
    """Evaluate the trial, ask the method what to make of it.

    Args:
        problem: What to minimise.
        method: How.
        bounds: Of x, a lower and an upper array, for a method that has
            `within(bounds)`; None for none.

    Attributes:
        kind: The method without bounds: those are with the state, for what is compiled.
        given: The method within its bounds.
        method: The same, bound to the problem if it asks for that.
        failure: The code of a run in which the method failed.
    """

    lookahead = 1

    def __init__(self, problem: Problem, method: Method, bounds: Any = None) -> None:
        self.problem, self.bounds, self.kind = problem, bounds, method
        if bounds is not None:
            within: Any = method
            method = within.within(bounds)
        self.given = self.method = method
        self.failure = code_of(getattr(method, "failure", "linesearch"))
        # Its class has to say so itself: what inherits from that may not be.
        says = vars(type(method)).get("is_one_kernel", False)
        self.is_one_kernel = says and not self.is_bound

    @property
    def knows_solutions(self) -> bool:
        """Whether the method says itself where a solution is."""
        is_told = hasattr(self.method, "why")  # it is `Explained`
        return is_told and getattr(self.method, "knows_solutions", True)

    @property
    def is_bound(self) -> bool:
        """Whether the method depends on the problem."""
        return self.method is not self.given

    def start(
        self, x: list[tf.Tensor], before: State | None = None
    ) -> tuple[Start, Evaluation]:
        """Evaluate a point, and let the method see the problem."""
        vector = ravel(x)
        evaluation = self.problem.at(vector)
        if hasattr(self.given, "bind"):  # it is `Bindable`
            self.method = self.given.bind(self.problem)
        bounds = Bounds.of(self.bounds, vector) or ()
        return Start.at(vector, evaluation, before, bounds), evaluation

    def begun(self, start: Start) -> State:
        """Return where a run begins: the method's first move is part of it."""
        x, evaluation, bounds = start.x, measured(start.evaluation), start.bounds
        move = _within(bounds, self.method).init(_point(x, evaluation))
        evaluation = self._projected(x, evaluation, bounds)
        value = evaluation.value
        is_bad = ~(tf.math.is_finite(value) & tf.math.is_finite(evaluation.grad_max))
        return State(
            x,
            _carried(evaluation),
            Memory(
                move.x,
                tf.nest.map_structure(tf.convert_to_tensor, move.state),
                bounds,
            ),
            tf.constant(True),
            either(is_bad, code_of("nonfinite"), RUNNING),
            start.step,
            start.evaluations,
            _expected(_told(move.expected, value.dtype), evaluation),
            start.first,
        )

    def query(self, state: State) -> Any:
        """Return the trial."""
        return state.memory.trial

    def evaluate(self, query: Any) -> Evaluation:
        """Return the function at the trial."""
        return seen(self.problem.at(query))

    def row(self, x: Any, evaluation: Evaluation) -> dict[str, Any]:
        """Return value, gradient and aux values, and the point while it is small."""
        row = {"fun": evaluation.value, "grad_max": evaluation.grad_max}
        place = {} if x is None else self.place(x)
        return {**row, **place, **evaluation.aux}

    def place(self, query: Any) -> dict[str, Any]:
        """Return the point while it is small."""
        return {VECTOR: query} if query.shape[0] <= SMALL else {}

    def of_any_size(self, state: Any, evaluation: Any) -> tuple[Any, Any]:
        """Return the specs for any number of parameters, if the method says how."""
        of_any_size = getattr(self.given, "of_any_size", None)
        if of_any_size is None or self.bounds is not None or self.is_bound:
            return state, evaluation
        vector: Any = tf.TensorSpec([None], state.x.dtype)
        carried = state.evaluation._replace(gradient=vector)
        memory = Memory(vector, of_any_size(state.memory.method))
        state = state._replace(x=vector, evaluation=carried, memory=memory)
        return state, evaluation._replace(gradient=vector)

    def accept(self, state: State, evaluation: Evaluation) -> State:
        """Let the method decide on the trial."""
        trial, remembered, bounds = state.memory
        old = _point(state.x, state.evaluation)
        method = _within(bounds, self.method)
        move = method.update(_point(trial, evaluation), old, remembered)
        evaluation = self._projected(trial, evaluation, bounds)
        value = evaluation.value
        is_finite = tf.math.is_finite(value) & tf.math.is_finite(evaluation.grad_max)
        accepted = tf.convert_to_tensor(move.accepted)
        taken = accepted & is_finite
        here = either(taken, (trial, _carried(evaluation)), (state.x, state.evaluation))
        told = _told(move.expected, value.dtype)
        is_hidden = at_precision(here[1].value, told, state.first)
        code = either(is_hidden, code_of("converged"), self.failure)
        code = either(move.failed, code, RUNNING)
        is_bad = accepted & ~is_finite
        return State(
            here[0],
            here[1],
            # A point that is not finite is kept, so that the cause can be looked for.
            Memory(either(is_bad, trial, move.x), move.state, bounds),
            accepted,
            either(is_bad, code_of("nonfinite"), code),
            state.step + tf.cast(taken, tf.int32),
            state.evaluations + 1,
            either(accepted, _expected(told, here[1]), state.expected),
            state.first,
        )

    def way(self, old: State, new: State) -> tuple[list[Any], list[Any]]:
        """Return the current point and the one before."""
        return [new.x], [old.x]

    def for_xla(self) -> Stepper | None:
        """Return it in a form that XLA compiles once; None if there is none."""
        problem = for_xla(self.problem, is_bound=self.is_bound)
        if problem is None or problem is self.problem:
            return self if problem is not None else None
        stepper = copy.copy(self)
        stepper.problem = problem
        if hasattr(self.given, "bind"):
            stepper.method = self.given.bind(problem)
        return stepper

    def clip(self, x: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the leaves of a point moved into the bounds."""
        if self.bounds is None:
            return x
        vector = ravel(x)
        bounds: Any = Bounds.of(self.bounds, vector)
        return unravel(bounds.clip(vector), x)

    def _projected(
        self, x: tf.Tensor, evaluation: Evaluation, bounds: Any
    ) -> Evaluation:
        """Return the evaluation with the slope of what no bound holds."""
        box = Bounds.of(bounds or self.bounds, x)
        if box is None:
            return evaluation
        free = box.reduced(_point(x, evaluation))
        return evaluation._replace(grad_max=free.grad_max)


def _within(bounds: Any, method: Any) -> Any:
    """Return a method within the bounds that a state brings, or its own ones."""
    return method.within(bounds) if bounds else method


class PureForms(Forms):
    """Calls at first; XLA from the evaluation on at which it pays."""

    def __init__(self, stepper: PureStepper) -> None:
        self._stepper, self._problem = stepper, stepper.problem

    def form(self, state: State, planned: int, jit: bool | str) -> Form:
        """Return XLA from the evaluation on at which it pays."""
        problem = self._problem
        is_refused = problem.evaluator.kept.get(NO_XLA) and jit == "auto"
        if is_refused or problem.source is not None:
            return Form("calls")
        types = operations(problem)
        if not types or jit is False:  # it runs eagerly, or shall
            return Form("calls")
        if jit is True:
            return Form("xla")
        if has(types, NOT_FOR_XLA):
            return Form("calls")
        size = sum(leaf.shape.num_elements() for leaf in problem.x.leaves)
        once = COMPILATION[0] + COMPILATION[1] * len(types)
        pays = int(once / (SAVED[0] + SAVED[1] * size))
        pays = 0 if pays < AT_ONCE else pays
        return Form("xla") if int(state.evaluations) >= pays else Form("calls", pays)

    def kept(self) -> tuple[Any, Any]:
        """Return where updates are kept: with the function if they depend on it."""
        kind = self._stepper.kind
        settings = getattr(kind, "settings", None)
        key = kind if settings is None else (type(kind), settings)
        place = self._problem.evaluator.kept if self._stepper.is_bound else None
        return place, key

    def kept_with_f(self) -> tuple[Any, Any]:
        """Return where compiled loops are kept: with the function."""
        key = self.kept()[1], signature(self._problem.x.template)
        return self._problem.evaluator.kept, key


class PureSolver(Solver):
    """A pure method at work on a problem.

    Args:
        problem: What to minimise.
        method: How.
        limits: Bounds of x, for a method that has `within(bounds)`; None for none.

    Attributes:
        blamed: The leaves of a point that was not finite, and what f took besides.

    Raises:
        InvalidArgumentError: If the leaves of the point have several dtypes, or one of
            the variables a constraint.
    """

    def __init__(
        self, problem: Problem, method: Method, limits: Limits | None = None
    ) -> None:
        self.problem = problem
        problem.find()
        self._like = problem.x.leaves
        _check_unconstrained(method.name, problem, limits)
        dtypes = {leaf.dtype.name for leaf in self._like}
        if len(dtypes) > 1:
            raise InvalidArgumentError(
                f"`{method.name}` works on one vector of one dtype.",
                got=f"leaves of {' and '.join(sorted(dtypes))}",
                hint="cast them to one dtype, or a Keras optimizer such as 'adam'",
            )
        self.stepper = PureStepper(problem, method, limits and limits.bounds)
        self.forms = PureForms(self.stepper)
        self._others: list[Any] = []
        self._start, self._leaps = tf.zeros([0]), 0
        self.blamed: tuple[list[tf.Tensor], tuple[Any, ...]] = [], ()

    def init(
        self, x: list[tf.Tensor] | None = None, before: State | None = None
    ) -> tuple[State, Evaluation]:
        """Evaluate a point, the start moved into the bounds; let the method begin.

        Args:
            x: The leaves of a point to begin anew at; None for the problem's start.
            before: The run until there.
        """
        if x is None:
            x = self.stepper.clip(self.problem.x.start())
        start, evaluation = self.stepper.start(x, before)
        self._start = start.x if before is None else self._start
        # The variables that f reads and does not write, as they are.
        own = {id(variable) for variable in written(self.problem)}
        rest = [v for v in others(self.problem) if id(v) not in own]
        self._others = [(variable, variable.read_value()) for variable in rest]
        place, key = self.forms.kept()
        key = "start", key, shapes_of(start)

        def begin(start: Start) -> tuple[State, tf.Tensor]:
            start = start._replace(evaluation=measured(start.evaluation))
            return self.stepper.begun(start), start.evaluation.grad_max

        def make() -> Any:
            return compiled(begin, start, in_sequence=place is None)

        state, grad_max = kept(place, key, make)(*tf.nest.flatten(start))
        return state, evaluation._replace(grad_max=grad_max)

    def point(self, state: State) -> list[tf.Tensor]:
        """Return the leaves of the current point."""
        return unravel(state.x, self._like)

    def gradient(self, evaluation: Evaluation) -> list[tf.Tensor]:
        """Return the leaves of the gradient."""
        return unravel(evaluation.gradient, self._like)

    def variables(self) -> list[tf.Variable]:
        """Return what else f reads: seeds, averages."""
        return others(self.problem)

    def named(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns with the leaves of the points."""
        if VECTOR not in columns:
            return columns
        leaves = split(columns[VECTOR], self._like)
        rest = {name: c for name, c in columns.items() if name != VECTOR}
        return {**rest, **self.problem.x.named(leaves)}

    def settle(self, state: State) -> None:
        """Put the user's variables to the current point."""
        if self.problem.x.variables:
            self.problem.x.assign(self.point(state))

    def refresh(self, state: State) -> State:
        """Begin anew where the variables are if one that f reads was changed."""
        variables = self.problem.x.variables
        moved = zip(variables, self.point(state), strict=False)
        pairs = [*moved, *self._others]
        if all(bool(tf.reduce_all(v.read_value() == value)) for v, value in pairs):
            return state
        x = self.problem.x.start() if variables else self.point(state)
        fresh, _ = self.init(x, state)
        return fresh._replace(step=state.step)

    def recover(self, state: State) -> tuple[State, str]:
        """Find what made the trial, or the start, not finite; restore the variables."""
        is_start = not np.isfinite(state.evaluation.grad_max)
        trial = unravel(state.x if is_start else state.memory.trial, self._like)
        self.blamed = trial, ()
        found = blame(self.problem, trial)
        self.settle(state)
        return state, found

    def escape(self, state: State) -> tuple[State, Evaluation | None]:
        """Begin anew at a lower point beside the current one, if there is one.

        Where a search has failed, second derivatives may certify a minimum.
        """
        # A rule of the user's, such as gtol, means what it says.
        is_own = int(state.code) in (self.stepper.failure, code_of("converged"))
        leaps = is_own and not self.stepper.knows_solutions and self._leaps < MOST_LEAPS
        products = self.stepper.is_bound
        look = look_around(
            self.problem,
            state,
            self.scale(state),
            products=products,
            leaps=leaps,
            bounds=self.stepper.bounds,
        )
        self.settle(state)
        if look.is_minimum:
            state = state._replace(code=tf.constant(code_of("converged")))
        if look.lower is None:
            return state, None
        self._leaps += not look.is_near
        begun, evaluation = self.init(unravel(look.lower, self._like), state)
        return begun._replace(code=state.code) if look.is_near else begun, evaluation

    def scale(self, state: State) -> float:
        """Return how long a step of the size of x is."""
        x, start = (np.asarray(v, np.float64)[None] for v in (state.x, self._start))
        return float(scale_of(x, start)[0])

    def why(self, state: State) -> tuple[str, str] | None:
        """Return what the method says about its memory."""
        has_failed = int(state.code) in (self.stepper.failure, code_of("converged"))
        if not (has_failed and self.stepper.knows_solutions):
            return None
        method: Any = self.stepper.method
        said: tuple[str, str] | None = method.why(state.memory.method)
        return said


def _check_unconstrained(name: str, problem: Problem, limits: Limits | None) -> None:
    """Refuse variables with a constraint that neither method nor bounds heed."""
    end = 0
    for owner, leaf in zip(problem.x.owners, problem.x.leaves, strict=False):
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


def seen(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation with the matrix of its linear model in place of that.

    A method sees no more, so what is compiled for it serves any number of residuals.
    """
    matrix = getattr(evaluation.linear, "matrix", None)
    return evaluation if matrix is None else evaluation._replace(linear=matrix)


def _point(x: tf.Tensor, evaluation: Evaluation) -> Point:
    """Return what a method sees of a point, of an evaluation that is `seen`."""
    value = tf.cast(evaluation.value, x.dtype)
    return Point(x, value, evaluation.gradient, evaluation.linear)


def _expected(told: tf.Tensor, evaluation: Evaluation) -> tf.Tensor:
    """Return the expected fall for the rules: 0 where the gradient vanishes."""
    expected: tf.Tensor = either(evaluation.grad_max == 0, tf.zeros_like(told), told)
    return expected


def _carried(evaluation: Evaluation) -> Evaluation:
    return evaluation._replace(aux={}, linear=())


def _told(expected: Any, dtype: tf.DType) -> tf.Tensor:
    """Return the expected fall; the dtype's largest number if it is not told."""
    if isinstance(expected, float) and not expected < float(dtype.max):
        return tf.constant(dtype.max, dtype)
    return tf.minimum(tf.cast(expected, dtype), dtype.max)
