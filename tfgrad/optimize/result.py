"""What a minimisation gives back: SciPy's fields, the history, a table and a plot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.report import html_table
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, named_leaves, unravel
from tfgrad.optimize.history import History
from tfgrad.runs.values import as_array

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
        nfev: Evaluations of the objective with its gradient, without those of the test
            whether the end is a saddle: at most a quarter more, or eight.
        success: True if `x` is a solution by the rule that `status` names.
        status: Why the run ended: "converged", "gtol", "ftol", "xtol", "target"
            (solutions), "steps", "epochs", "data" (over, and cannot be repeated),
            "seconds", "callback", "interrupted", "nonfinite", "unbounded",
            "linesearch", "trustregion", "scipy" (SciPy's method ended by itself),
            "infeasible" (it ended at a point that breaks a limit, or got no nearer to
            the limits), "stopped". Each is explained in `docs/choosing-a-method.md`.
        message: The same as a sentence.
        history: One row per state, row 0 the start: `step`, `fun`, `grad_max` (largest
            |element|), `seconds`; `expected` (the fall of f that the method expects)
            or `learning_rate`, if the method has it; the leaves of `x` while they are
            ten numbers or fewer; what `has_aux` returns, likewise.
        epochs: With data, one row per epoch that is over: `epoch`, `step`, the means of
            `fun` and of aux values over its batches, weighted by their sizes, and what
            `validation` returned.
        seconds: How long it took, in seconds, tracing included.
        directory: Where the run was logged; None if it was not.
        state: What `minimize(f, result)` goes on with, the method's memory included.
            None if it could not be kept.
        source: What `covariance` needs for second derivatives; a pickle has none.
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
    source: Any = field(default=None, compare=False)

    @property
    def covariance(self) -> np.ndarray[Any, Any]:
        """The covariance of the parameters, where f is a negative log likelihood.

        It is the inverse of the Hessian of f at `x`, in the order of
        `tf.nest.flatten(x)`, each leaf row by row: shape `[n, n]`, in the dtype of x.
        NaN in the rows of parameters that are at a bound: nothing is known of their
        errors, and the others' are those of a fit in which they are fixed. Computed
        when it is first asked for, as `stderr`: f is then traced anew, and evaluated
        with its Hessian; variables are put to `x` for that, and back.

        f has to be the sum over the data of -log p, not their mean, with all that
        depends on x. For half a sum of squares of residuals divided by their known
        errors it is that, too.

        Raises:
            InvalidArgumentError: If the Hessian is not positive, with its smallest
                eigenvalue; if f is random, over `data=` or under constraints, or is not
                known any more: what it reads has changed, or the result was pickled.

        >>> import tfgrad
        >>> def likelihood(x):  # of two numbers, known to 1 and 2
        ...     return (x[0] - 3.0) ** 2 / 2 + (x[1] - 5.0) ** 2 / 8
        >>> result = tfgrad.minimize(likelihood, [0.0, 0.0])
        >>> print(result.covariance.round(3).tolist(), result.stderr.numpy().round(3))
        [[1.0, 0.0], [0.0, 4.0]] [1. 2.]
        """
        return self._spread.covariance().astype(self._dtype)

    @property
    def stderr(self) -> Nest:
        """The standard error of each parameter, structured like `x`.

        The root of its variance: see `covariance`, also for what is raised.
        """
        errors, leaves = self._spread.errors(), tf.nest.flatten(self.x)
        parts = unravel(tf.constant(errors), leaves)
        pairs = zip(parts, leaves, strict=True)
        return tf.nest.pack_sequence_as(
            self.x, [tf.cast(part, leaf.dtype) for part, leaf in pairs]
        )

    def error_of(self, g: Callable[..., Any]) -> Nest:
        """Return the standard error of any function of the parameters.

        With J the Jacobian of g at `x` and S the covariance, the root of the diagonal
        of J S J': to first order, as for every standard error. `error_of(lambda p:
        model(p, t))` is the band of a fitted curve; NaN where g depends on a parameter
        at a bound, infinite where it does on what the data do not determine.

        Args:
            g: Takes what has the structure of `x`, returns a float tensor or a nest of
                them; or, if variables were minimised over, reads those by itself,
                without an argument. Written in TensorFlow.

        Returns:
            The errors, structured like what `g` returns, in its dtypes and units.

        Raises:
            InvalidArgumentError: As of `covariance`.
            NoGradientError: If a path from a parameter to what g returns is cut.

        >>> import tfgrad
        >>> y = np.array([1.2, 0.9, 1.5, 0.8])
        >>> fit = tfgrad.least_squares(lambda mean: mean - y, np.float64(0.0))
        >>> print(f"{float(fit.stderr):.4f} {float(fit.error_of(tf.exp)):.4f}")
        0.1581 0.4750

        References:
            Seber and Wild (1989), Nonlinear Regression, section 5.1.
        """
        variables = getattr(self.source, "variables", None)
        _check_eager()
        return self._spread.error_of(g, self.x, variables)

    @functools.cached_property
    def _spread(self) -> Any:
        if self.source is None:
            raise InvalidArgumentError(
                "The errors of a result are computed from its function.",
                got="a result without its function, as one from a pickle is",
                hint="minimize(f, result.x), and the errors of that result",
            )
        _check_eager()
        return self.source.spread(self)

    @property
    def _dtype(self) -> Any:
        leaves = [as_array(leaf) for leaf in tf.nest.flatten(self.x)]
        return np.result_type(*leaves)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: what was computed when asked for is no part."""
        return {name: each for name, each in vars(self).items() if name != "_spread"}

    def __repr__(self) -> str:
        width = max(len(name) for name, _ in self._table())
        return "\n".join(f"{name:>{width}}: {text}" for name, text in self._table())

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return html_table(self._table())

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


def _check_eager() -> None:
    """Refuse to compute errors, which takes NumPy, while a graph is traced."""
    if not tf.executing_eagerly():
        raise InvalidArgumentError(
            "Errors are computed outside of what is traced.",
            got="errors of a result that are asked for in a tf.function",
            hint="error = result.stderr, or result.error_of(g), before it is called",
        )


SHOWN = 4
"""Leaves of x that the table shows."""


def _short(leaf: Any) -> str:
    array = as_array(leaf)
    if array.size <= 6:
        return np.array2string(array, precision=6, separator=", ").replace("\n", "")
    return f"shape {array.shape}, {array.dtype}"
