"""A minimisation under way: what it is of, where it is, and why it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfgrad.derivatives.tapes import paused
from tfgrad.derivatives.tracing import as_written
from tfgrad.optimize.chain import Chain
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.distribute import out_of_scope
from tfgrad.optimize.epochs import Training
from tfgrad.optimize.history import Rows, Table
from tfgrad.optimize.loop import Loop
from tfgrad.optimize.methods.protocol import Method
from tfgrad.optimize.options import ENDLESS, Options
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.result import State
from tfgrad.optimize.solvers.optimizer import LOOP_STEPS
from tfgrad.optimize.solvers.scipy import SciPyLoop
from tfgrad.optimize.stopping import (
    RUNNING,
    is_stationary,
    rule_of,
    sentence,
    status_of,
)

GROWTH = 10
"""How many times as large as at the start f has to be for a run that diverges."""


class Clock:
    """The time of a run.

    Args:
        budget: Seconds that it may take; None if it may take any.
    """

    def __init__(self, budget: float | None) -> None:
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
        directory: Where the run is logged; None if it is not.
    """

    def __init__(self) -> None:
        self.rows, self.epochs = Table(), Table()
        self.directory: Path | None = None
        self._seen = 0

    @property
    def name(self) -> str | None:
        """That of the directory, so that it may be moved."""
        return None if self.directory is None else self.directory.name

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


class Minimisation:
    """A minimisation under way: what hooks see, and may end.

    Args:
        problem: What is minimised.
        options: How.
        chain: The methods.
        training: The data, if each step takes a batch.

    Attributes:
        loop: The method at work.
        state: Where it is.
        record: What happened.
        clock: The time.
        status: Why the run ended; None while it goes on.
        saved: The run that this one goes on from; at the end, this one.
    """

    loop: Any
    state: Any

    def __init__(
        self,
        problem: Problem,
        options: Options,
        chain: Chain,
        training: Training | None,
    ) -> None:
        self.problem, self.options = problem, options
        self.chain, self.training = chain, training
        self.record, self.clock = Record(), Clock(options.seconds)
        self.status: str | None = None
        self.saved: Any = None

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return int(self.state.step)

    @property
    def planned(self) -> int | None:
        """How many steps there will be at most; None if nobody knows."""
        if self.training is None:
            return self.chain.total
        return self.training.planned(self.chain.total)

    @property
    def optimizer(self) -> Any:
        """The optimizer at work; None if the method is no optimizer."""
        return getattr(self.loop.solver, "optimizer", None)

    def shown(self) -> State:
        """Return where the run is, for the user."""
        with self.compiling():
            evaluation = self.loop.solver.look(self.state)
        return State(
            step=self.step,
            x=self.problem.x.pack(self.loop.solver.point(self.state)),
            fun=evaluation.value.numpy(),
            grad_max=evaluation.grad_max.numpy(),
            seconds=self.clock.seconds(),
            epochs=self.record.epochs.columns(),
            optimizer=self.optimizer,
        )

    def refresh(self) -> None:
        """Take note of what the user may have changed."""
        with self.compiling():
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
                nonfinite="" if self.loop.bad is None else _about_nonfinite(self),
                **self.options.tolerances._asdict(),
            )
        return self.chain.message(said, self.step)

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Trace and call functions in the block; no tape of the user's sees it."""
        is_long = self.training is not None or (self.planned or ENDLESS) >= LOOP_STEPS
        is_optimizer = not isinstance(self.chain.stage.method, Method)
        optimized = is_long and is_optimizer
        with out_of_scope(), paused(), as_written(optimized=optimized):
            yield

    # --- what a driver asks for ---

    def make_loop(self, position: tuple[int, int] = (0, 0)) -> None:
        """Make the loop of the stage at work.

        Args:
            position: With data, how many epochs are over, and batches of the next one.
        """
        problem, stage, options = self.problem, self.chain.stage, self.options
        problem.find() if self.training is None else None
        limits: Any = None
        if options.are_limited or stage.is_scipy:
            limits = Limits(problem, options.bounds, options.constraints)
        tolerances, clock = options.tolerances, self.clock.seconds
        if stage.is_scipy:
            self.loop = SciPyLoop(problem, stage.method, limits, tolerances, clock)
            return
        source = None
        if self.training is not None:  # the target is a matter of whole epochs
            source, tolerances = self.training.source, tolerances._replace(target=None)
        self.loop = Loop(
            stage.solver(problem, source, position, limits),
            tolerances,
            planned=self.planned or ENDLESS,
            jit=options.jit,
            clock=clock,
            in_step=problem.replicas.is_clustered,
        )

    def judge(self) -> None:
        """Set the status if the run has ended; go on to the next stage of a chain."""
        while is_stationary(int(self.state.code)):
            self.state, rows = self.loop.escape(self.state)
            self.record.keep(rows)
            if not len(rows):
                break
        self.status = self.status or self._verdict()
        while self.status and rule_of(self.status).hands_over and self.chain.has_next:
            self._next_stage()
            self.status = self._verdict()

    def budget(self) -> str | None:
        """Return the status of a run that has used up its time, or its steps."""
        if self.clock.is_over:
            return "seconds"
        return "steps" if self.step >= self.chain.last else None

    def _verdict(self) -> str | None:
        if own := self.loop.why(self.state):
            return str(own[0])
        if int(self.state.code) != RUNNING:
            return status_of(int(self.state.code))
        return self.budget()

    def _next_stage(self) -> None:
        """Let the next method begin where the last one ended."""
        before, rows = self.loop.finish(self.state)
        self.record.keep(rows)
        self.problem.x.restart(self.loop.solver.point(before))
        self.loop.close()
        self.chain.hand_over(self.step)
        self.make_loop()
        state, _ = self.loop.start()
        evaluations = before.evaluations + state.evaluations
        self.state = state._replace(step=before.step, evaluations=evaluations)

    def end_epoch(self, trained: Training) -> Mapping[str, Any] | None:
        """Return the row of the epoch, if its batches are used up."""
        solver = self.loop.solver
        if trained.source.error is not None:
            raise trained.source.error
        if solver.has_more(self.state):
            return None
        count = int(self.state.batch.count)
        if count == 0:  # the new epoch has no batch
            self.end("data")
            return None
        rows = Rows(self.record.rows.columns()).part(slice(-count, None))
        epoch = int(self.state.batch.epoch) + 1
        row = {"epoch": epoch, "step": self.step, **trained.means(rows)}
        given: tuple[Any, ...] = ()
        if trained.validation is not None and self.problem.x.takes_values:
            given = (self.problem.x.pack(solver.point(self.state)),)
        row |= trained.validated(given)
        self.record.epochs.append(Rows({n: np.array([row[n]]) for n in row}))
        self.status = trained.status(row, self.options.target) or self.status
        return row


