"""Whether a point where the gradient vanishes is a minimum, or a saddle to leave.

Rules of stopping look at the gradient, and it is zero at maxima and saddles, too. There
the curvature tells: its smallest value, and the direction of it, come out of a few
products with the Hessian. A flat direction, as that of the monkey saddle, is tried.

References:
    Kuczyński and Woźniakowski (1992), SIAM Journal on Matrix Analysis and Applications
    13: how few steps of Lanczos's method from a random vector find an eigenvalue.
    Moré and Sorensen (1979), Mathematical Programming 16: leaving saddles along
    negative curvature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

PRODUCTS = 30
"""Products with the Hessian that a look may cost; with n of them it is exact."""

MOST_NUMBERS = 2**23
"""Numbers that they may fill, 64 MB: of millions of parameters, few are taken."""

NOISE = 10
"""Rounding errors of f up to which two of its values are the same."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def lower_point(
    x: Array,
    fun: float,
    grad: Array,
    *,
    product: Callable[[Array], Array],
    value: Callable[[Array], float],
    epsilon: float,
    products: int = PRODUCTS,
) -> Array | None:
    """Return a point near a stationary one where f is lower; None at a minimum.

    Args:
        x: Where the gradient is small, shape `[n]`.
        fun: The value there.
        grad: The gradient there.
        product: Returns the Hessian at `x` times a direction.
        value: Returns f at a point.
        epsilon: The rounding error of the dtype that f is computed in.
        products: How many of them to take at most.
    """
    found = _least_curvature(product, len(x), epsilon, products)
    if found is None:
        return None
    least, largest, direction = found
    clearly = epsilon**0.5 * largest
    # A flat direction is a way down from an exact zero of the gradient only; else the
    # point is on its slow way to a minimum that is as flat.
    if least > -clearly and (least > clearly or np.any(grad)):
        return None
    # Long enough for a fall of the third order to be seen beside rounding errors.
    step = epsilon ** (1 / 6) * max(1.0, float(np.linalg.norm(x))) * direction
    sides = [(value(point), point) for point in (x + step, x - step)]
    finite = [side for side in sides if np.isfinite(side[0])]
    if not finite:
        return None
    lowest, point = min(finite, key=lambda side: side[0])
    # Rounding bends gradients; where f bends down itself, its mean is lower, too.
    bends_down = least < -clearly
    level = np.mean([f for f, _ in finite]) if bends_down else lowest
    return point if level < fun - NOISE * epsilon * abs(fun) else None


def _least_curvature(
    product: Callable[[Array], Array], n: int, epsilon: float, most: int
) -> tuple[float, float, Array] | None:
    """Return the least curvature, the largest |curvature|, and the former's direction.

    From Lanczos's method, orthogonalised in full. None if it is not finite, or if no
    two products are allowed where there are two directions.
    """
    most = min(n, most, MOST_NUMBERS // n)
    if most < min(n, 2):
        return None
    q = np.random.default_rng(0).normal(size=n)
    basis, products = np.empty((0, n)), np.empty((0, n))
    while len(basis) < most:
        q = q / np.linalg.norm(q)
        basis = np.vstack([basis, q])
        products = np.vstack([products, product(q)])
        if not np.all(np.isfinite(products[-1])):
            return None
        q = products[-1]
        size = np.linalg.norm(q)
        for _ in range(2):  # the second time removes what rounding left of the first
            q = q - basis.T @ (basis @ q)
        if np.linalg.norm(q) <= epsilon * size:
            break  # the directions found so far are all that there are
    small = basis @ products.T
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    return values[0], max(abs(values)), basis.T @ vectors[:, 0]
