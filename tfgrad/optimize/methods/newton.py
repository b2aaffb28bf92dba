"""Newton's method in a trust region, by conjugate gradients on Hessian products.

Each `update` judges the trial by what the quadratic model had predicted of it, adapts
the radius within which the model is trusted, and minimises the model there; no matrix
is formed. Negative curvature, which a conjugate direction meets near maxima and
saddles, is followed to the boundary.

>>> import numpy as np
>>> import tfgrad
>>> def two_valleys(x):  # with a saddle between them, in which the run starts
...     return x[0] ** 2 - x[1] ** 2 + x[1] ** 4
>>> result = tfgrad.minimize(two_valleys, np.zeros(2), method="newton")
>>> print(result.status, f"{result.fun:.6f}")
converged -0.250000

References:
    Nocedal and Wright (2006), Numerical Optimization, 2nd edition: algorithms 4.1 (the
    trust region) and 7.2 (Steihaug's conjugate gradients).
    Conn, Gould and Toint (2000), Trust-Region Methods, section 17.4.2: what to make of
    a ratio of two numbers that rounding has eaten up.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either
from tfgrad.optimize.methods.expectation import length_of
from tfgrad.optimize.methods.protocol import Curvature, Move, Point

ACCEPTABLE = 1e-4
"""The least part of the predicted decrease for which a trial is taken."""

BAD, GOOD = 0.25, 0.75
"""Below and above these parts the radius shrinks and grows (algorithm 4.1)."""

SHRINKAGE, GROWTH = 0.25, 2.0
"""By how much it shrinks and grows."""

FORCING = 0.1
"""The largest part of the gradient that the solution of the model may leave."""

NOISE = 10
"""Rounding errors of f up to which two of its values are the same."""

MOST_TRIALS = 30
"""Trials in a row that are not taken; a radius is then 1e-18 of what it was."""

MOST_POWER = 0.4
"""The power of the dtype's largest number that a radius may be: it is squared."""

MOST_IDLE = 8
"""Steps in a row that change nothing before the precision of the dtype is reached."""


class State(NamedTuple):
    """What the method remembers; all but `step` of shape `[]`.

    Attributes:
        step: To the trial, shape `[n]`.
        predicted: By how much the model says that f falls.
        expected: The same without the radius, as far as conjugate gradients had come
            before they met it from the current point for the first time; the largest
            number of the dtype where the model has no minimum.
        radius: The length that a step may have.
        trials: How many were tried from the current point.
        first_grad: The length of the gradient at the start.
        least_grad: The largest |element| of the flattest gradient so far.
        idle: Steps in a row that neither lowered f nor flattened it.
        noise: The most by which f changed in trials from the current point of which the
            model expected no more than rounding.
    """

    step: tf.Tensor
    predicted: tf.Tensor
    expected: tf.Tensor
    radius: tf.Tensor
    trials: tf.Tensor
    first_grad: tf.Tensor
    least_grad: tf.Tensor
    idle: tf.Tensor
    noise: tf.Tensor


class Model(NamedTuple):
    """The minimum of the quadratic model; all but `step` of shape `[]`.

    Attributes:
        step: From the current point to it, shape `[n]`.
        predicted: By how much f falls there.
        expected: By how much it would without the radius.
        is_inside: Whether the radius did not matter.
    """

    step: tf.Tensor
    predicted: tf.Tensor
    expected: tf.Tensor
    is_inside: tf.Tensor


