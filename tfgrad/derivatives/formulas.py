"""The table of gradients that TensorFlow 2.21 has wrong or lacks, each put right.

The formulas consist of ops whose own gradients are right, so derivatives of every order
are. A complex gradient is the conjugate of the derivative times what arrives, as
everywhere in TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.projection import projected
from tfgrad.differences import EPSILONS

Gradient = Callable[..., Any]


class Repair(NamedTuple):
    """One entry of the table.

    Attributes:
        gradient: The right one: takes the op and the gradients of its outputs.
        reason: What is wrong with TensorFlow's.
        first: Whether it is wrong at the first order, or only where differentiated.
        applies: Takes an op, returns whether TensorFlow's is wrong for it.
        leads: Takes an op, returns whether TensorFlow's is right for it, and that of
            its gradient may be wrong.
    """

    gradient: Gradient
    reason: str
    first: bool
    applies: Callable[[tf.Operation], bool]
    leads: Callable[[tf.Operation], bool]


TABLE: dict[str, Repair] = {}
"""From the type of an op to its repair."""


def _repairs(
    *kinds: str,
    reason: str,
    first: bool = True,
    applies: Callable[[tf.Operation], bool] = lambda op: True,
    leads: Callable[[tf.Operation], bool] = lambda op: False,
) -> Callable[[Gradient], Gradient]:
    """Put a gradient into the table, see `Repair`."""

    def register(gradient: Gradient) -> Gradient:
        repair = Repair(gradient, reason, first, applies, leads)
        TABLE.update(dict.fromkeys(kinds, repair))
        return gradient

    return register


def is_in_moments(op: tf.Operation) -> bool:
    """Return whether `op` is the stop of the gradient in tf.nn.moments.

    The variance there is the mean of (x - stop_gradient(mean))**2. Its slope along the
    mean is zero, so the first derivative is right. But the slope of that slope is not
    zero.
    """
    return op.type == "StopGradient" and _is_made_by(op, "nn_impl.py", "moments")


def _is_complex(op: tf.Operation) -> bool:
    return bool(op.outputs[-1].dtype.is_complex)


@_repairs(
    "StopGradient",
    reason="tf.nn.moments stops the gradient of the mean: wrong at the second order",
    first=False,
    applies=is_in_moments,
)
def _stop_gradient(op: Any, grad: tf.Tensor) -> Any:
    return grad


@_repairs(
    "Prod",
    reason="its second derivative is lost where an element is 0",
    first=False,
)
def _prod(op: Any, grad: tf.Tensor) -> Any:
    x, axes = op.inputs
    shape = tf.shape(x)
    if not op.get_attr("keep_dims"):
        grad = tf.reshape(grad, _kept(shape, axes))
    # The reduced axes first, taken together: the product of all elements but one.
    order, count = _reduced_first(x, axes)
    moved = tf.transpose(x, order)
    flat = tf.reshape(moved, [count, -1])
    before = tf.math.cumprod(flat, 0, exclusive=True)
    after = tf.math.cumprod(flat, 0, exclusive=True, reverse=True)
    others = tf.reshape(before * after, tf.shape(moved))
    others = tf.transpose(others, tf.math.invert_permutation(order))
    answer = grad * tf.math.conj(others)
    answer.set_shape(x.shape)
    return answer, None


@_repairs(
    "Cumprod",
    reason="TensorFlow divides by x, and puts 0 where that is 0",
)
def _cumprod(op: Any, grad: tf.Tensor) -> Any:
    x, axis = op.inputs
    exclusive, reverse = op.get_attr("exclusive"), op.get_attr("reverse")
    before = tf.math.cumprod(x, axis, exclusive=True, reverse=reverse)
    factors, terms = tf.math.conj(x), grad
    if not reverse:
        factors, terms = (tf.reverse(t, [axis]) for t in (factors, terms))
    # The sum over the products that x is a factor of, without x itself.
    terms = _moved(terms, axis) if exclusive else terms
    sums = _recurrence(_moved(factors, axis), terms, axis)
    if not reverse:
        sums = tf.reverse(sums, [axis])
    return tf.math.conj(before) * sums, None


@_repairs(
    "SegmentProd",
    "UnsortedSegmentProd",
    reason="TensorFlow divides by x: its second derivative is lost where that is 0",
)
def _segment_products(op: Any, grad: tf.Tensor) -> Any:
    x, ids, *count = op.inputs
    places = tf.reshape(ids, [-1])
    rows = tf.reshape(x, tf.concat([[-1], tf.shape(x)[tf.rank(ids) :]], axis=0))
    # Segment by segment: the product of all elements before, times that of all after.
    order, first = tf.argsort(places, stable=True), tf.constant(0)
    rows, places = tf.gather(rows, order), tf.gather(places, order)
    others = tf.ones_like(rows)
    for _ in range(2):
        rows, places, others = (tf.reverse(t, [0]) for t in (rows, places, others))
        same = tf.equal(_moved(places + 1, first), places + 1) & (places > -1)
        factors = _where_rows(same, _moved(rows, first))
        terms = _where_rows(tf.logical_not(same), tf.ones_like(rows))
        others *= _recurrence(factors, terms, first)
    others = tf.gather(others, tf.math.invert_permutation(order))
    taken = _where_rows(ids > -1, tf.gather(grad, tf.maximum(ids, 0)))
    slope = taken * tf.math.conj(tf.reshape(others, tf.shape(x)))
    return slope, None, *(None for _ in count)


@_repairs(
    *("SegmentMean", "SegmentMax", "SegmentMin"),
    *("UnsortedSegmentMax", "UnsortedSegmentMin"),
    reason="TensorFlow divides by the size of a segment, which may be 0",
    first=False,
)
def _segment_shares(op: Any, grad: tf.Tensor) -> Any:
    x, ids, *count = op.inputs
    places = tf.maximum(ids, 0)
    shares = tf.ones_like(x)
    if op.type != "SegmentMean":
        is_extreme = tf.equal(x, tf.gather(op.outputs[0], places))
        shares = tf.cast(is_extreme, x.dtype)
    shares = _where_rows(ids > -1, shares)
    sums = tf.math.unsorted_segment_sum(shares, ids, tf.shape(grad)[0])
    shares = tf.math.divide_no_nan(shares, tf.gather(sums, places))
    slope = tf.gather(grad, places) * shares
    return slope, None, *(None for _ in count)


@_repairs(
    *("SparseSegmentSum", "SparseSegmentSumWithNumSegments"),
    *("SparseSegmentMean", "SparseSegmentMeanWithNumSegments"),
    *("SparseSegmentSqrtN", "SparseSegmentSqrtNWithNumSegments"),
    reason="right by itself; the op that it is made of has no gradient",
    first=False,
)
def _sparse_segments(op: Any, grad: tf.Tensor) -> Any:
    x, indices, ids, *count = op.inputs
    sizes = tf.math.unsorted_segment_sum(
        tf.ones(tf.shape(ids), x.dtype), ids, tf.shape(grad)[0]
    )
    power = -1.0 if "Mean" in op.type else -0.5 if "Sqrt" in op.type else 0.0
    weights = tf.gather(sizes, ids) ** power
    rows = tf.einsum("i,i...->i...", weights, tf.gather(grad, ids))
    slope = tf.math.unsorted_segment_sum(rows, indices, tf.shape(x)[0])
    return slope, None, None, *(None for _ in count)


@_repairs(
    "CumulativeLogsumexp",
    reason="TensorFlow takes the logarithm of the cotangent, which may be zero",
    first=False,
)
def _cumulative_logsumexp(op: Any, grad: tf.Tensor) -> Any:
    x, axis = op.inputs
    exclusive, reverse = op.get_attr("exclusive"), op.get_attr("reverse")
    y = op.outputs[0]
    if exclusive:
        y = tf.math.cumulative_logsumexp(x, axis, reverse=reverse)
    if not reverse:
        x, y, grad = (tf.reverse(t, [axis]) for t in (x, y, grad))
    grad = _moved(grad, axis) if exclusive else grad
    # y falls along the axis now, by what the terms left behind were worth.
    is_later = tf.cast(_moved(tf.ones_like(y), axis), tf.bool)
    falls = tf.where(is_later & tf.math.is_finite(y), y - _moved(y, axis), 0.0)
    factors = tf.where(is_later, tf.exp(falls), 0.0)
    sums = _recurrence(factors, grad, axis)
    answer = tf.exp(tf.where(tf.math.is_finite(x), x - y, x)) * sums
    return (answer if reverse else tf.reverse(answer, [axis])), None


@_repairs(
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


@_repairs(
    "Xlogy",
    reason="TensorFlow puts 0 where x is 0, and forgets the conjugate",
)
def _xlogy(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    usable = _usable(x, y)
    log = tf.where(usable, tf.math.log(tf.where(usable, y, 1)), 0)
    return _both(op, grad * log, grad * tf.math.xdivy(x, y))


@_repairs(
    "Xlog1py",
    reason="TensorFlow puts 0 where x is 0, and forgets the conjugate",
)
def _xlog1py(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    usable = _usable(x, y + 1)
    log = tf.where(usable, tf.math.log1p(tf.where(usable, y, 0)), 0)
    return _both(op, grad * log, grad * tf.math.xdivy(x, y + 1))


@_repairs(
    "Xdivy",
    reason="TensorFlow puts 0 where x is 0, and forgets the conjugate",
)
def _xdivy(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    usable = tf.not_equal(y, 0)
    inverse = tf.where(usable, 1 / tf.where(usable, y, 1), 0)
    inverse = tf.where(usable | tf.equal(x, 0), inverse, 1 / y)
    return _both(op, grad * inverse, grad * tf.math.xdivy(-x, y**2))


@_repairs(
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
    by_x = grad * conjugate * tf.pow(tf.math.conj(x), conjugate - 1)
    by_x = tf.where(constant, tf.zeros_like(by_x), by_x)
    if _static_value(y) is not None:
        return _summed_to(by_x, x), None
    base = tf.math.conj(x)
    usable = tf.not_equal(base, 0) if x.dtype.is_complex else base > 0
    log = tf.where(usable, tf.math.log(tf.where(usable, base, 1)), 0)
    return _both(op, by_x, grad * tf.math.conj(op.outputs[0]) * log)


@_repairs(
    "Sqrt",
    "Rsqrt",
    "Reciprocal",
    "Inv",
    reason="XLA forgets the conjugate",
    applies=_is_complex,
)
def _complex_root(op: Any, grad: tf.Tensor) -> Any:
    y = tf.math.conj(op.outputs[0])
    if op.type == "Sqrt":
        return grad * (0.5 / y)
    return grad * (-0.5 * y * y * y if op.type == "Rsqrt" else -y * y)


@_repairs(
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


@_repairs(
    "MatrixDeterminant",
    reason="TensorFlow forgets the conjugate, and divides by what may be 0",
)
def _determinant(op: Any, grad: tf.Tensor) -> Any:
    x, value = op.inputs[0], _as_matrices(op.outputs[0])
    if _is_square_of(x, 4):
        cofactors = _adjugate(x)
    else:
        rare = _adjugate(x) if _is_square_of(x, 16) else tf.cast(np.nan, x.dtype)
        singular = tf.equal(value, 0)
        cofactors = tf.where(singular, rare, value * _inverse(x, singular))
    return _as_matrices(grad) * tf.linalg.adjoint(cofactors)


@_repairs(
    "LogMatrixDeterminant",
    reason="TensorFlow takes the sign of a complex determinant to be constant",
)
def _log_determinant(op: Any, by_sign: tf.Tensor, by_log: tf.Tensor) -> Any:
    x, sign = op.inputs[0], op.outputs[0]
    if x.dtype.is_complex:
        turn = -tf.math.imag(tf.math.conj(by_sign) * sign)
        by_log = tf.complex(tf.math.real(by_log), turn)
    singular = _as_matrices(tf.equal(sign, 0))
    slopes = tf.linalg.adjoint(_inverse(x, singular))
    slopes = tf.where(singular, tf.cast(np.nan, x.dtype), slopes)
    return _as_matrices(by_log) * slopes


@_repairs(
    "SelfAdjointEigV2",
    reason="where eigenvalues repeat, TensorFlow puts 0 for what it cannot know",
    applies=lambda op: op.get_attr("compute_v"),
    leads=lambda op: not op.get_attr("compute_v"),
)
def _eigenvectors(op: Any, by_values: tf.Tensor, by_vectors: tf.Tensor) -> Any:
    x, has_vectors = op.inputs[0], op.get_attr("compute_v")
    values, vectors = op.outputs if has_vectors else tf.linalg.eigh(x)
    inner = tf.linalg.diag(by_values)
    if has_vectors:
        turned = tf.matmul(vectors, by_vectors, adjoint_a=True)
        inner += _over_gaps(turned, tf.math.real(values))
    slope = tf.matmul(vectors, tf.matmul(inner, vectors, adjoint_b=True))
    # One triangle of x is read.
    slope = tf.linalg.band_part(slope + tf.linalg.adjoint(slope), -1, 0)
    return tf.linalg.set_diag(slope, tf.linalg.diag_part(slope) / 2)


@_repairs(
    "Svd",
    reason="where singular values repeat, TensorFlow puts 0 for what it cannot know",
    applies=lambda op: op.get_attr("compute_uv") and _is_economic(op),
    leads=lambda op: not op.get_attr("compute_uv"),
)
def _singular_vectors(op: Any, by_s: tf.Tensor, *by_vectors: tf.Tensor) -> Any:
    x, has_vectors = op.inputs[0], op.get_attr("compute_uv")
    s, u, v = op.outputs if has_vectors else tf.linalg.svd(x)
    inner = tf.linalg.diag(tf.cast(by_s, x.dtype))
    if not has_vectors:
        return tf.matmul(u, tf.matmul(inner, v, adjoint_b=True))
    # Townsend (2016), Differentiating the Singular Value Decomposition.
    (by_u, by_v), s = by_vectors, tf.math.real(s)
    row = tf.cast(tf.expand_dims(s, -2), x.dtype)
    sums = row + tf.linalg.matrix_transpose(row)
    left = tf.matmul(u, by_u, adjoint_a=True)
    right = tf.matmul(v, by_v, adjoint_a=True)
    turned = [_quotient(_over_gaps(t, s), sums) for t in (left, right)]
    turned_left, turned_right = (t + tf.linalg.adjoint(t) for t in turned)
    inner += turned_left * row + tf.linalg.matrix_transpose(row) * turned_right
    if x.dtype.is_complex:
        turn = tf.math.imag(tf.linalg.diag_part(right))
        inner -= tf.linalg.diag(tf.complex(0 * s, _quotient(turn, s)))
    slope = tf.matmul(u, tf.matmul(inner, v, adjoint_b=True))
    height, width = _sides(x)
    if height is None or width is None or height > width:
        outside = _quotient(by_u - tf.matmul(u, left), row)
        slope += tf.matmul(outside, v, adjoint_b=True)
    if height is None or width is None or width > height:
        outside = _quotient(by_v - tf.matmul(v, right), row)
        slope += tf.matmul(u, outside, adjoint_b=True)
    return slope


@_repairs(
    "Qr",
    reason="where columns depend on each other, it divides by what rounding left",
    applies=lambda op: _has_gradient(op),
)
def _orthogonal_factor(op: Any, by_q: tf.Tensor, by_r: tf.Tensor) -> Any:
    x, r = op.inputs[0], op.outputs[1]
    with tf.GradientTape() as tape:
        tape.watch(x)
        factors = tf.linalg.qr(x, op.get_attr("full_matrices"))
    pivots = tf.abs(tf.linalg.diag_part(r))
    largest = tf.reduce_max(pivots, axis=-1, keepdims=True)
    least = 100 * EPSILONS[pivots.dtype] * largest  # two digits would be left
    unknown = _as_matrices(tf.reduce_any(pivots <= least, axis=-1))
    known = tf.where(unknown, tf.cast(np.nan, x.dtype), tf.ones([], x.dtype))
    return tape.gradient(factors, x, [by_q * known, by_r * known])


@_repairs(
    "SparseSlice",
    reason="right by itself; the op that it is made of has no gradient",
    first=False,
)
def _sparse_slice(op: Any, *grads: tf.Tensor) -> Any:
    indices, values, _, start, size = op.inputs
    inside = tf.reduce_all((indices >= start) & (indices < start + size), axis=1)
    slope = tf.scatter_nd(tf.where(inside), grads[1], tf.shape(values, tf.int64))
    return None, slope, None, None, None


@_repairs(
    "MulNoNan",
    reason="TensorFlow forgets the conjugate",
    applies=_is_complex,
)
def _mul_no_nan(op: Any, grad: tf.Tensor) -> Any:
    x, y = (tf.math.conj(tensor) for tensor in op.inputs)
    multiply = tf.math.multiply_no_nan
    return _both(op, multiply(grad, y), multiply(x, grad))


@_repairs(
    "MatrixSquareRoot",
    reason="TensorFlow forgets the conjugate",
    applies=_is_complex,
)
def _matrix_square_root(op: Any, grad: tf.Tensor) -> Any:
    # The slope S of A = Y Y solves adjoint(Y) S + S adjoint(Y) = grad, which is linear
    # in the elements of S, taken row by row.
    adjoint = tf.linalg.adjoint(op.outputs[0])
    n = tf.shape(adjoint)[-1]
    identity = tf.eye(n, dtype=adjoint.dtype)
    left = tf.einsum("...ik,jl->...ijkl", adjoint, identity)
    right = tf.einsum("ik,...lj->...ijkl", identity, adjoint)
    batch = tf.shape(grad)[:-2]
    matrix = tf.reshape(left + right, tf.concat([batch, [n * n, n * n]], axis=0))
    flat = tf.reshape(grad, tf.concat([batch, [n * n, 1]], axis=0))
    return tf.reshape(tf.linalg.solve(matrix, flat), tf.shape(grad))


@_repairs(
    "EuclideanNorm",
    reason="TensorFlow divides by the cotangent, which may be zero",
)
def _euclidean_norm(op: Any, grad: tf.Tensor) -> Any:
    x, axes = op.inputs
    y = op.outputs[0]
    if not op.get_attr("keep_dims"):
        shape = _kept(tf.shape(x), axes)
        y, grad = tf.reshape(y, shape), tf.reshape(grad, shape)
    # The gradient of a root is 0 where nothing arrives, as behind a square.
    return 2 * x * tf.raw_ops.SqrtGrad(y=y, dy=grad), None


@_repairs(
    "DynamicStitch",
    "ParallelDynamicStitch",
    reason="of two values for one place, the first one is overwritten: it has no slope",
)
def _dynamic_stitch(op: Any, grad: tf.Tensor) -> Any:
    count = len(op.inputs) // 2
    indices = list(op.inputs[:count])
    counts = [tf.size(part) for part in indices]
    numbers = tf.split(tf.range(1, tf.add_n(counts) + 1), counts)
    numbers = [
        tf.reshape(n, tf.shape(i)) for n, i in zip(numbers, indices, strict=True)
    ]
    stitch = getattr(tf.raw_ops, op.type)
    last = stitch(indices=indices, data=numbers)
    found = [
        _where_rows(tf.equal(tf.gather(last, i), n), tf.gather(grad, i))
        for i, n in zip(indices, numbers, strict=True)
    ]
    return [None] * count + found


@_repairs(
    "TensorScatterUpdate",
    reason="of two values for one place, the first one is overwritten: it has no slope",
    applies=lambda op: op.inputs[1].shape[-1] is not None,
)
def _tensor_scatter_update(op: Any, grad: tf.Tensor) -> Any:
    x, indices, updates = op.inputs
    depth = indices.shape[-1]
    shape = tf.shape(indices)[:-1]
    numbers = tf.reshape(tf.range(1, tf.reduce_prod(shape) + 1), shape)
    places = tf.zeros(tf.shape(x)[:depth], tf.int32)
    last = tf.tensor_scatter_nd_update(places, indices, numbers)
    is_last = tf.equal(tf.gather_nd(last, indices), numbers)
    by_updates = _where_rows(is_last, tf.gather_nd(grad, indices))
    by_x = tf.tensor_scatter_nd_update(grad, indices, tf.zeros_like(updates))
    return by_x, None, by_updates


@_repairs(
    "TensorListGather",
    reason="TensorFlow keeps one of the slopes of an element that is taken twice",
)
def _list_gather(op: Any, grad: tf.Tensor) -> Any:
    elements, indices, _ = op.inputs
    length = tf.raw_ops.TensorListLength(input_handle=elements)
    summed = tf.math.unsorted_segment_sum(grad, indices, length)
    answer = tf.raw_ops.TensorListFromTensor(
        tensor=summed, element_shape=tf.shape(grad)[1:]
    )
    return answer, None, None


@_repairs(
    "TensorListScatter",
    "TensorListScatterV2",
    "TensorListScatterIntoExistingList",
    reason="of two values for one place, the first one is overwritten: it has no slope",
)
def _list_scatter(op: Any, grad: tf.Tensor) -> Any:
    at = 1 if op.type == "TensorListScatterIntoExistingList" else 0
    indices = op.inputs[at + 1]
    numbers = tf.range(1, tf.size(indices) + 1)
    places = tf.zeros([tf.reduce_max(tf.pad(indices, [[0, 1]])) + 1], tf.int32)
    last = tf.tensor_scatter_nd_update(places, indices[:, tf.newaxis], numbers)
    is_last = tf.equal(tf.gather(last, indices), numbers)
    tensor = op.inputs[at]
    options = {"element_shape": tf.shape(tensor)[1:], "element_dtype": tensor.dtype}
    taken = tf.raw_ops.TensorListGather(input_handle=grad, indices=indices, **options)
    found: list[Any] = [None for _ in op.inputs]
    found[at] = _where_rows(is_last, taken)
    if at:
        found[0] = tf.raw_ops.TensorListScatterIntoExistingList(
            input_handle=grad, tensor=tf.zeros_like(tensor), indices=indices
        )
    return found


@_repairs(
    "ImageProjectiveTransformV2",
    "ImageProjectiveTransformV3",
    reason="TensorFlow transforms the slope backwards, which is not what the slope is",
)
def _projective_transform(op: Any, grad: tf.Tensor) -> Any:
    images, transforms, size, *fill = op.inputs
    options = _attributes(op, "interpolation", "fill_mode")
    options["fill_value"] = fill[0] if fill else 0.0
    with tf.GradientTape() as tape:
        tape.watch([images, transforms])
        output = projected(images, transforms, size, **options)
    found = tape.gradient(output, [images, transforms], [grad])
    return [*found, *(None for _ in op.inputs[2:])]


@_repairs("RGBToHSV", reason="TensorFlow's is wrong where a color is negative")
def _hue(op: Any, grad: tf.Tensor) -> Any:
    images = op.inputs[0]
    with tf.GradientTape() as tape:
        tape.watch(images)
        red, green, blue = tf.unstack(images, axis=-1)
        value = tf.maximum(tf.maximum(red, green), blue)
        spread = value - tf.minimum(tf.minimum(red, green), blue)
        by = tf.where(spread > 0, spread, 1)
        saturation = tf.where(value > 0, spread / tf.where(value > 0, value, 1), 0)
        sixths = tf.where(
            tf.equal(value, red),
            (green - blue) / by,
            tf.where(
                tf.equal(value, green), 2 + (blue - red) / by, 4 + (red - green) / by
            ),
        )
        hue = tf.where(spread > 0, sixths / 6, 0)  # of a whole turn more, the same
        colors = tf.stack([hue, saturation, value], axis=-1)
    return tape.gradient([colors], [images], [grad])[0]


@_repairs(
    "RFFT",
    "RFFT2D",
    reason="TensorFlow's is wrong where fft_length cuts the input, or is 1",
    applies=lambda op: not _keeps_length(op),
)
def _real_fourier(op: Any, grad: tf.Tensor) -> Any:
    x, length = op.inputs
    rank = 1 if op.type == "RFFT" else 2
    # Half of the spectrum of a complex input: the adjoint pads it and goes back.
    padding = tf.scatter_nd(
        [[tf.rank(grad) - 1, 1]],
        [length[-1] - tf.shape(grad)[-1]],
        tf.stack([tf.rank(grad), 2]),
    )
    backward = tf.signal.ifft if rank == 1 else tf.signal.ifft2d
    scale = tf.cast(tf.reduce_prod(length), x.dtype)
    slope = tf.math.real(backward(tf.pad(grad, padding))) * scale
    return _fitted(slope, tf.shape(x)), None


@_repairs(
    "IRFFT",
    "IRFFT2D",
    reason="TensorFlow's is wrong where fft_length cuts the input",
    applies=lambda op: not _keeps_length(op),
)
def _inverse_real_fourier(op: Any, grad: tf.Tensor) -> Any:
    x, length = op.inputs
    rank = 1 if op.type == "IRFFT" else 2
    forward = tf.signal.rfft if rank == 1 else tf.signal.rfft2d
    spectrum = forward(grad)
    columns = tf.range(tf.shape(spectrum)[-1])
    # All but the first frequency and the last of an even length stand for two.
    alone = tf.equal(columns, 0) | tf.equal(2 * columns, length[-1])
    weights = tf.cast(tf.where(alone, 1, 2), spectrum.dtype)
    weights /= tf.cast(tf.reduce_prod(length), spectrum.dtype)
    return _fitted(spectrum * weights, tf.shape(x)), None


@_repairs(
    "Abs",
    reason="beside another kink, which it makes up for, it loses a term at the tie",
    applies=lambda op: _is_in_smooth_function(op),
)
def _absolute(op: Any, grad: tf.Tensor) -> Any:
    # The other kink, of a rectifier or a maximum, has the slope of the same side.
    return tf.where(op.inputs[0] < 0, -grad, grad)


@_repairs("BesselI1", "BesselJ1", reason="TensorFlow has 1 for its slope at 0, 1/2")
def _bessel(op: Any, grad: tf.Tensor) -> Any:
    x, y = op.inputs[0], op.outputs[0]
    special = tf.math.special
    lower = special.bessel_i0(x) if op.type == "BesselI1" else special.bessel_j0(x)
    at_zero = tf.equal(x, 0)
    inner = lower - y / tf.where(at_zero, tf.ones_like(x), x)
    return grad * tf.where(at_zero, tf.constant(0.5, x.dtype), inner)


@_repairs("BesselI1e", reason="TensorFlow's second derivative at 0 is NaN")
def _scaled_bessel(op: Any, grad: tf.Tensor) -> Any:
    x, y = op.inputs[0], op.outputs[0]
    at_zero = tf.equal(x, 0)
    slope = tf.math.special.bessel_i0e(x) - y * tf.sign(x)
    inner = slope - y / tf.where(at_zero, tf.ones_like(x), x)
    return grad * tf.where(at_zero, tf.constant(0.5, x.dtype), inner)


@_repairs("Spence", reason="TensorFlow's second derivative at 1 is NaN")
def _spence(op: Any, grad: tf.Tensor) -> Any:
    u = op.inputs[0] - 1
    near = tf.abs(u) < 0.01  # the series of log(1 + u) / u, of which 9 terms are enough
    series = tf.math.polyval([tf.constant(1 / k, u.dtype) for k in range(9, 0, -1)], -u)
    far = tf.where(near, tf.ones_like(u), u)
    return -grad * tf.where(near, series, tf.math.log1p(far) / far)


@_repairs(
    "Softsign",
    reason="right by itself; the op that it is made of has no gradient",
    first=False,
)
def _softsign(op: Any, grad: tf.Tensor) -> Any:
    return grad / (1 + tf.abs(op.inputs[0])) ** 2


@_repairs("SoftsignGrad", reason="TensorFlow has no gradient for it")
def _softsign_grad(op: Any, grad: tf.Tensor) -> Any:
    slope, x = op.inputs
    size = 1 + tf.abs(x)
    return grad / size**2, -2 * grad * slope * tf.sign(x) / size**3


@_repairs(
    "ResizeBilinear",
    "ResizeBicubic",
    "ResizeNearestNeighbor",
    reason="right by itself; the op that it is made of has no gradient",
    first=False,
)
def _resize(op: Any, grad: tf.Tensor) -> Any:
    image = op.inputs[0]
    options = _attributes(op, "align_corners", "half_pixel_centers")
    if op.type == "ResizeNearestNeighbor":
        options["size"] = tf.shape(image)[1:3]
    else:
        options["original_image"] = image
    return getattr(tf.raw_ops, f"{op.type}Grad")(grads=grad, **options), None


@_repairs(
    "ResizeBilinearGrad",
    "ResizeBicubicGrad",
    "ResizeNearestNeighborGrad",
    reason="TensorFlow has no gradient for it: it is linear, and this is its adjoint",
)
def _resize_grad(op: Any, grad: tf.Tensor) -> Any:
    options = _attributes(op, "align_corners", "half_pixel_centers")
    forward = getattr(tf.raw_ops, op.type.removesuffix("Grad"))
    size = tf.shape(op.inputs[0])[1:3]
    return forward(images=grad, size=size, **options), None


@_repairs(
    "MaxPool",
    "MaxPool3D",
    reason="right by itself; the ops of its gradient have to be marked",
    first=False,
)
def _max_pool(op: Any, grad: tf.Tensor) -> Any:
    options = _pooling_options(op)
    if op.type == "MaxPool":
        options |= _attributes(op, "explicit_paddings")
    pooled = {"orig_input": op.inputs[0], "orig_output": op.outputs[0], "grad": grad}
    return getattr(tf.raw_ops, f"{op.type}Grad")(**pooled, **options)


@_repairs(
    "MaxPoolGrad",
    "MaxPool3DGrad",
    reason="its kernel may write its answer over an input that it has yet to read",
)
def _max_pool_grad(op: Any, grad: tf.Tensor) -> Any:
    image, output = op.inputs[0], op.inputs[1]
    pooled = {"orig_input": image, "orig_output": output, "grad": grad}
    kernel = getattr(tf.raw_ops, f"{op.type}Grad")
    answer = kernel(**pooled, **_pooling_options(op))
    # With stride 1 the kernel takes the buffer of `grad` for its answer while it reads
    # it, unless someone else still needs that buffer. In eager mode someone always
    # does.
    if grad.shape.is_compatible_with(output.shape):
        answer = tf.where(tf.math.is_nan(grad), grad, answer)
    return tf.zeros_like(image), tf.zeros_like(output), answer


POOLING = {"MaxPoolGradGrad", "MaxPool3DGradGrad"}
"""Ops whose kernel may write its answer over an input that it has yet to read."""


@_repairs(
    *POOLING,
    reason="right by itself; the ops of its gradient have to be marked",
)
def _max_pool_grad_grad(op: Any, grad: tf.Tensor) -> Any:
    image, output = op.inputs[0], op.inputs[1]
    pooled = {"orig_input": image, "orig_output": output, "grad": grad}
    kernel = getattr(tf.raw_ops, op.type.removesuffix("Grad"))
    answer = kernel(**pooled, **_pooling_options(op))
    return tf.zeros_like(image), tf.zeros_like(output), answer


def _pooling_options(op: tf.Operation) -> dict[str, Any]:
    return _attributes(op, "ksize", "strides", "padding", "data_format")


def _attributes(op: Any, *names: str) -> dict[str, Any]:
    values = {name: op.get_attr(name) for name in names}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def _is_made_by(op: tf.Operation, file: str, function: str) -> bool:
    frames = (frame for frame in op.traceback if frame.filename.endswith(file))
    return any(frame.name.startswith(function) for frame in frames)


def _is_in_smooth_function(op: tf.Operation) -> bool:
    return (
        _is_made_by(op, "nn_impl.py", "weighted_cross_entropy_with_logits")
        or _is_made_by(op, "np_math_ops.py", "logaddexp")
        or _is_made_by(op, "numpy.py", "logaddexp")
    )


def _keeps_length(op: tf.Operation) -> bool:
    """Return whether a Fourier transform is known to keep the length of its input."""
    x, length = op.inputs
    fixed = tf.get_static_value(length)
    if fixed is None or x.shape.rank is None:
        return False
    needed = [int(n) for n in fixed]
    if op.type.startswith("I"):
        needed[-1] = needed[-1] // 2 + 1
    return x.shape[-len(needed) :].as_list() == needed and min(fixed) > 1


def _reduced_first(x: tf.Tensor, axes: tf.Tensor) -> tuple[Any, Any]:
    """Return the axes of x, reduced ones first, and the number of their elements."""
    rank, known = x.shape.rank, tf.get_static_value(axes)
    shape = tf.shape(x)
    if rank is not None and known is not None:
        reduced = sorted({int(axis) % rank for axis in known.reshape(-1)})
        order = reduced + [axis for axis in range(rank) if axis not in reduced]
        if x.shape.is_fully_defined():
            return order, math.prod(x.shape[axis] for axis in reduced)
        return order, tf.reduce_prod(tf.gather(shape, tf.constant(reduced, tf.int32)))
    places = tf.range(tf.rank(x))[:, tf.newaxis]
    along = tf.cast(tf.reshape(axes, [-1]), tf.int32) % tf.rank(x)
    is_reduced = tf.reduce_any(tf.equal(places, along), axis=1)
    order = tf.argsort(tf.cast(~is_reduced, tf.int32), stable=True)
    return order, tf.reduce_prod(tf.where(is_reduced, shape, 1))


def _kept(shape: tf.Tensor, axes: tf.Tensor) -> tf.Tensor:
    """Return `shape` with 1 for each of the axes."""
    axes = tf.cast(tf.reshape(axes, [-1]), tf.int32) % tf.size(shape)
    return tf.tensor_scatter_nd_update(shape, axes[:, tf.newaxis], tf.ones_like(axes))


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


def _fitted(x: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Return x cut, or filled with zeros, to a shape."""
    kept = tf.minimum(tf.shape(x), shape)
    cut = tf.slice(x, tf.zeros_like(kept), kept)
    return tf.pad(cut, tf.stack([tf.zeros_like(kept), shape - kept], axis=1))


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


