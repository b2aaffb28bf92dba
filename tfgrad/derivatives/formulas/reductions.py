"""Products, sums and extremes along an axis or in segments; gathering, scattering."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.formulas.table import repairs


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
    "SparseSlice",
    reason="right by itself; the op that it is made of has no gradient",
    first=False,
)
def _sparse_slice(op: Any, *grads: tf.Tensor) -> Any:
    indices, values, _, start, size = op.inputs
    inside = tf.reduce_all((indices >= start) & (indices < start + size), axis=1)
    slope = tf.scatter_nd(tf.where(inside), grads[1], tf.shape(values, tf.int64))
    return None, slope, None, None, None


@repairs(
    "SparseAdd",
    reason="right by itself; TensorFlow takes the op that it is made of to be constant",
    first=False,
)
def _sparse_add(op: Any, *grads: tf.Tensor) -> Any:
    slopes = tf.pad(grads[1], [[1, 0]])  # 0 for what is left out of the sum
    places = _places(tf.size(grads[1]), op.inputs[0], op.inputs[3], op.outputs[0])
    by_a, by_b = (tf.gather(slopes, place) for place in places)
    return None, by_a, None, None, by_b, None, None


@repairs("SparseAddGrad", reason="TensorFlow takes it to be constant")
def _sparse_add_grad(op: Any, *grads: tf.Tensor) -> Any:
    count = tf.size(op.inputs[0])
    pairs = zip(grads, _places(count, *op.inputs[1:]), strict=True)
    parts = [tf.math.unsorted_segment_sum(g, place - 1, count) for g, place in pairs]
    return tf.add_n(parts), None, None, None


def _places(count: tf.Tensor, *indices: tf.Tensor) -> list[tf.Tensor]:
    """Return where the elements of two sparse tensors are in their sum, from 1 on."""
    names = ("a_indices", "b_indices", "sum_indices")
    numbers = tf.cast(tf.range(count) + 1, tf.float64)
    options = dict(zip(names, indices, strict=True))
    places = tf.raw_ops.SparseAddGrad(backprop_val_grad=numbers, **options)
    return [tf.cast(place, tf.int32) for place in places]


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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
