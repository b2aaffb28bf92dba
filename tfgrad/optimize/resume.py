"""A run saved after some steps, and how another run continues it.

A run goes on with a problem of the same structure and shapes whose function has the
same value at the saved point, and with methods of the same names.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.graphs import draws
from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, named_leaves, unravel
from tfgrad.optimize.chain import Chain, check_tells
from tfgrad.optimize.chunks import is_large, released
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.data import SIZE
from tfgrad.optimize.evaluator import is_open
from tfgrad.optimize.history import History, Rows
from tfgrad.optimize.methods.levenberg_marquardt import LevenbergMarquardt
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.options import Options
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.result import OptimizeResult
from tfgrad.optimize.solvers import State
from tfgrad.optimize.stopping import RUNNING, rule_of
from tfgrad.optimize.traced import operations, written
from tfgrad.runs.values import as_array

UNFINISHED = frozenset({None, "interrupted", "stopped"})
"""The statuses of a run that has not come to its end."""


FEW = 6
"""Elements of a point whose bounds an error writes out."""


class Identity(NamedTuple):
    """What has to be the same where a run goes on: leaves and bounds are described.

    What is `()` is not known, and may be anything.
    """

    x: tuple[str, ...]
    has_aux: bool
    methods: tuple[str, ...]
    bounds: Any = ()


class Outcome(NamedTuple):
    """The outcome of a run: the value, the leaves of x, and those of the gradient."""

    fun: Any
    x: Sequence[tf.Tensor]
    grad: Sequence[tf.Tensor]


@dataclass(frozen=True)
class Saved:
    """A run after some steps; what is not told here is as of its result.

    Attributes:
        limits: How far it was to go, see `limits_of`.
        state: Where the solver was, without batches.
        position: With data, the epochs that were over, and the batches since.
        variables: The values of the solver's variables.
        chain: Where the chain of methods was, without them.
        status: Why it ended; None while it goes on.
        directory: The name of the directory in which it was logged.
        outcome: What came out; None while the run goes on.
        options: How to call it again; None if that does not go on with it.
    """

    identity: Identity
    limits: list[Any]
    state: State
    position: tuple[int, int]
    variables: Sequence[tf.Tensor]
    chain: Chain
    history: History
    epochs: History
    seconds: float
    status: str | None = None
    message: str = ""
    success: bool = False
    nit: int = 0
    nfev: int = 0
    directory: str | None = None
    outcome: Outcome | None = None
    options: Options | None = field(default=None, compare=False)

    @property
    def has_ended(self) -> bool:
        """Whether the run came to an end of its own."""
        return self.status not in UNFINISHED


def identity_of(run: Minimisation) -> Identity:
    """Return what has to be the same where the run goes on."""
    problem, template = run.problem, run.problem.x.template
    leaves = [] if is_open(template) else named_leaves(template, "x")
    points = tuple(f"{name} of {_shape(leaf)}" for name, leaf in leaves)
    methods = tuple(stage.name for stage in run.chain.stages)
    bounds = () if is_open(template) else _box(problem, run.options.bounds)
    return Identity(points, problem.options["has_aux"], methods, bounds)


def _box(problem: Problem, bounds: Any) -> str:
    """Return a text that is the same for the same bounds."""
    sides = Limits(problem, bounds, None).bounds
    if sides is None:
        return "none"
    if sides[0].size > FEW:
        return f"those with the checksum {zlib.crc32(np.stack(sides).tobytes()):x}"
    return " to ".join(str(side.tolist()) for side in sides)


def going_on(result: OptimizeResult, options: Options) -> tuple[Nest, Options]:
    """Return the start and the options with which to go on from a result.

    What the call leaves out is as it was in the call that the result is of.

    Raises:
        InvalidArgumentError: If the result does not hold what that needs, or is a fit
            and the call is not.
    """
    if result.state is None:
        raise InvalidArgumentError(
            "Only a result with the state of its method can be continued.",
            got="a result without `state`",
            hint="minimize(f, result.x), which starts anew from there",
        )
    before = result.state.options
    if options.method is None and isinstance(before.method, LevenbergMarquardt):
        raise InvalidArgumentError(
            "A fit is continued by `least_squares`, with its residuals.",
            got="a result of `least_squares` for `minimize`, without `method`",
            hint='least_squares(residuals, result), or method="lbfgs" from there',
        )
    # Another method knows nothing of the rate and the bounds of the one before.
    fits = [isinstance(o.method, LevenbergMarquardt) for o in (before, options)]
    is_alike = options.method is None or all(fits)
    names = ["wrt", *["method", "learning_rate", "bounds"] * is_alike]
    kept = {n: getattr(before, n) for n in names if getattr(options, n) is None}
    merged = replace(options, has_aux=options.has_aux or before.has_aux, **kept)
    return result.x if before.wrt is None else None, merged


def check_same(there: Identity, here: Identity, what: str) -> None:
    """Refuse to go on with another problem, naming what differs."""
    pairs: Any = zip(Identity._fields, there, here, strict=True)
    for name, theirs, ours in pairs:
        if theirs == ours or () in (theirs, ours):
            continue
        if name == "x":
            both = zip(theirs, ours, strict=False)
            count = f"{len(theirs)} leaves", f"{len(ours)} leaves"
            theirs, ours = next(((a, b) for a, b in both if a != b), count)
        raise InvalidArgumentError(
            f"{what} goes on with the problem that it is of.",
            got=f"{name}: {theirs} before, {ours} now",
            hint="the call as it was, or another directory to start anew",
        )


def check_value(now: Any, before: Any, history: History) -> None:
    """Refuse a function with another value at the saved point than it had before."""
    if not has_value(now, before, history):
        raise InvalidArgumentError(
            "A run goes on with the function that it began with.",
            got=f"f = {float(now):.8g} at the point where it was {float(before):.8g}",
            hint="minimize(f, result.x), or another directory for `checkpoint`",
        )


def has_value(now: Any, before: Any, history: History) -> bool:
    """Return whether a value is what it was, but for rounding beside the history."""
    values = history.get("fun", np.zeros(0))
    size = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
    a, b = float(now), float(before)
    epsilon = EPSILONS[tf.as_dtype(as_array(now).dtype)] ** 0.5
    is_near = abs(a - b) <= epsilon * min(size, abs(b) + epsilon * size)
    return a == b or bool(np.isnan(b)) or is_near


def check_shapes(saved: Sequence[Any], fresh: Sequence[Any]) -> None:
    """Refuse tensors of other shapes or dtypes than a solver's own."""
    theirs, ours = ([*map(_shape, tensors)] for tensors in (saved, fresh))
    if theirs != ours:
        pairs = [(a, b) for a, b in zip(theirs, ours, strict=False) if a != b]
        is_fewer = len(theirs) != len(ours)
        raise InvalidArgumentError(
            "A run goes on with the function and the method it began with.",
            got=f"{len(theirs)} tensors there, {len(ours)} here"
            if is_fewer
            else "a tensor of {} there, of {} here".format(*pairs[0]),
            hint="the call as it was"
            + " (a learning rate that was a number stays one, a variable or a schedule "
            "one of these)" * is_fewer + ", or to start anew minimize(f, result.x), or "
            "another directory for `checkpoint`",
        )


