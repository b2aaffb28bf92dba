"""One minimisation, from its start to its result: the whole run, top to bottom."""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.tapes import is_watched, paused, resumed
from tfgrad.derivatives.tracing import as_written
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of
from tfgrad.optimize import resume
from tfgrad.optimize.chain import Chain, make_stages
from tfgrad.optimize.checkpoint import Checkpoints
from tfgrad.optimize.constraints import Limits, require_support
from tfgrad.optimize.data import can_take
from tfgrad.optimize.distribute import lost_worker, out_of_scope
from tfgrad.optimize.epochs import Training, training
from tfgrad.optimize.history import Rows, Table
from tfgrad.optimize.hooks import Hook, ProgressBar
from tfgrad.optimize.keras_callbacks import watching
from tfgrad.optimize.loop import Loop
from tfgrad.optimize.methods.protocol import Method
from tfgrad.optimize.options import ENDLESS, Options
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.result import OptimizeResult, State
from tfgrad.optimize.resume import Saved
from tfgrad.optimize.solvers.optimizer import LOOP_STEPS
from tfgrad.optimize.solvers.scipy import SciPyLoop
from tfgrad.optimize.stopping import (
    RUNNING,
    is_stationary,
    rule_of,
    sentence,
    status_of,
)
from tfgrad.optimize.tensorboard import TensorBoard, check_log
from tfgrad.optimize.workers import Workers

GROWTH = 10
"""How many times as large as at the start f has to be for a run that diverges."""


class Clock:
    """The time of a run.

    Args:
        budget: Seconds that it may take; None if it may take any.
    """

    def __init__(self, budget: float | None) -> None:
        """Start."""
        self._budget, self._began = budget, time.perf_counter()
        self._agreed: float | None = None

    def agree(self, seconds: float) -> None:
        """Let the budget be used up by what all workers have agreed on."""
        self._agreed = seconds

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began

    def go_on(self, seconds: float, *, counts_anew: bool) -> None:
        """Begin so many seconds ago; they are part of the budget, or not."""
        self._began -= seconds
        if counts_anew and self._budget is not None:
            self._budget += seconds

    @property
    def is_over(self) -> bool:
        """Whether the budget is used up."""
        seconds = self.seconds() if self._agreed is None else self._agreed
        return self._budget is not None and seconds >= self._budget


