"""One minimisation, from its start to its result: the whole run, top to bottom."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.tapes import is_watched, resumed
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of
from tfgrad.optimize import resume
from tfgrad.optimize.chain import Chain, make_stages
from tfgrad.optimize.checkpoint import Checkpoints
from tfgrad.optimize.constraints import require_support
from tfgrad.optimize.data import can_take
from tfgrad.optimize.distribute import lost_worker, out_of_scope
from tfgrad.optimize.epochs import training
from tfgrad.optimize.history import Rows
from tfgrad.optimize.hooks import Hook, ProgressBar
from tfgrad.optimize.keras_callbacks import watching
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.options import STEPS, Options
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.result import OptimizeResult
from tfgrad.optimize.stopping import RUNNING
from tfgrad.optimize.tensorboard import TensorBoard, check_log
from tfgrad.optimize.traced import reads
from tfgrad.optimize.workers import Workers


class Driver:
    """Runs one minimisation to its end, and lets hooks watch: `for _ in states()`.

    Attributes:
        run: The minimisation; its options are completed by those of a result to go on
            from.
        hooks: What watches.
    """

    @out_of_scope()
    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        options: Options,
        kind: Callable[..., Problem] = Problem,
        callback: Any = None,
    ) -> None:
        check_alone(f)
        self.kind = kind
        self.hooks: list[Hook] = [ProgressBar()]
        if callback is not None:
            self.hooks += watching(callback)
        if options.log is not None:
            check_log(options.log)
        before = x0 if isinstance(x0, OptimizeResult) else None
        if before is not None:
            x0, options = resume.going_on(before, options)
        has_data = options.data is not None
        stages = make_stages(options.method, options.learning_rate, has_data=has_data)
        if options.are_limited:
            for stage in stages:
                given = options.bounds, options.constraints
                require_support(stage.name, stage.method, *given)
        jit = has_data and options.jit is True
        flags = {"has_aux": options.has_aux, "jit": jit, "verify": options.verify}
        problem = kind(f, x0, options.wrt, **flags)
        trained, steps = None, options.steps or STEPS
        if has_data:
            is_by_batch = stages[0].is_by_batch
            trained, steps = training(options, problem, is_by_batch=is_by_batch)
        self.run = Minimisation(problem, options, Chain(stages, int(steps)), trained)
        if before is not None:
            resume.count_from(self.run, before)
        checkpoints = None
        if options.checkpoint is not None:
            checkpoints = Checkpoints(options.checkpoint, self.hooks)
            resume.find(self.run, checkpoints)
        if options.log is not None and problem.replicas.is_chief:
            self.hooks.append(TensorBoard(options.log))
        if checkpoints is not None and problem.replicas.is_chief:
            self.hooks.append(checkpoints)
        if not has_data:
            takes = int(problem.x.takes_values)
            _check_takes(f, takes, goes_on=before is not None)

    def states(self, *, pulled: bool = False) -> Generator[None]:
        """Run to the end; yield where it begins, and after each chunk.

        Args:
            pulled: Whether the caller wants one chunk at a time, maybe no more: then a
                method of SciPy runs in a thread, and chunks are `every` steps long.
        """
        run = self.run
        if run.status is not None:  # a checkpoint says that it has ended
            return
        error: BaseException | None = None
        begun: list[Hook] = []
        if run.problem.replicas.is_clustered:
            self.hooks.append(Workers(run.problem.replicas, list(self.hooks)))
        try:
            with run.compiling():
                for hook in self.hooks:
                    begun.append(hook)
                    hook.open(run)
                self._begin()
                run.record.unseen()  # hooks find them in the record
                for hook in self.hooks:
                    hook.begin(run)
                run.judge()
            yield
            first = run.step if pulled else None
            while run.status is None:
                with run.compiling():
                    self._advance(first)
                yield
        except BaseException as raised:
            error = raised
            is_interrupt = isinstance(raised, KeyboardInterrupt)
            run.end("interrupted" if is_interrupt else "stopped")
            lost = lost_worker(raised, run.problem.replicas)
            if lost is not None:
                raise lost from raised
            raise
        finally:
            with run.compiling():
                self._end(error, begun)

    def _begin(self) -> None:
        """Evaluate the start, or go to where the run was."""
        run = self.run
        if run.saved is None:
            run.make_loop()
            run.state, rows = run.loop.start()
            check_unwatched(run.problem)
        else:
            run.state, rows = resume.go_on(run, run.saved)
        run.record.keep(rows)

    def _advance(self, first: int | None) -> None:
        """Take a chunk of steps: up to the next that `descend` yields, from `first`."""
        run = self.run
        limit = min(hook.limit(run) for hook in self.hooks)
        if first is not None:
            every = int(run.options.every)
            limit = min(limit, every - (run.step - first) % every)
        limit = min(limit, run.chain.last - run.step)
        visit = self._visited if first is None else None
        run.state, rows = run.loop.advance(run.state, limit, visit)
        run.record.keep(rows)
        run.judge()
        if run.training is not None and run.status is None:
            row = run.end_epoch(run.training)
            if row is not None:
                for hook in self.hooks:
                    hook.epoch(run, row)
                opens = run.status is None
                run.state = run.loop.solver.next_epoch(run.state, opens=opens)
        self._watch()

    def _visited(self, state: Any, rows: Rows) -> bool:
        """Take note of an iteration of SciPy's; return whether it is to go on."""
        run = self.run
        run.state = state
        run.record.keep(rows)
        if int(state.code) != RUNNING:
            return False
        run.status = run.status or run.budget()
        self._watch()
        return run.status is None

    def _watch(self) -> None:
        rows = self.run.record.unseen()
        for hook in self.hooks:
            hook.rows(self.run, rows)

    def _end(self, error: BaseException | None, begun: Sequence[Hook]) -> None:
        """Finish the run, save its state, and end the hooks."""
        run = self.run
        with contextlib.ExitStack() as ending:
            for hook in begun:
                ending.callback(hook.end, run, error)
            if not hasattr(run, "state"):  # it has not begun
                return
            ending.callback(run.loop.close)
            if error is not None and lost_worker(error, run.problem.replicas):
                run.saved = None  # the variables have moved within the chunk
                return
            run.saved = resume.snapshot(run)
            if error is None:
                run.state, rows = run.loop.finish(run.state)
                run.record.keep(rows)
                for hook in begun:
                    hook.finish(run)
                _warn_of_validation(run)
                run.saved = resume.with_outcome(run, run.saved)
            else:
                run.loop.solver.settle(run.state)


