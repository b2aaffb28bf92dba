"""Where the path from an input to the output is cut: the op, and the user's line.

A gradient that is `None` means one of two things. Either nothing leads from the input
to the output, or only what stops a gradient on purpose does: zero is the answer. Or
something does, and one op on the way has no gradient: the cut. Telling them apart takes
the graph: the tensors between input and output, and those among them that a gradient
arrives at.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.diagnosis.causes import Culprit, cause_of_cut, cause_of_error
from tfgrad.diagnosis.graphs import (
    bodies,
    carries,
    connected,
    counterparts,
    following,
    handle_of,
    is_differentiable,
    leading_to,
    results,
    trace,
)
from tfgrad.diagnosis.lines import line_of, line_of_error, made_by_gradient

_STOPS = {"StopGradient", "PreventGradient"}
_READS_SHAPES = {"Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"}
_READS_SHAPES |= {"VariableShape", "VarIsInitializedOp"}
_STEPS = {"Round", "Rint", "Floor", "Ceil", "FloorDiv"}


class Cut(Culprit):
    """Where and why a gradient that should flow does not."""


def missing_gradients(
    function: Callable[..., tf.Tensor],
    inputs: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable] = (),
) -> list[Cut | None]:
    """Return, for each input and then each variable, where its gradient is cut.

    Call it when a tape answered `None`: it traces `function` once more.

    Args:
        function: Takes float tensors, returns one float tensor.
        inputs: What it takes. Only shape and dtype are used, so they may be symbolic.
        variables: Variables that it reads by itself.

    Returns:
        For each: the `Cut`, or None if nothing is cut. That is where nothing leads to
        the output, or only `tf.stop_gradient` and shapes do, and where the gradient
        exists.
    """
    try:
        return _traced_cuts(function, inputs, variables)
    except Exception:
        if not all(hasattr(tensor, "numpy") for tensor in inputs):
            raise
    # With all other inputs held at their values, the trace fails for those that leave
    # TensorFlow and for no other.
    cuts: list[Cut | None] = []
    for i, tensor in enumerate(inputs):

        def alone(moving: tf.Tensor, i: int = i) -> tf.Tensor:
            return function(*inputs[:i], moving, *inputs[i + 1 :])

        cuts += _cuts_or_error(alone, [tensor], [])
    return cuts + _cuts_or_error(lambda: function(*inputs), [], variables)


def find_cuts(
    graph: Any, outputs: Sequence[tf.Tensor], roots: Sequence[tf.Tensor]
) -> list[Cut | None]:
    """Return where the gradient of `outputs` is cut on its way to each of `roots`."""
    leads = leading_to(graph, outputs, blocks)
    arrives = _arriving(graph, outputs, leads)
    ends = arrives | {tensor.ref() for tensor in outputs}
    cuts: list[Cut | None] = []
    for root in roots:
        found: Iterator[Cut | None] = iter(())
        if root.ref() in leads and root.ref() not in arrives:
            between = leads & following(graph, root, blocks)
            found = (_cut_at(op, between) for op in _frontier(graph, between, ends))
        cuts.append(next(filter(None, found), None))
    return cuts


def find_cuts_inside(op: tf.Operation, between: Container[Any]) -> Iterator[Cut | None]:
    """Yield the cuts in the functions that `op`, a call, branch or loop, runs.

    Args:
        op: The op.
        between: The refs of the tensors that the path goes through.
    """
    for body in bodies(op):
        # Pairs stop at the shorter: building a gradient adds outputs to the body.
        pairs = zip(op.outputs, body.outputs, strict=False)
        outputs = [inner for outer, inner in pairs if outer.ref() in between]
        for cut in find_cuts(body, outputs, counterparts(op, body, between)):
            yield cut and cut.within(line_of(op))


def may_hide_a_cut(operations: Iterable[tf.Operation]) -> bool:
    """Return whether a loop or a branch among the ops leaves the float numbers inside.

    TensorFlow's gradient of a loop or branch is zero, and not None, where that of its
    body is cut.
    """
    return any(
        _leaves_floats(inner) or may_hide_a_cut([inner])
        for op in operations
        for body in bodies(op)
        for inner in body.get_operations()
    )


def _leaves_floats(op: tf.Operation) -> bool:
    by_value = any(map(is_differentiable, op.inputs))
    on = any(map(is_differentiable, op.outputs))
    leaves = by_value and not on and len(op.outputs) > 0
    is_cut = op.type in _STEPS or (leaves and not blocks(op))
    return is_cut and not made_by_gradient(op)  # of masks and indices: see `_cut_at`


def _arriving(
    graph: Any, outputs: Sequence[tf.Tensor], leads: Container[Any]
) -> set[Any]:
    """Return the refs of the tensors that a gradient of `outputs` really arrives at."""
    floats = list(filter(is_differentiable, outputs))
    operations = graph.get_operations()
    made = (tensor for op in operations for tensor in op.outputs)
    sources = [tensor for tensor in made if tensor.ref() in leads and carries(tensor)]
    arrives = connected(graph, floats, sources)
    if not any(map(bodies, operations)):
        return arrives
    reached = {tensor.ref() for tensor in outputs}
    for op in reversed(operations):
        if any(tensor.ref() in reached for tensor in results(op)):
            inputs = [tensor for tensor in op.inputs if tensor.ref() in arrives]
            reached |= _passed_to(op, inputs, leads)
    return arrives & reached


def _passed_to(
    op: tf.Operation, inputs: Sequence[tf.Tensor], leads: Container[Any]
) -> set[Any]:
    """Return the refs of those inputs that what `op` runs passes a gradient on to."""
    refs = {tensor.ref() for tensor in inputs}
    if not refs or not bodies(op):
        return refs
    passed: set[Any] = set()
    for body in bodies(op):
        pairs = zip(op.outputs, body.outputs, strict=False)
        outputs = [inner for outer, inner in pairs if outer.ref() in leads]
        if any(inner.dtype == tf.variant for inner in outputs):
            return refs  # gradients of lists arrive where they are taken apart
        # Once for all inputs: it builds gradients, and a body may have hundreds.
        inside = _arriving(body, outputs, leading_to(body, outputs, blocks))
        inside |= {inner.ref() for inner in outputs}
        passed |= {
            ref
            for ref in refs
            if any(t.ref() in inside for t in counterparts(op, body, {ref}))
        }
    return passed


def _traced_cuts(
    function: Callable[..., tf.Tensor],
    inputs: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
) -> list[Cut | None]:
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    traced = trace(function, specs)
    roots = [*traced.inputs[: len(inputs)], *(handle_of(v, traced) for v in variables)]
    read = [root for root in roots if root is not None]
    cuts = iter(find_cuts(traced.graph, traced.outputs, read))
    return [None if root is None else next(cuts) for root in roots]


def _cuts_or_error(
    function: Callable[..., tf.Tensor],
    inputs: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
) -> list[Cut | None]:
    """Return the cuts; if the function cannot be traced, the line at which it fails."""
    try:
        return _traced_cuts(function, inputs, variables)
    except Exception as error:
        cut = Cut("", line_of_error(error), *cause_of_error(error))
        return [cut for _ in (*inputs, *variables)]


def _frontier(
    graph: Any, between: Container[Any], arrives: set[Any]
) -> list[tf.Operation]:
    """Return the ops on the path that gradients arrive at and do not pass."""
    return [
        op
        for op in graph.get_operations()
        if not blocks(op)
        and any(tensor.ref() in arrives for tensor in results(op))
        and _values(op, between)
        and not any(tensor.ref() in arrives for tensor in _values(op, between))
    ]


def _values(op: tf.Operation, between: Container[Any]) -> list[tf.Tensor]:
    """Return the inputs of `op` on the path, without the variables it writes to."""
    written = {tensor.ref() for tensor in results(op)}
    return [t for t in op.inputs if t.ref() in between and t.ref() not in written]


def _cut_at(op: tf.Operation, between: Container[Any]) -> Cut | None:
    """Return the cut at `op`, or further back at the op that left the float numbers."""
    by_value = any(map(carries, _values(op, between)))
    if (op.type in _STEPS or not by_value) and made_by_gradient(op):
        # The masks and indices that TensorFlow's own gradients use (of tf.maximum, of
        # tf.sort) are constant almost everywhere: a second derivative has no term for
        # them, and zero is right.
        return None
    while not any(map(carries, _values(op, between))):
        op = _values(op, between)[0].op
        if op.type == "Placeholder":
            return None
    if bodies(op):
        return next(filter(None, find_cuts_inside(op, between)), None)
    return Cut(op.type, line_of(op), *cause_of_cut(op))


def blocks(op: tf.Operation) -> bool:
    """Return whether `op` is there to pass no gradient: zero is the answer."""
    return op.type in _STOPS or op.type in _READS_SHAPES