class Record:
    """What is kept of a run.

    Attributes:
        rows: A row for each point.
        epochs: One for each epoch.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.rows, self.epochs = Table(), Table()
        self._seen = 0

    def keep(self, rows: Rows) -> None:
        """Add rows, but those of steps that are there."""
        steps = self.rows.columns().get("step", np.zeros(0))
        if len(rows) and len(steps):
            rows = rows.part(rows.columns["step"] > steps[-1])
        if len(rows):
            self.rows.append(rows)

    def unseen(self) -> Rows:
        """Return the rows since the last call, without columns of nothing but NaN."""
        rows = Rows(self.rows.columns()).part(slice(self._seen, None))
        self._seen += len(rows)
        kept = {n: c for n, c in rows.columns.items() if n == "fun" or not _is_empty(c)}
        return Rows(kept)


class Driver:
    """One minimisation: `for _ in run.states()`, then `run.result()`.

    Args:
        f: As for `minimize`.
        x0: As for `minimize`.
        options: The others.
        kind: What `f` is the function of, or part of.
        callback: As for `minimize`.

    Attributes:
        kind: As above.
        problem: What is minimised.
        options: As above, completed by those of a result to go on from.
        training: The data, if there is some.
        chain: The methods.
        loop: The method at work.
        state: Where it is.
        record: What happened.
        status: Why the run ended; None while it goes on.
        hooks: What watches.
    """

    loop: Any
    state: Any

    @out_of_scope()
    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        options: Options,
        kind: Callable[..., Problem] = Problem,
        callback: Any = None,
    ) -> None:
        """Check what can be checked; nothing is traced or written."""
        _check_alone(f)
        self.hooks: list[Hook] = [ProgressBar(), *watching(callback)]
        check_log(options.log)
        before = x0 if isinstance(x0, OptimizeResult) else None
        if before is not None:
            x0, options = resume.going_on(before, options)
        has_data = options.data is not None
        stages = make_stages(options.method, options.learning_rate, has_data=has_data)
        for stage in stages:
            given = options.bounds, options.constraints
            require_support(stage.name, stage.method, *given)
        jit = has_data and options.jit is True
        flags = {"has_aux": options.has_aux, "jit": jit, "verify": options.verify}
        self.kind = kind
        self.problem = kind(f, x0, options.wrt, **flags)
        is_by_batch = stages[0].is_by_batch
        self.training, steps = training(options, self.problem, is_by_batch=is_by_batch)
        self.options = options
        self.chain = Chain(stages, steps)
        self.record = Record()
        self.status: str | None = None
        self.clock = Clock(options.seconds)
        self.saved: Saved | None = None
        if before is not None:
            resume.count_from(self, before)
        checkpoints = None
        if options.checkpoint is not None:
            checkpoints = Checkpoints(options.checkpoint)
            resume.find(self, checkpoints)
        if options.log is not None and self.problem.replicas.is_chief:
            self.hooks.append(TensorBoard(options.log))
        if checkpoints is not None and self.problem.replicas.is_chief:
            self.hooks.append(checkpoints)
        if not has_data:
            _check_closed(f, self.problem.takes_values, goes_on=before is not None)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return int(self.state.step)

    @property
    def optimizer(self) -> Any:
        """The optimizer at work; None if the method is no optimizer."""
        return getattr(self.loop.solver, "optimizer", None)

    @property
    def directory(self) -> Path | None:
        """Where the run is logged; None if it is not."""
        logs = (hook.directory for hook in self.hooks if isinstance(hook, TensorBoard))
        directory, log, saved = next(logs, None), self.options.log, self.saved
        if directory is None and log is not None and saved and saved.directory:
            return Path(str(log)) / saved.directory
        return directory

    @property
    def planned(self) -> int | None:
        """How many steps there will be at most; None if nobody knows."""
        if self.training is None:
            return self.chain.total
        return self.training.planned(self.chain.total)

    # --- the run ---

    def states(self, *, pulled: bool = False) -> Generator[None]:
        """Run to the end; yield where it begins, and after each chunk.

        Args:
            pulled: Whether the caller wants one chunk at a time, maybe no more: then a
                method of SciPy runs in a thread, and chunks are `every` steps long.
        """
        if self.status is not None:  # a checkpoint says that it has ended
            return
        error: BaseException | None = None
        begun: list[Hook] = []
        if self.problem.replicas.is_clustered:
            self.hooks.append(Workers(self.problem.replicas))
        try:
            with self._compiling():
                for hook in self.hooks:
                    begun.append(hook)
                    hook.open(self)
                self._begin(pulled)
                rows = self.record.unseen()
                for hook in self.hooks:
                    hook.begin(self, rows)
                self._judge()
            yield
            first = self.step if pulled else None
            while self.status is None:
                with self._compiling():
                    self._advance(first)
                yield
        except BaseException as raised:
            error = raised
            is_interrupt = isinstance(raised, KeyboardInterrupt)
            self.end("interrupted" if is_interrupt else "stopped")
            lost = lost_worker(raised, self.problem.replicas)
            if lost is not None:
                raise lost from raised
            raise
        finally:
            with self._compiling():
                self._end(error, begun)

    def _begin(self, pulled: bool) -> None:
        """Evaluate the start, or go to where the run was."""
        if self.saved is None:
            self.make_loop(pulled)
            self.state, rows = self.loop.start()
            _check_unwatched(self.problem)
        else:
            self.state, rows = resume.go_on(self, self.saved, pulled)
        self.record.keep(rows)

    def _advance(self, first: int | None) -> None:
        """Take a chunk of steps: up to the next that `descend` yields, from `first`."""
        limit = min(hook.limit(self) for hook in self.hooks)
        if first is not None:
            every = int(self.options.every)
            limit = min(limit, every - (self.step - first) % every)
        limit = min(limit, self.chain.last - self.step)
        self.state, rows = self.loop.advance(self.state, limit)
        self.record.keep(rows)
        self._judge()
        if self.training is not None and self.status is None:
            self._end_epoch(self.training)
        self._watch()

    def visited(self, state: Any, rows: Rows) -> bool:
        """Take note of an iteration of SciPy's; return whether it is to go on."""
        self.state = state
        self.record.keep(rows)
        if int(state.code) != RUNNING:
            return False
        self.status = self.status or self._budget()
        self._watch()
        return self.status is None

    def _watch(self) -> None:
        rows = self.record.unseen()
        for hook in self.hooks:
            hook.rows(self, rows)

    def _judge(self) -> None:
        """Say why the run ended, if it did; a stage that is over hands over."""
        if is_stationary(int(self.state.code)):
            self.state, rows = self.loop.escape(self.state)
            self.record.keep(rows)
        self.status = self.status or self._verdict()
        while self.status and self._hands_over(self.status):
            self._next_stage()
            self.status = self._verdict()

    def _verdict(self) -> str | None:
        if own := self.loop.why(self.state):
            return str(own[0])
        if int(self.state.code) != RUNNING:
            return status_of(int(self.state.code))
        return self._budget()

    def _budget(self) -> str | None:
        if self.clock.is_over:
            return "seconds"
        return "steps" if self.step >= self.chain.last else None

    def _hands_over(self, status: str) -> bool:
        """Return whether the stage is over, the run is not, and another is left."""
        return rule_of(status).hands_over and self.chain.has_next

    def _next_stage(self) -> None:
        """Let the next method begin where the last one ended."""
        before, rows = self.loop.finish(self.state)
        self.record.keep(rows)
        self.problem.restart(self.loop.solver.point(before))
        self.loop.close()
        self.chain.hand_over(self.step)
        self.make_loop(pulled=False)
        state, _ = self.loop.start()
        evaluations = before.evaluations + state.evaluations
        self.state = state._replace(step=before.step, evaluations=evaluations)

    def make_loop(self, pulled: bool, position: tuple[int, int] = (0, 0)) -> None:
        """Make the loop of the stage at work."""
        problem, stage, options = self.problem, self.chain.stage, self.options
        problem.find() if self.training is None else None
        limits = Limits(problem, options.bounds, options.constraints)
        if stage.is_scipy:
            tolerances, clock = options.tolerances, self.clock.seconds
            self.loop = SciPyLoop(problem, stage.method, limits, tolerances, clock)
            self.loop.visit = None if pulled else self.visited
            return
        source, tolerances = None, options.tolerances
        if self.training is not None:  # the target is a matter of whole epochs
            source, tolerances = self.training.source, tolerances._replace(target=None)
        self.loop = Loop(
            stage.solver(problem, source, position, limits),
            tolerances,
            planned=self.planned or ENDLESS,
            jit=options.jit,
            clock=self.clock.seconds,
            in_step=problem.replicas.is_clustered,
        )

    def _end_epoch(self, trained: Training) -> None:
        """End the epoch if its batches are used up; open the next one."""
        solver = self.loop.solver
        if trained.source.error is not None:
            raise trained.source.error
        if bool(solver.has_next(self.state)) or solver.may_draw(self.state):
            return
        count = int(self.state.batch.count)
        if count == 0:  # the new epoch has no batch
            self.end("data")
            return
        rows = Rows(self.record.rows.columns()).part(slice(-count, None))
        epoch = int(self.state.batch.epoch) + 1
        row = {"epoch": epoch, "step": self.step, **trained.means(rows)}
        point = self.problem.pack(solver.point(self.state))
        point = (point,) if self.problem.takes_values else ()
        row |= trained.validated(point)
        self.record.epochs.append(Rows({n: np.array([row[n]]) for n in row}))
        self.status = trained.status(row, self.options.target) or self.status
        for hook in self.hooks:
            hook.epoch(self, row)
        self.state = solver.next_epoch(self.state, opens=self.status is None)

    # --- what others ask ---

    def shown(self) -> State:
        """Return where the run is, for the user."""
        with self._compiling():
            evaluation = self.loop.solver.look(self.state)
        return State(
            step=self.step,
            x=self.problem.pack(self.loop.solver.point(self.state)),
            fun=evaluation.value.numpy(),
            grad_max=evaluation.grad_max.numpy(),
            seconds=self.clock.seconds(),
            epochs=self.record.epochs.columns(),
            optimizer=self.optimizer,
        )

    def refresh(self) -> None:
        """Take note of what the user may have changed."""
        with self._compiling():
            self.state = self.loop.solver.refresh(self.state)

    def end(self, status: str) -> None:
        """End the run from outside, unless it has ended already."""
        self.status = self.status or status

    def message(self) -> str:
        """Return why the run ended as a sentence."""
        own = self.loop.why(self.state)
        if own and own[0] == self.status:
            said = own[1]
        else:
            said = sentence(
                self.status or "",
                step=self.step,
                seconds=self.options.seconds,
                nonfinite=_about_nonfinite(self),
                **self.options.tolerances._asdict(),
            )
        return self.chain.message(said, self.step)

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Trace and call functions in the block; no tape of the user's sees it."""
        is_long = self.training is not None or (self.planned or ENDLESS) >= LOOP_STEPS
        is_optimizer = not isinstance(self.chain.stage.method, Method)
        optimized = is_long and is_optimizer
        with out_of_scope(), paused(), as_written(optimized=optimized):
            yield

    def _end(self, error: BaseException | None, begun: Sequence[Hook]) -> None:
        """Finish, put away what was done, and let the hooks end."""
        with contextlib.ExitStack() as ending:
            for hook in begun:
                ending.callback(hook.end, self, error)
            if not hasattr(self, "state"):  # it has not begun
                return
            ending.callback(self.loop.close)
            if error is not None and lost_worker(error, self.problem.replicas):
                self.saved = None  # the variables have moved within the chunk
                return
            self.saved = resume.snapshot(self)
            if error is None:
                self.state, rows = self.loop.finish(self.state)
                self.record.keep(rows)
                for hook in begun:
                    hook.finish(self)
                _warn_of_validation(self)
                self.saved = resume.with_outcome(self, self.saved)
            else:
                self.loop.solver.settle(self.state)


