"""Matrices: determinants, roots, decompositions."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.formulas.table import is_complex, repairs
from tfgrad.differences import EPSILONS


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
    "MatrixSquareRoot",
    reason="TensorFlow forgets the conjugate",
    applies=is_complex,
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
