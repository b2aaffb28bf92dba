"""Where TensorFlow's own answer would be wrong without a word, found in the traced ops.

A tape drops in silence what an op's gradient leaves out. So a gradient may exist and
still lack a term: x + tf.numpy_function(sin, x) has the gradient 1. The ops that can do
so are few and known; this module looks for them, and for ops that compute wrongly when
compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.repairs import (
    ADJOINT,
    CROSS_ENTROPY,
    POOLING,
    is_in_moments,
    is_repaired,
)
from tfgrad.diagnosis.causes import cause_of_cut
from tfgrad.diagnosis.graphs import (
    bodies,
    carries,
    connected,
    counterparts,
    following,
    handle_of,
    results,
    trace,
    writes,
)
from tfgrad.diagnosis.lines import line_of, made_by_gradient
from tfgrad.diagnosis.path import Cut, blocks
from tfgrad.diagnosis.report import no_gradient_error
from tfgrad.errors import NoGradientError, WrongDerivativeError


class UnverifiableGradientError(NoGradientError):
    """A path runs through Python code: only an eager evaluation can be verified."""


class RepairableGradientError(WrongDerivativeError):
    """A gradient of TensorFlow's is wrong, and tfgrad has a right one."""


# Read off tensorflow/python/ops/*_grad.py, TensorFlow 2.21: what returns None for a
# float input that moves the output, or is registered with ops.NotDifferentiable.
IGNORED_INPUTS: dict[str, tuple[int, ...]] = {
    "Betainc": (0, 1),
    "DrawBoundingBoxes": (0, 1),
    "DrawBoundingBoxesV2": (0, 1, 2),
    "ExtractGlimpse": (0, 2),
    "ExtractGlimpseV2": (0, 2),
    "HSVToRGB": (0,),
    "LinSpace": (0, 1),
    "MatrixDiagPartV3": (2,),
    "MatrixDiagV3": (4,),
    "MatrixSolveLs": (2,),
    "OneHot": (2, 3),
    "PadV2": (2,),
    "ParameterizedTruncatedNormal": (1, 2, 3, 4),
    "Polygamma": (0,),
    "RandomShuffle": (0,),
    "Range": (0, 1, 2),
    "ScaleAndTranslate": (2, 3),
    "Zeta": (0,),
}
"""The positions of the inputs that an op's registered gradient leaves out."""

_PYTHON = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}


def require_whole(
    function: Callable[..., tf.Tensor],
    inputs: Sequence[tf.Tensor],
    variables: Sequence[tf.Variable],
    name: str,
    names: Sequence[str],
) -> None:
    """Refuse a function whose gradient would lack a term.

    Args:
        function: Takes float tensors, returns one float tensor. It is traced once more.
        inputs: What it takes; only shapes and dtypes are used.
        variables: Variables that it reads by itself.
        name: What the user calls the function.
        names: What the user calls the inputs and the variables.

    Raises:
        NoGradientError: If a path from an input goes through an op that drops it.
        UnverifiableGradientError: If it goes through Python code that may or may not
            drop it.
        RepairableGradientError: If it goes through a gradient that TensorFlow itself
            has wrong.
    """
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    traced = trace(function, specs)
    roots = [*traced.inputs[: len(inputs)], *(handle_of(v, traced) for v in variables)]
    for root, argument in zip(roots, names, strict=True):
        op = root is not None and _dropping(traced.graph, traced.outputs, root)
        if op:
            raise _error(op, name, argument)


def require_right_kernels(
    outputs: Sequence[tf.Tensor], name: str, *, own: bool
) -> None:
    """Refuse tensors that depend on ops that compute wrongly when compiled.

    Args:
        outputs: What was traced.
        name: What the user calls the function.
        own: The trace is one of ours, which is run with constant folding off if need
            be.

    Raises:
        RepairableGradientError: If a max pooling writes over its own input.
        WrongDerivativeError: If a partition may be folded.
    """
    symbolic = [tensor for tensor in outputs if not hasattr(tensor, "numpy")]
    if not symbolic:
        return
    operations, _ = _leading_to(symbolic[0].graph, symbolic)
    pooling = next(filter(_overwrites_its_input, every(operations)), None)
    if pooling is not None:
        raise needs_repair(pooling, name)
    partition = None if own else folds_wrongly(operations)
    if partition is not None:
        raise WrongDerivativeError(
            f"TensorFlow's compiled derivative of `{name}` may be wrong.",
            got=f"tf.dynamic_partition at {line_of(partition)}: if its partitions are "
            "constant, its outputs are taken for one another",
            hint="tf.boolean_mask for each part; the transform outside of tf.function",
        )