def _is_square_of(x: tf.Tensor, most: int) -> bool:
    """Return whether matrices are known to have at most so many rows."""
    return x.shape.rank is not None and x.shape[-1] in range(1, most + 1)


def _is_economic(op: tf.Operation) -> bool:
    """Return whether a decomposition has the vectors of the singular values only."""
    height, width = _sides(op.inputs[0])
    is_square = height is not None and height == width
    return is_square or not op.get_attr("full_matrices")


def _has_gradient(op: tf.Operation) -> bool:
    """Return whether TensorFlow differentiates a QR factorisation at all."""
    height, width = _sides(op.inputs[0])
    if height is None or width is None:
        return False
    return height <= width or not op.get_attr("full_matrices")


def _sides(x: tf.Tensor) -> Any:
    """Return the height and the width of matrices; None for what is not known."""
    return x.shape[-2:] if x.shape.rank else (None, None)


def _as_matrices(x: tf.Tensor) -> tf.Tensor:
    return tf.expand_dims(tf.expand_dims(x, -1), -1)


def _over_gaps(x: tf.Tensor, values: tf.Tensor) -> tf.Tensor:
    """Return x[i, j] / (values[j] - values[i]) and 0 on the diagonal.

    Where two values are one, up to rounding, that is 0 for 0 and not finite for all
    else: the limit hangs on derivatives that are not in x.
    """
    gaps = tf.expand_dims(values, -2) - tf.expand_dims(values, -1)
    largest = _as_matrices(tf.reduce_max(tf.abs(values), axis=-1))
    gaps = tf.where(tf.abs(gaps) > 4 * EPSILONS[values.dtype] * largest, gaps, 0)
    x = tf.linalg.set_diag(x, tf.zeros_like(tf.linalg.diag_part(x)))
    return _quotient(x, tf.cast(gaps, x.dtype))


