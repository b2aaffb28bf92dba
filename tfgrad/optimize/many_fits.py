"""`least_squares_many`: one model, thousands of data sets, a row for each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.forward import push_forward
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.vectorized import static_size
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, ravel, unravel
from tfgrad.optimize.blocks import WIDEST, Outcome
from tfgrad.optimize.driver import check_alone
from tfgrad.optimize.history import Array
from tfgrad.optimize.least_squares import LeastSquaresResult, check_loss
from tfgrad.optimize.many import ManyResult, run
from tfgrad.optimize.methods import losses
from tfgrad.optimize.methods.levenberg_marquardt import STATUSES, own_sentence
from tfgrad.optimize.methods.marquardt import Marquardt, triangle
from tfgrad.optimize.options import Options, require_no
from tfgrad.optimize.residuals import (
    Linear,
    ResidualEvaluator,
    Residuals,
    check_dtypes,
)
from tfgrad.optimize.rows import Starts
from tfgrad.optimize.uncertainty import OfFit, spread_of_factor

MOST_PARAMETERS = 50
"""Parameters that one fit may have: each is a stage of the compiled program."""


XLA_ROWS = 50_000
"""Fits from which on a compilation with XLA is worth its seconds: each takes some ten
steps, which are quick in the graph, too."""


@dataclass(frozen=True, repr=False, kw_only=True)
class ManyFitsResult(ManyResult):
    """The outcome of `least_squares_many`: that of `minimize_many`, and statistics.

    `fun` is half the sum of squares. What `LeastSquaresResult` says of standard errors
    holds here, too. The statistics are computed when they are first asked for.
    """

    _linear: Array
    _residuals: Callable[[int], Nest] | None
    _used: Callable[[], Array] | None
    _is_held: Array

    @functools.cached_property
    def degrees_of_freedom(self) -> Array:
        """Residuals that were not left out, less parameters; shape `[count]`."""
        return self._counts - self._linear.shape[1]

    @functools.cached_property
    def _counts(self) -> Array:
        assert self._used is not None
        return self._used()

    @functools.cached_property
    def residual_std(self) -> Array:
        """The standard deviation of the residuals of each fit, shape `[count]`."""
        freedom = self.degrees_of_freedom
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = np.where(freedom > 0, 2 * self.fun / freedom, np.nan)
        return np.sqrt(variance).astype(self.fun.dtype)

    @functools.cached_property
    def covariance(self) -> Array:
        """Of the parameters of each fit, shape `[count, n, n]`."""
        variance = self.residual_std.astype(np.float64) ** 2
        factors = self._linear[:, :, :-1]
        spread = spread_of_factor(factors, self._counts, variance, self._is_held)
        return spread.covariance().astype(self.fun.dtype)

    def _left(self, i: int) -> OfFit:
        """Return what is left of the Jacobian of one fit."""
        factor, variance = self._linear[i, :, :-1], float(self.residual_std[i]) ** 2
        return OfFit(factor, int(self._counts[i]), variance, self._is_held[i])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle no function: few can be. Single fits then have no residuals."""
        known = {"_counts": self._counts}
        return {**vars(self), **known, "_residuals": None, "_used": None}

    def _message(self, i: int) -> str:
        status = str(self.status[i])
        if status in STATUSES.values() and self._facts[status] is None:
            dtype = tf.as_dtype(self.fun.dtype)
            return own_sentence(status, dtype, float(self.fun[i]))
        return super()._message(i)

    def __getitem__(self, index: int) -> LeastSquaresResult:
        """Return the result of one fit, as `least_squares` returns it."""
        i = self._place(index)
        result: LeastSquaresResult = self._one(
            i,
            LeastSquaresResult,
            residuals=self._residuals and self._residuals(i),
            degrees_of_freedom=int(self.degrees_of_freedom[i]),
            residual_std=self.residual_std[i],
            source=self._left(i),
        )
        return result


