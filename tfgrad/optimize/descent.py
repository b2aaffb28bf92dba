"""A minimisation under way: its course, its history, its log and its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.tracing import as_written
from tfgrad.nested import Nest
from tfgrad.optimize.checkpoint import Checkpoints
from tfgrad.optimize.course import Course
from tfgrad.optimize.data_loop import DataLoop
from tfgrad.optimize.epochs import ENDLESS, STEPS, training
from tfgrad.optimize.fingerprint import fingerprint
from tfgrad.optimize.limits import limits_facts, require_support
from tfgrad.optimize.log import Log, check_log, open_log
from tfgrad.optimize.loop import LOOP_STEPS, Rows, Since
from tfgrad.optimize.objective import Objective
from tfgrad.optimize.options import Options
from tfgrad.optimize.result import History, OptimizeResult
from tfgrad.optimize.saved import (
    UNFINISHED,
    Outcome,
    Saved,
    check_began,
    check_continues,
    check_same,
    going_on,
    result_of,
)
from tfgrad.optimize.stages import check_tells, make_stages
from tfgrad.optimize.stopping import NONFINITE, RUNNING
from tfgrad.optimize.table import Table
from tfgrad.runs.writer import Run


@dataclass(frozen=True)
class State:
    """Where a minimisation is after some steps.

    Attributes:
        step: How many steps were taken; 0 is the start.
        x: The point, in the structure of `x0` (of `wrt`).
        fun: The value of the objective there, in its dtype.
        grad_norm: The largest |element| of the gradient there.
        seconds: The time since the start, in seconds.
        epochs: With data, arrays with one row per epoch that is over, as in the result.
    """

    step: int
    x: Nest
    fun: Any
    grad_norm: Any
    seconds: float
    epochs: History = field(default_factory=dict, compare=False)


class Descent:
    """One minimisation: advance it until it has a status, then take its result.

    Args:
        f: As for `minimize`.
        x0: As for `minimize`.
        options: The others.
        kind: What `f` is the objective of, or part of.

    Attributes:
        objective: What is minimised.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        options: Options,
        kind: type[Objective] = Objective,
    ) -> None:
        """Check what can be checked; nothing is traced or written."""
        check_log(options.log)
        before = x0 if isinstance(x0, OptimizeResult) else None
        if before is not None:
            x0, options = going_on(before, options)
        has_data = options.data is not None
        stages = make_stages(options.method, options.learning_rate, has_data=has_data)
        for stage in stages:
            require_support(
                stage.name, stage.scipy, options.bounds, options.constraints
            )
        self._name = "+".join(stage.name for stage in stages)
        self._options = options
        self.objective = kind(
            f,
            x0,
            options.wrt,
            has_aux=options.has_aux,
            jit=has_data and options.jit is True,
        )
        self._training, steps = training(options, self.objective)
        what = self.objective, stages, options, self._training, steps
        self._course = Course(*what)
        self._problem = {
            "function": self.objective.name,
            **self.objective.facts(),
            "data": "none" if self._training is None else str(self._training.source),
            **limits_facts(options.bounds, options.constraints),
            "method": ", ".join(stage.identity for stage in stages),
        }
        self._tells = all(stage.tells for stage in stages)
        self._saved: Saved | None = None
        self._is_alike = True
        self._is_resumed = self._is_over = False
        if before is not None:
            self._count_from(before)
        self._checkpoints: Checkpoints | None = None
        self._code = ""
        if options.checkpoint is not None:
            self._code = fingerprint(f)
            check_tells(stages)
            if self._training is not None:
                self._training.check_repeats()
            self._checkpoints = Checkpoints(options.checkpoint)
            self._find_checkpoint(self._checkpoints)
        self._log: Log | None = None
        self._table, self._epochs = Table(), Table()
        self._is_whole = True
        self._began: list[float] = []  # value and slope where a saved run began
        self._last: Saved | None = None

    @property
    def status(self) -> str | None:
        """Why it ended; None while it goes on."""
        return self._course.status

    @property
    def total(self) -> int:
        """How many steps it may take in all."""
        return self._course.total

    @property
    def planned(self) -> int | None:
        """The same, known beforehand; None if the data decides."""
        if self._training is None:
            return self.total
        return self._training.planned(self.total)

    @property
    def state(self) -> State:
        """Where it is."""
        loop = self._course.loop
        return State(
            step=loop.step,
            x=self.objective.pack(loop.point()),
            fun=loop.at.row["fun"].numpy(),
            grad_norm=loop.at.row["grad_norm"].numpy(),
            seconds=loop.seconds,
            epochs=self._epochs.columns(),
        )

    def compiling(self) -> AbstractContextManager[None]:
        """Return the context in which `with` and `advance` are to be called."""
        is_long = (self.planned or ENDLESS) >= LOOP_STEPS
        return as_written(optimized=is_long and self.objective.takes_many_steps)

    def __enter__(self) -> Self:
        """Evaluate the start, or go to where it was; open the log; save."""
        with contextlib.ExitStack() as undo:
            if self._checkpoints is not None:
                self._checkpoints.open()
                undo.callback(self._checkpoints.close)
                if self.objective.takes_values and self._training is None:
                    row = self.objective.evaluate().row
                    self._began = [float(row[name]) for name in ("fun", "grad_norm")]
            if self._saved is None:
                self._course.begin()
                rows = self._course.loop.start()
            else:
                self._go_on(self._saved)
                rows = self._rows_of(self._saved)
            if len(rows):
                self._table.append(rows)
            if self._saved is not None and self._saved.epochs:
                self._epochs.append(Rows(self._saved.epochs))
            if self._options.log is not None:
                self._log = self._open_log(self._options.log)
            if self._log is not None:
                undo.callback(self._log.suspend, "failure")
            if self._checkpoints is not None:  # from now on it knows of the log
                self._checkpoints.save(self._snapshot())
            if self._log is not None:
                step, epochs = self._course.loop.step, self._epochs.columns()
                self._log.begin(rows, epochs, step, self._leaves)
            self._course.judge()
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log and save, whatever happened."""
        if error is not None:
            self.end("interrupted" if kind is KeyboardInterrupt else "stopped")
        with contextlib.ExitStack() as ending:
            self._course.close()
            if self._checkpoints is not None:
                ending.callback(self._checkpoints.close)
            if error is None:
                self._finish()
            elif self._is_whole and self._last is None:
                self._last = self._snapshot()
            self._close_log()
            if self._last is not None:
                self._saved = self._with_outcome(self._last)
                if self._checkpoints is not None:
                    self._checkpoints.save(self._saved)

    def advance(self, most: int) -> int:
        """Take one chunk of at most `most` steps; return how many were taken in all."""
        course = self._course
        if course.status is None:
            if self._log is not None:
                most = min(most, self._log.longest_chunk(course.loop.step))
            self._is_whole = False
            self._record(course.advance(most))
            course.judge()
            if isinstance(course.loop, DataLoop):
                self._end_epoch(course.loop)
            self._is_whole = True
            if course.status is not None:
                self._finish()
            elif self._checkpoints is not None and self._checkpoints.is_due:
                self._checkpoints.save(self._snapshot())
        return course.loop.step

    def end(self, status: str) -> None:
        """End the run from outside, unless it has ended already."""
        self._course.end(status)

    def result(self) -> OptimizeResult:
        """Return what came out."""
        assert self._saved is not None
        directory = None if self._log is None else self._log.directory
        return result_of(self._saved, self.objective, directory)

    def finished(self) -> OptimizeResult | None:
        """Return the result of this very run, if a checkpoint says that it has ended.

        Variables are put there. Only if some are not named, `f` is traced to find them.
        """
        if not self._is_over:
            return None
        assert self._saved is not None
        if not self.objective.variables or self._saved.loop.facts["has_others"]:
            with self.compiling():
                self._course.go_on(self._saved.facts, self._saved.loop)
        saved = replace(self._saved, options=self._call())
        result = result_of(saved, self.objective, self._logged_in(saved))
        self.objective.assign(tf.nest.flatten(result.x))
        return result

    def _record(self, rows: Rows) -> None:
        if len(rows):
            self._table.append(rows)
            if self._log is not None:
                self._log.rows(rows, self._course.loop.step, self._leaves)

    def _finish(self) -> None:
        """Keep what is due at the end; after the first time, nothing is."""
        if self._last is None:
            # An optimizer goes on from its point, not from the average of several.
            self._last = self._snapshot()
        self._record(self._course.loop.finish())
        if self._course.loop.code == NONFINITE:
            self._course.status = "nonfinite"

    def _end_epoch(self, loop: DataLoop) -> None:
        """If an epoch is over, keep its row, and see whether it is the last."""
        assert self._training is not None
        loop.require_no_error()
        if not loop.is_over or loop.code != RUNNING:
            return
        if loop.batch == 0:  # the new epoch has no batch
            self.end("data")
            return
        row = self._training.end_epoch(loop, self.objective.point_argument())
        self._epochs.append(Rows({name: np.array([row[name]]) for name in row}))
        if self._log is not None:
            self._log.epoch(row)
        status = self._training.status(loop, row)
        self._course.status = status or self._course.status

    # --- going on ---

    def _count_from(self, result: OptimizeResult) -> None:
        """Go on from a result: as it did, or from its point with another method."""
        saved: Saved = result.state
        there = saved.facts["problem"]
        self._saved, self._is_alike = saved, there["method"] == self._problem["method"]
        names = ["x", "has_aux", "data"]
        if self._is_alike:
            names += ["bounds", "constraints"]
        here = {name: self._problem[name] for name in names}
        check_same(there, here, "A result")
        trained, position = self._training, saved.loop.facts.get("position")
        if trained is not None and trained.epochs is not None and position:
            self._training = replace(trained, epochs=trained.epochs + position[0])
        since = Since(result.nit, result.nfev, result.seconds)
        self._course.count_from(saved.facts, since, alike=self._is_alike)

    def _find_checkpoint(self, checkpoints: Checkpoints) -> None:
        saved = checkpoints.newest()
        if saved is not None:
            check_same(saved.facts["problem"], self._problem, f"{checkpoints.path}")
            self._saved, self._is_alike, self._is_resumed = saved, True, True
            # What may be another function is evaluated, and refused if it is one.
            alike = {"limits": self._limits(), "code": self._code}
            is_same = all(saved.facts.get(name) == alike[name] for name in alike)
            self._is_over = saved.has_ended and is_same

    def _limits(self) -> dict[str, Any]:
        """Return how far it may go, in JSON."""
        epochs = None if self._training is None else self._training.epochs
        return {**self._course.limits, "epochs": epochs}

    def _go_on(self, saved: Saved) -> None:
        """Go to where the run was; if it was of another function, change nothing."""
        objective, course = self.objective, self._course
        if not objective.variables and self._training is None:  # they are to be found
            course.begin()
        with objective.put_back_on_error():
            if self._is_alike:
                course.go_on(saved.facts, saved.loop)
                row, fun = course.loop.at.row, course.loop.at.row["fun"]
                if course.loop.repeats:
                    row = course.loop.turns.evaluate().row
            else:
                assert saved.outcome is not None
                fun = saved.outcome.fun
                objective.assign(saved.outcome.x)
                course.begin()
                row = course.loop.at.row if course.loop.repeats else {"fun": fun}
            check_continues(saved.history, course.loop.at.row, row["fun"], fun)
            if self._is_resumed and course.loop.repeats:
                # Near a minimum of 0, twice the function has the value of it.
                check_began(self._began, saved.facts["began"], row["fun"].dtype)

    def _rows_of(self, saved: Saved) -> Rows:
        """Return the rows of a run to go on with, but those that are made again.

        Over data, the last one is that of the batch which the next step takes.
        """
        rows, loop = Rows(saved.history), saved.loop.facts
        if not self._is_alike or loop.get("has_row", True):
            return rows
        return rows.first(int(np.searchsorted(rows.columns["step"], loop["step"])))

    def _snapshot(self) -> Saved:
        facts = {
            "problem": self._problem,
            "limits": self._limits(),
            "code": self._code,
            "began": self._began,
            "log": None if self._log is None else self._log.directory.name,
            **self._course.facts(),
        }
        history, epochs = self._table.columns(), self._epochs.columns()
        return Saved(facts, self._course.loop.snapshot(), history, epochs)

    def _with_outcome(self, saved: Saved) -> Saved:
        """Return the same with what came out, and with how it was called."""
        loop = self._course.loop
        x, grad = self._leaves()
        options = self._call() if self._tells and saved.loop.is_whole else None
        outcome = Outcome(loop.at.row["fun"], x, grad)
        facts = {
            **saved.facts,
            **self._course.facts(),
            "nit": loop.step,
            "nfev": loop.evaluations,
            "seconds": loop.seconds,
        }
        return Saved(
            facts,
            saved.loop,
            self._table.columns(),
            self._epochs.columns(),
            outcome,
            options,
        )

    def _call(self) -> Options:
        """Return how to call it again, with the variables that were found."""
        wrt = self._options.wrt
        if wrt is None and not self.objective.takes_values:
            wrt = self.objective.template
        # What is large, or what no pickle takes, is to be given again.
        again = ("data", "validation", "constraints", "log")
        left_out: dict[str, Any] = dict.fromkeys(again)
        return replace(self._options, wrt=wrt, checkpoint=None, **left_out)

    # --- the log ---

    def _leaves(self) -> tuple[list[Any], list[Any]]:
        """Return the point and the gradient there, leaf by leaf."""
        loop = self._course.loop
        return loop.point(), loop.turns.gradient(loop.at)

    def _facts(self) -> dict[str, Any]:
        """Return what the log says about the run."""
        options, trained = self._options, self._training
        rules = vars(options.stopping).items()
        return {
            "problem": self.objective.name,
            "learning_rate": options.learning_rate,
            "steps": None if self.total >= ENDLESS else self.total,
            **({} if trained is None else trained.facts()),
            **{name: value for name, value in rules if value is not None},
            "jit": options.jit,
        }

    def _open_log(self, log: Run | str | PathLike[str]) -> Log | None:
        resumed = None
        if self._is_resumed and self._saved is not None and not self._saved.has_ended:
            resumed = self._logged_in(self._saved)
        return open_log(
            log,
            self._name,
            self.objective,
            self._facts(),
            STEPS if self.planned is None else self.planned,
            int(self._options.every),
            resumed,
            self._course.loop.step,
        )

    def _logged_in(self, saved: Saved) -> Path | None:
        """Return the directory in which a checkpoint's run was logged, if it is there.

        Only its name is saved, so that logs may be moved.
        """
        log, name = self._options.log, saved.facts["log"]
        if isinstance(log, Run):
            return log.directory
        if log is None or name is None or not (Path(log) / name).is_dir():
            return None
        return Path(log) / name

    def _close_log(self) -> None:
        if self._log is None:
            return
        if self._checkpoints is not None and self.status in UNFINISHED:
            self._log.suspend(self.status or "")
            return
        loop = self._course.loop
        self._log.close(
            self.status or "",
            x=self.objective.pack(loop.point()),
            fun=float(loop.at.row["fun"]),
            grad_norm=float(loop.at.row["grad_norm"]),
            nit=loop.step,
            nfev=loop.evaluations,
            message=self._course.message(),
        )
