"""How far a search has come, and what may still be expected: without units of x.

What L-BFGS with and without bounds share.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.optimize.methods.convergence import DIGITS, VANISHING
from tfgrad.optimize.methods.protocol import Point

FIRST = 0.1
"""The first step, as a part of |x|, or of |f| / |g| if that is less: neither knows the
units of x, and a search that started too far away may end in another valley."""

MOST_IDLE = 8
"""Steps in a row that change nothing before the search gives up: at a saddle in
float32, some drift along until they find the way down."""

FALLEN, KINK = 1e-2, 1e6
"""At a kink slopes promise ever less, too, but the gradient does not fall to a 100th of
the largest one: where f has fallen by a million times of what is expected, which is as
the square of the gradient elsewhere, it is one."""


class Descent(NamedTuple):
    """A step down the gradient.

    Attributes:
        step: Of shape `[n]`.
        slope: Of f along it, shape `[]`.
    """

    step: tf.Tensor
    slope: tf.Tensor


class Progress(NamedTuple):
    """How the last steps went; all of shape `[]`.

    Attributes:
        grad_max: The max-norm of the gradient.
        length: Its Euclidean norm.
        least_grad: The smallest max-norm of the gradient so far.
        most_grad: The largest one.
        idle: How many steps in a row changed nothing. A step is idle if it neither
            lowers f by more than rounding, nor halves the smallest gradient so far; or
            if the search had to end at a point that is not flatter.
        expected: The fall of f that the last direction promises; the largest number of
            the dtype while no pair is known.
        first_fun: The value of f at the start.
    """

    grad_max: tf.Tensor
    length: tf.Tensor
    least_grad: tf.Tensor
    most_grad: tf.Tensor
    idle: tf.Tensor
    expected: tf.Tensor
    first_fun: tf.Tensor


def first_length(start: Point, length: tf.Tensor) -> tf.Tensor:
    """Return how long the first step is: 1 if x and f are zero."""
    of_x = length_of(start.x)
    of_f = tf.math.divide_no_nan(tf.abs(start.fun), length)
    either_one = tf.maximum(of_x, of_f)
    either_one = tf.where(either_one > 0, either_one, tf.ones_like(of_x))
    least = tf.minimum(of_x, of_f)
    return FIRST * tf.where(least > 0, least, either_one)


def sized(here: Point, first_fun: tf.Tensor) -> Descent:
    """Return a step in variables that are counted in their own sizes.

    With u = x g / F, where F is what f has fallen by, or |f| if that is more, it is
    -x u, element by element. If f curves by F over a step of the size of x, it is least
    there, by F |u|^2 / 2. That knows no units of any variable.
    """
    fall = tf.maximum(first_fun - here.fun, tf.abs(here.fun))
    part = tf.math.divide_no_nan(here.x * here.grad, fall)
    return Descent(-here.x * part, -fall * tf.reduce_sum(part * part))


def steepest(grad: tf.Tensor, length: tf.Tensor, scale: tf.Tensor) -> Descent:
    """Return a step as long as the last pair says, or no longer than 1."""
    scale = tf.where(scale > 0, scale, 1 / tf.maximum(length, 1))
    return Descent(-scale * grad, -(scale * length) * length)


def start_of(start: Point) -> tuple[Progress, Descent]:
    """Return how a run begins, and its first step."""
    norm, length = start.grad_max, length_of(start.grad)
    unknown = tf.zeros_like(length) + length.dtype.max
    expected = tf.where(length > 0, unknown, tf.zeros_like(length))
    none = tf.constant(0)
    progress = Progress(norm, length, norm, norm, none, expected, start.fun)
    step = first_length(start, length)
    direction = -tf.math.divide_no_nan(step, length) * start.grad
    return progress, Descent(direction, -step * length)


def is_kink(here: Point, progress: Progress, expected: tf.Tensor) -> tf.Tensor:
    """Return whether f has fallen as it cannot where the gradient has not."""
    kink = min(KINK, float(expected.dtype.max))  # float16 holds no million
    has_fallen = (progress.first_fun - here.fun) / kink > expected
    return has_fallen & tf.logical_not(has_flattened(progress))


def has_flattened(progress: Progress) -> tf.Tensor:
    """Return whether the gradient has fallen, as it does not at a kink."""
    return progress.grad_max <= FALLEN * progress.most_grad


def told(
    expected: tf.Tensor,
    before: tf.Tensor,
    fun: tf.Tensor,
    sized: Descent,
    first_fun: tf.Tensor,
) -> tf.Tensor:
    """Return the fall that is still to be expected, on doubt a larger one.

    Where most of f is to vanish, the model is as good as the digits of f are many.
    Else a model that has never seen a flat direction expects nothing of it; the step
    in the sizes of the variables does. But the fall so far, which that takes for how f
    curves, may be of steeper places: the less is left of f, the less it says about this
    one. The geometric mean of both is taken.
    """
    grows = expected / 2 > before
    careful = tf.where(grows, expected.dtype.max, tf.maximum(expected, before))
    size = tf.abs(fun)
    fall = tf.maximum(first_fun - fun, size)
    part = tf.math.divide_no_nan(tf.maximum(size, DIGITS * fall), fall)
    in_sizes = tf.math.divide_no_nan(-sized.slope / 2, tf.sqrt(part))
    careful = tf.maximum(careful, in_sizes)
    return tf.where(expected >= VANISHING * tf.abs(fun), expected, careful)


def after_step(
    new: Point, old: Point, before: Progress, length: tf.Tensor, is_last: tf.Tensor
) -> Progress:
    """Return how it goes if `new` is taken, whose gradient has that `length`."""
    norm = new.grad_max
    stands = old.fun - new.fun <= EPSILONS[new.fun.dtype] * tf.abs(old.fun)
    is_idle = stands & (norm > before.least_grad / 2) | is_last
    return before._replace(
        grad_max=norm,
        length=length,
        least_grad=tf.minimum(norm, before.least_grad),
        most_grad=tf.maximum(norm, before.most_grad),
        idle=tf.where(is_idle, before.idle + 1, 0),
    )


def length_of(x: tf.Tensor) -> tf.Tensor:
    """Return the Euclidean norm; its square may be more than the dtype holds."""
    largest = tf.reduce_max(tf.abs(x))
    return largest * tf.norm(tf.math.divide_no_nan(x, largest))