def _shape(leaf: Any) -> str:
    tensor = leaf.read_value() if isinstance(leaf, tf.Variable) else leaf
    return describe(tensor)


# --- going on ---


def count_from(run: Minimisation, result: OptimizeResult) -> None:
    """Let a run go on from a result: as it did, or from its point by other methods."""
    run.saved = saved = result.state
    here = identity_of(run)
    own = saved.identity._replace(methods=(), bounds=())
    check_same(own, here, "A result")
    if is_alike(run):
        run.chain.go_on(saved.chain, result.nit)
    else:
        run.chain.first = result.nit
    run.clock.go_on(result.seconds, counts_anew=True)
    if run.training is not None and run.training.epochs is not None:
        epochs = run.training.epochs + saved.position[0]
        run.training = replace(run.training, epochs=epochs)


def find(run: Minimisation, checkpoints: Any) -> None:
    """Let a run go on from its newest checkpoint, if there is one.

    One of another problem is refused, and so is data that ends after one epoch.
    """
    check_tells(run.chain.stages)
    if run.training is not None:
        run.training.check_repeats()
    saved = checkpoints.newest()
    if saved is None:
        return
    here = identity_of(run)
    check_same(saved.identity, here, str(checkpoints.path))
    run.saved = saved
    run.chain.index, run.chain.first = saved.chain.index, saved.chain.first
    run.chain.used, run.chain.taken = saved.chain.used, list(saved.chain.taken)
    run.clock.go_on(saved.seconds, counts_anew=False)
    if saved.directory is not None and run.options.log is not None:
        run.record.directory = Path(str(run.options.log)) / saved.directory
    if saved.has_ended and saved.limits == limits_of(run):
        _end_at_once(run, saved)


