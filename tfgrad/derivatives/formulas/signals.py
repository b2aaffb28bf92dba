"""Images and signals: pooling, resizing, warping, colors, Fourier transforms."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from tfgrad.derivatives.formulas.table import repairs
from tfgrad.derivatives.projection import projected


@repairs(
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


@repairs("RGBToHSV", reason="TensorFlow's is wrong where a color is negative")
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


@repairs(
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


def _fitted(x: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Return x cut, or filled with zeros, to a shape."""
    kept = tf.minimum(tf.shape(x), shape)
    cut = tf.slice(x, tf.zeros_like(kept), kept)
    return tf.pad(cut, tf.stack([tf.zeros_like(kept), shape - kept], axis=1))
