"""The graph of a function, traced for reading: where data flows, where gradients do."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

_RUN_EAGERLY = threading.RLock()
_is_inlining: ContextVar[bool] = ContextVar("is_inlining", default=False)

_WRITES = ("Assign", "ResourceScatter", "ResourceApply", "ResourceSparseApply",
           "ResourceStridedSliceAssign", "RngReadAndSkip", "RngSkip",
           "StatefulStandardNormal", "StatefulUniform")  # fmt: skip
"""How the ops that write to a variable, their first input, are called."""

DRAWS = (
    "Random", "Multinomial", "Rng", "TruncatedNormal",
    "StatefulStandardNormal", "StatefulUniform",
)  # fmt: skip
"""Parts of the names of ops that draw random numbers."""

_READS = (
    *("VarHandleOp", "ReadVariableOp", "VarIsInitializedOp", "ResourceGather"),
    *("VariableShape", "DisableCopyOnRead", "LookupTableFind", "LookupTableSize"),
    *("Placeholder", "NoOp", "Identity", "Empty"),
)
"""What stateful ops that change nothing begin with."""

_DRAWS_ALONE = (
    *("RandomUniform", "RandomStandardNormal", "RandomShuffle", "RandomGamma"),
    *("RandomPoisson", "TruncatedNormal", "ParameterizedTruncatedNormal"),
    "Multinomial",
)
"""What ops begin with that draw from a state of their own, in no order."""

_HARMLESS = (
    *_READS,
    *("Assign", "ResourceScatter", "ResourceApply", "ResourceSparseApply"),
    *("ResourceStridedSliceAssign", "Assert", "CheckNumerics", "XlaLaunch"),
    *("PartitionedCall", "StatefulPartitionedCall", "If", "Case", "While"),
)
"""What stateful ops that may run once more, on copies, begin with."""

_STATEFUL: dict[str, bool] = {}

_NEEDS_AUTOGRAPH = tf.errors.OperatorNotAllowedInGraphError

BODIES = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "Case": ("branches",),
    "StatelessCase": ("branches",),
    "While": ("body",),
    "StatelessWhile": ("body",),
}
"""The attributes in which calls, conditionals and loops name the functions they run."""


def operations_of(graph: Any) -> list[str]:
    """Return the types of the ops of a graph and of all that it calls; none of None."""
    if graph is None:
        return []
    definition = graph.as_graph_def()
    bodies = [body.node_def for body in definition.library.function]
    return [node.op for nodes in [definition.node, *bodies] for node in nodes]


def has(types: Iterable[str], parts: Sequence[str]) -> bool:
    """Return whether the name of a type of ops has one of these parts."""
    return any(part in name for name in types for part in parts)


def draws(types: Iterable[str]) -> bool:
    """Return whether ops of these types draw random numbers."""
    return has(types, DRAWS)


def trace(function: Callable[..., Any], specs: Sequence[tf.TensorSpec]) -> Any:
    """Return the concrete function of `function`, nested ones inlined if possible.

    Raises:
        Exception: Whatever `function` raises when its arguments are symbolic.
    """
    # A Python `if` on a tensor needs AutoGraph. Inlining switches AutoGraph off inside
    # of nested tf.functions; if that is where the `if` is, they have to stay calls.
    failures: list[Exception] = []
    for inline, autograph in [(True, False), (True, True), (False, True)]:
        with inlined() if inline else contextlib.nullcontext():
            try:
                compiled = tf.function(function, autograph=autograph)
                return compiled.get_concrete_function(*specs)
            except Exception as error:
                failures.append(error)
    first, *_, last = failures
    # AutoGraph turns float(x) into something that fails later, on a line too far down.
    raise last if isinstance(first, _NEEDS_AUTOGRAPH) else first


@contextlib.contextmanager
def inlined() -> Iterator[None]:
    """Within it, the ops of a nested tf.function go into the caller's graph."""
    if _is_inlining.get():  # of this thread, or of the one that waits for it
        yield
        return
    with _RUN_EAGERLY, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tf.data warns that the flag is not for it
        before = tf.config.functions_run_eagerly()
        tf.config.run_functions_eagerly(True)
        token = _is_inlining.set(True)
        try:
            yield
        finally:
            _is_inlining.reset(token)
            tf.config.run_functions_eagerly(before)


def handle_of(variable: tf.Variable, traced: Any) -> tf.Tensor | None:
    """Return the input of the `traced` function that is the variable's storage."""
    captured = traced.captured_inputs
    pairs = zip(traced.inputs[-len(captured) :], captured, strict=False)
    return next((inner for inner, outer in pairs if outer is variable.handle), None)


