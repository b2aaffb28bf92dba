"""Whether a point where a run ends is a minimum, or there is a lower one beside it.

Rules of stopping look at the gradient, and it is zero at maxima and saddles, too. The
smallest curvature, which a few products with the Hessian give together with its
direction, tells them apart. Along a direction without curvature, as at a monkey saddle,
values of f decide. The same products give Newton's step, which finds what a method has
missed in a flat direction, or says that nothing is left to be found.

References:
    Kuczyński and Woźniakowski (1992), SIAM Journal on Matrix Analysis and Applications
    13: how few steps of Lanczos's method from a random vector find an eigenvalue.
    Moré and Sorensen (1979), Mathematical Programming 16: leaving saddles along
    negative curvature.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.graphs import draws
from tfgrad.differences import EPSILONS
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.stopping import code_of
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

FARTHER = 1 / 6, 1 / 12, 0.0
"""Powers of epsilon: how far values of f are compared where gradient and curvature are
zero, as parts of |x|. At the first, x^3 is seen beside 1; x^7 is at the last."""

FLOORS = 1.0, 0.75, 0.5
"""Powers of epsilon: parts of the largest curvature below which others are rounding."""

NEAR = 0.1
"""By how much the fall along Newton's step may differ from what its model says near the
minimum, as a part of it."""

MISSED, NEGLIGIBLE = 1e-6, 1e-8
"""The fall of f, as a part of |f|, for which a run goes on that has converged by its
own rule; and for which one does that has failed, and else has converged."""

Array = np.ndarray[Any, np.dtype[np.float64]]


class Look(NamedTuple):
    """What lies around the end of a run.

    Attributes:
        lower: A point where f is lower; None at a minimum.
        is_minimum: Whether second derivatives certify that rounding alone is left.
        is_near: Whether f is as low at `lower` as Newton's model says, so that the
            minimum is near, and another look tells more than the method does.
    """

    lower: tf.Tensor | None = None
    is_minimum: bool = False
    is_near: bool = False


class Curvatures(NamedTuple):
    """Second derivatives along orthogonal directions, a row for each problem.

    Attributes:
        values: Along each direction, the least first, shape `[rows, k]`; of unknown
            ones infinity.
        directions: Shape `[rows, n, k]`.
    """

    values: Array
    directions: Array

    @property
    def largest(self) -> Array:
        """The largest |curvature|, shape `[rows]`."""
        known = np.where(np.isfinite(self.values), np.abs(self.values), 0.0)
        return np.max(known, axis=1, initial=0.0)


def scale_of(x: Array, start: Array) -> Array:
    """Return how long a step of the size of x is, whatever its units, in each row.

    1 where all that is known of x is that it is zero.
    """
    lengths = [np.linalg.norm(vector, axis=1) for vector in (x, x - start)]
    longest = np.max(np.where(np.isfinite(lengths), lengths, 0.0), axis=0)
    return np.where(longest > 0, longest, 1.0)


def look_around(
    problem: Problem,
    state: Any,
    scale: float,
    *,
    products: bool,
    leaps: bool,
    bounds: tuple[Array, Array] | None = None,
) -> Look:
    """Return what lies around the current point, within bounds if there are some.

    A variable is looked at if it may move by a step of the differences in both ways.

    Args:
        problem: What is minimised.
        state: Where the run is, a `solvers.State`.
        scale: How long a step of the size of x is: see `scale_of`.
        products: Whether products with the Hessian are compiled already. If not,
            differences of gradients replace them, at a cost of at most a quarter of the
            run's; but not where a search has failed and a few products tell all.
        leaps: Whether Newton's step counts, too.
        bounds: A lower and an upper array; None for none.
    """
    types = operations(problem)
    if not types or draws(types):
        return Look()
    x, dtype = np.asarray(state.x, np.float64), state.x.dtype
    epsilon, grad = EPSILONS[dtype], np.asarray(state.evaluation.gradient, np.float64)
    lower, upper = (-np.inf, np.inf) if bounds is None else bounds
    room = np.minimum(x - lower, upper - x)
    is_free = room > epsilon ** (1 / 3) * scale
    is_held = ((x <= lower) & (grad > 0)) | ((x >= upper) & (grad < 0))
    sees_all = bool(np.all(is_free | is_held))
    has_failed = leaps and int(state.code) != code_of("converged")
    is_exact = problem.has_hessian and (
        products or not int(state.step) or (has_failed and len(x) <= PRODUCTS)
    )
    count = min(max(int(state.evaluations) // 4, LEAST_LOOK), MOST_LOOK)

    def whole(part: Array) -> Array:
        moved = x.copy()
        moved[is_free] = part
        return np.clip(moved, lower, upper)

    def at(x: Array) -> Evaluation:
        return problem.at(tf.constant(x, dtype))

    def value(points: Array) -> Array:
        return np.array([float(at(whole(points[0])).value)])

    def gradient(points: Array) -> Array:
        of_all = np.asarray(at(whole(points[0])).gradient, np.float64)
        return of_all[None, is_free]

    def exact(directions: Array) -> Array:
        v = np.zeros_like(x)
        v[is_free] = directions[0]
        of_all = np.asarray(problem.hvp(state.x, tf.constant(v, dtype)), np.float64)
        return of_all[None, is_free]

    fun, most = float(state.evaluation.value), PRODUCTS if is_exact else count // 2
    fallen, scales = float(state.first) - fun, np.array([scale])
    free, slopes = x[is_free], grad[is_free]
    row = free[None], np.array([fun]), slopes[None], scales
    estimated = by_differences(gradient, free[None], scales, epsilon)
    product = exact if is_exact else estimated

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as that a second derivative runs eagerly
        try:
            beside, is_lower = lower_inwards(
                x[None], np.array([fun]), grad[None], scales, (lower, upper),
                lambda points: np.array([float(at(points[0]).value)]), epsilon,
            )  # fmt: skip
            if is_lower[0]:
                return Look(tf.constant(beside[0], dtype))
            found = curvatures(product, (1, len(free)), epsilon, most)
            points, is_lower = lower_points(*row, found, value, epsilon)
            if is_lower[0]:
                return Look(tf.constant(whole(points[0]), dtype))
            if not leaps or not np.isfinite(found.values[0, 0]):
                return Look()
            part = NEGLIGIBLE if has_failed else MISSED
            least = max(max(part, NOISE * epsilon) * abs(fun), epsilon**1.5 * fallen)
            for power in FLOORS:
                step, fall = _newton(slopes, found, epsilon**power)
                ahead = (free + step)[None]
                if fall > least and (truly := fun - value(ahead)[0]) > fall / 2:
                    is_near = sees_all and abs(truly - fall) <= NEAR * fall
                    return Look(tf.constant(whole(ahead[0]), dtype), is_near=is_near)
        except Exception:  # a user's gradient may raise anything: nothing is known
            return Look()
    _, fall = _newton(slopes, found, epsilon)
    is_whole = is_exact and sees_all and found.values.shape[1] == len(free)
    is_definite = found.values[0, 0] > NOISE * epsilon * found.largest[0]
    is_negligible = fall <= max(NEGLIGIBLE, NOISE * epsilon) * abs(fun)
    return Look(None, bool(has_failed and is_whole and is_definite and is_negligible))


def lower_inwards(
    x: Array,
    fun: Array,
    grad: Array,
    scale: Array,
    bounds: tuple[Any, Any],
    value: Callable[[Array], Array],
    epsilon: float,
) -> tuple[Array, Any]:
    """Return points inwards from bounds without a slope, and where f is lower there.

    Nothing but values says that. Arguments are as for `lower_points`; bounds are a
    lower and an upper array.
    """
    lower, upper = bounds
    is_inside = np.minimum(x - lower, upper - x) > 0
    with np.errstate(invalid="ignore"):  # where neither bound is finite
        inward = np.sign((lower - x) - (x - upper))
    inward = np.where(is_inside | (grad != 0), 0.0, inward)
    points, is_lower, noise = x, np.zeros(len(x), bool), NOISE * epsilon * np.abs(fun)
    is_open: Any = np.any(inward, axis=1)
    for power in FARTHER:
        if not np.any(is_open):
            break
        step = epsilon**power * scale[:, None] * inward
        beside = np.clip(x + step, lower, upper)
        change = value(beside) - fun
        finds = is_open & (change < -noise)
        points = np.where(finds[:, None], beside, points)
        is_lower = is_lower | finds
        is_open = is_open & (np.abs(change) <= noise)  # else a minimum, near by
    return points, is_lower


def by_differences(
    gradient: Callable[[Array], Array], x: Array, scale: Array, epsilon: float
) -> Callable[[Array], Array]:
    """Return the products of the Hessians at x, `[rows, n]`, with unit directions.

    They are differences of gradients; `scale` is how long a step of the size of x is.
    """
    # The step that balances rounding and curvature of the gradient.
    size = epsilon ** (1 / 3) * scale[:, None]

    def product(directions: Array) -> Array:
        step = size * directions
        ahead, behind = (gradient(points) for points in (x + step, x - step))
        return (ahead - behind) / (2 * size)

    return product


def _newton(grad: Array, found: Curvatures, least: float) -> tuple[Array, float]:
    """Return Newton's step along the directions, and the fall that it promises.

    No curvature counts as less than the part `least` of the largest one.
    """
    slopes = grad @ found.directions[0]
    sizes = np.maximum(found.values[0], least * found.largest[0])
    parts = np.divide(slopes, sizes, out=np.zeros_like(slopes), where=sizes > 0)
    return -found.directions[0] @ parts, float(slopes @ parts / 2)


def lower_points(
    x: Array,
    fun: Array,
    grad: Array,
    scale: Array,
    found: Curvatures,
    value: Callable[[Array], Array],
    epsilon: float,
) -> tuple[Array, Any]:
    """Return points along the least curvature, `[rows, n]`, and where f is lower there.

    Args:
        x: Where the gradients are small, shape `[rows, n]`.
        fun: The values there, shape `[rows]`.
        grad: The gradients there, like `x`.
        scale: How long a step of the size of x is, shape `[rows]`: see `scale_of`.
        found: The curvatures there.
        value: Returns f at a point for each row.
        epsilon: The rounding error of the dtype that f is computed in.
    """
    least, direction = found.values[:, 0], found.directions[:, :, 0]
    is_known, noise = np.isfinite(least), NOISE * epsilon * np.abs(fun)
    if not np.any(is_known):
        return x, is_known
    clearly = epsilon**0.5 * found.largest
    # A direction without curvature is tried only where the gradient is exactly zero;
    # elsewhere the run approaches a flat minimum slowly.
    is_straight = np.abs(least) <= np.maximum(clearly, noise / scale**2)
    is_flat = is_straight & ~np.any(grad, axis=1)
    bends_down, is_bent = least < -clearly, least <= -clearly
    points, is_lower = x, np.zeros(len(x), bool)
    for power in FARTHER:
        # Long enough for a fall of the third order to be seen beside rounding errors.
        size = epsilon**power * scale
        step = size[:, None] * direction
        values = np.stack([value(x + step), value(x - step)])
        is_finite, ends = np.isfinite(values), np.where(values == -np.inf, -1.0, 0.0)
        values = np.where(is_finite, values, np.inf)
        lowest = np.min(values, axis=0)
        # Rounding of gradients may look like curvature. If f really curves down, the
        # mean of its values on both sides is lower, too.
        mean = np.where(np.all(is_finite, axis=0), np.mean(values, axis=0), lowest)
        level = np.where(bends_down, mean, lowest)
        told = np.abs(np.sum(grad * step, axis=1)) + np.abs(least) * size**2
        is_open = is_bent | is_flat | (fun - lowest > MISTAKEN * told)
        finds = is_open & (level < fun - noise)
        # If gradients underflow, f may fall without end.
        values = np.where(finds, values, ends)
        finds = is_known & ~is_lower & (finds | (is_flat & np.any(ends, axis=0)))
        is_ahead = (values[0] <= values[1])[:, None]
        beside = np.where(is_ahead, x + step, x - step)
        points = np.where(finds[:, None], beside, points)
        is_lower = is_lower | finds
        if not np.any(is_flat & ~is_lower):
            break
    return points, is_lower


def curvatures(
    product: Callable[[Array], Array],
    shape: tuple[int, ...],
    epsilon: float,
    most: int,
    free: Any = 1.0,
) -> Curvatures:
    """Return curvatures by Lanczos's method, orthogonalised in full, in each row.

    Products stay among the variables where the mask `free`, `[rows, n]`, is 1.
    None is known if a product is not finite, or if only one product is allowed in two
    or more dimensions.
    """
    rows, n = shape
    most = min(n, most, MOST_NUMBERS // (rows * n))
    if most < min(n, 2) or not np.any(free):
        return Curvatures(np.full((rows, 1), np.inf), np.zeros((rows, n, 1)))
    q = free * np.broadcast_to(np.random.default_rng(0).normal(size=n), shape)
    basis, images = np.zeros((2, rows, most, n))
    goes_on, count = np.any(q, axis=1), 0
    while count < most and np.any(goes_on):
        q = q / np.where(goes_on, np.linalg.norm(q, axis=1), 1.0)[:, None]
        basis[:, count] = q
        image = np.where(goes_on[:, None], product(q), 0.0)
        images[:, count] = image
        count, q = count + 1, image[:, :, None]
        known = basis[:, :count]
        for _ in range(2):  # the second time removes what rounding left of the first
            q = q - known.swapaxes(1, 2) @ (known @ q)
        q = q[:, :, 0]
        # If nothing is left, there are no more directions to be found.
        goes_on = goes_on & (
            np.linalg.norm(q, axis=1) > epsilon * np.linalg.norm(image, axis=1)
        )
        q = np.where(goes_on[:, None], q, 0.0)
    basis, images = basis[:, :count], images[:, :count]
    small = basis @ images.swapaxes(1, 2)
    is_known = np.all(np.isfinite(small), axis=(1, 2))
    small = np.where(is_known[:, None, None], small, 0.0)
    small = (small + np.swapaxes(small, 1, 2)) / 2
    # Where a row ended early it has no directions: they must not be the least.
    is_empty = ~np.any(basis, axis=2)
    largest = np.max(np.abs(np.linalg.eigvalsh(small)), axis=1)[:, None]
    fill = np.where(is_empty, 2 * largest, 0.0)
    values, vectors = np.linalg.eigh(small + fill[:, :, None] * np.eye(count))
    any_empty = np.any(is_empty, axis=1)[:, None]
    is_known = is_known[:, None] & ~((values > 1.5 * largest) & any_empty)
    directions = basis.swapaxes(1, 2) @ vectors
    return Curvatures(np.where(is_known, values, np.inf), directions)
