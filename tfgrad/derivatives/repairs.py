"""Gradients that TensorFlow gets wrong or lacks, put right wherever they are needed.

The gradient of an op can be exchanged by a mark on the op, the one that
`tf.Graph.gradient_override_map` makes. A tape that records op by op ignores the mark;
the gradient of a whole compiled function obeys it. So all ops traced here are marked,
in case the trace is differentiated again; and where the marks are needed at once, the
user's function is compiled as a whole. Nothing changes for any other function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.formulas import TABLE, Gradient
from tfgrad.diagnosis.graphs import BODIES, bodies, inlined
from tfgrad.diagnosis.lines import line_of, made_by_gradient
from tfgrad.errors import WrongDerivativeError

_PREFIX = "Tfgrad"
_MARK = "_gradient_op_type"
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_UNREPAIRED = "_tfgrad_unrepaired"


class RepairableGradientError(WrongDerivativeError):
    """A gradient of TensorFlow's is wrong, and tfgrad has a right one."""


_is_repairing: ContextVar[bool] = ContextVar("is_repairing", default=False)


@contextlib.contextmanager
def repairing() -> Iterator[None]:
    """Trace in the block what is made of `repaired` functions."""
    token = _is_repairing.set(True)
    try:
        yield
    finally:
        _is_repairing.reset(token)


def is_repairing() -> bool:
    """Return whether what is traced is made of `repaired` functions."""
    return _is_repairing.get()


def repaired(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f` with right gradients only; it has to be called in a trace."""

    def whole(*args: Any, **kwargs: Any) -> Any:
        def inside() -> Any:
            # A function nested in it would have a gradient of its own, made before.
            with inlined():
                return f(*args, **kwargs)

        return called(inside)

    vars(whole)[_UNREPAIRED] = f
    return whole


def unrepaired(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that `f` is made of, if `repaired` made it."""
    found: Callable[..., Any] = getattr(f, _UNREPAIRED, f)
    return found


def called(f: Callable[[], Any]) -> Any:
    """Return `f()`, called as a function of its own in the graph that is traced."""
    traced = tf.function(f, autograph=False).get_concrete_function()
    mark(traced.graph.get_operations(), calls=True)
    return traced()


def needs_marks(operations: Iterable[tf.Operation]) -> bool:
    """Return whether a tape would differentiate `operations` wrongly.

    It obeys marks in called functions only.
    """
    return any(is_marked(op) or _wrong(op, twice=True) for op in operations)


def wants_marks(operations: Iterable[tf.Operation]) -> bool:
    """Return whether there is an op to mark: of some order, its gradient is wrong."""
    return any(
        is_repairable(op)
        or _leads(op)
        or any(wants_marks(body.get_operations()) for body in bodies(op))
        for op in operations
    )


def mark(operations: Iterable[tf.Operation], *, calls: bool = False) -> None:
    """Let the gradients of all ops in the table be right, in loops and branches, too.

    Args:
        operations: The ops.
        calls: Mark the ops in called functions, too; none of those is the user's.
    """
    for op in operations:
        kind = op.type
        if kind in TABLE and (_leads(op) or is_repairable(op)) and not is_marked(op):
            value = tf.compat.v1.AttrValue(s=f"{_PREFIX}{kind}".encode())
            # There is no public way to mark an op that is in a branch or a loop.
            op._set_attr(_MARK, value)
        if kind in BODIES and (calls or kind not in _CALLS):
            for body in bodies(op):
                mark(body.get_operations(), calls=calls)


def calls_repairable(operations: Iterable[tf.Operation]) -> bool:
    """Return whether a function is called that has ops in the table, without marks."""
    return any(
        _wrong(op, twice=True) is not None
        if op.type in _CALLS
        else any(calls_repairable(body.get_operations()) for body in bodies(op))
        for op in operations
        if op.type in BODIES
    )


def is_repairable(op: tf.Operation) -> bool:
    """Return whether TensorFlow's gradient of `op` is wrong, of any order."""
    repair = TABLE.get(op.type)
    # An op on integers alone, as the product of a shape, is not differentiated.
    return repair is not None and _has_slope(op) and repair.applies(op)


def _leads(op: tf.Operation) -> bool:
    repair = TABLE.get(op.type)
    return repair is not None and _has_slope(op) and repair.leads(op)


def _has_slope(op: tf.Operation) -> bool:
    return any(not out.dtype.is_integer for out in op.outputs)


def is_marked(op: tf.Operation) -> bool:
    """Return whether the gradient of `op` is one of this table."""
    try:
        return bool(op.get_attr(_MARK).startswith(_PREFIX.encode()))
    except ValueError:
        return False


def require_right(
    operations: Iterable[tf.Operation], name: str, *, twice: bool
) -> None:
    """Refuse ops that a tape is about to differentiate wrongly.

    Ops in functions that were made here are marked instead: the gradients of these
    functions are built later.

    Args:
        operations: What the tape has seen.
        name: What the user calls the function.
        twice: They will be differentiated again.

    Raises:
        RepairableGradientError: If one of them is in the table, and has no mark.
    """
    for op in operations:
        if _is_repairing.get():
            for body in bodies(op):
                mark(body.get_operations(), calls=True)
        found = _wrong(op, twice=twice)
        if found is not None:
            raise RepairableGradientError(
                f"TensorFlow's derivative of `{name}` is wrong.",
                got=f"{found.type} at {line_of(found)}: {TABLE[found.type].reason}",
                hint="the transform outside of your own tf.function",
            )


def _wrong(op: tf.Operation, *, twice: bool) -> tf.Operation | None:
    """Return `op`, or an op inside of it, if its gradient would be wrong."""
    if is_repairable(op) and not is_marked(op):
        again = twice or any(made_by_gradient(other) for other in _users(op))
        return op if TABLE[op.type].first or again else None
    inside = (inner for body in bodies(op) for inner in body.get_operations())
    return next(filter(None, (_wrong(inner, twice=twice) for inner in inside)), None)


def _users(op: tf.Operation) -> list[tf.Operation]:
    return [user for tensor in op.outputs for user in tensor.consumers()]


def _registered() -> None:
    """Register the gradients of the table under the names in the marks."""
    for kind, repair in TABLE.items():
        with contextlib.suppress(KeyError):  # registered by an earlier import
            tf.RegisterGradient(_PREFIX + kind)(_marking(repair.gradient))


def _marking(gradient: Gradient) -> Gradient:
    """Return `gradient`, the ops of which are marked, too."""

    def marked(op: tf.Operation, *grads: Any) -> Any:
        graph = tf.compat.v1.get_default_graph()
        first = len(graph.get_operations())
        answer = gradient(op, *grads)
        mark(graph.get_operations()[first:], calls=True)
        return answer

    return marked


_registered()
