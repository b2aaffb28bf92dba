"""What a function to differentiate may return, and the words for what it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.errors import InvalidArgumentError, ScalarObjectiveError
from tfgrad.nested import Nest, describe, is_variable, map_leaves


def objective(has_aux: bool) -> Callable[[Call], Any]:
    """Return the function from a call to its one number, or to (number, aux)."""
    return with_aux(scalar_output, has_aux)


def with_aux(check: Callable[[Any, str], Any], has_aux: bool) -> Callable[[Call], Any]:
    """Return the function from a call to its checked output, or to (output, aux)."""

    def output(call: Call) -> Any:
        if not has_aux:
            return check(call.output(), call.name)
        value, aux = aux_pair(call.output(), call.name)
        return check(value, call.name), aux

    return output


def float_outputs(output: Nest, name: str) -> Nest:
    """Return what the user's function returned as a nest of float tensors."""
    if not tf.nest.is_nested(output):
        return float_output(output, name)
    outputs = map_leaves(lambda leaf, path: float_output(leaf, name, path), output, "")
    if not tf.nest.flatten(outputs):
        float_output(output, name)
    return outputs


def float_output(output: Any, name: str, path: str = "") -> tf.Tensor:
    """Return what the user's function returned as a float tensor, or refuse it."""
    if is_variable(output):
        output = tf.convert_to_tensor(output)
    if isinstance(output, tf.Tensor) and output.dtype.is_floating:
        return output
    if isinstance(output, np.ndarray | np.generic | float):
        hint = "tf.* functions all the way: what left TensorFlow has no derivative"
    elif isinstance(output, tf.Tensor) and output.dtype.is_complex:
        hint = "tf.math.real(...) or tf.abs(...) of it"
    elif isinstance(output, tf.Tensor):
        hint = "tf.cast(..., tf.float32), before anything is rounded"
    elif tf.nest.is_nested(output):
        hint = "tfgrad.jacobian or tfgrad.vjp, which take nests; or one number of them"
    elif path:
        hint = "float tensors only; all else comes back by has_aux=True"
    else:
        hint = "return the tensor; is a `return` missing?"
    raise ScalarObjectiveError(
        "The function to differentiate must return a real float tensor.",
        got=f"`{name}` returned {describe(output)}{path and f' at {path}'}",
        hint=hint,
    )


def scalar_output(output: Any, name: str) -> tf.Tensor:
    """Return what the user's function returned as one float number, or refuse it."""
    tensor = float_output(output, name)
    if tensor.shape.rank is None:
        return tf.ensure_shape(tensor, [])
    if tensor.shape.rank != 0:
        raise ScalarObjectiveError(
            "The gradient needs an objective that returns one number.",
            got=f"`{name}` returned {describe(tensor)}",
            hint="tf.reduce_mean(...) or tf.reduce_sum(...) around it, or "
            "tfgrad.jacobian for one row per output, or tfgrad.derivative elementwise",
        )
    return tensor


def aux_pair(returned: Any, name: str) -> tuple[Any, Any]:
    """Return the pair (value, aux) that the user's function returned, or refuse it."""
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    raise InvalidArgumentError(
        "With has_aux=True the function must return a pair (value, aux).",
        got=f"`{name}` returned {describe(returned)}",
        hint="return value, aux",
    )