def needs_repair(op: tf.Operation, name: str) -> RepairableGradientError:
    """Return the error for an op whose gradient TensorFlow has wrong."""
    label, reason, hint = _BROKEN[op.type]
    return RepairableGradientError(
        f"TensorFlow's second derivative of `{name}` is wrong.",
        got=f"{label} at {line_of(op)}: {reason}",
        hint=f"{hint}, or the call outside of loops, branches and your own tf.function",
    )


def folds_wrongly(operations: Iterable[tf.Operation]) -> tf.Operation | None:
    """Return the first op, at any depth, that constant folding gets wrong, if any."""
    return next((op for op in every(operations) if op.type == "DynamicPartition"), None)


def wrong_under_xla(operations: Iterable[tf.Operation]) -> bool:
    """Return whether one of the ops is one that XLA is known to get wrong.

    Where two elements are equal, it does not pass on the one that it took before.
    """
    return any(op.type in POOLING for op in every(operations))


def may_drop(operations: Iterable[tf.Operation]) -> bool:
    """Return whether one of the ops, at any depth, may drop a term of a gradient.

    Repairs hold for the functions that are called. A tape that sees the ops themselves
    passes them by.
    """
    return any(
        _is_suspect(op)
        or any(_is_suspect(o) and not is_repaired(o) for o in inside(op))
        for op in operations
    )


def every(operations: Iterable[tf.Operation]) -> Iterator[tf.Operation]:
    """Yield the ops, and those in the functions that they call or loop over."""
    for op in operations:
        yield op
        yield from inside(op)


def inside(op: tf.Operation) -> Iterator[tf.Operation]:
    """Yield the ops in the functions that `op` calls, branches to or loops over."""
    for body in bodies(op):
        yield from every(body.get_operations())


_MANUAL = (
    "mean = tf.reduce_mean(x, axes, keepdims=True), variance = tf.reduce_mean((x - "
)
_MANUAL += "mean) ** 2, axes) in place of the layer"
_POOL = (
    "max pooling",
    "its kernel writes over its input",
    "stride 2, or tf.reduce_max",
)
_RESIZE = ("tf.image.resize", "its gradient has no gradient", "tf.matmul with weights")
_BROKEN = {
    "StopGradient": ("tf.nn.moments", "it stops the gradient of the mean", _MANUAL),
    CROSS_ENTROPY: (
        "tf.nn.softmax_cross_entropy_with_logits",
        "it forgets that the labels move",
        "-tf.reduce_sum(labels * tf.nn.log_softmax(logits), axis=-1)",
    ),
    **dict.fromkeys(POOLING, _POOL),
    **dict.fromkeys(ADJOINT, _RESIZE),
}
"""Ops with a wrong gradient: their name to users, what is wrong, what to write."""


def _dropping(
    graph: Any,
    outputs: Sequence[tf.Tensor],
    root: tf.Tensor,
    differentiated: bool | None = None,
) -> tf.Operation | None:
    """Return the op that drops a term of the gradient of `outputs` to `root`, if any.

    Args:
        graph: The graph they are in.
        outputs: Where the gradient comes from.
        root: Where it goes to.
        differentiated: For a body, whether gradients of it were taken.
    """
    leading, leads = _leading_to(graph, outputs)
    between = leads & following(graph, root, _blocks)
    within = differentiated is not None
    suspects = [op for op in leading if _takes(op, between, trust=within)]
    if not suspects:
        return None
    passing = {op: _passing(op, differentiated) for op in suspects}
    if any(map(bodies, suspects)):
        differentiated = differentiated or any(map(made_by_gradient, leading))
    floats = [tensor for tensor in outputs if tensor.dtype.is_floating]
    lists = [tensor for tensor in outputs if tensor.dtype == tf.variant]
    tensors = [t for found in passing.values() for t in found if carries(t)]
    # A gradient arrives at a tensor list only outside, where it is taken apart again.
    arrives = connected(graph, floats, tensors) | _leading_to(graph, lists)[1]
    arrives |= {tensor.ref() for tensor in outputs}
    for op, results_of_op in passing.items():
        if any(tensor.ref() in arrives for tensor in results_of_op):
            inside = bodies(op)
            found = _dropping_inside(op, between, differentiated) if inside else op
            if found is not None:
                return found
    return None


