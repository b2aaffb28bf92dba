"""The graph that a run shows: a function and its gradient, in the user's scopes."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import keras
import tensorflow as tf

from tfgrad import nested
from tfgrad.diagnosis.graphs import bodies, condition
from tfgrad.diagnosis.lines import reason_of
from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.tensorboard import require

LAYERS = "graph_keras_model"
"""By this name the Graphs plugin finds a model of layers, its "conceptual graph"."""

_LABELS = {"If": ["then", "else"], "While": ["body", "cond"]}
"""What the bodies of a conditional or a loop are called."""

_LARGEST_CONSTANT = 1024
"""Bytes; TensorBoard shows no larger ones, and f may close over a whole data set."""

_plain = tf.autograph.experimental.do_not_convert
"""For our own functions in the trace, which AutoGraph takes 0.3 seconds to convert."""


def step_graph(
    f: Callable[..., Any], args: Sequence[Any], name: str
) -> tf.compat.v1.GraphDef:
    """Return the `GraphDef` of the value of `f` at `args` and of its gradient.

    This is the work of one step of a gradient method: the operations of `f` stand under
    `name`, those of the gradient under `gradient_tape`, and the results are the nodes
    `value` and `gradient/<with respect to what>`. `Run.graph` explains the arguments.
    """
    parameters = nested.argument_names(f, len(args))
    tensors = _tensors(args, parameters)
    names = _node_names(tensors)
    body = getattr(f, "python_function", f)  # its operations, not a call of it
    # TensorFlow knows the variables of a model by their last names alone: "kernel".
    variables = getattr(f, "variables", ()) if is_model(f) else ()
    layers = {id(variable.value.handle): variable.path for variable in variables}
    sources: dict[str, Any] = {}  # what f is differentiated by, by its gradient's name

    def step(*inputs: tf.Tensor) -> None:
        given = dict(zip(tensors, inputs, strict=True))
        floats = {n: x for n, x in zip(names, inputs, strict=True) if _is_float(x)}
        with tf.GradientTape() as tape:
            tape.watch(list(floats.values()))
            # A Keras model opens a scope of its own name.
            with tf.name_scope(_node_name(name)) if not layers else nullcontext():
                output = body(*_with_tensors(args, parameters, given))
        read = tape.watched_variables()
        results = _node_names([*floats, *(v.name for v in read)])
        sources.update(zip(results, [*floats.values(), *read], strict=True))
        if _is_float(output) and output.shape.rank == 0:
            tf.identity(output, "value")
            _draw_gradient(tape, output, sources)

    pairs = zip(names, tensors.values(), strict=True)
    specs = [tf.TensorSpec(x.shape, x.dtype, node) for node, x in pairs]
    return _flatten(_traced(step, specs, name), len(specs), sources, layers)


def _traced(
    step: Callable[..., None], specs: Sequence[tf.TensorSpec], name: str
) -> Any:
    try:
        # AutoGraph takes 0.2 seconds to convert `step`, and few functions need it.
        try:
            plain = tf.function(step, autograph=False)
            return plain.get_concrete_function(*specs)
        except Exception:
            return tf.function(step).get_concrete_function(*specs)
    except Exception as error:  # whatever f itself raises, and TensorFlow about f
        raise InvalidArgumentError(
            "A graph is drawn of what TensorFlow can trace and differentiate.",
            got=f"`{name}`: {type(error).__name__}: {reason_of(error)}",
            hint="TensorFlow's own operations all through, as tf.sin for np.sin",
        ) from error


@_plain
def _draw_gradient(tape: tf.GradientTape, output: Any, sources: dict[str, Any]) -> None:
    # The tape uses the scope of this name for most of the gradient, but not for its
    # sums and its seeds; the slash at the end puts those there, too.
    with tf.name_scope("gradient_tape/"):
        gradients = tape.gradient(output, list(sources.values()))
    with tf.name_scope("gradient"):
        for name, gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                tf.identity(getattr(gradient, "values", gradient), name)


def _flatten(
    traced: Any, argument_count: int, sources: dict[str, Any], layers: dict[int, str]
) -> tf.compat.v1.GraphDef:
    """Return the flat graph of a concrete function, its variables under their names."""
    variables = {id(v.handle): _node_name(v.name) for v in traced.graph.variables}
    trainable = {n: v for n, v in sources.items() if nested.is_variable(v)}
    variables |= {id(v.handle): name for name, v in trainable.items()}
    variables |= {key: _node_name(path) for key, path in layers.items()}
    placeholders = [tensor.op.name for tensor in traced.inputs[argument_count:]]
    pairs = list(zip(placeholders, traced.captured_inputs, strict=True))
    handles = {p: variables[id(c)] for p, c in pairs if id(c) in variables}
    # Other captures are tensors made outside f, whose names are mere numbers.
    others = {p for p, c in pairs if p not in handles}
    constants = {p: re.sub(r"[^/]+$", "constant", p) for p in others}
    names = [op.name for op in traced.graph.get_operations()]
    renamed = _in_layers(names, handles) | handles | constants
    return _Flat(renamed, set(handles)).graph_def_of(traced.graph)


def _in_layers(names: list[str], handles: Mapping[str, str]) -> dict[str, str]:
    """Return new names for operations, in the scopes of their layers' variables.

    Keras opens the scope of a layer to build it and again to call it, so TensorFlow
    calls the second scope "hidden_1", beside the variables of the layer "hidden". Where
    a variable is read says which scope is that of its layer.
    """
    layer_of: dict[str, str] = {}
    for place, variable in handles.items():
        layers, scopes = variable.split("/")[:-1], place.split("/")
        for start in range(len(scopes) - len(layers) + 1):
            pairs = list(zip(scopes[start:], layers, strict=False))
            if all(re.fullmatch(rf"{re.escape(b)}(_\d+)*", a) for a, b in pairs):
                layer_of |= pairs
                break
    return {
        name: "/".join(layer_of.get(part, part) for part in name.split("/"))
        for name in names
    }


class _Flat:
    """A graph in which the bodies of calls, branches and loops are written out.

    TensorBoard draws each of those as one opaque node. Here a call is replaced by the
    operations of its body; a branch or a loop stays as the node in which its bodies
    end. The graph is for the eye and cannot be run: a loop has no edge back.

    A tensor's key is the path of its body and its ref, since one body may be called
    from several places.
    """

    def __init__(self, renamed: Mapping[str, str], handles: Container[str]) -> None:
        self._renamed, self._handles = renamed, handles
        self._unique: Any = tf.Graph().unique_name  # numbers those that are taken
        self._nodes: dict[tuple[str, str], Any] = {}  # by path and name in the body
        self._tensors: dict[Any, str] = {}  # -> "node:index"
        self._same: dict[Any, Any] = {}  # a tensor -> the tensor that it stands for
        self._inputs: list[tuple[Any, list[Any], list[tuple[str, str]]]] = []

    def graph_def_of(self, graph: Any) -> tf.compat.v1.GraphDef:
        self._write(graph, "", lambda name: self._renamed.get(name, name))
        # An input may be an operation that was made later, so it is named at the end.
        for node, tensors, controls in self._inputs:
            before = (self._nodes[key].name for key in controls if key in self._nodes)
            node.input[:] = [self._name_of(tensor) for tensor in tensors]
            node.input.extend(f"^{name}" for name in before)
        flat = tf.compat.v1.GraphDef(node=self._nodes.values())
        flat.versions.producer = graph.graph_def_versions.producer
        return flat

    def _name_of(self, tensor: Any) -> str:
        while tensor in self._same:
            tensor = self._same[tensor]
        return self._tensors[tensor].removesuffix(":0")

    def _write(self, graph: Any, path: str, rename: Callable[[str], str]) -> None:
        for op in graph.get_operations():
            is_parameter = op.outputs and (path, op.outputs[0].ref()) in self._same
            if op.type == "NoOp" or is_parameter:
                continue  # a NoOp ends a function, and only orders other operations
            name = rename(op.name)
            inside = bodies(op)
            if inside and op.type.endswith("PartitionedCall"):
                (body,) = inside
                name = f"{posixpath.dirname(name)}/{_python_name(body.name)}".strip("/")
                results = self._write_body(op, body, path, self._unique(name))
                outputs = ((path, output.ref()) for output in op.outputs)
                self._same |= zip(outputs, results, strict=False)
            else:
                self._copy(op, path, self._unique(name), inside)

    def _copy(self, op: Any, path: str, name: str, inside: Sequence[Any]) -> None:
        node = tf.compat.v1.NodeDef()
        node.CopyFrom(op.node_def)
        node.name = name
        if not path and op.name in self._handles:
            node.op = "VarHandleOp"
        _shorten(node)
        shapes = (output.shape.as_proto() for output in op.outputs)
        node.attr["_output_shapes"].list.shape.extend(shapes)
        self._nodes[path, op.name] = node
        for i, output in enumerate(op.outputs):
            self._tensors[path, output.ref()] = f"{name}:{i}"
        kind = op.type.removeprefix("Stateless")
        labels = _LABELS.get(kind, [f"branch_{i}" for i in range(len(inside))])
        if kind == "While":
            inside = [*inside, condition(op)]
        passed = len(inside[0].inputs) if inside else 0
        own = list(op.inputs)[: len(op.inputs) - passed]
        inputs = [(path, tensor.ref()) for tensor in own]
        for label, body in zip(labels, inside, strict=bool(inside)):
            inputs += self._write_body(op, body, path, f"{name}/{label}")
        controls = [(path, before.name) for before in op.control_inputs]
        self._inputs.append((node, inputs, controls))

    def _write_body(self, op: Any, body: Any, path: str, name: str) -> list[Any]:
        """Write `body` out under `name`; return its results."""
        passed = list(op.inputs)[len(op.inputs) - len(body.inputs) :]
        for inner, outer in zip(body.inputs, passed, strict=True):
            self._same[name, inner.ref()] = path, outer.ref()
        names = [inner.name for inner in body.get_operations()]
        # Operations in a branch or a loop have the name of its node before their own.
        repeated = posixpath.commonpath([op.name, *names])

        def rename(inner: str) -> str:
            return f"{name}/{inner.removeprefix(f'{repeated}/')}"

        self._write(body, name, rename)
        return [(name, output.ref()) for output in body.outputs]


def _python_name(function: str) -> str:
    """Return the name that the user gave to a function that TensorFlow has numbered.

    >>> _python_name("__inference_loss_42")
    'loss'
    """
    for pattern in (r"__inference___backward_(.+)_\d+_\d+", r"__[a-z]+_(.+)_\d+"):
        if match := re.fullmatch(pattern, function):
            return match[1]
    return function


def _shorten(node: Any) -> None:
    """Drop attributes that only a machine reads, and the contents of big constants."""
    for key in [k for k, v in node.attr.items() if v.HasField("func") or v.list.func]:
        del node.attr[key]
    node.attr.pop("_class", None)  # names of other nodes, which may have new names
    if node.op == "Const" and node.ByteSize() > _LARGEST_CONSTANT:
        value = node.attr["value"].tensor
        shape = tf.compat.v1.AttrValue(shape=value.tensor_shape).shape
        value.Clear()
        value.dtype = node.attr["dtype"].type
        value.tensor_shape.CopyFrom(shape)


# --- Keras models ---------------------------------------------------------------------


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
        return (tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), nest),)
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
    keras_util = require("plugins.graph.keras_util")
    try:
        text = str(model.to_json())
        content = json.loads(text)
        keras_util.keras_model_to_graph_def(content)
    except Exception:  # whatever a custom layer or TensorBoard raises about it
        return None
    return text if content["config"].get("layers") else None


def _float_spec(shape: Any) -> tf.TensorSpec:
    return tf.TensorSpec((None, *shape[1:]), keras.config.floatx())


# --- names and arguments --------------------------------------------------------------


def _tensors(args: Sequence[Any], parameters: Sequence[str]) -> dict[str, Any]:
    """Return the leaves of `args` that are tensors, can be, or stand for one."""
    weak = nested.weak_dtype(*args)
    tensors: dict[str, Any] = {}
    for arg, parameter in zip(args, parameters, strict=True):
        for path, leaf in nested.named_leaves(arg, parameter):
            if nested.is_number(leaf) or nested.is_array_like(leaf):
                tensors[path] = nested.to_tensor(leaf, path, weak)
            elif isinstance(leaf, tf.TensorSpec):
                tensors[path] = leaf
            elif hasattr(leaf, "__array__"):
                tensors[path] = tf.convert_to_tensor(leaf)
    return tensors


@_plain
def _with_tensors(
    args: Sequence[Any], parameters: Sequence[str], tensors: dict[str, tf.Tensor]
) -> list[Any]:
    """Return `args` with `tensors` in the places that they have by name."""
    return [
        nested.map_leaves(lambda leaf, path: tensors.get(path, leaf), arg, parameter)
        for arg, parameter in zip(args, parameters, strict=True)
    ]


@_plain
def _is_float(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


@_plain
def _node_names(names: Iterable[str]) -> list[str]:
    unique: Any = tf.Graph().unique_name
    return [unique(_node_name(name)) for name in names]


def _node_name(name: str) -> str:
    """Return `name` as TensorFlow takes it for a node; variables lose their ":0".

    >>> _node_name("params['w'][0]"), _node_name("dense/kernel:0")
    ('params_w_0', 'dense/kernel')
    """
    name = name.removesuffix(":0")
    return re.sub(r"[^A-Za-z0-9./]+", "_", name).strip("_/") or "x"