def _check_alone(f: Any) -> None:
    """Refuse to run inside of what is traced: the answer would have no derivative."""
    if not tf.executing_eagerly():
        raise InvalidArgumentError(
            "A minimisation runs by itself, not inside a tf.function or a transform.",
            got=f"`{name_of(f)}` to be minimised while a graph is traced",
            hint="tfgrad.solution(f, x0, *args) there, which has a derivative; or call "
            "it outside, it compiles itself",
        )


def _check_unwatched(problem: Problem) -> None:
    """Refuse a function of what a tape watches: the answer has no derivative by it.

    The variables that are moved do not count: they are given new values.
    """
    moved = {id(variable) for variable in problem.variables}
    with resumed():
        for source in problem.reads():
            if id(source) not in moved and is_watched(source):
                raise InvalidArgumentError(
                    "A minimisation cannot be differentiated by what its function "
                    "depends on.",
                    got=f"`{problem.name}` reads {describe(source)}, which a tape "
                    "watches",
                    hint="tfgrad.solution(f, x0, *args), which has a derivative; or "
                    "the call outside of the tape, or tf.stop_gradient of it",
                )


def _check_closed(f: Any, takes_values: bool, *, goes_on: bool) -> None:
    """Refuse a function of more than the point where there is no data."""
    if can_take(f, int(takes_values)):
        return
    rule = "A function of values needs a start; one of variables takes no argument."
    got = f"`{name_of(f)}`, which takes an argument, without `x0`"
    hint = "minimize(f, x0), or minimize(lambda: f(variable), wrt=variable)"
    if takes_values or goes_on:
        rule = "Without `data`, a function takes the point and nothing else."
        got = f"`{name_of(f)}{inspect.signature(f)}` without `data`"
        hint = "minimize(f, x0, data=(x, y)), with a parameter for each part"
    if goes_on:
        rule += " A result does not hold the data: it is given again."
        hint = "minimize(f, result, data=(x, y), epochs=10)"
    raise InvalidArgumentError(rule, got=got, hint=hint)


