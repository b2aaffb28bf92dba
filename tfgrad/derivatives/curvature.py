"""The gradient as a function, and the verification of what differentiates it again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call, Compiled
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.repairs import is_in_moments
from tfgrad.derivatives.soundness import every
from tfgrad.derivatives.verification import (
    Array,
    Disagreement,
    coarsest,
    disagreement,
    evaluate_at,
    point_of,
    rounding,
)
from tfgrad.diagnosis.graphs import writes
from tfgrad.diagnosis.lines import line_of, made_by_gradient
from tfgrad.differences import EPSILONS
from tfgrad.errors import WrongDerivativeError

Product = Callable[[list[tf.Tensor]], list[tf.Tensor]]
"""From a direction, one tensor for each source, to the Hessian times it."""

SUSPICIOUS = {
    "Cholesky": "it reads one triangle only; f of (x + transpose of x) / 2 does not",
    "Angle": "under XLA its second derivative has the wrong sign",
    "MaxPool": "under XLA its second derivative has wrong elements",
    "ResizeBilinearGrad": "it has no gradient, so the second derivative lacks a term",
}
"""Ops whose second derivatives are known to come out wrong, and why."""

KINKED = {
    *("Abs", "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Sign", "ClipByValue"),
    *("Maximum", "Minimum", "Max", "Min", "SelectV2", "Select", "TopKV2", "ArgMax"),
    *("ArgMin", "Greater", "GreaterEqual", "Less", "LessEqual", "Floor", "Ceil"),
    *("Round", "Rint", "FloorMod", "FloorDiv", "MaxPool", "MaxPool3D", "SegmentMax"),
    *("SegmentMin", "UnsortedSegmentMax", "UnsortedSegmentMin", "If", "Case"),
    *("StatelessIf", "StatelessCase"),
}
"""Ops that make a gradient jump, or bend, where a value crosses another."""

STEP_BETWEEN_KINKS = 2.0**-20
"""In float64: short enough to meet few kinks, and eight digits are still right."""


def gradient(call: Call) -> list[tf.Tensor]:
    """Return the gradient of a call's one number, flat."""
    return Recording(objective(False), call).gradients()


def require_derivative(
    call: Call,
    lower: Callable[[Call], list[tf.Tensor]],
    product: Product,
    compiled: Compiled,
) -> None:
    """Refuse a derivative that is not that of `lower`, of one order less.

    Args:
        call: Where.
        lower: What was differentiated.
        product: The derivative times a direction.
        compiled: What computed it.

    Raises:
        WrongDerivativeError: If differences of `lower` are far from it.
    """
    differenced = Compiled(call.f, lower)

    def function(point: list[Array]) -> Array:
        return evaluate_at(call, point, lambda moved: differenced(*moved.nests))

    def directional(direction: list[Array]) -> Array:
        v = [
            tf.constant(part.astype(source.dtype.as_numpy_dtype))
            for part, source in zip(direction, call.sources, strict=True)
        ]
        return np.concatenate([np.ravel(np.asarray(p, np.float64)) for p in product(v)])

    graph = compiled.graph(*call.nests)
    if graph is None:
        return  # run eagerly, where each gradient was verified as it was taken
    operations = list(every(graph.get_operations()))
    dtype = coarsest(call.sources, operations)
    step = None
    if any(map(_has_kinks, operations)):
        if dtype != tf.float64:
            return  # rounding hides the slope within a step that is clear of kinks
        step = STEP_BETWEEN_KINKS
    with _untouched(graph.variables if any(map(writes, operations)) else ()):
        wrong = disagreement(function, directional, point_of(call), dtype, step)
        if wrong is None or any(map(_redefines_slope, operations)):
            return
        value = Compiled(call.f, lambda call: tf.nest.flatten(call.output()))
        floor = rounding(float(EPSILONS[dtype]), value(*call.nests))
    if abs(wrong.claimed - wrong.difference) > floor:
        raise _error(call, wrong, operations)


@contextlib.contextmanager
def _untouched(variables: Iterable[tf.Variable]) -> Iterator[None]:
    """Restore variables: a check evaluates `f` more often than the user asked for."""
    before = [(variable, variable.read_value()) for variable in variables]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def _has_kinks(op: tf.Operation) -> bool:
    """Return whether the slope of a function jumps somewhere because of `op`."""
    if op.type not in KINKED or made_by_gradient(op):
        return False
    return any(tensor.dtype.is_floating for tensor in op.inputs)


def _redefines_slope(op: tf.Operation) -> bool:
    """Return whether `op` says that the derivative is not the slope."""
    if op.type == "StopGradient":
        return not is_in_moments(op)
    if op.type != "IdentityN":
        return False
    return "CustomGradient" in str(op.get_attr("_gradient_op_type"))


def _error(
    call: Call, wrong: Disagreement, operations: Sequence[tf.Operation]
) -> WrongDerivativeError:
    sizes = np.cumsum([source.shape.num_elements() for source in call.sources])
    name = call.names[int(np.searchsorted(sizes, wrong.element, side="right"))]
    known = (
        f"; {kind} at {line_of(op)}: {reason}"
        for op in operations
        for kind, reason in SUSPICIOUS.items()
        if op.type.startswith(kind)
    )
    return WrongDerivativeError(
        f"TensorFlow's second derivative of `{call.name}` is wrong, by `{name}`.",
        got=f"along a random direction {wrong}{next(known, '')}",
        hint="jit=False; float64; tfgrad.explain(f, x); or tfgrad.finite_difference",
    )
