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

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.traced import operations

PRODUCTS = 30
"""Products with the Hessian that a look may cost; with n of them it is exact."""

MOST_NUMBERS = 2**23
"""Numbers that they may fill, 64 MB: of millions of parameters, few are taken."""

NOISE = 10
"""Rounding errors of f up to which two of its values are the same."""

LEAST_LOOK, MOST_LOOK = 8, 60
"""Gradients that a look around a stationary point may cost, between these bounds."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def point_beside(problem: Problem, state: Any, *, products: bool) -> tf.Tensor | None:
    """Return a point beside the current one where f is lower; None at a minimum.

    Args:
        problem: What is minimised.
        state: Where the run is, a `solvers.State`.
        products: Whether products with the Hessian are compiled already. If not,
            differences of gradients make up for them, as many as come to a quarter of
            what the run has cost.
    """
    types = operations(problem)
    if not types or any("Random" in operation for operation in types):
        return None
    count = None
    if (int(state.step) and not products) or not problem.has_hessian:
        count = min(max(int(state.evaluations) // 4, LEAST_LOOK), MOST_LOOK)
    x, dtype = np.asarray(state.x, np.float64), state.x.dtype

    def at(x: Array) -> Evaluation:
        return problem.at(tf.constant(x, dtype))

    def product(direction: Array) -> Array:
        if count is None:
            v = tf.constant(direction, dtype)
            return np.asarray(problem.hvp(state.x, v), np.float64)
        # The step that balances rounding and curvature of the gradient.
        size = EPSILONS[dtype] ** (1 / 3) * max(1.0, float(np.linalg.norm(x)))
        step = size * direction
        ahead, behind = (np.asarray(at(p).gradient) for p in (x + step, x - step))
        change: Array = (ahead - behind).astype(np.float64)
        return change / (2 * np.linalg.norm(step))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as that a second derivative runs eagerly
        try:
            lower = lower_point(
                x,
                float(state.evaluation.value),
                np.asarray(state.evaluation.gradient, np.float64),
                product=product,
                value=lambda x: float(at(x).value),
                epsilon=EPSILONS[dtype],
                products=PRODUCTS if count is None else count // 2,
            )
        except Exception:  # a user's gradient may raise anything: nothing is known
            return None
    return None if lower is None else tf.constant(lower, dtype)


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
