"""The graph that a run shows: a function and its gradient, in the user's scopes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.inline import UniqueNames, inline
from tfgrad.runs.models import model_variables

_plain = tf.autograph.experimental.do_not_convert
"""For what runs inside the trace beside f: AutoGraph would take 0.3 seconds over it."""


def step_graph(
    f: Callable[..., Any], args: Sequence[Any], name: str
) -> tf.compat.v1.GraphDef:
    """Return the `GraphDef` of the value of `f` at `args` and of its gradient.

    This is the work of one step of a gradient method: the operations of `f` stand under
    `name`, those of the gradient under `gradient_tape`, and the results are the nodes
    `value` and `gradient/<with respect to what>`. Nested `tf.function`s, branches and
    loops are written out (inline.py). `f` is traced, not run.

    Args:
        f: A TensorFlow function. When it returns one float number, the gradient is
            taken with respect to the float tensors in `args` and to the trainable
            variables that `f` reads; else the graph shows the value alone.
        args: Its arguments: nests of tensors, arrays, numbers (which become float
            tensors), `tf.TensorSpec`s, and any objects that `f` knows what to do with.
        name: The name scope of `f`.

    Returns:
        A `GraphDef` to look at (it cannot be run), without a library of functions.

    Raises:
        InvalidArgumentError: If `f` cannot be traced, or cannot be differentiated.
    """
    parameters = _parameters(f, len(args))
    tensors = _tensors(args, parameters)
    names = _node_names(tensors)
    body = getattr(f, "python_function", f)  # its operations, not a call of it
    layers = model_variables(f)
    sources: dict[str, Any] = {}  # what the gradient is taken to, by the result's name

    def step(*inputs: tf.Tensor) -> None:
        given = dict(zip(tensors, inputs, strict=True))
        floats = {n: x for n, x in zip(names, inputs, strict=True) if _is_float(x)}
        with tf.GradientTape() as tape:
            tape.watch(list(floats.values()))
            # A Keras model opens a scope of its own name.
            with tf.name_scope(_node_name(name)) if not layers else nullcontext():
                output = body(*_with_tensors(args, parameters, given))
        variables = tape.watched_variables()
        results = _node_names([*floats, *(v.name for v in variables)])
        sources.update(zip(results, [*floats.values(), *variables], strict=True))
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
        return tf.function(step).get_concrete_function(*specs)
    except Exception as error:  # whatever f itself raises, and TensorFlow about f
        message = f"{type(error).__name__}: {error}".strip()
        raise InvalidArgumentError(
            "A graph is drawn of what TensorFlow can trace and differentiate.",
            got=f"`{name}`: {message.splitlines()[-1].strip()}",
            hint="TensorFlow's own operations all through, as tf.sin for np.sin",
        ) from error


@_plain
def _draw_gradient(tape: tf.GradientTape, output: Any, sources: dict[str, Any]) -> None:
    # The slash at the end enters the scope that the tape itself uses: the sums and
    # seeds that it adds then stand in one place with the rest of the gradient.
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
    names = {p: variables[id(c)] for p, c in pairs if id(c) in variables}
    # Other captures are tensors made outside f, which TensorFlow gives mere numbers.
    others = {p for p, c in pairs if p not in names}
    constants = {p: re.sub(r"[^/]+$", "constant", p) for p in others}
    graph_def = traced.graph.as_graph_def(add_shapes=True)
    for node in graph_def.node:
        if node.name in names:
            node.op = "VarHandleOp"
    return inline(graph_def, names | constants)


def _parameters(f: Callable[..., Any], count: int) -> list[str]:
    """Return what `f` calls its first `count` arguments."""
    try:
        parameters = list(inspect.signature(f).parameters.values())
    except (TypeError, ValueError):  # some built-in functions do not say
        parameters = []
    names = [p.name for p in parameters if p.kind < p.VAR_POSITIONAL][:count]
    return names + [f"args_{i}" for i in range(len(names), count)]


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
            elif isinstance(leaf, tf.Tensor) or nested.is_variable(leaf):
                tensors[path] = tf.convert_to_tensor(leaf)
            elif hasattr(leaf, "__array__"):
                tensors[path] = tf.convert_to_tensor(np.asarray(leaf))
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
    unique = UniqueNames()
    return [unique.take(_node_name(name)) for name in names]


def _node_name(name: str) -> str:
    """Return `name` as TensorFlow takes it for a node; variables lose their ":0".

    >>> _node_name("params['w'][0]"), _node_name("dense/kernel:0")
    ('params_w_0', 'dense/kernel')
    """
    name = name.removesuffix(":0")
    return re.sub(r"[^A-Za-z0-9./]+", "_", name).strip("_/") or "x"