def _dropping_inside(
    op: tf.Operation, between: set[Any], differentiated: bool | None
) -> tf.Operation | None:
    for body in bodies(op):
        pairs = zip(op.outputs, body.outputs, strict=False)
        outputs = [inner for outer, inner in pairs if outer.ref() in between]
        for root in counterparts(op, body, between):
            found = _dropping(body, outputs, root, differentiated)
            if found is not None:
                return found
    return None


def _leading_to(
    graph: Any, outputs: Sequence[tf.Tensor]
) -> tuple[list[tf.Operation], set[Any]]:
    """Return the ops that `outputs` depend on, and the refs of what goes into them.

    In reverse order of creation, so that a variable leads there only by the writes that
    come before it is read.
    """
    found, leading = {tensor.ref() for tensor in outputs}, []
    for op in reversed(graph.get_operations()):
        if any(tensor.ref() in found for tensor in results(op)) and not _blocks(op):
            found.update(tensor.ref() for tensor in op.inputs)
            leading.append(op)
    return leading, found


def _takes(op: tf.Operation, between: set[Any], *, trust: bool) -> bool:
    """Return whether `op` takes a value on the path by an input that it may drop.

    Args:
        op: The op.
        between: The refs of the tensors on the path.
        trust: Whether it is in a function, where repairs hold.
    """
    if bodies(op):
        return may_drop([op]) and any(t.ref() in between for t in op.inputs)
    if not _is_suspect(op) or (trust and is_repaired(op)):
        return False
    return any(t.ref() in between for t in _dropped(op) if carries(t))


def _is_suspect(op: tf.Operation) -> bool:
    kind = op.type
    if kind == "StopGradient":
        return is_in_moments(op)
    if kind in IGNORED_INPUTS or kind in _PYTHON or kind == CROSS_ENTROPY:
        return True
    return kind in ADJOINT or writes(op)


def _dropped(op: tf.Operation) -> list[tf.Tensor]:
    """Return the inputs of a suspect that its gradient leaves out."""
    positions: Sequence[int] = range(1 if writes(op) else 0, len(op.inputs))
    if op.type == CROSS_ENTROPY:
        positions = (1,)
    positions = IGNORED_INPUTS.get(op.type, positions)
    return [op.inputs[i] for i in positions if i < len(op.inputs)]


def _passing(op: tf.Operation, differentiated: bool | None) -> list[tf.Tensor]:
    """Return the results of `op` that have a term to drop."""
    if (
        op.type == CROSS_ENTROPY
    ):  # its slope: what comes to its value goes to the labels
        return [op.outputs[1]]
    if op.type == "StopGradient":
        if differentiated is None:
            differentiated = any(map(made_by_gradient, op.outputs[0].consumers()))
        return list(op.outputs) if differentiated else []
    return results(op)


def _blocks(op: tf.Operation) -> bool:
    return blocks(op) and not is_in_moments(op)


def _overwrites_its_input(op: tf.Operation) -> bool:
    """Return whether `op` may be given the buffer of its third input for its answer."""
    if op.type not in POOLING:
        return False
    grad = op.inputs[2]
    if not grad.shape.is_compatible_with(op.outputs[0].shape):
        return False
    aliases = [grad]  # the same buffer, by other names
    while aliases[-1].op.type in ("Reshape", "Identity"):
        aliases.append(aliases[-1].op.inputs[0])
    consumers = (other for alias in aliases for other in alias.consumers())
    return all(other.type != "IsNan" for other in consumers)


def _error(op: tf.Operation, name: str, argument: str) -> Exception:
    if op.type in _BROKEN:
        return needs_repair(op, name)
    if op.type == "EagerPyFunc":
        return UnverifiableGradientError(
            f"The gradient of `{name}`, by `{argument}`, cannot be verified here.",
            got=f"tf.py_function at {line_of(op)}: NumPy in it would give zero",
            hint="the transform outside of tf.function and XLA, where it is verified",
        )
    label, reason, hint = cause_of_cut(op)
    if op.type in IGNORED_INPUTS:
        reason = "its gradient in TensorFlow leaves this input out"
    cut = Cut(op.type, line_of(op), label, reason, hint)
    return no_gradient_error(name, argument, cut)
