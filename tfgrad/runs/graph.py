"""The graph that a run shows: a function and its gradient, in the user's scopes."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.runs.inline import inline


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
            tensors), and any objects that `f` knows what to do with.
        name: The name scope of `f`.

    Returns:
        A `GraphDef` to look at (it cannot be run), without a library of functions.
    """
    parameters = _parameters(f, len(args))
    tensors = _tensors(args, parameters)
    names = _distinct(_node_name(path) for path in tensors)
    body = getattr(f, "python_function", f)  # its operations, not a call of it
    sources: dict[
        str, Any
    ] = {}  # what the gradient is taken to, by the name of its node

    def step(*inputs: tf.Tensor) -> None:
        floats = {
            n: x for n, x in zip(names, inputs, strict=True) if x.dtype.is_floating
        }
        with tf.GradientTape() as tape:
            tape.watch(list(floats.values()))
            with tf.name_scope(_node_name(name)):
                given = dict(zip(tensors, inputs, strict=True))
                output = body(*_with_tensors(args, parameters, given))
        variables = tape.watched_variables()
        ours = _distinct([*floats, *(_name_of(v) for v in variables)])
        sources.update(zip(ours, [*floats.values(), *variables], strict=True))
        if _is_float_number(output):
            tf.identity(output, "value")
            _draw_gradient(tape, output, sources)

    specs = [
        tf.TensorSpec(x.shape, x.dtype, n)
        for n, x in zip(names, tensors.values(), strict=True)
    ]
    traced = tf.function(step).get_concrete_function(*specs)
    return _flatten(traced, len(specs), sources)


def _draw_gradient(tape: tf.GradientTape, output: Any, sources: dict[str, Any]) -> None:
    # The slash at the end enters the scope that the tape itself uses, so that the sums
    # and seeds which it adds stand in one place with all other operations of the
    # gradient.
    with tf.name_scope("gradient_tape/"):
        gradients = tape.gradient(output, list(sources.values()))
    with tf.name_scope("gradient"):
        for name, gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                tf.identity(getattr(gradient, "values", gradient), name)


def _flatten(
    traced: Any, argument_count: int, sources: dict[str, Any]
) -> tf.compat.v1.GraphDef:
    """Return the flat graph of a concrete function, its variables under their names."""
    variables = {id(v.handle): _name_of(v) for v in traced.graph.variables}
    trainable = {n: v for n, v in sources.items() if nested.is_variable(v)}
    variables |= {id(v.handle): name for name, v in trainable.items()}
    placeholders = [tensor.op.name for tensor in traced.inputs[argument_count:]]
    pairs = list(zip(placeholders, traced.captured_inputs, strict=True))
    names = {p: variables[id(c)] for p, c in pairs if id(c) in variables}
    # Other captures are tensors made outside f; TensorFlow gives them numbers for
    # names.
    constants = {
        p: re.sub(r"[^/]+$", "constant", p) for p, c in pairs if p not in names
    }
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


def _tensors(args: Sequence[Any], parameters: Sequence[str]) -> dict[str, tf.Tensor]:
    """Return the leaves of `args` that are tensors, or can be, by their names."""
    weak = nested.weak_dtype(*args)
    tensors = {}
    for arg, parameter in zip(args, parameters, strict=True):
        for path, leaf in nested.named_leaves(arg, parameter):
            if nested.is_number(leaf) or nested.is_array_like(leaf):
                tensors[path] = nested.to_tensor(leaf, path, weak)
            elif isinstance(leaf, tf.Tensor) or nested.is_variable(leaf):
                tensors[path] = tf.convert_to_tensor(leaf)
            elif hasattr(leaf, "__array__"):
                tensors[path] = tf.convert_to_tensor(np.asarray(leaf))
    return tensors


def _with_tensors(
    args: Sequence[Any], parameters: Sequence[str], tensors: dict[str, tf.Tensor]
) -> list[Any]:
    """Return `args` with `tensors` in the places that they have by name."""
    return [
        nested.map_leaves(lambda leaf, path: tensors.get(path, leaf), arg, parameter)
        for arg, parameter in zip(args, parameters, strict=True)
    ]


def _is_float_number(output: Any) -> bool:
    is_tensor = isinstance(output, tf.Tensor)
    return is_tensor and output.shape.rank == 0 and output.dtype.is_floating


def _name_of(variable: tf.Variable) -> str:
    return _node_name(variable.name.split(":")[0])


def _distinct(names: Iterable[str]) -> list[str]:
    """Return `names` with numbers after those that came before.

    >>> _distinct(["w", "b", "w"])
    ['w', 'b', 'w_1']
    """
    distinct: list[str] = []
    for name in names:
        candidates = itertools.chain(
            [name], (f"{name}_{i}" for i in itertools.count(1))
        )
        distinct.append(next(c for c in candidates if c not in distinct))
    return distinct


def _node_name(text: str) -> str:
    """Return `text` as a name that TensorFlow takes for a node.

    >>> _node_name("params['w'][0]")
    'params_w_0'
    """
    return re.sub(r"[^A-Za-z0-9./]+", "_", text).strip("_/") or "x"