def is_alike(run: Minimisation) -> bool:
    """Return whether the methods of a run are those of what it goes on from."""
    names = tuple(stage.name for stage in run.chain.stages)
    return names == run.saved.identity.methods


def go_on(run: Minimisation, saved: Saved) -> tuple[State, Rows]:
    """Return where a run goes on, and the rows until there.

    If its function is another one, that is refused, and nothing was changed.
    """
    if run.training is None:
        run.problem.find()
    with put_back_on_error(run.problem):
        alike = is_alike(run)
        if alike and not run.chain.stage.is_scipy:
            state = _restored(run, saved)
        else:
            state = _begun_at(run, saved)
    rows = Rows(saved.history)
    if alike and len(rows):
        last = saved.state.step + run.loop.solver.stepper.lookahead
        rows = rows.part(rows.columns["step"] < int(last))
    if saved.epochs:
        run.record.epochs.append(Rows(saved.epochs))
    return state, rows


def _begun_at(run: Minimisation, saved: Saved) -> State:
    """Return where a method begins at the point where another one ended."""
    if saved.outcome is not None:
        x, before = saved.outcome.x, saved.outcome.fun
    else:
        x = unravel(saved.state.x, run.problem.x.leaves)
        before = saved.state.evaluation.value
    run.problem.x.restart(x)
    run.make_loop(saved.position)
    state, _ = run.loop.start()
    if before is not None and not run.training and repeats(run.problem):
        check_value(run.loop.solver.look(state).value, before, saved.history)
    return state._replace(
        step=tf.constant(saved.nit or int(saved.state.step)),
        evaluations=(saved.nfev or saved.state.evaluations) + state.evaluations,
        code=saved.state.code if _is_ended(run, saved) else state.code,
    )


def _restored(run: Minimisation, saved: Saved) -> State:
    """Return the state that was saved, if the function is the one it is of."""
    there = saved.state
    is_vector = isinstance(there.x, tf.Tensor) and there.x.shape.rank == 1
    if is_vector:
        shapes = run.problem.x.leaves
        size = sum(shape.shape.num_elements() for shape in shapes)
        check_shapes([there.x], [tf.zeros(size, there.x.dtype)])
        run.problem.x.restart(unravel(there.x, shapes))
    run.make_loop(saved.position)
    solver = run.loop.solver
    fresh, evaluation = solver.init()
    own = tf.nest.flatten(fresh._replace(batch=()))
    leaves = [*map(_restorable, tf.nest.flatten(there), own)]
    check_shapes(leaves, own)
    check_shapes(saved.variables, solver.variables())
    state: State = tf.nest.pack_sequence_as(fresh._replace(batch=()), leaves)
    if is_vector:  # within the bounds of this call
        memory = state.memory._replace(bounds=fresh.memory.bounds)
        state = state._replace(memory=memory)
    is_known = run.training is None and repeats(run.problem)
    if is_vector and evaluation is not None:
        if not is_known:  # the function is random: its value now is what counts
            state = fresh._replace(step=there.step, evaluations=there.evaluations)
        else:
            check_value(evaluation.value, there.evaluation.value, saved.history)
    for variable, value in zip(solver.variables(), saved.variables, strict=True):
        variable.assign(value)
    if not is_vector and is_known and int(there.step):
        now = solver.look_back(there).value
        check_value(now, there.evaluation.value, saved.history)
    rate = run.options.learning_rate
    if rate is not None and run.optimizer is not None and not callable(rate):
        run.optimizer.learning_rate = rate
    code = there.code if _is_ended(run, saved) else tf.constant(RUNNING)
    return state._replace(code=code, batch=fresh.batch)


def _restorable(leaf: Any, like: Any) -> Any:
    """Return what is restored for a saved leaf: a column if like is one, as saved once.

    A run may write to what is large where it is, and a result goes on more than once.
    """
    if is_large(leaf):
        return tf.raw_ops.DeepCopy(x=leaf)
    is_meant = leaf.shape.rank == 1 and [*like.shape] == [*leaf.shape, 1]
    return tf.expand_dims(leaf, 1) if is_meant else leaf


