"""Flatten the functions of a graph, so that TensorBoard shows what they do.

TensorBoard draws a call of a nested `tf.function`, an `if` and a loop as one opaque
node. Here each body is written out under a name scope of its own: a call gives way to
the body's operations, an `if` or a loop stays as the node in which its bodies end. The
result is for the eye. It cannot be run: a loop is drawn once, with no edge back.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_FIRST_DATA_INPUT = {"While": 0, "StatelessWhile": 0}
_FIRST_DATA_INPUT |= dict.fromkeys(("If", "StatelessIf", "Case", "StatelessCase"), 1)
_LARGEST_CONSTANT = 1024
"""Bytes; TensorBoard shows no larger ones, and f may close over a whole data set."""


def inline(
    graph_def: tf.compat.v1.GraphDef, renamed: Mapping[str, str]
) -> tf.compat.v1.GraphDef:
    """Return `graph_def` with the bodies of its functions in place of their calls.

    Args:
        graph_def: A graph with its library of functions.
        renamed: New names for some of the graph's own nodes.
    """
    return _Inliner(graph_def).run(graph_def, renamed)


class UniqueNames:
    """Hands out names, with numbers after those that are taken.

    >>> names = UniqueNames()
    >>> [names.take(name) for name in ("w", "b", "w", "w")]
    ['w', 'b', 'w_1', 'w_2']
    """

    def __init__(self) -> None:
        """Begin with no name taken."""
        self._last_numbers: dict[str, int] = {}

    def take(self, wanted: str) -> str:
        """Return `wanted`, or the first `wanted_1`, `wanted_2`... that is free."""
        name = wanted
        while name in self._last_numbers:
            self._last_numbers[wanted] += 1
            name = f"{wanted}_{self._last_numbers[wanted]}"
        self._last_numbers[name] = 0
        return name


class _Scope(NamedTuple):
    """One function body on its way into the flat graph."""

    names: dict[str, str]  # of its nodes: in the body -> in the flat graph
    arguments: dict[str, str]  # its parameters -> tensors of the flat graph

    def tensor(self, reference: str) -> str:
        """Return "node:index" in the flat graph for an input written in the body.

        A body says "node:output name:index". Which outputs a node has by name is in no
        public table, so the index alone is kept: it is exact for all operations but the
        few with several named outputs, and there the edge is right and its label may be
        that of a sibling.
        """
        if reference in self.arguments:
            return self.arguments[reference]
        node, *output = reference.split(":")
        return f"{self.names[node]}:{output[-1] if output else 0}"

    def data(self, node: Any) -> list[str]:
        return [self.tensor(i) for i in node.input if not i.startswith("^")]

    def controls(self, node: Any) -> list[str]:
        """Return "^node" for each operation that must run before `node`."""
        nodes = (i.removeprefix("^") for i in node.input if i.startswith("^"))
        return [f"^{self.names[n]}" for n in nodes if n in self.names]


class _Inliner:
    def __init__(self, graph_def: Any) -> None:
        self._library = {f.signature.name: f for f in graph_def.library.function}
        self._flat = tf.compat.v1.GraphDef(versions=graph_def.versions)
        self._results: dict[str, str] = {}  # outputs of calls -> tensors in the bodies
        self._names = UniqueNames()

    def run(self, graph_def: Any, renamed: Mapping[str, str]) -> Any:
        wanted = {n.name: renamed.get(n.name, n.name) for n in graph_def.node}
        names = {old: self._names.take(new) for old, new in wanted.items()}
        self._add(graph_def.node, _Scope(names, {}))
        emitted = {node.name for node in self._flat.node}
        for node in self._flat.node:
            inputs = [self._source(i) for i in node.input]
            node.input[:] = [i for i in inputs if i.split(":")[0].strip("^") in emitted]
        return self._flat

    def _add(self, nodes: Iterable[Any], scope: _Scope) -> None:
        for node in nodes:
            if node.op == "NoOp":
                continue  # it ends a function, and only orders what others show
            name = scope.names[node.name]
            bodies = list(self._bodies(node))
            if bodies and node.op in _CALLS:
                ((_, function),) = bodies
                path = posixpath.join(posixpath.dirname(name), _python_name(function))
                path = self._names.take(path)
                results = self._splice(function, path, "", scope.data(node))
                self._results |= {f"{name}:{i}": r for i, r in enumerate(results)}
            else:
                self._copy(node, name, scope, bodies)

    def _copy(
        self, node: Any, name: str, scope: _Scope, bodies: Sequence[tuple[str, Any]]
    ) -> None:
        copy = self._flat.node.add()
        copy.CopyFrom(node)
        copy.name = name
        inputs = scope.data(node)
        if bodies:
            first = _FIRST_DATA_INPUT[node.op]
            data, inputs = inputs[first:], inputs[:first]
            for label, body in bodies:
                places = [node.name, *(n.name for n in body.node_def)]
                strip = posixpath.commonpath(places)
                inputs += self._splice(body, f"{name}/{label}", strip, data)
        copy.input[:] = [*inputs, *scope.controls(node)]
        _shorten(copy)

    def _splice(self, body: Any, path: str, strip: str, inputs: list[str]) -> list[str]:
        """Write `body` out under `path`, fed by `inputs`; return its results' tensors.

        The names in the body of an `if` or a loop repeat where it stands: `strip`.
        """
        local = {n.name: n.name.removeprefix(f"{strip}/") for n in body.node_def}
        names = {n: self._names.take(f"{path}/{short}") for n, short in local.items()}
        parameters = [argument.name for argument in body.signature.input_arg]
        scope = _Scope(names, dict(zip(parameters, inputs, strict=True)))
        self._add(body.node_def, scope)
        return [scope.tensor(body.ret[r.name]) for r in body.signature.output_arg]

    def _bodies(self, node: Any) -> Iterable[tuple[str, Any]]:
        """Yield (label, function) for each function that `node` runs, if known."""
        if node.op not in _CALLS and node.op not in _FIRST_DATA_INPUT:
            return
        for key in sorted(node.attr):
            value = node.attr[key]
            functions = [value.func] if value.HasField("func") else value.list.func
            for i, function in enumerate(functions):
                label = key.removesuffix("_branch").removesuffix("es")
                label = f"{label}_{i}" if value.HasField("list") else label
                if function.name in self._library:
                    yield label, self._library[function.name]

    def _source(self, tensor: str) -> str:
        """Return where `tensor` really comes from, in the notation of a GraphDef."""
        while tensor in self._results:
            tensor = self._results[tensor]
        return tensor.removesuffix(":0")


def _python_name(function: Any) -> str:
    """Return the name that the user gave to a function that TensorFlow has numbered."""
    name = str(function.signature.name)
    for pattern in (r"__inference___backward_(.+)_\d+_\d+", r"__[a-z]+_(.+)_\d+"):
        if match := re.fullmatch(pattern, name):
            return match[1]
    return name


def _shorten(node: Any) -> None:
    """Drop attributes that only a machine reads, and the contents of big constants."""
    for key in [k for k, v in node.attr.items() if v.HasField("func") or v.list.func]:
        del node.attr[key]
    node.attr.pop("_class", None)  # colocation, by names that may be gone
    if node.op == "Const" and node.ByteSize() > _LARGEST_CONSTANT:
        value = node.attr["value"].tensor
        shape = tf.compat.v1.AttrValue(shape=value.tensor_shape).shape
        value.Clear()
        value.dtype = node.attr["dtype"].type
        value.tensor_shape.CopyFrom(shape)
