"""Functions of single elements: powers, logarithms, kinks, special functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.formulas.table import is_complex, repairs
from tfgrad.diagnosis.lines import frames_of, made_by_gradient


def is_in_moments(op: tf.Operation) -> bool:
    """Return whether `op` is the stop of the gradient in tf.nn.moments.

    The variance there is the mean of (x - stop_gradient(mean))**2. Its slope along the
    mean is zero, so the first derivative is right. But the slope of that slope is not
    zero.
    """
    return op.type == "StopGradient" and _is_made_by(op, "nn_impl.py", "moments")


@repairs(
    "StopGradient",
    reason="tf.nn.moments stops the gradient of the mean: wrong at the second order",
    first=False,
    applies=is_in_moments,
)
def _stop_gradient(op: Any, grad: tf.Tensor) -> Any:
    return grad


@repairs(
    "SoftmaxCrossEntropyWithLogits",
    reason="TensorFlow takes labels to sum to one, and the slope not to depend on them",
)
def _cross_entropy(op: Any, grad: tf.Tensor, slope_grad: tf.Tensor) -> Any:
    logits, labels = op.inputs
    probabilities, weights = op.outputs[1] + labels, grad[:, tf.newaxis]
    total = tf.reduce_sum(labels + tf.zeros_like(logits), axis=-1, keepdims=True)
    by_logits = weights * (probabilities * total - labels)
    by_labels = -weights * tf.nn.log_softmax(logits)
    if slope_grad is not None:
        mean = tf.reduce_sum(slope_grad * probabilities, axis=-1, keepdims=True)
        by_logits += probabilities * (slope_grad - mean)
        by_labels -= slope_grad
    return _summed_to(by_logits, logits), _summed_to(by_labels, labels)


@repairs(
    "Xlogy",
    reason="TensorFlow puts 0 where x is 0, and forgets the conjugate",
)
def _xlogy(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    usable = _usable(x, y)
    log = tf.where(usable, tf.math.log(tf.where(usable, y, 1)), 0)
    return _both(op, grad * log, grad * tf.math.xdivy(x, y))


@repairs(
    "Xlog1py",
    reason="TensorFlow puts 0 where x is 0, and forgets the conjugate",
)
def _xlog1py(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    usable = _usable(x, y + 1)
    log = tf.where(usable, tf.math.log1p(tf.where(usable, y, 0)), 0)
    return _both(op, grad * log, grad * tf.math.xdivy(x, y + 1))


@repairs(
    "Xdivy",
    reason="TensorFlow puts 0 where x is 0, and forgets the conjugate",
)
def _xdivy(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    usable = tf.not_equal(y, 0)
    inverse = tf.where(usable, 1 / tf.where(usable, y, 1), 0)
    inverse = tf.where(usable | tf.equal(x, 0), inverse, 1 / y)
    return _both(op, grad * inverse, grad * tf.math.xdivy(-x, y**2))


@repairs(
    "Pow",
    reason="TensorFlow has 0 * infinity for the slope of x**0 at 0",
    applies=lambda op: all(map(_may_be_zero, reversed(op.inputs))),
    leads=lambda op: (
        _static_value(op.inputs[1]) is not None or not _may_be_zero(op.inputs[1])
    ),
)
def _pow(op: Any, grad: tf.Tensor) -> Any:
    x, y = op.inputs
    constant = tf.equal(y, 0)
    conjugate = tf.math.conj(tf.where(constant, tf.ones_like(y), y))
    base, lower = tf.math.conj(x), conjugate - 1
    whole = base
    if x.dtype.is_complex:  # 0 to the power of 0 is NaN there
        whole = tf.where(tf.equal(lower, 0), tf.ones_like(base), base)
    by_x = grad * conjugate * tf.pow(whole, lower)
    by_x = tf.where(constant, tf.zeros_like(by_x), by_x)
    if _static_value(y) is not None:
        return _summed_to(by_x, x), None
    usable = tf.not_equal(base, 0) if x.dtype.is_complex else base > 0
    log = tf.where(usable, tf.math.log(tf.where(usable, base, 1)), 0)
    return _both(op, by_x, grad * tf.math.conj(op.outputs[0]) * log)


@repairs(
    "Sqrt",
    "Rsqrt",
    "Reciprocal",
    "Inv",
    reason="XLA forgets the conjugate; at 0, the slope of a capped root's slope is NaN",
    applies=lambda op: is_complex(op) or _is_capped_root(op),
)
def _root(op: Any, grad: tf.Tensor) -> Any:
    y = tf.math.conj(op.outputs[0])
    if not y.dtype.is_complex and op.type == "Sqrt":
        return 0.5 * tf.math.xdivy(grad, y)
    if not y.dtype.is_complex:
        for _ in range(3):
            grad = tf.math.multiply_no_nan(y, grad)
        return -0.5 * grad
    if op.type == "Sqrt":
        return grad * (0.5 / y)
    return grad * (-0.5 * y * y * y if op.type == "Rsqrt" else -y * y)


@repairs(
    "ClipByValue",
    reason="where the limits cross it takes the upper one, and the op the lower one",
    applies=lambda op: not _are_in_order(*op.inputs[1:]),
)
def _clip(op: Any, grad: tf.Tensor) -> Any:
    x, low, high = op.inputs
    is_low = tf.minimum(x, high) < low
    is_high = (x > high) & ~is_low
    masks = (~(is_low | is_high), is_low, is_high)
    pairs = zip(masks, op.inputs, strict=True)
    return [_summed_to(tf.where(mask, grad, 0), part) for mask, part in pairs]


@repairs(
    "MulNoNan",
    reason="TensorFlow forgets the conjugate",
    applies=is_complex,
)
def _mul_no_nan(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    multiply = tf.math.multiply_no_nan
    return _both(op, multiply(grad, y), multiply(x, grad))


@repairs(
    "Abs",
    reason="beside another kink, which it makes up for, it loses a term at the tie",
    applies=lambda op: _is_in_smooth_function(op) or _is_squared(op),
)
def _absolute(op: Any, grad: tf.Tensor) -> Any:
    # The other kink, of a rectifier or a maximum, has the slope of the same side; of a
    # square, this is the slope of a slope on one side, which the other one shares.
    return tf.where(op.inputs[0] < 0, -grad, grad)


@repairs("BesselI1", "BesselJ1", reason="TensorFlow has 1 for its slope at 0, 1/2")
def _bessel(op: Any, grad: tf.Tensor) -> Any:
    x, y = op.inputs[0], op.outputs[0]
    special = tf.math.special
    lower = special.bessel_i0(x) if op.type == "BesselI1" else special.bessel_j0(x)
    at_zero = tf.equal(x, 0)
    inner = lower - y / tf.where(at_zero, tf.ones_like(x), x)
    return grad * tf.where(at_zero, tf.constant(0.5, x.dtype), inner)


@repairs("BesselI1e", reason="TensorFlow's second derivative at 0 is NaN")
def _scaled_bessel(op: Any, grad: tf.Tensor) -> Any:
    x, y = op.inputs[0], op.outputs[0]
    at_zero = tf.equal(x, 0)
    slope = tf.math.special.bessel_i0e(x) - y * tf.sign(x)
    inner = slope - y / tf.where(at_zero, tf.ones_like(x), x)
    return grad * tf.where(at_zero, tf.constant(0.5, x.dtype), inner)


@repairs("Spence", reason="TensorFlow's second derivative at 1 is NaN")
def _spence(op: Any, grad: tf.Tensor) -> Any:
    u = op.inputs[0] - 1
    near = tf.abs(u) < 0.01  # the series of log(1 + u) / u, of which 9 terms are enough
    series = tf.math.polyval([tf.constant(1 / k, u.dtype) for k in range(9, 0, -1)], -u)
    far = tf.where(near, tf.ones_like(u), u)
    return -grad * tf.where(near, series, tf.math.log1p(far) / far)


@repairs(
    "Softsign",
    reason="right by itself; the op that it is made of has no gradient",
    first=False,
)
def _softsign(op: Any, grad: tf.Tensor) -> Any:
    return grad / (1 + tf.abs(op.inputs[0])) ** 2


@repairs("SoftsignGrad", reason="TensorFlow has no gradient for it")
def _softsign_grad(op: Any, grad: tf.Tensor) -> Any:
    slope, x = op.inputs
    size = 1 + tf.abs(x)
    return grad / size**2, -2 * grad * slope * tf.sign(x) / size**3


def _is_made_by(op: tf.Operation, file: str, function: str) -> bool:
    frames = (frame for frame in frames_of(op) if frame.filename.endswith(file))
    return any(frame.name.startswith(function) for frame in frames)


def _is_in_smooth_function(op: tf.Operation) -> bool:
    return (
        _is_made_by(op, "nn_impl.py", "weighted_cross_entropy_with_logits")
        or _is_made_by(op, "np_math_ops.py", "logaddexp")
        or _is_made_by(op, "numpy.py", "logaddexp")
    )


def _is_capped_root(op: tf.Operation) -> bool:
    """Return whether a limit takes the place of the root where that of 0 is asked for.

    As where a vector is divided by its norm.
    """
    cap = {"Sqrt": "Maximum", "Rsqrt": "Minimum"}.get(op.type)
    users = op.outputs[0].consumers()
    squeezed = [user.outputs[0] for user in users if user.type == "Squeeze"]
    further = (user for tensor in squeezed for user in tensor.consumers())
    return any(user.type == cap for user in (*users, *further))


def _is_squared(op: tf.Operation) -> bool:
    """Return whether nothing but the square of an absolute value is asked for."""

    def squares(user: tf.Operation) -> bool:
        if user.type == "Pow":
            return bool(np.all(_static_value(user.inputs[1]) == 2))
        factors = [x.op.type == "Abs" and x.op.inputs[0].ref() for x in user.inputs]
        return user.type == "Square" or (user.type == "Mul" and len({*factors}) == 1)

    users = [u for u in op.outputs[0].consumers() if not made_by_gradient(u)]
    return bool(users) and all(map(squares, users))


def _may_be_zero(x: tf.Tensor) -> bool:
    """Return whether an element may be 0; a / b is not: it would need an infinite b."""
    fixed = _static_value(x)
    if fixed is not None:
        return not (fixed != 0).all()
    if x.op.type in ("Neg", "Identity", "RealDiv"):
        return _may_be_zero(x.op.inputs[0])
    return not _is_positive(x)


def _are_in_order(low: tf.Tensor, high: tf.Tensor) -> bool:
    """Return whether the limits are known, and do not cross."""
    limits = tf.get_static_value(low), tf.get_static_value(high)
    return all(x is not None for x in limits) and bool(np.all(limits[0] <= limits[1]))


def _is_positive(x: tf.Tensor, *, or_zero: bool = False) -> bool:
    """Return whether the op that computes x tells that all of x is positive."""
    fixed, kind = tf.get_static_value(x), x.op.type
    if fixed is not None and not x.dtype.is_complex:
        return bool(((fixed > 0) | ((fixed == 0) & or_zero)).all())
    if kind in ("Exp", "Square", "Abs", "Sigmoid", "Softplus", "Sqrt"):  # underflow
        return or_zero and x.dtype.is_floating
    if kind not in ("AddV2", "Add"):
        return False
    none_is_negative = all(_is_positive(part, or_zero=True) for part in x.op.inputs)
    return none_is_negative and (or_zero or any(map(_is_positive, x.op.inputs)))


def _static_value(x: tf.Tensor) -> Any:
    """Return the value of a constant, or of a difference of such; None if unknown."""
    if x.op.type != "Sub":
        return tf.get_static_value(x)
    left, right = map(_static_value, x.op.inputs)
    return None if left is None or right is None else left - right


def _summed_to(gradient: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Return `gradient` summed over the axes along which `like` was broadcast."""
    if gradient.shape.is_fully_defined() and gradient.shape == like.shape:
        return gradient
    shape = tf.shape(like)
    _, axes = tf.raw_ops.BroadcastGradientArgs(s0=tf.shape(gradient), s1=shape)
    return tf.reshape(tf.reduce_sum(gradient, axes), shape)


def _both(op: Any, by_x: tf.Tensor, by_y: tf.Tensor) -> list[tf.Tensor]:
    return [_summed_to(by_x, op.inputs[0]), _summed_to(by_y, op.inputs[1])]


def _usable(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Return where the logarithm of y counts: not where 0 times it is put to 0."""
    has_log = tf.not_equal(y, 0) if y.dtype.is_complex else y > 0
    return has_log | tf.not_equal(x, 0)
