"""What a minimisation gives back: SciPy's fields, the history, a table and a plot."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfgrad.nested import Nest, named_leaves
from tfgrad.optimize.history import History

if TYPE_CHECKING:
    from tfgrad.runs.plots import Picture


@dataclass(frozen=True)
class State:
    """Where a minimisation is after some steps.

    Attributes:
        step: How many steps were taken; 0 is the start.
        x: The point, in the structure of `x0` (of `wrt`).
        fun: The value of the objective there, in its dtype.
        grad_max: The largest |element| of the gradient there.
        seconds: The time since the start, in seconds.
        epochs: With data, arrays with one row per epoch that is over, as in the result.
        optimizer: The run's own, if it has one: a callback may set its `learning_rate`.
    """

    step: int
    x: Nest
    fun: Any
    grad_max: Any
    seconds: float
    epochs: History = field(default_factory=dict, compare=False)
    optimizer: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, repr=False)
class OptimizeResult:
    """The outcome of `minimize`.

    Attributes:
        x: The best point found, in the structure of `x0` (of `wrt`).
        fun: The value of the objective there.
        grad: The gradient there, structured like `x`.
        nit: Steps taken.
        nfev: Evaluations of the objective with its gradient, but for those of a look
            around the end, whether it is a saddle: a quarter more at most, or eight.
        success: True if `x` is a solution by the rule that `status` names.
        status: Why the run ended: "gtol", "ftol", "xtol", "target" (solutions),
            "steps", "epochs", "data" (over, and cannot be repeated), "seconds",
            "callback", "interrupted", "nonfinite", "unbounded", "precision",
            "linesearch", "trustregion", "scipy" (ended by itself), "infeasible" (so did
            it, or got no nearer, where a limit is broken), "stopped".
        message: The same as a sentence.
        history: One row per state, row 0 the start: `step`, `fun`, `grad_max` (largest
            |element|), `seconds`; the leaves of `x` while they are ten numbers or
            fewer; what `has_aux` returns, likewise.
        epochs: With data, one row per epoch that is over: `epoch`, `step`, the means of
            `fun` and of aux values over its batches, weighted by their sizes, and what
            `validation` returned.
        seconds: How long it took, in seconds, tracing included.
        directory: Where the run was logged; None if it was not.
        state: What `minimize(f, result)` goes on with: the method's memory among it.
            None if the method does not tell, or one of SciPy's was told too much to
            keep (2**25 numbers).
    """

    x: Nest
    fun: np.floating[Any]
    grad: Nest
    nit: int
    nfev: int
    success: bool
    status: str
    message: str
    history: History = field(compare=False)
    seconds: float
    directory: Path | None = None
    epochs: History = field(default_factory=dict, compare=False)
    state: Any = field(default=None, compare=False)

    def __repr__(self) -> str:
        """Return a short table."""
        width = max(len(name) for name, _ in self._table())
        return "\n".join(f"{name:>{width}}: {text}" for name, text in self._table())

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        rows = "".join(
            f"<tr><th style='text-align:right'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for name, text in self._table()
        )
        return f"<table>{rows}</table>"

    def plot(self) -> Picture:
        """Return a figure of the history: f, and in logs its gap and gradient.

        The gap is to the lowest value of the run. Needs no display; in a notebook the
        figure shows itself.
        """
        from tfgrad.runs.plots import Picture

        steps, fun = self.history["step"], self.history["fun"]
        figure = Picture(figsize=(8, 3), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(steps, fun)
        left.set(xlabel="step", ylabel="f", title="objective")
        gap = np.abs(fun - np.min(fun, initial=self.fun))
        for values, label in (
            (gap, "f - lowest f"),
            (self.history["grad_max"], "max |gradient|"),
        ):
            positive = values > 0
            right.semilogy(steps[positive], values[positive], label=label)
        right.set(xlabel="step", title="convergence")
        right.legend()
        return figure

    def _table(self) -> list[tuple[str, str]]:
        rows = [
            ("message", self.message),
            ("status", f"{self.status} (success: {self.success})"),
            ("fun", f"{self.fun:.10g}"),
        ]
        rows += [
            (name, _short(leaf)) for name, leaf in named_leaves(self.x, "x")[:SHOWN]
        ]
        hidden = len(named_leaves(self.x, "x")) - SHOWN
        if hidden > 0:
            rows.append(("x", f"and {hidden} more"))
        largest = float(self.history["grad_max"][-1])
        rows += [
            ("max |grad|", f"{largest:.3g}"),
            ("nit, nfev", f"{self.nit}, {self.nfev}"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        if self.directory is not None:
            rows.append(("logged in", str(self.directory)))
        return rows


SHOWN = 4
"""Leaves of x that the table shows."""


def _short(leaf: Any) -> str:
    array = np.asarray(leaf)
    if array.size <= 6:
        return np.array2string(array, precision=6, separator=", ").replace("\n", "")
    return f"shape {array.shape}, {array.dtype}"