def _end_at_once(run: Minimisation, saved: Saved) -> None:
    """Take the result of a run that has ended, if its function is this one."""
    assert saved.outcome is not None
    problem, outcome = run.problem, saved.outcome
    if run.training is None:
        problem.find()
    with put_back_on_error(problem), run.compiling():
        run.make_loop()  # which knows the variables that f writes, as its averages
        problem.x.restart(outcome.x)
        if run.training is None:
            value = problem.evaluate(problem.x.start()).value
            if repeats(problem):
                check_value(value, outcome.fun, saved.history)
        variables = run.loop.solver.variables()
        check_shapes(saved.variables, variables)
        for variable, value in zip(variables, saved.variables, strict=True):
            variable.assign(value)
        problem.x.restart(outcome.x)
    run.status, run.saved = saved.status, replace(saved, options=_call_of(run))


@contextlib.contextmanager
def put_back_on_error(problem: Problem) -> Iterator[None]:
    """Put the variables back to where they are, should the block raise."""
    before = [variable.read_value() for variable in problem.x.variables]
    try:
        yield
    except Exception:
        problem.x.assign(before)
        raise


def repeats(problem: Problem) -> bool:
    """Return whether f is known to have one value at one point."""
    types = operations(problem)
    return bool(types) and not draws(types) and not written(problem)


# --- putting away ---


def snapshot(run: Minimisation) -> Saved:
    """Return the run as it is."""
    solver, state = run.loop.solver, run.state
    position = (0, 0)
    if run.training is not None:
        position = int(state.batch.epoch), int(state.batch.count)
    return Saved(
        identity=identity_of(run),
        limits=limits_of(run),
        state=released(state._replace(batch=())),
        position=position,
        variables=[variable.read_value() for variable in solver.variables()],
        chain=replace(run.chain, stages=[], taken=list(run.chain.taken)),
        history=run.record.rows.columns(),
        epochs=run.record.epochs.columns(),
        seconds=run.clock.seconds(),
        status=run.status,
        directory=run.record.name,
    )


def with_outcome(run: Minimisation, saved: Saved) -> Saved:
    """Return the same with what came out, and with how the run was called."""
    solver, evaluation = run.loop.solver, run.state.evaluation
    x, grad = solver.point(run.state), solver.gradient(evaluation)
    return replace(
        saved,
        status=run.status,
        message=run.message(),
        success=run.loop.succeeded or rule_of(run.status or "").is_solution,
        outcome=Outcome(evaluation.value, x, grad),
        history=run.record.rows.columns(),
        nit=run.step,
        nfev=int(run.state.evaluations),
        seconds=run.clock.seconds(),
        directory=run.record.name,
        options=_call_of(run),
    )


def result_of(run: Minimisation) -> OptimizeResult:
    """Return the result of a run that has ended."""
    saved = run.saved
    assert saved is not None
    assert saved.outcome is not None
    history = Rows(run.record.rows.columns() or saved.history)
    fun: Any = saved.outcome.fun
    return OptimizeResult(
        x=run.problem.x.pack(saved.outcome.x),
        fun=fun.numpy(),
        grad=run.problem.x.pack(saved.outcome.grad),
        nit=saved.nit,
        nfev=saved.nfev,
        success=saved.success,
        status=saved.status or "",
        message=saved.message,
        history={n: c for n, c in history.columns.items() if n != SIZE},
        epochs=run.record.epochs.columns() or saved.epochs,
        seconds=saved.seconds,
        directory=run.record.directory,
        state=saved if saved.options is not None else None,
    )


def limits_of(run: Minimisation) -> list[Any]:
    """Return how far a run may go, the tolerances last: what JSON can hold."""
    options = run.options
    epochs = None if run.training is None else run.training.epochs
    shares = [stage.steps for stage in run.chain.stages]
    budgets = [run.chain.steps, shares, options.seconds, epochs]
    return [*budgets, list(options.tolerances)]


def _call_of(run: Minimisation) -> Options | None:
    """Return how to call the run again, with the variables that were found.

    None if its method keeps what it remembers to itself.
    """
    if run.loop.solver.stepper.is_eager:
        return None
    wrt = run.options.wrt
    if wrt is None and not run.problem.x.takes_values:
        wrt = run.problem.x.template
    # What is large, or what no pickle takes, is to be given again.
    again = "data", "batch_size", "epochs", "validation", "constraints", "log"
    left_out: dict[str, Any] = dict.fromkeys((*again, "checkpoint"))
    return replace(run.options, wrt=wrt, **left_out)


def _is_ended(run: Minimisation, saved: Saved) -> bool:
    """Return whether what ended the run by itself ends it where it goes on, too."""
    return is_alike(run) and list(saved.limits[-1]) == limits_of(run)[-1]
