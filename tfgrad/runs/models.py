"""Keras models as TensorBoard's Graphs tab shows them."""

from __future__ import annotations

import json
from typing import Any

import keras
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError

PLUGIN = "graph_keras_model"
"""By this name the Graphs plugin finds a model of layers, its "conceptual graph"."""


def is_model(f: Any) -> bool:
    """Return whether `f` is a Keras model."""
    return isinstance(f, keras.Model)


def model_inputs(model: keras.Model) -> tuple[Any, ...]:
    """Return what to call `model` with: a nest of `tf.TensorSpec`.

    Raises:
        InvalidArgumentError: If the model has never seen an input.
    """
    inputs = getattr(model, "inputs", None)
    if inputs:
        nest = inputs[0] if len(inputs) == 1 else getattr(model, "input", inputs)
        return (tf.nest.map_structure(_spec, nest),)
    shapes = model.get_build_config() if model.built else None
    if not shapes:
        raise InvalidArgumentError(
            "The graph of a model needs the shape of its input.",
            got=f"{model.name!r}, which was never called",
            hint="run.graph(model, batch), with a batch or a tf.TensorSpec of one",
        )
    shapes = shapes.get("input_shape") or list(shapes["shapes_dict"].values())
    if isinstance(shapes, dict):
        return ({name: _float_spec(shape) for name, shape in shapes.items()},)
    is_one = all(size is None or isinstance(size, int) for size in shapes)
    return tuple(map(_float_spec, [shapes] if is_one else shapes))


def conceptual_graph(model: keras.Model) -> str | None:
    """Return the layers of `model` as JSON, None if it is no graph of layers.

    A subclass of `keras.Model` is Python code, not a graph of layers. Of a model that
    TensorBoard could not draw, nothing is written: its tab would show an error.
    """
    # On use: it costs a tenth of a second, and most runs have no model.
    from tensorboard.plugins.graph import keras_util

    try:
        text = str(model.to_json())
        content = json.loads(text)
        keras_util.keras_model_to_graph_def(content)
    except Exception:  # whatever a custom layer or TensorBoard raises about it
        return None
    return text if content["config"].get("layers") else None


def model_variables(f: Any) -> dict[int, str]:
    """Return the paths of the variables of a model by the ids of their handles.

    TensorFlow knows each by its last name alone: "kernel". What is no model has none.
    """
    variables = f.variables if is_model(f) else []
    return {id(variable.value.handle): variable.path for variable in variables}


def _spec(tensor: Any) -> tf.TensorSpec:
    return tf.TensorSpec(tensor.shape, tensor.dtype)


def _float_spec(shape: Any) -> tf.TensorSpec:
    return tf.TensorSpec((None, *shape[1:]), keras.config.floatx())
