"""Traced ops for which TensorFlow's own answer would be wrong, without an error.

Where the gradient of an op leaves out an input, a tape drops that term without an
error. So a gradient may exist and still lack a term: x + tf.numpy_function(sin, x) has
the gradient 1. The ops that can do so are few and known; this module looks for them,
and for ops that compute wrongly when compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.formulas import POOLING, is_in_moments
from tfgrad.diagnosis.causes import cause_of_cut
from tfgrad.diagnosis.graphs import (
    BODIES,
    bodies,
    carries,
    connected,
    counterparts,
    following,
    handle_of,
    is_differentiable,
    results,
    trace,
    writes,
)
from tfgrad.diagnosis.lines import line_of
from tfgrad.diagnosis.path import Cut, blocks
from tfgrad.diagnosis.report import no_gradient_error
from tfgrad.errors import NoGradientError, WrongDerivativeError


class UnverifiableGradientError(NoGradientError):
    """A path runs through Python code: only an eager evaluation can be verified."""


# Read off tensorflow/python/ops/*_grad.py, TensorFlow 2.21: what returns None for a
# float input that moves the output, or is registered with ops.NotDifferentiable; and
# the ops that make numbers of text, which may have been numbers before.
IGNORED_INPUTS: dict[str, tuple[int, ...]] = {
    "Betainc": (0, 1),
    "DecodePaddedRaw": (0,),
    "DecodeRaw": (0,),
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
    "ParseTensor": (0,),
    "Polygamma": (0,),
    "RandomShuffle": (0,),
    "Range": (0, 1, 2),
    "ScaleAndTranslate": (2, 3),
    "StringToNumber": (0,),
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
        NoGradientError: If the runtime cannot run one of the ops.
        WrongDerivativeError: If a partition may be folded.
    """
    symbolic = [tensor for tensor in outputs if not hasattr(tensor, "numpy")]
    if not symbolic:
        return
    operations, _ = _leading_to(symbolic[0].graph, symbolic)
    unknown = next((op for op in every(operations) if op.type in _UNRUNNABLE), None)
    if unknown is not None:
        raise NoGradientError(
            f"TensorFlow has no derivative of this order of `{name}`.",
            got=f"{unknown.type} at {line_of(unknown)}, which its runtime cannot run",
            hint="tfgrad.finite_difference of tfgrad.grad(f); another form of the op",
        )
    partition = None if own else folds_wrongly(operations)
    if partition is not None:
        raise WrongDerivativeError(
            f"TensorFlow's compiled derivative of `{name}` may be wrong.",
            got=f"tf.dynamic_partition at {line_of(partition)}: if its partitions are "
            "constant, its outputs are taken for one another",
            hint="tf.boolean_mask for each part; the transform outside of tf.function",
        )


def folds_wrongly(operations: Iterable[tf.Operation]) -> tf.Operation | None:
    """Return the first op, at any depth, that constant folding gets wrong, if any."""
    return next((op for op in every(operations) if op.type == "DynamicPartition"), None)


def wrong_under_xla(operations: Iterable[tf.Operation]) -> bool:
    """Return whether one of the ops is one that XLA is known to get wrong.

    Where two elements are equal, a max pooling does not pass on the one that it took
    before.
    """
    return any(
        op.type in POOLING or _is_padded_with_stride(op) for op in every(operations)
    )


def _is_padded_with_stride(op: tf.Operation) -> bool:
    """Return whether XLA would end the process on a convolution's gradient."""
    if not op.type.startswith("Conv2D"):
        return False
    is_padded = op.get_attr("padding") == b"EXPLICIT"
    return is_padded and max(op.get_attr("strides")) > 1


def may_drop(operations: Iterable[tf.Operation]) -> bool:
    """Return whether one of the ops, at any depth, may drop a term of a gradient."""
    return any(map(_is_suspect, every(operations)))


def every(operations: Iterable[tf.Operation]) -> Iterator[tf.Operation]:
    """Yield the ops, and those in the functions that they call or loop over."""
    for op in operations:
        yield op
        if op.type in BODIES:
            for body in bodies(op):
                yield from every(body.get_operations())


_UNRUNNABLE = {"SymbolicGradient"}
"""What TensorFlow writes into a graph for the gradient of a function it has lost."""


def _dropping(
    graph: Any,
    outputs: Sequence[tf.Tensor],
    root: tf.Tensor,
) -> tf.Operation | None:
    """Return the op that drops a term of the gradient of `outputs` to `root`, if any.

    Args:
        graph: The graph they are in.
        outputs: Where the gradient comes from.
        root: Where it goes to.
    """
    leading, leads = _leading_to(graph, outputs)
    between = leads & following(graph, root, _blocks)
    suspects = [op for op in leading if _takes(op, between)]
    if not suspects:
        return None
    passing = {op: results(op) for op in suspects}
    floats = list(filter(is_differentiable, outputs))
    lists = [tensor for tensor in outputs if tensor.dtype == tf.variant]
    tensors = [t for found in passing.values() for t in found if carries(t)]
    # A gradient arrives at a tensor list only outside, where it is taken apart again.
    arrives = connected(graph, floats, tensors) | _leading_to(graph, lists)[1]
    arrives |= {tensor.ref() for tensor in outputs}
    for op, results_of_op in passing.items():
        if any(tensor.ref() in arrives for tensor in results_of_op):
            inside = bodies(op)
            found = _dropping_inside(op, between) if inside else op
            if found is not None:
                return found
    return None


def _dropping_inside(op: tf.Operation, between: set[Any]) -> tf.Operation | None:
    for body in bodies(op):
        pairs = zip(op.outputs, body.outputs, strict=False)
        outputs = [inner for outer, inner in pairs if outer.ref() in between]
        for root in counterparts(op, body, between):
            found = _dropping(body, outputs, root)
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


def _takes(op: tf.Operation, between: set[Any]) -> bool:
    """Return whether `op` takes a value on the path by an input that it may drop."""
    if bodies(op):
        return may_drop([op]) and any(t.ref() in between for t in op.inputs)
    if not _is_suspect(op):
        return False
    # Integers that Python code takes, or a variable, are no part of a slope.
    any_dtype = op.type in IGNORED_INPUTS
    return any(t.ref() in between for t in _dropped(op) if any_dtype or carries(t))


def _is_suspect(op: tf.Operation) -> bool:
    if op.type in IGNORED_INPUTS:  # the range of a shape has no slope, say
        return not all(tensor.dtype.is_integer for tensor in _dropped(op))
    return op.type in _PYTHON or writes(op)


def _dropped(op: tf.Operation) -> list[tf.Tensor]:
    """Return the inputs of a suspect that its gradient leaves out."""
    positions: Sequence[int] = range(1 if writes(op) else 0, len(op.inputs))
    positions = IGNORED_INPUTS.get(op.type, positions)
    return [op.inputs[i] for i in positions if i < len(op.inputs)]


def _blocks(op: tf.Operation) -> bool:
    return blocks(op) and not is_in_moments(op)


def _error(op: tf.Operation, name: str, argument: str) -> Exception:
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