def writes(op: tf.Operation) -> bool:
    """Return whether `op` writes to a variable, whose handle is its first input."""
    if not op.type.startswith(_WRITES):  # which is asked much faster than its inputs
        return False
    return len(op.inputs) > 0 and op.inputs[0].dtype == tf.resource


def unrepeatable(graph: Any) -> tf.Operation | None:
    """Return the first op, at any depth, that may not be run once more, if any.

    It draws random numbers, prints, or reads the next element of something.
    """
    for op in graph.get_operations():
        if _is_stateful(op) and not op.type.startswith(_HARMLESS):
            return op
        found = next(filter(None, map(unrepeatable, bodies(op))), None)
        if found is not None:
            return found
    return None


def acts(graph: Any) -> bool:
    """Return whether an op, at any depth, has to run, and in its turn.

    It writes, prints, runs Python code, or takes the next of something; or it asserts,
    and nothing that leads to the outputs waits for that.
    """
    for op in graph.get_operations():
        if not _is_stateful(op) or op.type.startswith((*_READS, *_DRAWS_ALONE)):
            continue
        if op.type.startswith(("Assert", "CheckNumerics")) and _leads(graph, op):
            continue
        inside = bodies(op, opaque=True)
        inside += [condition(op)] if op.type == "While" else []
        if not inside or any(body is None or acts(body) for body in inside):
            return True
    return False


def _leads(graph: Any, wanted: tf.Operation) -> bool:
    """Return whether the outputs of a graph depend on an op, or wait for it."""
    found, left = set(), [tensor.op for tensor in graph.outputs]
    while left:
        op = left.pop()
        if op.name not in found:
            found.add(op.name)
            left += [*(tensor.op for tensor in op.inputs), *op.control_inputs]
    return wanted.name in found


def _is_stateful(op: tf.Operation) -> bool:
    kind = op.type
    if kind not in _STATEFUL:  # asking TensorFlow takes twenty times as long
        _STATEFUL[kind] = bool(op.op_def.is_stateful)
    return _STATEFUL[kind]


def written_variables(traced: Any) -> list[tf.Variable]:
    """Return the variables that a `traced` function writes to, in reading order."""
    # `traced.variables` has an order of its own in every process.
    places = {id(x): i for i, x in enumerate(traced.captured_inputs)}
    variables = (v for v in traced.variables if id(v.handle) in places)
    read = sorted(variables, key=lambda variable: places[id(variable.handle)])
    if not read:
        return []
    operations = traced.graph.get_operations()
    written = {tensor.ref() for op in operations for tensor in _written(op)}
    handles = ((variable, handle_of(variable, traced)) for variable in read)
    return [v for v, h in handles if h is not None and h.ref() in written]


_OPAQUE = "_tfgrad_opaque"


def make_opaque(op: tf.Operation) -> None:
    """Hide the inside of a call: its answer is a constant of every derivative."""
    op._set_attr(_OPAQUE, tf.compat.v1.AttrValue(b=True))  # there is no public way


def bodies(op: tf.Operation, *, opaque: bool = False) -> list[Any]:
    """Return the graphs that a call, branch or loop runs; with `opaque`, hidden too."""
    kind = op.type  # which TensorFlow is asked for
    if kind not in BODIES:
        return []
    if not opaque and "Call" in kind and op.node_def.attr[_OPAQUE].b:
        return []
    found = []
    for attribute in BODIES[kind]:
        value = op.get_attr(attribute)
        names = value if isinstance(value, list) else [value]
        found += [_body(op.graph, name.name) for name in names]
    return [body for body in found if body is not None]


def counterparts(op: tf.Operation, body: Any, refs: Container[Any]) -> list[tf.Tensor]:
    """Return the inputs of a body of `op` that stand for those in `refs`."""
    # The first input of a conditional chooses the branch, which does not get it.
    passed = list(op.inputs)[len(op.inputs) - len(body.inputs) :]
    pairs = zip(passed, body.inputs, strict=True)
    return [inner for outer, inner in pairs if outer.ref() in refs]


def condition(op: tf.Operation) -> Any:
    """Return the graph of the function that decides whether a loop goes on."""
    return _body(op.graph, op.get_attr("cond").name)


def carries(tensor: tf.Tensor) -> bool:
    """Return whether gradients flow through tensors of this dtype."""
    dtype = tensor.dtype
    return dtype.is_floating or dtype.is_complex or dtype in (tf.resource, tf.variant)


