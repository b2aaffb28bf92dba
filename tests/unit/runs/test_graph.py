import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.graph import conceptual_graph, model_inputs, step_graph


def names(graph_def):
    return {node.name for node in graph_def.node}


def node(graph_def, name):
    return next(node for node in graph_def.node if node.name == name)


def run(graph_def, fetches, feeds):
    """Evaluate nodes of a graph that has neither variables nor branches nor loops."""
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        with tf.compat.v1.Session(graph=graph) as session:
            feeds = {f"{name}:0": value for name, value in feeds.items()}
            return session.run([f"{name}:0" for name in fetches], feeds)


@tf.function
def square(x):
    with tf.name_scope("residual"):
        return tf.square(x - 1.0)


@tf.function
def twice(x):
    return square(x) + square(2.0 * x)


def test_a_graph_has_the_function_and_its_gradient_and_their_results():
    graph = step_graph(lambda x: x**2 + x - 1, [3.0], "f")

    assert {"x", "f/pow", "f/sub", "value", "gradient/x"} <= names(graph)
    assert "gradient_tape/f/pow/Pow" in names(graph)
    assert list(node(graph, "value").input) == ["f/sub"]


def test_scopes_of_the_user_are_kept():
    def f(x):
        with tf.name_scope("model"), tf.name_scope("layer"):
            return tf.sin(x)

    assert {"f/model/layer/Sin", "gradient_tape/f/model/layer/Cos"} <= names(
        step_graph(f, [1.0], "f")
    )


def test_the_scope_may_have_a_name_that_tensorflow_does_not_take():
    assert "my_f/Sin" in names(step_graph(tf.sin, [1.0], "‖my f‖"))


def test_nested_functions_are_written_out_under_their_names():
    graph = step_graph(lambda x: tf.reduce_sum(twice(x)), [[1.0, 2.0]], "f")

    assert {
        "f/twice/square/residual/Square",
        "f/twice/square_1/residual/Square",
    } <= names(graph)
    assert not {n.op for n in graph.node} & {
        "PartitionedCall",
        "StatefulPartitionedCall",
    }
    assert not graph.library.function


def test_the_outermost_function_adds_no_level():
    assert "f/residual/Square" in names(step_graph(square, [3.0], "f"))


def test_a_graph_with_nested_functions_computes_what_the_tape_does():
    def f(x, y):
        return tf.reduce_sum(twice(x * x) * tf.function(tf.sin, jit_compile=True)(y))

    x, y = tf.constant([1.0, 2.0]), tf.constant([3.0, 4.0])
    with tf.GradientTape() as tape:
        tape.watch([x, y])
        value = f(x, y)
    expected = [value, *tape.gradient(value, [x, y])]

    fetches = ["value", "gradient/x", "gradient/y"]
    got = run(step_graph(f, [x, y], "f"), fetches, {"x": x.numpy(), "y": y.numpy()})
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def choices(x):
    return [lambda: 2.0 * x, lambda: 3.0 * x]


def test_every_input_of_a_node_is_in_the_graph():
    @tf.function
    def body(x):
        if tf.reduce_sum(x) > 0.0:
            x = square(x)
        while tf.reduce_sum(x) < 100.0:
            x = tf.switch_case(tf.cast(x[0], tf.int32) % 2, choices(x))
        return tf.reduce_sum(x)

    graph = step_graph(body, [[1.0, 2.0]], "f")
    inputs = {i.strip("^").split(":")[0] for node in graph.node for i in node.input}
    assert inputs <= names(graph)
    assert len(names(graph)) == len(graph.node)


def test_branches_and_loops_are_written_out():
    def f(x):
        y = tf.cond(x > 0.0, lambda: tf.sin(x), lambda: tf.cos(x))
        (y,) = tf.while_loop(lambda y: y < 9.0, lambda y: [tf.exp(y)], [y])
        return y

    graph = step_graph(f, [1.0], "f")
    assert {"f/cond/then/Sin", "f/cond/else/Cos", "f/while/body/Exp"} <= names(graph)
    assert {"f/while/cond/Less", "f/while", "f/cond"} <= names(graph)
    assert "f/cond/then/Identity" in node(graph, "f/cond").input


def test_an_edge_is_from_the_output_that_is_used():
    @tf.function
    def last(x):
        return tf.cast(tf.math.top_k(x, 2).indices, tf.float32)

    graph = step_graph(lambda x: tf.reduce_sum(last(x)), [[1.0, 2.0]], "f")
    assert list(node(graph, "f/last/Cast").input) == ["f/last/TopKV2:1"]


def test_a_function_that_is_called_twice_is_written_out_twice():
    @tf.function
    def looped(x):
        while x < 9.0:
            x = 2.0 * x
        return x

    graph = step_graph(lambda x: looped(looped(x)), [1.0], "f")
    assert {"f/looped/while/body/mul", "f/looped_1/while/body/mul"} <= names(graph)
    assert "f/looped/Identity" in node(graph, "f/looped_1/while/cond/Less").input
    assert node(graph, "f/looped/Identity").input[0].startswith("f/looped/while:")


