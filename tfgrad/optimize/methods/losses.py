"""Robust losses of residuals, as weights on a linear model of them.

With z = (r / s)^2, s the scale from which on a residual is an outlier, what is least is
f = s^2 / 2 times the sum of rho(z): half the sum of squares for "linear". Near a point
it is a sum of squares again, of residuals and a Jacobian that are weighted so that
gradient and Gauss-Newton Hessian of f are theirs (Triggs); without its part that would
not be positive.

References:
    SciPy, `scipy.optimize.least_squares`: the names and the losses.
    Triggs et al. (2000), Bundle Adjustment: A Modern Synthesis, section 4.3 and
    appendix A: the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tfgrad.differences import EPSILONS

Rho = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def _linear(z: tf.Tensor) -> Rho:
    return z, tf.ones_like(z), tf.zeros_like(z)


def _soft_l1(z: tf.Tensor) -> Rho:
    t = 1 + z
    # 2 (sqrt(t) - 1), without cancellation at small z.
    return 2 * z / (tf.sqrt(t) + 1), t**-0.5, -0.5 * t**-1.5


def _huber(z: tf.Tensor) -> Rho:
    outside = tf.maximum(z, 1)
    is_inside = z <= 1
    return (
        tf.where(is_inside, z, 2 * tf.sqrt(outside) - 1),
        outside**-0.5,
        tf.where(is_inside, tf.zeros_like(z), -0.5 * outside**-1.5),
    )


def _cauchy(z: tf.Tensor) -> Rho:
    t = 1 + z
    return tf.math.log1p(z), 1 / t, -1 / t**2


def _arctan(z: tf.Tensor) -> Rho:
    t = 1 + z**2
    return tf.atan(z), 1 / t, -2 * z / t**2


LOSSES: dict[str, Callable[[tf.Tensor], Rho]] = {
    "linear": _linear,
    "soft_l1": _soft_l1,
    "huber": _huber,
    "cauchy": _cauchy,
    "arctan": _arctan,
}
"""rho, its first and its second derivative, by name."""


def cost(residuals: tf.Tensor, loss: str = "linear", f_scale: float = 1.0) -> tf.Tensor:
    """Return what is minimised, shape `[]`, in the squared unit of the residuals.

    Args:
        residuals: Of shape `[m]`.
        loss: A name of `LOSSES`.
        f_scale: The residual from which on one is an outlier, in their unit.

    >>> float(cost(tf.constant([3.0, 4.0])))
    12.5
    >>> float(cost(tf.constant([0.0, 4.0]), "huber", 2.0))
    6.0
    """
    if loss == "linear":
        return tf.reduce_sum(tf.square(residuals)) / 2
    rho, _, _ = LOSSES[loss](tf.square(residuals / f_scale))
    return f_scale**2 * tf.reduce_sum(rho) / 2


def slope(r: tf.Tensor, loss: str = "linear", f_scale: float = 1.0) -> tf.Tensor:
    """Return the derivative of the cost by each residual."""
    return r * LOSSES[loss](tf.square(r / f_scale))[1]


def curvature(r: tf.Tensor, loss: str = "linear", f_scale: float = 1.0) -> tf.Tensor:
    """Return the second derivative of the cost by each residual, kept positive."""
    z = tf.square(r / f_scale)
    _, first, second = LOSSES[loss](z)
    return tf.maximum(first + 2 * second * z, EPSILONS[z.dtype])


def weighted(
    r: tf.Tensor, loss: str = "linear", f_scale: float = 1.0
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the residuals of the sum of squares that f is like, and their weights.

    The weights, shape `[m]`, are those of the rows of its Jacobian.
    """
    weights = tf.sqrt(curvature(r, loss, f_scale))
    return slope(r, loss, f_scale) / weights, weights