def least_squares_many(
    residuals: Callable[..., Any],
    x0s: Nest,
    *args: Nest,
    steps: int | None = None,
    gtol: float | None = None,
    ftol: float | None = None,
    xtol: float | None = None,
    target: float | None = None,
    seconds: float | None = None,
    bounds: Any = None,
    loss: str = "linear",
    f_scale: float = 1.0,
    missing: str = "nonfinite",
    jit: bool | str = "auto",
    verify: bool = True,
    **unknown: Any,
) -> ManyFitsResult:
    """Fit one model to many sets of data, all at once, by Levenberg-Marquardt.

    Use it for thousands of pixels, spectra or channels. Each fit is what
    `least_squares` does with one row, in a form that vectorises; see `minimize_many`
    for rows, blocks and what is compiled when.

    Args:
        residuals: `residuals(x, *args)` of one problem returns model less data, a float
            array or a nest of them.
        x0s: The starts, as for `minimize_many`: of at most 50 parameters. One start
            without rows serves all.
        *args: The data, `[count, ...]` each, and what else `residuals` takes.
        steps: How many steps each fit takes at most. None means 1000, and as many once
            more, with another first step, for fits that do not arrive.
        gtol: As for `least_squares`, as are `ftol`, `xtol` and `target`; so are the
            rules without them, for each row.
        ftol: See `gtol`.
        xtol: See `gtol`.
        target: See `gtol`.
        seconds: End all fits after this time, in seconds.
        bounds: As for `minimize_many`, with or without a row for each problem.
        loss: As for `least_squares`.
        f_scale: As for `least_squares`.
        missing: What a NaN in the data of a row does: "nonfinite" makes it the status
            of that row; "drop" leaves out the residuals that it makes NaN, at most as
            many as there are NaNs among the arguments of that row.
        jit: As for `minimize_many`, but that XLA begins to pay at 50,000 rows.
        verify: As for `minimize_many`.
        **unknown: Refused with a TypeError that says what to write instead.

    Returns:
        A `ManyFitsResult`: `x`, `stderr`, `covariance`, `residual_std`, `status` and
        more, arrays with a row for each fit.

    Raises:
        InvalidArgumentError: If an argument breaks its rule, as for `minimize_many`.
        ScalarObjectiveError: If `residuals` returns anything but real float tensors.
        NoGradientError: If a path from a parameter to a residual exists, but is cut.

    Example:
        >>> import numpy as np
        >>> t = np.linspace(0.0, 4.0, 9)
        >>> rates = np.array([0.5, 1.0, 2.0])
        >>> signals = 3.0 * np.exp(-rates[:, None] * t) + 0.01 * np.sin(20 * t)
        >>> def misfit(p, signal):
        ...     return p["size"] * tf.exp(-p["rate"] * t) - signal
        >>> start = {"size": np.float64(1), "rate": np.float64(1)}
        >>> result = least_squares_many(misfit, start, signals)
        >>> print(np.round(result.x["rate"], 2), result.stderr["rate"].shape)
        [0.5 1.  2. ] (3,)

    References:
        `tfgrad.optimize.methods.marquardt`.
    """
    require_no(least_squares_many, unknown)
    check_alone(residuals)
    check_loss(loss, f_scale)
    if missing not in ("nonfinite", "drop"):
        raise InvalidArgumentError(
            "`missing` says what a NaN in the data of a row does.",
            got=f"missing={missing!r}",
            hint='missing="drop", or "nonfinite"',
        )
    own_rules = loss == "linear" and (gtol, ftol, xtol) == (None, None, None)
    options = Options(
        steps=steps, gtol=gtol, ftol=ftol, xtol=xtol, target=target, seconds=seconds,
        bounds=bounds, jit=jit, verify=verify,
    )  # fmt: skip
    rows = Starts(residuals, x0s, args)
    n = rows.x.shape[1]
    if n > MOST_PARAMETERS:
        raise InvalidArgumentError(
            f"Each of many fits has at most {MOST_PARAMETERS} parameters.",
            got=f"{n} parameters",
            hint="tfgrad.least_squares for each row, in a loop",
        )
    problem = RowResiduals(
        residuals, rows.first, None, has_aux=False, verify=verify,
        loss=loss, f_scale=float(f_scale), drops=missing == "drop",
    )  # fmt: skip
    method = Marquardt(is_open=not own_rules)
    made, outcome, sides = run(
        ManyFitsResult, problem, rows, method, options, XLA_ROWS, _is_doubtful
    )
    is_held = np.zeros(outcome.x.shape, bool)
    for side in sides:
        is_held |= outcome.x == side
    result: ManyFitsResult = made(
        _linear=outcome.linear,
        _residuals=functools.partial(_residuals, residuals, rows, outcome.x),
        _used=functools.partial(_used, problem, rows),
        _is_held=is_held,
    )
    return result


