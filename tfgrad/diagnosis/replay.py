"""Run a copy of a traced graph on given values, or of the body of a branch or a loop.

A copy, since the graph of a finished function cannot get new outputs, and since what is
inside of a conditional or a loop has no outputs at all.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.diagnosis.graphs import bodies, condition, gradients

_MOST_TURNS = 1000
"""Turns of a loop that are replayed in search of the one that goes wrong."""

_COPIES = itertools.count()
_CALLED: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

Replay = Callable[[Sequence[Any], Sequence[Any]], tuple[list[Any], list[Any]]]


class Turn(NamedTuple):
    """One run of a body: of a call, of the branch taken, of one turn of a loop.

    Attributes:
        body: Its graph.
        inputs: One value for each input of the body.
        outputs: The float outputs of the body.
        cotangents: The gradients that arrive at them.
    """

    body: Any
    inputs: list[Any]
    outputs: list[tf.Tensor]
    cotangents: list[Any]


def replay(
    graph: Any,
    tensors: Sequence[tf.Tensor],
    outputs: Sequence[tf.Tensor],
    reduce: Callable[[tf.Tensor], tf.Tensor],
) -> Replay:
    """Return a compiled function that runs a copy of `graph`.

    It takes one value per input of the graph and one cotangent per output, and returns
    the reduced values of `tensors`, and their reduced gradients or None. Nothing in the
    graph may have been differentiated before: that rewrites what is inside of branches.
    """

    def run(inputs: Sequence[Any], cotangents: Sequence[Any], sloped: bool) -> Any:
        copies = _copy(graph, list(map(tf.identity, inputs)), [*tensors, *outputs])
        inner, ends = copies[: len(tensors)], copies[len(tensors) :]
        here = tf.compat.v1.get_default_graph()
        slopes = [None for _ in inner]
        if sloped:
            slopes = gradients(here, ends, inner, list(cotangents))
        dense = [None if g is None else tf.convert_to_tensor(g) for g in slopes]
        return list(map(reported, inner)), list(map(reported, dense))

    def reported(tensor: Any) -> Any:
        hidden = tensor is None or tensor.dtype in (tf.resource, tf.variant)
        return None if hidden else reduce(tensor)

    compiled = tf.function(run, autograph=False)

    def replayed(inputs: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        # Called directly, a fifth explanation would have TensorFlow warn of retracing.
        traced = compiled.get_concrete_function(inputs, cotangents, sloped=True)
        try:
            return traced(inputs, cotangents, sloped=True)
        except TypeError:  # a tf.custom_gradient that refers to the original graph
            traced = compiled.get_concrete_function(inputs, cotangents, sloped=False)
            return traced(inputs, cotangents, sloped=False)

    return replayed


def _copy(
    graph: Any, inputs: Sequence[tf.Tensor], tensors: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Return the copies of `tensors` in a copy of `graph` in the current graph."""
    definition = _renamed(graph)
    functions = tf.compat.v1.GraphDef(
        library=definition.library, versions=definition.versions
    )
    with tf.init_scope():  # imported eagerly, functions are registered to be run
        tf.graph_util.import_graph_def(functions, name="")
    places = [place.name for place in graph.inputs]
    given = dict(zip(places, inputs, strict=True))
    names = [tensor.name for tensor in tensors]
    found = tf.graph_util.import_graph_def(definition, given, names, name="copy")
    pairs = zip(names, found, strict=True)
    return [given.get(name, tensor) for name, tensor in pairs]


def _renamed(graph: Any) -> Any:
    """Return the definition of `graph` with functions that have names of their own.

    Differentiating a conditional or a loop registers rewritten branches under names
    made of the old ones; those of a copy must not collide with the original's.
    """
    definition = graph.as_graph_def()
    mark = f"_copy_{next(_COPIES)}"
    functions = definition.library.function
    own = {function.signature.name for function in functions}
    for function in functions:
        function.signature.name += mark
    scopes = [definition.node, *(function.node_def for function in functions)]
    for value in (v for nodes in scopes for node in nodes for v in node.attr.values()):
        for called in (value.func, *value.list.func):
            if called.name in own:
                called.name += mark
    for node in definition.node:
        if node.op.endswith("PartitionedCall"):
            (body,) = bodies(graph.get_operation_by_name(node.name), opaque=True)
            _CALLED[node.attr["f"].func.name] = body
            node.attr["_gradient_op_type"].s = b"TfgradCall"
    return definition


