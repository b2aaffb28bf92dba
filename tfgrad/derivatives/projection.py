"""Images moved by projective transforms, in ops whose gradients are right.

What TensorFlow's kernel does (tensorflow/core/kernels/image/image_ops.h), step by step:
its registered gradient transforms the slope backwards instead, which is right for some
rotations only, and has none for the transforms.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def projected(
    images: tf.Tensor,
    transforms: tf.Tensor,
    size: tf.Tensor,
    *,
    interpolation: str,
    fill_mode: str,
    fill_value: Any,
) -> tf.Tensor:
    """Return what the op ImageProjectiveTransformV3 does.

    Args:
        images: Of shape `[batch, height, width, channels]`.
        transforms: Of shape `[batch or 1, 8]`, from output to input coordinates.
        size: Height and width of the output.
        interpolation: "NEAREST" or "BILINEAR".
        fill_mode: "CONSTANT", "REFLECT", "WRAP" or "NEAREST".
        fill_value: What stands outside of the image.
    """
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    x, y, is_finite = _coordinates(transforms, size, tf.shape(images)[0])
    x, y = _inside(x, width, fill_mode), _inside(y, height, fill_mode)
    fill = tf.cast(fill_value, images.dtype)

    def read(row: tf.Tensor, column: tf.Tensor) -> tf.Tensor:
        known = (row >= 0) & (row < _float(height))
        known &= (column >= 0) & (column < _float(width))
        places = [tf.where(known, place, 0.0) for place in (row, column)]
        indices = tf.stack([tf.cast(place, tf.int32) for place in places], axis=-1)
        values = tf.gather_nd(images, indices, batch_dims=1)
        return tf.where(tf.expand_dims(known, -1), values, fill)

    if interpolation == "NEAREST":
        answer = read(_rounded(y), _rounded(x))
    else:
        up, left = tf.floor(y), tf.floor(x)
        right, down = _weight(x - left, images), _weight(y - up, images)
        above = (1 - right) * read(up, left) + right * read(up, left + 1)
        below = (1 - right) * read(up + 1, left) + right * read(up + 1, left + 1)
        answer = (1 - down) * above + down * below
    return tf.where(tf.expand_dims(is_finite, -1), answer, fill)


def _coordinates(
    transforms: tf.Tensor, size: tf.Tensor, batch: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return where each output pixel comes from, and whether that is anywhere."""
    all_of_them = tf.broadcast_to(transforms, [batch, 8])
    a, b, c, d, e, f, g, h = (
        part[:, tf.newaxis, tf.newaxis] for part in tf.unstack(all_of_them, axis=1)
    )
    rows, columns = _float(tf.range(size[0])), _float(tf.range(size[1]))
    rows, columns = rows[:, tf.newaxis], columns[tf.newaxis]
    scale = g * columns + h * rows + 1.0
    is_finite = tf.not_equal(scale, 0.0)
    scale = tf.where(is_finite, scale, 1.0)
    x, y = a * columns + b * rows + c, d * columns + e * rows + f
    return x / scale, y / scale, is_finite


def _inside(place: tf.Tensor, length: tf.Tensor, mode: str) -> tf.Tensor:
    """Return coordinates outside of the image as others that are inside."""
    if mode == "CONSTANT":
        return place
    n = _float(length)
    if mode == "REFLECT":
        before = tf.where(
            place < 2 * n, 2 * n * _whole(-place / (2 * n)) + place, place
        )
        before = tf.where(before < -n, before + 2 * n, -before - 1)
        after = place - 2 * n * _whole(place / (2 * n))
        after = tf.where(after >= n, 2 * n - after - 1, after)
    elif mode == "WRAP":
        period = tf.maximum(n - 1, 1)
        before = place + n * (_whole(-place / period) + 1)
        after = place - n * _whole(place / period)
    else:
        before = after = place
    moved = tf.where(place < 0, before, tf.where(place > n - 1, after, place))
    moved = tf.where(moved > n - 1, n - 1, tf.where(moved < 0, 0.0, moved))
    return tf.where(length <= 1, tf.zeros_like(moved), moved)


def _weight(part: tf.Tensor, images: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.expand_dims(part, -1), images.dtype)


def _float(x: tf.Tensor) -> tf.Tensor:
    return tf.cast(x, tf.float32)


def _whole(x: tf.Tensor) -> tf.Tensor:
    """Return the whole part of x, which does not move with it."""
    return tf.stop_gradient(tf.floor(tf.abs(x)) * tf.sign(x))


def _rounded(x: tf.Tensor) -> tf.Tensor:
    """Return x rounded, halves away from zero, as C's round does."""
    return tf.floor(tf.abs(x) + 0.5) * tf.sign(x)