def _quotient(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Return x / y, and 0 for 0 / 0, whose slope by x is infinite all the same."""
    infinite = tf.where(tf.equal(y, 0), tf.cast(np.inf, x.dtype), tf.zeros_like(x))
    return tf.math.xdivy(x, y) + tf.math.multiply_no_nan(infinite, x)


def _adjugate(x: tf.Tensor) -> tf.Tensor:
    """Return the determinant times the inverse, where there is no inverse, too.

    By the recurrence of Faddeev and LeVerrier (Gantmacher 1959, The Theory of Matrices,
    chapter IV.5), which divides by whole numbers only.
    """
    size: Any = x.shape[-1]
    identity = tf.eye(size, dtype=x.dtype)
    found = tf.zeros_like(x) + identity
    for k in range(1, size):
        product = x @ found
        trace = tf.linalg.trace(product)[..., tf.newaxis, tf.newaxis]
        found = trace / k * identity - product
    return found


def _inverse(x: tf.Tensor, singular: tf.Tensor) -> tf.Tensor:
    """Return the inverse; where matrices are singular, TensorFlow's op would fail.

    It is that of x, not of its adjoint: where x is singular but for rounding, the
    determinant has the same last pivot only then.
    """
    identity = tf.eye(tf.shape(x)[-1], dtype=x.dtype)
    return tf.linalg.inv(tf.where(singular, identity, x))


def _where_rows(condition: tf.Tensor, rows: tf.Tensor) -> tf.Tensor:
    """Return rows where the condition holds, of a shape that theirs begins with."""
    extra = tf.ones([tf.rank(rows) - tf.rank(condition)], tf.int32)
    shape = tf.concat([tf.shape(condition), extra], axis=0)
    return tf.where(tf.reshape(condition, shape), rows, tf.zeros_like(rows))


def _moved(x: tf.Tensor, axis: tf.Tensor, by: Any = 1) -> tf.Tensor:
    """Return x moved up by some places along an axis, zeros moving in at the start."""
    along, rank = tf.get_static_value(axis), x.shape.rank
    if along is not None and rank is not None and x.shape.is_fully_defined():
        padding = [[0, 0] for _ in range(rank)]
        padding[int(along)] = [min(by, x.shape[int(along)]), 0]
        shape: Any = x.shape.as_list()
        return tf.slice(tf.pad(x, padding), [0] * rank, shape)
    here = tf.one_hot(axis % tf.rank(x), tf.rank(x), dtype=tf.int32)
    start = tf.pad(x, tf.stack([here * by, tf.zeros_like(here)], axis=1))
    moved = tf.slice(start, tf.zeros_like(here), tf.shape(x))
    moved.set_shape(x.shape)
    return moved


def _recurrence(factors: tf.Tensor, terms: tf.Tensor, axis: tf.Tensor) -> tf.Tensor:
    """Return s[i] = terms[i] + factors[i] s[i - 1] along an axis, s[-1] being 0.

    In log2(n) steps of all elements at once, without a division (Blelloch 1990, Prefix
    Sums and Their Applications).
    """
    length, along = tf.shape(terms)[axis], tf.get_static_value(axis)
    known = None
    if along is not None and terms.shape.rank is not None:
        known = terms.shape[int(along)]
    steps = (_LONGEST if known is None else max(known - 1, 0)).bit_length()
    for step in range(steps):
        by: Any = 2**step if known is not None else tf.minimum(2**step, length)
        terms += factors * _moved(terms, axis, by)
        factors *= _moved(factors, axis, by)
    return terms


_LONGEST = 2**20
"""The length that is provided for where it is not known while tracing."""