@tf.RegisterGradient("TfgradCall")
def _gradient_of_call(op: tf.Operation, *cotangents: tf.Tensor) -> list[Any]:
    """Return the gradient of a copied call: TensorFlow has none that knows branches."""
    body = _CALLED[op.get_attr("f").name]
    copies = _copy(body, op.inputs, [*body.inputs, *body.outputs])
    inner, ends = copies[: len(body.inputs)], copies[len(body.inputs) :]
    floats = [i for i, end in enumerate(ends) if end.dtype.is_floating]
    here = tf.compat.v1.get_default_graph()
    given = [cotangents[i] for i in floats]
    return gradients(here, [ends[i] for i in floats], inner, given)


def turn_inside(
    op: tf.Operation, values: list[Any], slopes: list[Any], *, backward: bool
) -> Turn | None:
    """Return the run of a body of `op` in which a number goes wrong, if it is found.

    `values` are those of its inputs, then of its outputs; `slopes` are the gradients of
    its outputs. With `backward`, it is a gradient that goes wrong.
    """
    inputs, results = values[: len(op.inputs)], values[len(op.inputs) :]
    body = _chosen(bodies(op), op, inputs)
    if body is None:
        return None
    # The first input of a conditional chooses the branch, which does not get it.
    passed = inputs[len(inputs) - len(body.inputs) :]
    if any(value is None for value in passed):  # a list of tensors cannot be fetched
        return None
    # Pairs stop at the shortest: building a gradient adds outputs to the body.
    ends = [
        (end, tf.zeros_like(value) if slope is None else slope)
        for end, value, slope in zip(body.outputs, results, slopes, strict=False)
        if end.dtype.is_floating
    ]
    turn = Turn(body, passed, [end for end, _ in ends], [slope for _, slope in ends])
    return _turn_of_loop(op, turn, backward) if op.type.endswith("While") else turn


def _chosen(found: list[Any], op: tf.Operation, inputs: list[Any]) -> Any:
    """Return the body that ran."""
    index = 0
    if op.type.endswith("If"):
        index = 0 if inputs[0] else 1
    elif op.type.endswith("Case"):
        index = min(max(int(inputs[0]), 0), len(found) - 1)
    return found[index] if found else None


def _turn_of_loop(op: tf.Operation, last: Turn, backward: bool) -> Turn | None:
    """Return the turn of a loop in which a value, or going back a gradient, goes wrong.

    `last` has the inputs of the first turn, and the cotangents of the last.
    """
    body = last.body
    step = replay(body, body.outputs, [], tf.identity)
    test = condition(op)
    goes_on = replay(test, test.outputs, [], tf.identity)
    states = [last.inputs]
    while goes_on(states[-1], [])[0][0]:
        after, _ = step(states[-1], [])
        pairs = zip(states[-1], after, strict=True)
        states.append([old if new is None else new for old, new in pairs])
        if not backward and any(map(_is_spoiled, after)):
            return last._replace(inputs=states[-2])
        if len(states) > _MOST_TURNS:
            return None
    return _turn_back(last, states[:-1]) if backward else None


def _turn_back(last: Turn, states: list[list[Any]]) -> Turn | None:
    """Return the turn, going back, that passes on a gradient that is not finite."""
    body, ends = last.body, [tensor.ref() for tensor in last.outputs]
    kept = [i for i, tensor in enumerate(body.outputs) if tensor.ref() in ends]
    inputs = [body.inputs[i] for i in kept]
    pull = replay(body, inputs, last.outputs, tf.identity)
    turn = last
    for state in reversed(states):
        turn = turn._replace(inputs=state)
        values, slopes = pull(turn.inputs, turn.cotangents)
        pairs = zip(values, slopes, strict=True)
        before = [tf.zeros_like(v) if slope is None else slope for v, slope in pairs]
        if any(map(_is_spoiled, before)):
            return turn
        turn = turn._replace(cotangents=before)
    return None


def _is_spoiled(value: tf.Tensor | None) -> bool:
    if value is None or not value.dtype.is_floating:
        return False
    return not bool(tf.reduce_all(tf.math.is_finite(value)))