def _warn_of_validation(run: Driver) -> None:
    """Say that a validation was never called: nobody knows where some data ends."""
    training = run.training
    if training is None or training.validation is None or training.source.batches:
        return
    if run.status in ("steps", "seconds") and not run.record.epochs.columns():
        warnings.warn(
            "`validation` is called at the end of an epoch, and none has ended in "
            f"{run.step} steps: let `data` end after some batches",
            RuntimeWarning,
            stacklevel=2,
        )


def _is_empty(column: np.ndarray[Any, Any]) -> bool:
    return column.dtype.kind == "f" and bool(np.all(np.isnan(column)))


def _about_nonfinite(run: Driver) -> str:
    """Return the sentence about a value or gradient that is not finite."""
    step, loop = run.step, run.loop
    if loop.bad is None:
        return ""
    bad = {name: column[-1] for name, column in loop.bad.columns.items()}
    what, value = "f", bad["fun"]
    if np.isfinite(bad["fun"]):
        what, value = "an element of the gradient", bad["grad_max"]
    why = f" ({loop.blame})" if loop.blame else ""
    if bad["step"] == 0:
        return f"At the start, {what} is {value}{why}: no step was taken."
    return (
        f"In step {step + 1}, {what} became {value}{_about_rate(run, bad)}{why}; "
        f"x is the last finite point, after step {step}."
    )


def _about_rate(run: Driver, bad: dict[str, Any]) -> str:
    """Return that the learning rate is too large, where f grew before it overflowed."""
    fun = run.record.rows.columns().get("fun", np.zeros(0)).astype(np.float64)
    is_growing = len(fun) > 1 and fun[-1] > GROWTH * abs(fun[0]) and fun[-1] > fun[-2]
    if "learning_rate" not in bad or not is_growing:
        return ""
    return (
        f": f grew from {fun[0]:.3g} to {fun[-1]:.3g} in the steps before, so the "
        f"learning rate, {bad['learning_rate']:.3g}, is likely too large"
    )
