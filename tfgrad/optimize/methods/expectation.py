"""The fall of f that a search still expects, whatever the units of x.

L-BFGS with bounds and without share it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either
from tfgrad.optimize.methods.convergence import DIGITS, VANISHING
from tfgrad.optimize.methods.protocol import Point

FIRST = 0.1
"""The length of the first step, as a part of |x|, or of |f| / |g| if that is less: both
scale with the units of x. A longer step might end in another valley."""

MOST_IDLE = 8
"""Idle steps in a row (see `Progress`) with which the method fails. Near a saddle in
float32, some runs take a few before they find the way down."""

LEVEL = 100
"""Rounding errors of f that hide a fall, for sums of hundreds of terms."""

FALLEN, KINK = 1e-2, 1e6
"""A point is taken for a kink if its gradient is more than the first number times the
largest one, and f has fallen by more than the second times the expected fall. At a
smooth minimum the expected fall shrinks like the square of the gradient."""


class Descent(NamedTuple):
    """A step down the gradient.

    Attributes:
        step: Of shape `[n]`.
        slope: Of f along it, shape `[]`.
    """

    step: tf.Tensor
    slope: tf.Tensor


class Size(NamedTuple):
    """How large f is, shape `[]`.

    Attributes:
        value: |f|.
        fallen: By how much f has fallen since the start.
        fall: The same, or |f| if that is more.
    """

    value: tf.Tensor
    fallen: tf.Tensor
    fall: tf.Tensor

    @classmethod
    def of(cls, fun: tf.Tensor, first_fun: tf.Tensor) -> Size:
        """Return it, given f at the start."""
        value, fallen = tf.abs(fun), first_fun - fun
        return cls(value, fallen, tf.maximum(fallen, value))


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
    most = tf.maximum(of_x, of_f)
    most = either(most > 0, most, tf.ones_like(of_x))
    least = tf.minimum(of_x, of_f)
    return FIRST * either(least > 0, least, most)


def sized(here: Point, size: Size) -> Descent:
    """Return the Newton step of a diagonal Hessian that is guessed from x and f.

    The Hessian is F / x^2 on its diagonal: f curves by F, the fall so far or |f| if
    that is more, over a step of the size of x. With u = x g / F, the step is -x u,
    element by element, and f falls by F |u|^2 / 2. The units of the variables cancel.
    """
    part = tf.math.divide_no_nan(here.x * here.grad, size.fall)
    return Descent(-here.x * part, -size.fall * tf.reduce_sum(part * part))


def steepest(grad: tf.Tensor, length: tf.Tensor, scale: tf.Tensor) -> Descent:
    """Return a step down the gradient, scaled by the last pair, or no longer than 1."""
    scale = either(scale > 0, -scale, -1 / tf.maximum(length, 1))
    return Descent(scale * grad, (scale * length) * length)


def start_of(start: Point) -> tuple[Progress, Descent]:
    """Return the progress at the start, and the first step."""
    norm, length = start.grad_max, length_of(start.grad)
    unknown = tf.zeros_like(length) + length.dtype.max
    expected = either(length > 0, unknown, tf.zeros_like(length))
    none = tf.constant(0)
    progress = Progress(norm, length, norm, norm, none, expected, start.fun)
    step = first_length(start, length)
    direction = -tf.math.divide_no_nan(step, length) * start.grad
    return progress, Descent(direction, -step * length)


def told(
    progress: Progress,
    before: tf.Tensor,
    size: Size,
    gain: tf.Tensor,
    noise: tf.Tensor,
    failed: tf.Tensor,
) -> tf.Tensor:
    """Return the expected fall to report: in doubt, more than the model's own.

    Where the minimum of f is taken to be 0 (`VANISHING`), the model's own number is
    reported. Elsewhere the model may have seen no flat direction yet, and expect
    nothing of it; `sized` does. But `sized` takes its curvature from the fall so far,
    most of which may have happened where f is steeper. So the geometric mean of its
    falls with F = the fall so far and with F = |f| is used, if that is larger.

    Args:
        progress: With the fall that the model expects.
        before: What it expected one step before.
        size: Of f.
        gain: By how much f falls with the step `sized`.
        noise: The largest change of f that rounding may have made.
        failed: Whether the search has: nothing is then doubted but rounding.
    """
    expected, unknown = progress.expected, tf.constant(before.dtype.max, before.dtype)
    careful = either(expected / 2 > before, unknown, tf.maximum(expected, before))
    part = tf.maximum(size.value, DIGITS * size.fall)
    part = tf.math.divide_no_nan(part, size.fall)
    careful = tf.maximum(careful, tf.math.divide_no_nan(gain, tf.sqrt(part)))
    careful = either(expected >= VANISHING * size.value, expected, careful)

    has_flattened: Any = progress.grad_max <= FALLEN * progress.most_grad
    is_hidden = has_flattened & (tf.maximum(expected, gain) <= 4 * noise)
    last = either(is_hidden, tf.zeros_like(expected), expected)
    # If the noise in f exceeds its rounding, f may still fall by that noise.
    is_noisy = noise > LEVEL * EPSILONS[noise.dtype] * size.value
    last = either(is_noisy, tf.maximum(last, noise), last)
    # A kink: see `KINK`, of which float16 holds no million.
    has_fallen = size.fallen / min(KINK, float(expected.dtype.max)) > expected
    is_kink = has_fallen & ~has_flattened
    reported: tf.Tensor = either(is_kink, unknown, either(failed, last, careful))
    return reported


def after_step(
    new: Point, old: Point, before: Progress, length: tf.Tensor, is_last: tf.Tensor
) -> Progress:
    """Return the progress after a step to `new`, whose gradient has that `length`."""
    norm = new.grad_max
    stands = old.fun - new.fun <= EPSILONS[new.fun.dtype] * tf.abs(old.fun)
    is_idle = stands & (norm > before.least_grad / 2) | is_last
    return before._replace(
        grad_max=norm,
        length=length,
        least_grad=tf.minimum(norm, before.least_grad),
        most_grad=tf.maximum(norm, before.most_grad),
        idle=either(is_idle, before.idle + 1, 0),
    )


def length_of(x: tf.Tensor) -> tf.Tensor:
    """Return the Euclidean norm; its square may be more than the dtype holds."""
    largest = tf.reduce_max(tf.abs(x))
    return largest * tf.norm(tf.math.divide_no_nan(x, largest))
