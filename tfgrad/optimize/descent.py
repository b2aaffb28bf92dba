"""A minimisation under way: the loop, its history, its log, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Self

import numpy as np

from tfgrad.derivatives.tracing import as_written
from tfgrad.differences import EPSILONS
from tfgrad.nested import Nest
from tfgrad.optimize.log import Log, check_log
from tfgrad.optimize.loop import LOOP_STEPS, Loop, Rows
from tfgrad.optimize.objective import Objective
from tfgrad.optimize.result import History, OptimizeResult
from tfgrad.optimize.stopping import (
    GIVEN_UP,
    RUNNING,
    SOLUTIONS,
    STATUSES,
    UNBOUNDED,
    Stopping,
)
from tfgrad.optimize.turns import make_turns
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
    """

    step: int
    x: Nest
    fun: Any
    grad_norm: Any
    seconds: float


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

    Arguments are those of `minimize`, checked.

    Attributes:
        status: Why it ended; None while it goes on. May be set, to end it.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        *,
        wrt: Nest,
        method: Any,
        learning_rate: Any,
        stopping: Stopping,
        steps: int,
        seconds: float | None,
        has_aux: bool,
        jit: bool | str,
        log: Run | str | PathLike[str] | None,
    ) -> None:
        """Check what can be checked; nothing is traced or written."""
        check_log(log)
        self._make_turns = make_turns(method, learning_rate)
        self._objective = Objective(f, x0, wrt, has_aux=has_aux)
        self._stopping = stopping
        self._steps = steps
        self._seconds = seconds
        self._jit = jit
        self._log_to = log
        self._facts = {
            "problem": self._objective.name,
            "method": str(method),
            "learning_rate": learning_rate,
            "steps": steps,
            **{k: v for k, v in vars(stopping).items() if v is not None},
            "jit": jit,
        }
        self._log: Log | None = None
        self._table = _Table()
        self.status: str | None = None

    def __enter__(self) -> Self:
        """Evaluate the start and, if it is to be logged, open the log."""
        self._loop = Loop(
            self._objective,
            self._make_turns,
            self._stopping,
            steps=self._steps,
            jit=self._jit,
        )
        if self._log_to is not None:
            name = self._loop.turns.name
            self._log = Log(
                self._log_to, name, self._objective, self._facts, self._steps
            )
        self._keep(self._loop.here())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log, whatever happened."""
        if error is not None and self.status is None:
            self.status = "interrupted" if kind is KeyboardInterrupt else "stopped"
        if error is None and self._loop.turns.finish():
            self._loop.evaluate()
        if self._log is not None:
            self._log.close(self.status or "", **self._outcome())

    def compiling(self) -> AbstractContextManager[None]:
        """Return the context in which `with` and `advance` are to be called."""
        return as_written(optimized=self._steps >= LOOP_STEPS)

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
        )

    def advance(self, most: int) -> int:
        """Take one chunk of at most `most` steps; return how many were taken in all."""
        loop = self._loop
        if self.status is None:
            self._keep(loop.advance(min(most, self._steps - loop.step)))
        return loop.step

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
            seconds=float(self._loop.seconds),
            directory=self._log.directory if self._log else None,
        )

    def _keep(self, rows: Rows) -> None:
        self._table.append(rows)
        if self._log is not None and len(rows):
            self._log.rows(rows, self._leaves)
        if self._loop.code == GIVEN_UP:
            self.status = self._why_given_up()
        elif self._loop.code != RUNNING:
            self.status = STATUSES[self._loop.code]
        elif self._loop.step >= self._steps:
            self.status = "steps"
        elif self._seconds is not None and self._loop.seconds >= self._seconds:
            self.status = "seconds"

    def _why_given_up(self) -> str:
        """Return "precision" where rounding hides what a step would change."""
        row = self._loop.at.row
        fun, norm = float(row["fun"]), float(row["grad_norm"])
        hidden = EPSILONS[row["fun"].dtype] ** 0.5 * max(1.0, abs(fun))
        return "precision" if norm <= hidden else "linesearch"

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
        """Return the sentence for a status."""
        step, rules = self._loop.step, self._loop.stopping
        if status == "nonfinite":
            return self._nonfinite_message()
        return {
            "gtol": f"No element of the gradient is larger than {rules.gtol}.",
            "ftol": f"The last step changed f by less than {rules.ftol}, relatively.",
            "xtol": f"The last step was shorter than {rules.xtol}, relatively.",
            "target": f"f has reached the target {rules.target}.",
            "steps": f"All {step} steps were taken; no rule says this is a solution.",
            "unbounded": f"f fell below {UNBOUNDED:g}: it seems to have no minimum.",
            "precision": "Rounding hides what any further step would change.",
            "linesearch": "No step downhill was found; f may have a kink here.",
            "seconds": f"The {self._seconds} seconds were over after {step} steps.",
            "callback": f"The callback asked to stop after step {step}.",
            "interrupted": f"Interrupted after step {step}; all until there is kept.",
            "stopped": f"Left after step {step}.",
        }[status]

    def _nonfinite_message(self) -> str:
        bad = {name: c[-1] for name, c in self._loop.nonfinite.columns.items()}
        if np.isfinite(bad["fun"]):
            what, value = "an element of the gradient", bad["grad_norm"]
        else:
            what, value = "f", bad["fun"]
        if bad["step"] == 0:
            return f"At the start, {what} is {value}: no step was taken."
        return (
            f"In step {self._loop.step + 1}, {what} became {value}; "
            f"x is the last finite point, after step {self._loop.step}."
        )
