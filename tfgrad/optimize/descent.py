"""A minimisation under way: the loop, its history, its log, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np

from tfgrad.derivatives.tracing import as_written
from tfgrad.nested import Nest
from tfgrad.optimize.data_loop import DataLoop
from tfgrad.optimize.epochs import ENDLESS, STEPS, training
from tfgrad.optimize.limits import require_support
from tfgrad.optimize.log import Log, check_log, open_log
from tfgrad.optimize.loop import LOOP_STEPS, NOTHING, Loop, Rows, Since
from tfgrad.optimize.objective import Objective
from tfgrad.optimize.options import Options
from tfgrad.optimize.result import History, OptimizeResult
from tfgrad.optimize.scipy_loop import SciPyLoop
from tfgrad.optimize.sentences import sentence
from tfgrad.optimize.stages import HANDS_OVER, make_stages
from tfgrad.optimize.stopping import (
    GIVEN_UP,
    NONFINITE,
    RUNNING,
    SOLUTIONS,
    STATUSES,
)


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


class _Table:
    """Rows, appended in place: the end of a long run must not wait for a copy."""

    def __init__(self) -> None:
        self._columns: History = {}
        self._count = 0

    def append(self, rows: Rows) -> None:
        """Add rows; memory doubles when it is full."""
        count = self._count + len(rows)
        for name, column in rows.columns.items():
            kept = self._columns.setdefault(name, column[:0])
            if len(kept) < count:
                shape = (max(count, 2 * self._count), *column.shape[1:])
                self._columns[name] = np.empty(shape, column.dtype)
                self._columns[name][: self._count] = kept[: self._count]
            self._columns[name][self._count : count] = column
        self._count = count

    def columns(self) -> History:
        """Return the rows so far, by column."""
        return {name: column[: self._count] for name, column in self._columns.items()}


class Descent:
    """One minimisation: advance it until it has a status, then take its result.

    Args:
        f: As for `minimize`.
        x0: As for `minimize`.
        options: The others.
        objective: What `f` is part of, if not the objective itself.

    Attributes:
        status: Why it ended; None while it goes on.
        total: How many steps it may take.
        planned: The same, known beforehand; None if the data decides.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        options: Options,
        objective: Objective | None = None,
    ) -> None:
        """Check what can be checked; nothing is traced or written."""
        check_log(options.log)
        self._options = options
        self._stages = make_stages(
            options.method, options.learning_rate, has_data=options.data is not None
        )
        for stage in self._stages:
            require_support(
                stage.name, stage.scipy, options.bounds, options.constraints
            )
        self._name = "+".join(stage.name for stage in self._stages)
        self._objective = objective or Objective(
            f,
            x0,
            options.wrt,
            has_aux=options.has_aux,
            jit=options.data is not None and options.jit is True,
        )
        # `_left` is for the stages without a number of steps of their own.
        self._training, self._left = training(options, self._objective)
        self._log: Log | None = None
        self._table, self._epochs = _Table(), _Table()
        self._taken: list[tuple[str, int]] = []
        self.total = sum(stage.steps or 0 for stage in self._stages)
        self.total += self._left if any(s.steps is None for s in self._stages) else 0
        self.planned: int | None = self.total
        if self._training is not None:
            self.planned = self._training.planned(self.total)
        self.status: str | None = None

    def __enter__(self) -> Self:
        """Evaluate the start and, if it is to be logged, open the log."""
        self._begin(0, NOTHING)
        if (log := self._options.log) is not None:
            steps = STEPS if self.planned is None else self.planned
            every = int(self._options.every)
            self._log = open_log(
                log, self._name, self._objective, self._facts(), steps, every
            )
        self._record(self._loop.start())
        self._judge()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log, whatever happened."""
        if error is not None:
            self.end("interrupted" if kind is KeyboardInterrupt else "stopped")
        self._close()
        if error is None:
            self._finish()
        if self._log is not None:
            self._log.close(self.status or "", **self._outcome())

    def compiling(self) -> AbstractContextManager[None]:
        """Return the context in which `with` and `advance` are to be called."""
        return as_written(optimized=(self.planned or ENDLESS) >= LOOP_STEPS)

    @property
    def state(self) -> State:
        """Where it is."""
        at = self._loop.at
        return State(
            step=self._loop.step,
            x=self._objective.pack(self._loop.point()),
            fun=at.row["fun"].numpy(),
            grad_norm=at.row["grad_norm"].numpy(),
            seconds=self._loop.seconds,
            epochs=self._epochs.columns(),
        )

    def advance(self, most: int) -> int:
        """Take one chunk of at most `most` steps; return how many were taken in all."""
        if self.status is None:
            most = min(most, self._last - self._loop.step)
            if self._log is not None:
                most = min(most, self._log.longest_chunk(self._loop.step))
            self._record(self._loop.advance(most))
            self._judge()
            if isinstance(self._loop, DataLoop):
                self._end_epoch(self._loop)
            if self.status is not None:
                self._finish()
        return self._loop.step

    def end(self, status: str) -> None:
        """End the run from outside, unless it has ended already."""
        if self.status is None:
            self.status = status

    def result(self) -> OptimizeResult:
        """Return what came out."""
        at = self._loop.at
        status = self.status or ""
        fun: Any = at.row["fun"].numpy()
        return OptimizeResult(
            x=self._objective.pack(self._loop.point()),
            fun=fun,
            grad=self._objective.pack(self._loop.turns.gradient(at)),
            nit=self._loop.step,
            nfev=self._loop.evaluations,
            success=status in SOLUTIONS,
            status=status,
            message=self._message(status),
            history=self._table.columns(),
            epochs=self._epochs.columns(),
            seconds=float(self._loop.seconds),
            directory=self._log.directory if self._log else None,
        )

    def _begin(self, index: int, since: Since) -> None:
        """Start a stage where the variables are."""
        stage = self._stages[index]
        share = self._left if stage.steps is None else stage.steps
        what: Any = self._objective, stage.make_turns, self._options.stopping
        self._loop: Loop | DataLoop
        if self._training is not None:
            self._loop = DataLoop(*what, source=self._training.source)
        elif stage.scipy is not None:
            self._loop = SciPyLoop(
                *what,
                method=stage.scipy,
                bounds=self._options.bounds,
                constraints=self._options.constraints,
                steps=share,
                since=since,
            )
        else:
            jit = self._options.jit
            self._loop = Loop(*what, steps=share, jit=jit, since=since)
        self._stage, self._first, self._last = index, since.step, since.step + share

    def _facts(self) -> dict[str, Any]:
        """Return what the log says about the run."""
        options, trained = self._options, self._training
        rules = vars(options.stopping).items()
        return {
            "problem": self._objective.name,
            "learning_rate": options.learning_rate,
            "steps": None if self.total == ENDLESS else self.total,
            **({} if trained is None else trained.facts()),
            **{name: value for name, value in rules if value is not None},
            "jit": options.jit,
        }

    def _record(self, rows: Rows) -> None:
        if len(rows):
            self._table.append(rows)
            if self._log is not None:
                self._log.rows(rows, self._leaves)

    def _close(self) -> None:
        if isinstance(self._loop, SciPyLoop):
            self._loop.close()

    def _finish(self) -> None:
        """Keep what is due at the end; after the first time, nothing is."""
        self._record(self._loop.finish())
        if self._loop.code == NONFINITE:
            self.status = "nonfinite"

    def _end_epoch(self, loop: DataLoop) -> None:
        """If an epoch is over, keep its row, and see whether it is the last."""
        assert self._training is not None
        loop.require_no_error()
        if not loop.is_over or loop.code != RUNNING:
            return
        if loop.batch == 0:  # the new epoch has no batch
            self.end("data")
            return
        row = self._training.end_epoch(loop, self._objective.point_argument())
        self._epochs.append(Rows({name: np.array([row[name]]) for name in row}))
        if self._log is not None:
            self._log.epoch(row)
        self.status = self._training.status(loop, row) or self.status

    def _judge(self) -> None:
        """Say why it ended, if it did; a stage that is over hands over to the next."""
        self.status = self._verdict()
        while self._hands_over():
            self._hand_over()
            self.status = self._verdict()

    def _verdict(self) -> str | None:
        loop, seconds = self._loop, self._options.seconds
        if own := self._own_words():
            return own[0]
        if loop.code == GIVEN_UP:
            return loop.turns.failure
        if loop.code != RUNNING:
            return STATUSES[loop.code]
        if seconds is not None and loop.seconds >= seconds:
            return "seconds"
        return "steps" if loop.step >= self._last else None

    def _hands_over(self) -> bool:
        """Return whether the stage is over, the run is not, and another is left.

        The `gtol` that a pure method has of itself ends its stage, the user's the run.
        """
        is_own_rule = self.status == "gtol" and self._options.gtol is None
        if self.status not in HANDS_OVER and not is_own_rule:
            return False
        return self._stage + 1 < len(self._stages)

    def _hand_over(self) -> None:
        loop, stage = self._loop, self._stages[self._stage]
        self._taken.append((stage.name, loop.step - self._first))
        if stage.steps is None:
            self._left -= loop.step - self._first
        assert isinstance(loop, Loop)  # there are no chains over data
        self._close()
        loop.turns.finish()
        self._begin(self._stage + 1, loop.so_far())

    def _own_words(self) -> tuple[str, str] | None:
        """Return the status and the sentence of a method that gave up and says why."""
        return self._loop.why() if isinstance(self._loop, Loop) else None

    def _leaves(self) -> tuple[list[Any], list[Any]]:
        """Return the point and the gradient there, leaf by leaf."""
        return self._loop.point(), self._loop.turns.gradient(self._loop.at)

    def _outcome(self) -> dict[str, Any]:
        at = self._loop.at.row
        return {
            "x": self._objective.pack(self._loop.point()),
            "fun": float(at["fun"]),
            "grad_norm": float(at["grad_norm"]),
            "nit": self._loop.step,
            "nfev": self._loop.evaluations,
            "message": self._message(self.status or ""),
        }

    def _message(self, status: str) -> str:
        """Return the sentence for a status, and how many steps each stage took."""
        loop, seconds = self._loop, self._options.seconds
        why = loop.blame if status == "nonfinite" else ""
        said = sentence(status, loop.step, loop.stopping, seconds, loop.nonfinite, why)
        if isinstance(loop, SciPyLoop):
            said = loop.says.get(status, said)
        own = self._own_words()
        if own and own[0] == status:
            said = own[1]
        if not self._taken:
            return said
        name = self._stages[self._stage].name
        taken = [*self._taken, (name, loop.step - self._first)]
        return f"{said} Steps: {', '.join(f'{n} {count}' for n, count in taken)}."