def check_alone(f: Any) -> None:
    """Refuse to run inside of what is traced: the answer would have no derivative."""
    if not tf.executing_eagerly():
        raise InvalidArgumentError(
            "A minimisation runs by itself, not inside a tf.function or a transform.",
            got=f"`{name_of(f)}` to be minimised while a graph is traced",
            hint="tfgrad.solution(f, x0, *args) there, which has a derivative; or call "
            "it outside, it compiles itself",
        )


def check_unwatched(problem: Problem) -> None:
    """Refuse a function of what a tape watches: the answer has no derivative by it.

    The variables that are moved do not count: they are given new values.
    """
    moved = {id(variable) for variable in problem.x.variables}
    with resumed():
        for source in reads(problem):
            if id(source) not in moved and is_watched(source):
                raise InvalidArgumentError(
                    "A minimisation cannot be differentiated by what its function "
                    "depends on.",
                    got=f"`{problem.name}` reads {describe(source)}, which a tape "
                    "watches",
                    hint="tfgrad.solution(f, x0, *args), which has a derivative; or "
                    "the call outside of the tape, or tf.stop_gradient of it",
                )


def _check_takes(f: Any, count: int, *, goes_on: bool) -> None:
    """Refuse a function that does not take so many arguments, for want of data."""
    if can_take(f, count):
        return
    got = f"`{name_of(f)}{inspect.signature(f)}`"
    if goes_on:
        raise InvalidArgumentError(
            "Without `data`, a function takes the point and nothing else. A result "
            "does not hold the data: it is given again.",
            got=f"{got} without `data`",
            hint="minimize(f, result, data=(x, y), epochs=10)",
        )
    if count == 0:
        raise InvalidArgumentError(
            "A function of values needs a start; one of variables takes no argument.",
            got=f"`{name_of(f)}`, which takes an argument, without `x0`",
            hint="minimize(f, x0), or minimize(lambda: f(variable), wrt=variable)",
        )
    raise InvalidArgumentError(
        "With `x0`, the function takes one argument: all values, in the form of `x0`.",
        got=got,
        hint="wrt= the variables that f reads, and no x0"
        if can_take(f, 0)
        else "lambda x: f(x, a) for what is not moved; else one nest, x = [a, b]",
    )


def _warn_of_validation(run: Minimisation) -> None:
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