def is_differentiable(tensor: tf.Tensor) -> bool:
    """Return whether a tensor holds numbers that have slopes."""
    return bool(tensor.dtype.is_floating or tensor.dtype.is_complex)


def following(
    graph: tf.Graph,
    root: tf.Tensor,
    blocks: Callable[[tf.Operation], bool] = lambda op: False,
) -> set[Any]:
    """Return the refs of the tensors in `graph` that depend on `root`, and its own.

    Creation order is execution order, so one pass is enough: a variable that is written
    to carries the value to all reads that come later.
    """
    found = {root.ref()}
    for op in graph.get_operations():
        if any(tensor.ref() in found for tensor in op.inputs) and not blocks(op):
            found.update(tensor.ref() for tensor in results(op))
    return found


def leading_to(
    graph: tf.Graph,
    outputs: Sequence[tf.Tensor],
    blocks: Callable[[tf.Operation], bool] = lambda op: False,
) -> set[Any]:
    """Return the refs of `outputs` and of the tensors that they depend on."""
    found = {tensor.ref() for tensor in outputs}
    for op in reversed(graph.get_operations()):
        if any(tensor.ref() in found for tensor in results(op)) and not blocks(op):
            found.update(tensor.ref() for tensor in op.inputs)
    return found


def results(op: tf.Operation) -> list[tf.Tensor]:
    """Return the outputs of `op`, and the handles of the variables it writes to."""
    return [*op.outputs, *_written(op)]


def connected(
    graph: tf.Graph, outputs: Sequence[tf.Tensor], tensors: Sequence[tf.Tensor]
) -> set[Any]:
    """Return the refs of those `tensors` that a gradient of `outputs` arrives at."""
    with graph.as_default():  # of a complex output, TensorFlow asks for weights
        weights = [tf.ones_like(y) if y.dtype.is_complex else None for y in outputs]
    found = gradients(graph, outputs, tensors, weights)
    pairs = zip(tensors, found, strict=True)
    return {tensor.ref() for tensor, gradient in pairs if gradient is not None}


def gradients(
    graph: tf.Graph,
    outputs: Sequence[tf.Tensor],
    tensors: Sequence[tf.Tensor],
    cotangents: Sequence[tf.Tensor | None] | None = None,
) -> list[Any]:
    """Return the gradients of `outputs`; None also behind an op without a gradient."""
    dead_ends: list[tf.Tensor] = []
    while outputs and tensors:
        try:
            with graph.as_default(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dense gradients of tf.gather
                found: list[Any] = tf.gradients(
                    outputs, tensors, cotangents, stop_gradients=dead_ends
                )
            return found
        except LookupError as error:
            ends = _named_op(graph, error)
            if not ends or ends[0].ref() in {tensor.ref() for tensor in dead_ends}:
                raise
            dead_ends += ends
    return [None for _ in tensors]


def _written(op: tf.Operation) -> list[tf.Tensor]:
    """Return the handles of the variables that `op` writes to, by itself or inside."""
    found = [op.inputs[0]] if writes(op) else []
    for body in bodies(op):
        inside = {t.ref() for inner in body.get_operations() for t in _written(inner)}
        passed = list(op.inputs)[len(op.inputs) - len(body.inputs) :]
        pairs = zip(passed, body.inputs, strict=True)
        found += [outer for outer, inner in pairs if inner.ref() in inside]
    return found


def _body(graph: Any, name: str) -> Any:
    # The one private function used here. Without it a cut inside of a branch or a loop
    # is reported on the line of the `if` or the loop.
    while graph is not None:
        found = getattr(graph, "_get_function", lambda name: None)(name)
        if found is not None:
            return getattr(found, "graph", None)
        # A loop under a persistent tape is wrapped into a call; its body is not.
        graph = getattr(graph, "outer_graph", None)
    return None


def _named_op(graph: tf.Graph, error: LookupError) -> list[tf.Tensor]:
    """Return the outputs of the op without gradient, or of the calls that run it."""
    match = re.search(r"operation\s*'([^']+)' \(op type: (\w+)\)", str(error))
    name, kind = match.groups() if match else ("", "PreventGradient")
    ops = graph.get_operations()
    found = [op for op in ops if op.type == kind and name in ("", op.name)]
    return [t for op in found or ops if found or _runs(op, kind) for t in op.outputs]


def _runs(op: tf.Operation, kind: str) -> bool:
    inside = (inner for body in bodies(op) for inner in body.get_operations())
    return any(inner.type == kind or _runs(inner, kind) for inner in inside)
