"""Gradients that TensorFlow gets wrong or lacks, put right where they are needed.

The gradient of an op can be exchanged in one graph, by
`tf.Graph.gradient_override_map`. A tape that records op by op does not look there, the
gradient of a whole compiled function does. So the user's function is made into one, in
which these gradients hold; nothing changes for any other function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import tensorflow as tf

from tfgrad.diagnosis.graphs import inlined

Gradient = Callable[..., Any]

_PREFIX = "Tfgrad"
_REPAIRED: dict[str, str] = {}
"""From an op to the name that its gradient in this module is registered by."""

POOLING = {"MaxPoolGradGrad", "MaxPool3DGradGrad"}
"""Ops whose kernel may write its answer over an input that it has yet to read."""

ADJOINT = {"ResizeBilinearGrad", "ResizeBicubicGrad", "ResizeNearestNeighborGrad"}
"""Linear ops without a gradient: it is the op that they are the gradient of."""

CROSS_ENTROPY = "SoftmaxCrossEntropyWithLogits"


def repaired(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f` with the gradients of this module; it has to be called in a trace."""

    def whole(*args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            # A nested tf.function has a graph of its own, where nothing is overridden.
            with inlined(), _overrides():
                return f(*args, **kwargs)

        # A concrete function is called even where other functions run eagerly.
        return tf.function(inside, autograph=False).get_concrete_function()()

    return whole


def is_repaired(op: tf.Operation) -> bool:
    """Return whether the gradient of `op` is one of this module's."""
    try:
        return str(op.get_attr("_gradient_op_type"), "utf-8").startswith(_PREFIX)
    except ValueError:
        return False


def is_in_moments(op: tf.Operation) -> bool:
    """Return whether `op` is the stop of the gradient in tf.nn.moments.

    The variance there is the mean of (x - stop_gradient(mean))**2. Its slope along the
    mean is zero, so the first derivative is right. But the slope of that slope is not
    zero.
    """
    if op.type != "StopGradient":
        return False
    frames = [frame for frame in op.traceback if frame.filename.endswith("nn_impl.py")]
    return any(frame.name.startswith("moments") for frame in frames)


def _overrides() -> AbstractContextManager[None]:
    return tf.compat.v1.get_default_graph().gradient_override_map(_REPAIRED)


def _repairs(*kinds: str) -> Callable[[Gradient], Gradient]:
    """Register a gradient for some ops, to be used within `_overrides`."""

    def register(gradient: Gradient) -> Gradient:
        for kind in kinds:
            _REPAIRED[kind] = _PREFIX + kind
            with contextlib.suppress(KeyError):  # registered by an earlier import
                tf.RegisterGradient(_PREFIX + kind)(gradient)
        return gradient

    return register


def _attributes(op: tf.Operation, *names: str) -> dict[str, Any]:
    values = {name: op.get_attr(name) for name in names}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


@_repairs("StopGradient")
def _stop_gradient(op: tf.Operation, grad: tf.Tensor) -> tf.Tensor | None:
    return grad if is_in_moments(op) else None


@_repairs("ResizeBilinear", "ResizeBicubic", "ResizeNearestNeighbor")
def _resize(op: tf.Operation, grad: tf.Tensor) -> Any:
    image = op.inputs[0]
    options = _attributes(op, "align_corners", "half_pixel_centers")
    if op.type == "ResizeNearestNeighbor":
        options["size"] = tf.shape(image)[1:3]
    else:
        options["original_image"] = image
    with _overrides():
        return getattr(tf.raw_ops, f"{op.type}Grad")(grads=grad, **options), None


@_repairs(*ADJOINT)
def _resize_grad(op: tf.Operation, grad: tf.Tensor) -> Any:
    options = _attributes(op, "align_corners", "half_pixel_centers")
    forward = getattr(tf.raw_ops, op.type.removesuffix("Grad"))
    with _overrides():
        return forward(images=grad, size=tf.shape(op.inputs[0])[1:3], **options), None


@_repairs("MaxPool", "MaxPool3D")
def _max_pool(op: tf.Operation, grad: tf.Tensor) -> Any:
    options = _pooling_options(op)
    if op.type == "MaxPool":
        options |= _attributes(op, "explicit_paddings")
    pooled = {"orig_input": op.inputs[0], "orig_output": op.outputs[0], "grad": grad}
    with _overrides():
        return getattr(tf.raw_ops, f"{op.type}Grad")(**pooled, **options)


@_repairs("MaxPoolGrad", "MaxPool3DGrad")
def _max_pool_grad(op: tf.Operation, grad: tf.Tensor) -> Any:
    image, output = op.inputs[0], op.inputs[1]
    pooled = {"orig_input": image, "orig_output": output, "grad": grad}
    kernel = getattr(tf.raw_ops, f"{op.type}Grad")
    with _overrides():
        answer = kernel(**pooled, **_pooling_options(op))
    # With stride 1 the kernel takes the buffer of `grad` for its answer while it reads
    # it, unless someone else still needs that buffer. In eager mode someone always
    # does.
    answer = tf.where(tf.math.is_nan(grad), grad, answer)
    return tf.zeros_like(image), tf.zeros_like(output), answer


@_repairs(*POOLING)
def _max_pool_grad_grad(op: tf.Operation, grad: tf.Tensor) -> Any:
    image, output = op.inputs[0], op.inputs[1]
    pooled = {"orig_input": image, "orig_output": output, "grad": grad}
    kernel = getattr(tf.raw_ops, op.type.removesuffix("Grad"))
    with _overrides():
        answer = kernel(**pooled, **_pooling_options(op))
    return tf.zeros_like(image), tf.zeros_like(output), answer


def _pooling_options(op: tf.Operation) -> dict[str, Any]:
    return _attributes(op, "ksize", "strides", "padding", "data_format")


@_repairs(CROSS_ENTROPY)
def _cross_entropy(op: tf.Operation, grad: tf.Tensor, slope_grad: tf.Tensor) -> Any:
    # The op's second output is the slope, softmax(logits) - labels. TensorFlow's
    # gradient of it forgets the labels.
    logits, labels = op.inputs
    probabilities, weights = tf.nn.softmax(logits), grad[:, tf.newaxis]
    mean = tf.reduce_sum(slope_grad * probabilities, axis=-1, keepdims=True)
    return (
        weights * (probabilities - labels) + probabilities * (slope_grad - mean),
        -weights * tf.nn.log_softmax(logits) - slope_grad,
    )
