import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.graph import conceptual_graph, model_inputs, step_graph


class Subclass(keras.Model):
    def __init__(self):
        super().__init__(name="net")
        self.hidden = keras.layers.Dense(3, name="hidden")

    def call(self, x):
        return self.hidden(x)


class OfDict(keras.Model):
    def call(self, x):
        return x["a"] + x["b"]


def functional():
    a, b = keras.Input([4], name="a"), keras.Input([2], name="b")
    hidden = keras.layers.Concatenate()([keras.layers.Dense(3)(a), b])
    return keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(hidden), name="net")


def sequential():
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(1)], name="net")


def test_the_inputs_of_a_model_are_found_in_their_structure():
    subclass, of_dict = Subclass(), OfDict()
    subclass(np.ones([2, 4]))
    of_dict({"a": np.ones([2, 3]), "b": np.ones([2, 3])})
    spec = tf.TensorSpec([None, 4])

    assert model_inputs(sequential()) == (spec,)
    assert model_inputs(subclass) == (spec,)
    (nest,) = model_inputs(functional())
    assert {name: s.shape.as_list() for name, s in nest.items()} == {
        "a": [None, 4],
        "b": [None, 2],
    }
    assert set(model_inputs(of_dict)[0]) == {"a", "b"}


def test_a_model_that_was_never_called_is_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)never called.*run.graph\(model, b"
    ):
        model_inputs(Subclass())


@pytest.mark.parametrize("make", [functional, sequential])
def test_layers_are_written_as_tensorboard_reads_them(make):
    content = json.loads(conceptual_graph(make()))

    assert content["config"]["layers"]


def test_a_subclassed_model_has_no_graph_of_layers():
    model = Subclass()
    model(np.ones([2, 4]))

    assert conceptual_graph(model) is None


def test_operations_stand_under_their_layer_and_variables_have_paths():
    model = Subclass()
    model(np.ones([2, 4]))
    names = [n.name for n in step_graph(model, model_inputs(model), model.name).node]

    assert "net/hidden/kernel" in names
    assert any("net" in name and name.endswith("MatMul") for name in names)


def test_a_spec_stands_for_a_tensor_in_a_graph():
    graph = step_graph(lambda x: tf.reduce_sum(x**2), [tf.TensorSpec([None, 2])], "f")

    (x,) = (node for node in graph.node if node.name == "x")
    assert [d.size for d in x.attr["shape"].shape.dim] == [-1, 2]
    assert "gradient/x" in [node.name for node in graph.node]


def test_operations_stand_beside_the_variables_of_their_layer():
    layers = [keras.Input([4]), keras.layers.Dense(3), keras.layers.Dense(1)]
    for layer, name in zip(layers[1:], ("dense", "dense_1"), strict=True):
        layer.name = name  # as Keras itself numbers them
    model = keras.Sequential(layers, name="net")
    graph = step_graph(model, model_inputs(model), "net")

    inputs = {n.name: list(n.input) for n in graph.node}
    for name in ("dense", "dense_1"):
        (reads,) = inputs[f"net/{name}/Cast/ReadVariableOp"]
        assert reads == f"net/{name}/kernel"
    assert not [name for name in inputs if name.startswith("net_1")]