def _is_empty(column: np.ndarray[Any, Any]) -> bool:
    return column.dtype.kind == "f" and bool(np.all(np.isnan(column)))


def _about_nonfinite(run: Minimisation) -> str:
    """Return the sentence about a value or gradient that is not finite."""
    step, loop = run.step, run.loop
    bad = {name: column[-1] for name, column in loop.bad.columns.items()}
    what, value = "f", bad["fun"]
    if np.isfinite(bad["fun"]):
        what, value = "an element of the gradient", bad["grad_max"]
    # Of a run that diverges, the op that overflows is not the cause.
    rate = _about_rate(run, bad)
    why = rate or (f" ({loop.blame})" if loop.blame else "")
    if bad["step"] == 0:
        return f"At the start, {what} is {value}{why}: no step was taken."
    return (
        f"In step {step + 1}, {what} became {value}{why}; "
        f"x is the last finite point, after step {step}."
    )


def _about_rate(run: Minimisation, bad: dict[str, Any]) -> str:
    """Return that the learning rate is too large, where f overflowed, or grew before.

    But for the start, where there is no step yet.
    """
    fun = run.record.rows.columns().get("fun", np.zeros(0)).astype(np.float64)
    if "learning_rate" not in bad or not len(fun) or bad["step"] == 0:
        return ""
    rate = f"the learning rate, {bad['learning_rate']:.3g}, is likely too large"
    if len(fun) > 1 and fun[-1] > max(GROWTH * abs(fun[0]), fun[-2]):
        grown = f"f grew from {fun[0]:.3g} to {fun[-1]:.3g} in the steps before"
        return f": {grown}, so {rate}"
    return f": {rate}" if bad["fun"] == np.inf else ""