def test_a_body_within_a_body_is_written_out():
    def f(x):
        def body(y):
            return [tf.cond(y > 1.0, lambda: 3.0 * square(y), lambda: y + 1.0)]

        return tf.while_loop(lambda y: y < 9.0, body, [x])[0]

    inner = "f/while/body/cond/then/square/residual/Square"
    assert inner in names(step_graph(f, [1.0], "f"))


def test_variables_are_drawn_under_their_names():
    weights = tf.Variable([1.0, 2.0], name="weights")
    bias = keras.Variable(3.0, name="bias")
    graph = step_graph(lambda: tf.reduce_sum(weights * bias), [], "f")

    assert node(graph, "weights").op == node(graph, "bias").op == "VarHandleOp"
    assert {"gradient/weights", "gradient/bias"} <= names(graph)


def test_variables_of_one_name_keep_their_gradients_apart():
    x, y = tf.Variable(1.0), tf.Variable(2.0)
    graph = step_graph(lambda: tf.exp(y) * tf.sin(x), [], "f")

    # The function reads y first; both were named "Variable" by TensorFlow.
    reads = {n.name: n.input[0] for n in graph.node if n.op == "ReadVariableOp"}
    sine = reads[node(graph, "f/Sin").input[0]]
    assert {sine, reads[node(graph, "f/Exp").input[0]]} == {"Variable", "Variable_1"}
    (of_sine,) = node(graph, f"gradient/{sine}").input
    assert node(graph, node(graph, of_sine).input[1]).op == "Cos"


def test_a_keras_model_is_drawn_with_its_layers():
    model = keras.Sequential([keras.layers.Dense(2, name="hidden")])
    model.build((None, 3))
    graph = step_graph(lambda x: tf.reduce_sum(model(x)), [np.ones((4, 3))], "loss")

    assert {"sequential/hidden/kernel", "gradient/sequential/hidden/kernel"} <= {
        re.sub(r"sequential(_\d+)+", "sequential", name) for name in names(graph)
    }


def test_leaves_of_a_nest_are_inputs_under_their_names():
    def f(params, count):
        return params["w"] * tf.cast(count, tf.float32) + params["b"][0]

    params = {"w": 1.0, "b": (np.float32(2.0), None)}
    graph = step_graph(f, [params, tf.constant(3)], "f")
    assert {"params_w", "params_b_0", "count"} <= names(graph)
    assert {"gradient/params_w", "gradient/params_b_0"} <= names(graph)
    assert "gradient/count" not in names(graph)


@pytest.mark.parametrize(
    "output", [tf.exp, tf.unstack, tf.size], ids=["vector", "list", "size"]
)
def test_a_function_of_no_single_float_is_drawn_without_gradient(output):
    graph = step_graph(lambda x: output(tf.sin(x)), [[1.0, 2.0]], "f")

    assert "x" in names(graph)
    assert not [name for name in names(graph) if name.startswith(("gradient", "value"))]


def test_a_gradient_of_rows_is_drawn():
    graph = step_graph(lambda x: tf.reduce_sum(tf.gather(x, [0, 0])), [[1.0, 2.0]], "f")

    assert "gradient/x" in names(graph)


def test_big_constants_are_drawn_without_their_contents():
    data = tf.random.stateless_normal([100, 100], [0, 0])
    graph = step_graph(lambda x: tf.reduce_sum(x * data.numpy()), [1.0], "f")

    assert graph.ByteSize() < 20_000
    constants = [n.attr["value"].tensor for n in graph.node if n.op == "Const"]
    assert [100, 100] in [[d.size for d in c.tensor_shape.dim] for c in constants]


def test_tensors_from_outside_are_drawn_as_constants():
    data = tf.range(3.0)
    graph = step_graph(lambda x: tf.reduce_sum(x * data), [1.0], "f")

    assert "f/mul/constant" in names(graph) or "f/constant" in names(graph)


def test_drawing_leaves_variables_and_compiled_functions_alone():
    x = tf.Variable(3.0)
    traces = []

    @tf.function
    def f():
        traces.append(1)
        return x.assign_sub(1.0) ** 2

    step_graph(f, [], "f")
    assert x.numpy() == 3.0
    f()
    f()
    assert len(traces) == 2  # one for the graph, one for the calls


def test_a_function_that_leaves_tensorflow_cannot_be_drawn():
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)got: `f`: .*try: .*tf.sin for"
    ):
        step_graph(lambda x: np.sin(x), [1.0], "f")


def test_an_operation_without_gradient_is_named():
    def f(x):
        return tf.reduce_sum(tf.unique(x).y)

    with pytest.raises(InvalidArgumentError, match="Unique"):
        step_graph(f, [[1.0, 2.0]], "f")


def test_edges_know_their_shapes():
    graph = step_graph(lambda x: tf.reduce_sum(x), [np.ones((2, 3))], "f")

    (shape,) = node(graph, "x").attr["_output_shapes"].list.shape
    assert [dimension.size for dimension in shape.dim] == [2, 3]


# --- Keras models ---------------------------------------------------------------------


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