class Newton:
    """A trust-region Newton method: few evaluations, for smooth functions.

    Use it where products with the Hessian are cheap beside the steps that they save:
    ill-conditioned and indefinite problems of two to thousands of parameters.
    """

    name = "newton"
    failure = "trustregion"

    def __init__(self, objective: Curvature | None = None) -> None:
        self._objective = objective

    @property
    def settings(self) -> tuple[()]:
        """What `init` and `update` depend on besides arguments and objective."""
        return ()

    def bind(self, objective: Curvature) -> Newton:
        """Return the method for one objective."""
        return Newton(objective)

    def init(self, start: Point) -> Move:
        """Return a step that is no longer than x, or |f| / |g| if x is zero."""
        zero, none = tf.zeros_like(start.fun), tf.constant(0)
        size, slope = length_of(start.x), length_of(start.grad)
        of_f = tf.math.divide_no_nan(tf.abs(start.fun), slope)
        radius = tf.where(size > 0, size, of_f)
        state = State(
            step=tf.zeros_like(start.x),
            predicted=zero,
            expected=zero,
            radius=tf.where(radius > 0, radius, tf.ones_like(radius)),
            trials=none,
            first_grad=slope,
            least_grad=start.grad_max,
            idle=none,
            noise=zero,
        )
        return self._search(start, state)

    def update(self, new: Point, old: Point, state: State) -> Move:
        """Take the trial if f fell as predicted; trust the model more, or less."""
        noise = _noise(old)
        # With `noise` in both, the ratio is 1 where rounding hides the decrease.
        ratio = (old.fun - new.fun + noise) / (state.predicted + noise)
        is_taken = new.is_finite & (ratio >= ACCEPTABLE)
        is_dull = new.is_finite & (state.predicted <= noise)
        change = tf.where(is_dull, tf.abs(new.fun - old.fun), tf.zeros_like(noise))
        here = either(is_taken, new._replace(linear=()), old._replace(linear=()))
        state = state._replace(
            radius=_radius(state, tf.where(new.is_finite, ratio, -1)),
            trials=tf.where(is_taken, 0, state.trials + 1),
            least_grad=tf.minimum(state.least_grad, here.grad_max),
            idle=tf.where(is_taken, _idle(new, old, state), state.idle),
            noise=tf.where(is_taken, 0 * noise, tf.maximum(state.noise, change)),
        )
        stuck = (state.trials >= MOST_TRIALS) | (state.idle >= MOST_IDLE)
        return self._search(here, state, stuck)._replace(accepted=is_taken)

    def _search(self, here: Point, state: State, stuck: Any = False) -> Move:
        model = self._minimiser(here, state)
        x = here.x + model.step
        failed = tf.reduce_all(x == here.x) | stuck
        expected = tf.where(state.trials == 0, model.expected, state.expected)
        state = state._replace(
            step=model.step, predicted=model.predicted, expected=expected
        )
        # Beyond the radius f may fall by more, so that fall is not known; a failed
        # method has no use for a radius, and reports the number.
        told = tf.where(model.is_inside, expected, expected.dtype.max)
        told = tf.where(failed, tf.maximum(expected, state.noise), told)
        return Move(x, state, failed=failed, expected=told)

    def _minimiser(self, here: Point, state: State) -> Model:
        """Return where the model is least, about (7.2).

        The gradient is counted in its own size, so that no square overflows.
        """
        assert self._objective is not None
        hvp, largest = self._objective.hvp, here.fun.dtype.max
        # A power of 2 rounds nothing.
        one = tf.ones_like(here.grad_max)
        unit = tf.where(here.grad_max > 0, here.grad_max, one)
        unit = 2.0 ** tf.floor(tf.math.log(unit) / math.log(2))
        unit = tf.where(unit > 0, unit, one)
        grad = here.grad / unit
        radius = tf.minimum(state.radius / unit, largest**MOST_POWER)
        size = tf.norm(grad)
        n: Any = here.x.shape[0]
        most = 2 * n + 10  # n would do in exact arithmetic
        part = tf.sqrt(tf.math.divide_no_nan(size * unit, state.first_grad))
        part = tf.minimum(part, FORCING)

        def goes_on(i: Any, is_over: Any, z: Any, r: Any, d: Any, _: Any) -> tf.Tensor:
            on: tf.Tensor = ~is_over & (i < most)
            return on & (tf.norm(r) > part * size)

        def body(i: Any, _: Any, z: Any, r: Any, d: Any, fall: Any) -> Any:
            product = hvp(here.x, d)
            # Where the Hessian is not finite, only the gradient is left of the model.
            is_known = tf.reduce_all(tf.math.is_finite(product))
            product = tf.where(is_known, product, tf.zeros_like(product))
            curvature, square = _dot(d, product), _dot(r, r)
            length = tf.math.divide_no_nan(square, curvature)
            more = tf.where(curvature > 0, square * length / 2, largest / 4)
            leaves = (curvature <= 0) | ~(tf.norm(z + length * d) < radius)
            length = tf.where(leaves, _to_boundary(z, d, radius), length)
            z, r = z + length * d, r + length * product
            return i + 1, leaves, z, r, _dot(r, r) / square * d - r, fall + more

        zero, none = tf.zeros_like(here.x), tf.zeros_like(here.fun)
        start = (0, size == 0, zero, grad, -grad, none)
        end = tf.while_loop(goes_on, body, start, parallel_iterations=1)
        _, leaves, z, r, _, fall = end
        # As r = g + H z, the model at z is (g + r).z / 2.
        predicted = -_dot(z, grad + r) / 2
        predicted, known = (unit * (unit * number) for number in (predicted, fall))
        fall = tf.where(fall < largest / 4, known, largest / 4)
        return Model(unit * z, predicted, fall, ~leaves | (size == 0))


def _radius(state: State, ratio: tf.Tensor) -> tf.Tensor:
    """Return the new radius, for the ratio of actual to predicted decrease."""
    length, radius = length_of(state.step), state.radius
    is_at_boundary = length > 0.9 * radius
    grown = tf.minimum(GROWTH * radius, radius.dtype.max**MOST_POWER)
    grown = tf.where((ratio > GOOD) & is_at_boundary, grown, radius)
    return tf.where(ratio < BAD, SHRINKAGE * length, grown)


def _to_boundary(z: tf.Tensor, d: tf.Tensor, radius: tf.Tensor) -> tf.Tensor:
    """Return the t > 0 at which z + t d has the length `radius`."""
    a, b, c = _dot(d, d), _dot(z, d), radius**2 - _dot(z, z)
    return c / (b + tf.sqrt(b * b + a * c))  # without cancellation, as b >= 0


def _idle(new: Point, old: Point, state: State) -> tf.Tensor:
    falls = old.fun - new.fun > _noise(old)
    flattens = new.grad_max <= state.least_grad / 2
    return tf.where(falls | flattens, 0, state.idle + 1)


def _noise(point: Point) -> tf.Tensor:
    """Return up to what difference two values like that of `point` are the same."""
    return NOISE * EPSILONS[point.fun.dtype] * tf.abs(point.fun)


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(a * b)
