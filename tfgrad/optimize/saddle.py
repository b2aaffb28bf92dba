"""Whether a point where the gradient vanishes is a minimum, or a saddle to leave.

Rules of stopping look at the gradient, and it is zero at maxima and saddles, too. The
smallest curvature, which a few products with the Hessian give together with its
direction, tells them apart. Along a direction without curvature, as at a monkey saddle,
values of f decide.

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
"""The most products with the Hessian for one point; n of them are exact."""

MOST_NUMBERS = 2**23
"""The most numbers in all products, 64 MB: of millions of parameters, few fit."""

NOISE = 10
"""Rounding errors of f up to which two of its values are the same."""

MISTAKEN = 10
"""How many times as far as slope and curvature say f has to fall beside a point for it
to be no minimum: an inflection, which both of them vanish at."""

LEAST_LOOK, MOST_LOOK = 8, 60
"""The least and the most gradients that may be spent around a stationary point."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def point_beside(problem: Problem, state: Any, *, products: bool) -> tf.Tensor | None:
    """Return a point beside the current one where f is lower; None at a minimum.

    Args:
        problem: What is minimised.
        state: Where the run is, a `solvers.State`.
        products: Whether products with the Hessian are compiled already. If not,
            differences of gradients replace them, at a cost of at most a quarter of the
            run's.
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
    points, is_lower = lower_points(
        x[None],
        np.array([fun]),
        grad[None],
        product=lambda directions: product(directions[0])[None],
        value=lambda points: np.array([value(points[0])]),
        epsilon=epsilon,
        products=products,
    )
    return points[0] if is_lower[0] else None


def lower_points(
    x: Array,
    fun: Array,
    grad: Array,
    *,
    product: Callable[[Array], Array],
    value: Callable[[Array], Array],
    epsilon: float,
    products: int,
) -> tuple[Array, Any]:
    """Return points near many stationary ones, `[rows, n]`, and where f is lower there.

    Arguments are those of `lower_point`, with a row for each problem: so are what
    `product` and `value` take and return.
    """
    least, largest, direction = _least_curvatures(product, x.shape, epsilon, products)
    is_known = np.isfinite(least)
    if not np.any(is_known):
        return x, is_known
    clearly = epsilon**0.5 * largest
    # A direction without curvature is tried only where the gradient is exactly zero;
    # elsewhere the run approaches a flat minimum slowly.
    is_stationary = ~np.any(grad, axis=1)
    is_open = (least <= -clearly) | ((least <= clearly) & is_stationary)
    # Long enough for a fall of the third order to be seen beside rounding errors.
    size = epsilon ** (1 / 6) * np.maximum(1.0, np.linalg.norm(x, axis=1))
    step = size[:, None] * direction
    values = np.stack([value(x + step), value(x - step)])
    is_finite = np.isfinite(values)
    values = np.where(is_finite, values, np.inf)
    lowest = np.min(values, axis=0)
    # Rounding of gradients may look like curvature. If f really curves down, the mean
    # of its values on both sides is lower, too.
    bends_down = least < -clearly
    mean = np.where(np.all(is_finite, axis=0), np.mean(values, axis=0), lowest)
    level = np.where(bends_down, mean, lowest)
    told = np.abs(np.sum(grad * step, axis=1)) + np.abs(least) * size**2
    is_open |= fun - lowest > MISTAKEN * told
    is_lower = is_open & (level < fun - NOISE * epsilon * np.abs(fun))
    is_ahead = values[0] <= values[1]
    return np.where(is_ahead[:, None], x + step, x - step), is_lower


def _least_curvatures(
    product: Callable[[Array], Array],
    shape: tuple[int, ...],
    epsilon: float,
    most: int,
) -> tuple[Array, Array, Array]:
    """Return the least curvatures, the largest |curvatures|, directions of the least.

    From Lanczos's method, orthogonalised in full, in each row. The least is infinite if
    a product is not finite, or if only one product is allowed in two or more
    dimensions.
    """
    rows, n = shape
    most = min(n, most, MOST_NUMBERS // (rows * n))
    unknown = np.full(rows, np.inf), np.zeros(rows), np.zeros(shape)
    if most < min(n, 2):
        return unknown
    q = np.broadcast_to(np.random.default_rng(0).normal(size=n), shape)
    basis, images = np.zeros((2, rows, most, n))
    goes_on, count = np.ones(rows, bool), 0
    while count < most and np.any(goes_on):
        q = q / np.where(goes_on, _lengths(q), 1.0)[:, None]
        basis[:, count] = q
        image = np.where(goes_on[:, None], product(q), 0.0)
        images[:, count] = image
        count, q = count + 1, image[:, :, None]
        known = basis[:, :count]
        for _ in range(2):  # the second time removes what rounding left of the first
            q = q - known.swapaxes(1, 2) @ (known @ q)
        q = q[:, :, 0]
        # If nothing is left, there are no more directions to be found.
        goes_on = goes_on & (_lengths(q) > epsilon * _lengths(image))
        q = np.where(goes_on[:, None], q, 0.0)
    basis, images = basis[:, :count], images[:, :count]
    small = basis @ images.swapaxes(1, 2)
    is_known = np.all(np.isfinite(small), axis=(1, 2))
    small = np.where(is_known[:, None, None], small, 0.0)
    small = (small + np.swapaxes(small, 1, 2)) / 2
    # Where a row ended early it has no directions: they must not be the least.
    is_empty = ~np.any(basis, axis=2)
    largest = np.max(np.abs(np.linalg.eigvalsh(small)), axis=1)
    if np.any(is_empty):
        fill = np.where(is_empty, 2 * largest[:, None], 0.0)
        small = small + fill[:, :, None] * np.eye(count)
    values, vectors = np.linalg.eigh(small)
    direction = (vectors[:, None, :, 0] @ basis)[:, 0]
    return np.where(is_known, values[:, 0], np.inf), largest, direction


def _lengths(rows: Array) -> Array:
    lengths: Array = np.sqrt(np.einsum("rn,rn->r", rows, rows))
    return lengths