def _is_doubtful(outcome: Outcome) -> Array:
    """Return which fits may have ended at a saddle: a look at all would cost too much.

    Those are that took no step, and those that a parameter does not change there, or
    one much like another, as symmetry makes it.
    """
    n = outcome.x.shape[1]
    factor = np.abs(outcome.linear[:, :, :n])
    pivots = np.diagonal(factor, axis1=1, axis2=2)
    epsilon = np.finfo(outcome.x.dtype).eps
    least = epsilon**0.5 * np.linalg.norm(factor, axis=1)
    return (outcome.nit == 0) | np.any(pivots <= least, axis=1)


class RowEvaluator(ResidualEvaluator):
    """Residuals with a Jacobian by columns, and a triangle by Gram-Schmidt.

    Both vectorise. Few columns of many residuals are the common case.
    """

    def __init__(self, *args: Any, drops: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self._drops = drops

    def record(self, f: Callable[..., Any], arguments: tuple[Nest, ...]) -> Recording:
        """Return the residuals on a tape; count what may be missing of them."""
        leaves = [a for a in tf.nest.flatten(arguments[1:]) if a.dtype.is_floating]
        self._missing = tf.add_n([tf.constant(0), *map(count_nan, leaves)])
        return super().record(f, arguments)

    def value(
        self, recording: Recording, scale: Any
    ) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
        """Return half the sum of squares, its gradient, and the linear model."""
        check_dtypes(recording)
        residuals = ravel(recording.outputs)
        recording.require_sound()
        push = push_forward(recording)
        sources = recording.sources
        n = static_size(sources) or 0
        units = [tf.constant(unit, residuals.dtype) for unit in np.eye(n)]
        columns = tf.stack([ravel(push(unravel(unit, sources))) for unit in units])
        if self._drops:
            is_missing = tf.math.is_nan(residuals)
            count = count_nan(residuals)
            is_right = (count <= self._missing) & (count < tf.size(residuals))
            zero = tf.zeros([], residuals.dtype)
            residuals = tf.where(is_missing, zero, residuals)
            columns = tf.where(is_missing, zero, columns)
        value = losses.cost(residuals, *self.loss)
        if self._drops:
            value = tf.where(is_right, value, float("nan"))
        if self.loss[0] != "linear":
            residuals, weights = losses.weighted(residuals, *self.loss)
            columns *= weights
        slope = tf.reduce_sum(columns * residuals, 1)
        both = tf.concat([columns, residuals[None]], 0)
        linear = Linear(triangle(both), recording.output)
        return value, unravel(slope, sources), linear


class RowResiduals(Residuals):
    """Residuals of one row of many, of which those that are missing may be dropped."""

    kind = RowEvaluator

    def __init__(self, *args: Any, drops: bool, **options: Any) -> None:
        self.options = {"drops": drops}
        super().__init__(*args, **options)


def count_nan(tensor: tf.Tensor) -> tf.Tensor:
    """Return how many elements are NaN, shape `[]`."""
    return tf.reduce_sum(tf.cast(tf.math.is_nan(tensor), tf.int32))


def _residuals(f: Any, rows: Starts, x: Array, index: int) -> Nest:
    """Return the residuals of one fit, with NaN where they are missing."""
    leaves = unravel(tf.constant(x[index]), tf.nest.flatten(rows.first))
    point = tf.nest.pack_sequence_as(rows.first, leaves)
    return f(point, *rows.arguments(index))


def _used(problem: RowResiduals, rows: Starts) -> Array:
    """Return how many residuals of each fit were not left out."""
    first = problem.evaluate(tf.nest.flatten(rows.first), rows.data)
    used = np.full(
        rows.count, static_size(tf.nest.flatten(first.linear.residuals)) or 0
    )
    if not problem.options["drops"]:
        return used
    floats = [array for array in rows.arrays if array.dtype.kind == "f"]
    holes = [np.any(np.isnan(a.reshape(rows.count, -1)), axis=1) for a in floats]
    with_holes = np.flatnonzero(np.any([np.zeros(rows.count, bool), *holes], axis=0))

    def missing(data: list[tf.Tensor]) -> tf.Tensor:
        row = tf.nest.pack_sequence_as(rows.data, data)
        found = [count_nan(r) for r in tf.nest.flatten(problem.f(rows.first, *row))]
        return tf.add_n(found)

    def count(data: list[tf.Tensor]) -> tf.Tensor:
        return tf.vectorized_map(missing, data, warn=False)

    counted = tf.function(count, reduce_retracing=True)
    for part in np.array_split(with_holes, -(-len(with_holes) // WIDEST) or 1):
        if len(part):
            used[part] -= counted([tf.constant(a[part]) for a in rows.arrays]).numpy()
    return used
