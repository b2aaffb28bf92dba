"""`least_squares`: fit a model to data, and say how well the parameters are known."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, named_leaves, ravel
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.driver import Driver
from tfgrad.optimize.history import Array
from tfgrad.optimize.methods.levenberg_marquardt import MOST_FOR_QR, LevenbergMarquardt
from tfgrad.optimize.methods.losses import LOSSES
from tfgrad.optimize.minimize import run
from tfgrad.optimize.options import Options, require_no
from tfgrad.optimize.residuals import Residuals, linear_size
from tfgrad.optimize.result import OptimizeResult, State
from tfgrad.optimize.uncertainty import OfFit, held, source_of
from tfgrad.runs.run import Run

MOST_SHOWN = 12
"""Parameters that the table of a result shows one by one."""


@dataclass(frozen=True, repr=False, kw_only=True)
class LeastSquaresResult(OptimizeResult):
    """The outcome of `least_squares`: that of `minimize`, and what statistics ask for.

    `fun` is half the sum of squares. The standard errors hold where the model is nearly
    linear within them, and the errors of the data are independent and of one size; for
    data of known errors, divide the residuals by those.

    Attributes:
        residuals: At `x`, structured as the function returns them; None with `data`.
        degrees_of_freedom: Residuals less parameters, m - n; a parameter whose two
            bounds are equal is none.
        residual_std: The standard deviation of the residuals, the root of their sum of
            squares over the degrees of freedom; NaN if there are none.
    """

    residuals: Nest
    degrees_of_freedom: int
    residual_std: np.floating[Any]

    @property
    def covariance(self) -> Array:
        """The covariance of the parameters, `residual_std**2 * inv(J'J)`.

        In the order of `tf.nest.flatten(x)`, each leaf row by row: shape `[n, n]`.
        Where the errors of the data were known, divide it by `residual_std**2` (SciPy's
        `absolute_sigma`). Infinite in the rows of parameters that the data do not
        determine, and in all rows if there are no degrees of freedom; NaN in those of
        parameters that are at a bound. Computed when it is asked for, as `stderr` and
        `error_of`: of up to 100 parameters from what the fit has left, of more from a
        Jacobian, or where that has more than 2**25 elements from products with J'J,
        which know half of the digits.

        Raises:
            InvalidArgumentError: If there are more than 2**25 pairs of parameters; or,
                of more than 100 parameters, if the residuals are not known any more:
                what they read has changed, or the result was pickled.
        """
        return super().covariance

    def _table(self) -> list[tuple[str, str]]:
        rows = super()._table()
        if getattr(self.source, "fit", self.source) is not None:
            shown = _with_errors(self.x, self.stderr)
            first = next(i for i, (name, _) in enumerate(rows) if name[0] == "x")
            others = [row for row in rows[first:] if row[0][0] != "x"]
            rows = rows[:first] + shown + others
        spread = (
            f"{self.residual_std:.6g}, {self.degrees_of_freedom} degrees of freedom"
        )
        return [*rows[:3], ("residual std", spread), *rows[3:]]


def least_squares(
    residuals: Callable[..., Any],
    x0: Nest | None = None,
    *,
    wrt: Nest | None = None,
    data: Any = None,
    batch_size: int | None = None,
    steps: int = 1000,
    gtol: float | None = None,
    ftol: float | None = None,
    xtol: float | None = None,
    target: float | None = None,
    seconds: float | None = None,
    bounds: Any = None,
    loss: str = "linear",
    f_scale: float = 1.0,
    has_aux: bool = False,
    jit: bool | str = False,
    verify: bool = True,
    callback: Callable[[State], Any] | None = None,
    log: Run | str | PathLike[str] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **unknown: Any,
) -> LeastSquaresResult:
    """Minimise half the sum of squares of residuals, by Levenberg-Marquardt.

    Use it to fit a model to data: it takes far fewer steps than `minimize` on the same
    sum, whatever the units of the parameters, and says how well each is known. The
    function is traced twice, three times with `log`. Up to 500 parameters, a step costs
    a Jacobian of at most 2**25 elements and its singular values (up to 100 parameters)
    or the eigenvalues of J'J; beyond, conjugate gradients on products with J.

    Args:
        residuals: Returns model less data: a float array, or a nest of float arrays of
            any shapes, of the dtype of the parameters. To weigh data, divide each
            residual by its standard error.
        x0: The parameters to start from: float32 or float64 arrays, numbers, nests of
            them, of one dtype. Not changed. For more digits than float32 has, make them
            and the data float64. Or a result to go on from, as for `minimize`: 3 steps
            and 4 more are 7 to the last bit.
        wrt: Variables that `residuals` reads, as for `minimize`, in place of `x0`.
        data: What `residuals` takes besides, batch by batch, as for `minimize`: each
            evaluation goes through all of it, and keeps a triangle of n rows in place
            of J, so that the data may be larger than memory.
        batch_size: How many rows of arrays a batch has; None means 32.
        steps: How many steps to take at most.
        gtol: Stop where no element of the gradient of half the sum is larger. Without
            `gtol`, `ftol` and `xtol`, the run ends where one of three rules holds that
            know no units, to half of the digits of the dtype (1.5e-8, or 3.5e-4 in
            float32), and to a tenth of that where rounding does not forbid it. "gtol":
            of the residuals, no larger part lies in the directions that the parameters
            can change them in. "xtol": the Gauss-Newton step changes no parameter by a
            larger part of itself. "target": f is at most `eps**2 * min(1, f(x0))`.
            Where there are no matrices, `gtol` is that of `minimize`.
        ftol: Stop after a step that changes f by no more, relative to max(1, f).
        xtol: Stop after a step no longer than this, relative to max(1, ||x||).
        target: Stop where f is no larger.
        seconds: Stop after this time, in seconds.
        bounds: What the parameters lie between, as for `minimize`; no point is outside.
            The standard error of a parameter that ends at a bound is not known: NaN.
        loss: What is least is half of `f_scale**2 * sum(rho((r / f_scale)**2))` of the
            residuals r, with rho by name as in SciPy: "linear" (the sum of squares),
            "soft_l1", "huber", "cauchy" or "arctan", by which outliers count less.
        f_scale: The residual from which on one is an outlier, in their unit.
        has_aux: `residuals` returns `(residuals, aux)`.
        jit: Compile with XLA, as for `minimize`; where it computes singular values of
            more than some ten parameters, that is slower.
        verify: Compare the first gradient of `f` with a difference along a random
            direction, and raise `WrongDerivativeError` if they disagree; costs one
            evaluation or two. An optimizer's first gradient is part of a compiled step
            and is not compared.
        callback: Called with a `State` after each chunk of steps; True ends the run.
        log: A directory, or an open `Run`, as for `minimize`.
        checkpoint: A directory to go on from after a crash, as for `minimize`.
        **unknown: Refused with a TypeError that says what to write instead.

    Returns:
        A `LeastSquaresResult`: `x`, `stderr`, `covariance`, `residual_std` and more.
        Its `fun` is half the sum of squares.

    Raises:
        InvalidArgumentError: If an argument breaks its rule, or `residuals` returns one
            number, no number at all, or another dtype.
        ScalarObjectiveError: If `residuals` returns anything but real float tensors.
        NoGradientError: If a path from a parameter to a residual exists, but is cut.
        WrongDerivativeError: If forward and reverse mode disagree.
        RunError: If the log cannot be written.

    Example:
        >>> import numpy as np
        >>> t = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
        >>> y = np.array([5.1, 2.9, 1.9, 1.1, 0.6])
        >>> def misfit(p):
        ...     return p["size"] * tf.exp(-p["rate"] * t) - y
        >>> start = {"size": np.float64(1.0), "rate": np.float64(1.0)}
        >>> result = least_squares(misfit, start)
        >>> for name in ("size", "rate"):
        ...     print(f"{name} = {result.x[name]:.3f} +- {result.stderr[name]:.3f}")
        size = 5.066 +- 0.091
        rate = 0.518 +- 0.018
        >>> print(result.status, result.degrees_of_freedom)
        xtol 3

    References:
        Moré (1978), The Levenberg-Marquardt algorithm: implementation and theory.
        Bates and Watts (1988), Nonlinear Regression Analysis, section 2.3.
    """
    require_no(least_squares, unknown)
    check_loss(loss, f_scale)
    # Its own rules are about sums of squares.
    own_rules = loss == "linear" and (gtol, ftol, xtol) == (None, None, None)
    method = LevenbergMarquardt(is_open=not own_rules)
    options = Options(
        wrt=wrt, data=data, batch_size=batch_size, method=method, steps=steps,
        gtol=gtol, ftol=ftol, xtol=xtol, target=target, seconds=seconds, bounds=bounds,
        has_aux=has_aux, jit=jit, verify=verify, log=log, checkpoint=checkpoint,
    )  # fmt: skip
    kind = functools.partial(Residuals, loss=loss, f_scale=float(f_scale))
    driver = Driver(residuals, x0, options, kind, callback)
    with driver.run.compiling():
        return _with_statistics(run(driver), driver)


def check_loss(loss: Any, f_scale: Any) -> None:
    """Refuse a loss without a name here, and a scale that is not positive."""
    if loss not in LOSSES:
        raise InvalidArgumentError(
            "`loss` must be the name of a loss.",
            got=f"loss={loss!r}",
            hint=", ".join(map(repr, LOSSES)),
        )
    is_number = isinstance(f_scale, numbers.Real) and not isinstance(f_scale, bool)
    if not is_number or not 0 < f_scale < np.inf:
        raise InvalidArgumentError(
            "`f_scale` must be a positive number.",
            got=f"f_scale={f_scale!r}",
            hint="the size of a residual that is no outlier yet",
        )


def _with_statistics(result: OptimizeResult, driver: Driver) -> LeastSquaresResult:
    """Return the result with what residuals and Jacobian at its point say."""
    fit, bounds = driver.run.problem, driver.run.options.bounds
    linear = fit.at(ravel(tf.nest.flatten(result.x))).linear
    residuals = None if fit.source is not None else linear.residuals
    count = linear_size(linear)
    limits = Limits(fit, bounds, ())
    freedom = count - int(np.sum(limits.lower < limits.upper))
    with np.errstate(invalid="ignore", divide="ignore"):
        none = result.fun.dtype.type("nan")
        variance = 2 * result.fun / freedom if freedom > 0 else none
    n = limits.lower.size
    small = None
    is_there = n <= MOST_FOR_QR or fit.source is not None  # else J can be had again
    if is_there and isinstance(linear.matrix, tf.Tensor):
        factor = linear.matrix[:, :n].numpy()
        if n > MOST_FOR_QR:  # it is J'J
            roots, v = np.linalg.eigh(factor)
            factor = np.sqrt(np.maximum(roots, 0))[:, None] * v.T
        small = OfFit(factor, count, float(variance), held(fit, bounds, result.x))
    known = vars(result) | {"source": source_of(driver.run, driver.kind, small)}
    return LeastSquaresResult(
        **known,
        residuals=residuals,
        degrees_of_freedom=freedom,
        residual_std=np.sqrt(variance),
    )


def _with_errors(x: Nest, stderr: Nest) -> list[tuple[str, str]]:
    """Return the rows of a table: each parameter and its standard error."""
    rows = []
    for (name, leaf), (_, error) in zip(
        named_leaves(x, "x"), named_leaves(stderr, "x"), strict=True
    ):
        values, errors = np.asarray(leaf), np.asarray(error)
        for index in np.ndindex(values.shape):
            place = name + (f"[{', '.join(map(str, index))}]" if index else "")
            rows.append((place, f"{values[index]:.8g} +- {errors[index]:.3g}"))
    hidden = len(rows) - MOST_SHOWN
    return rows[:MOST_SHOWN] + ([("x", f"and {hidden} more")] if hidden > 0 else [])
