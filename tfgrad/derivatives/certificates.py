"""From a call and its answer to the functions that `verification` compares.

A trace returns its answer, and the functions that the answer is the derivative of: the
outputs of the user's function and, for a second derivative, their gradient. So calls of
the same compiled function at other points give the differences to compare the answer
with; two calls are enough if the answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.formulas import is_in_moments
from tfgrad.derivatives.replicas import Replica
from tfgrad.derivatives.signatures import is_dynamic
from tfgrad.derivatives.soundness import every
from tfgrad.derivatives.tracing import suited
from tfgrad.derivatives.verification import (
    LARGE,
    MOST_MOVING,
    Array,
    Arrays,
    Functions,
    coarsest,
    disagreement,
    is_still,
    moving_part,
)
from tfgrad.diagnosis.graphs import unrepeatable
from tfgrad.diagnosis.lines import frames_of, line_of, made_by_gradient
from tfgrad.diagnosis.sources import restored
from tfgrad.differences import Slope
from tfgrad.errors import WrongDerivativeError

if TYPE_CHECKING:
    from tfgrad.derivatives.calls import Call

Ladder = list[list[tf.Tensor]]
"""The functions that an answer holds derivatives of: the flat outputs of each."""

Slopes = Callable[["Certificate", Arrays, list[Arrays]], Sequence[float]]
"""From a direction, and weights of all outputs, to the slope of each weighted sum."""

SUSPICIOUS = {
    "Cholesky": "it reads one triangle only; f of (x + transpose of x) / 2 does not",
    "Angle": "under XLA its second derivative has the wrong sign",
    "Qr": "where columns depend on each other, its slope is not known",
    "SelfAdjointEigV2": "where eigenvalues repeat, the slopes of eigenvectors are lost",
    "Svd": "where singular values repeat, the slopes of the vectors are lost",
    "Bitcast": "bits have no slope, so this path is left out",
    "Sqrt": "its slope at 0 is infinite, and infinite times 0 is NaN",
    "Relu": "at 0 its slope is taken to be 0, whatever stands beside it",
    "Abs": "at 0 its slope is taken to be 0, whatever stands beside it",
    "Sign": "its slope is taken to be 0",
    "Maximum": "where both are equal, each gets half of the slope or one gets all",
    "Minimum": "where both are equal, each gets half of the slope or one gets all",
}
"""Ops whose derivatives are known to come out wrong at some points, and why."""

_BY_DESIGN = (
    *("FakeQuant", "QuantizeAndDequantize", "PreventGradient"),
    "StatelessRandomGamma",  # that of the distribution, not of its sampler
)
"""Ops whose gradient is not meant to be the slope, by the first part of their names."""


class Certificate:
    """One call of a transform, ready to be verified.

    Args:
        call: The call.
        concrete: The concrete function that answered it.
        found: What it returned: the answer, and the outputs of each function of the
            ladder.
        slopes: See `Slopes`.
        lower: Computes the ladder, where the answer comes without one.
    """

    def __init__(
        self,
        call: Call,
        concrete: Any,
        found: Sequence[Any],
        slopes: Slopes,
        lower: Any = None,
    ) -> None:
        self.call = call
        self.answer = found[0]
        self.ladder = _levels(found[1:])
        self._slopes = slopes
        self._operations = list(every(concrete.graph.get_operations()))
        moving = call.sources if call.variables is not None else ()
        self._replica = Replica(concrete, moving)
        self._values: Replica | None = None
        if lower is not None:
            self._values = Replica(lower, moving)
            self.ladder = _levels(self._values(_dynamic(call)))
            if not self._values.is_steady(_dynamic(call)):
                self.ladder = []  # each evaluation is that of another function
        elif sum(source.shape.num_elements() or 0 for source in call.sources) > LARGE:
            # To compute the answer, too, would cost more than to trace this.
            self._values = Replica(concrete, moving, lambda found: found[1:])

    def along(self, direction: Arrays) -> Any:
        """Return the answer for another direction."""
        vectors = _tensors(direction, self.call.sources)
        return self._run(self.call.along(vectors))[0]

    def pulled(self, weights: Sequence[Any]) -> list[Any]:
        """Return the gradient of the first function's outputs, weighted and summed."""
        call = self.call.apart()
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(call.sources)
            outputs = tf.nest.flatten(self._run(call)[1])
        cotangents = _tensors(list(weights), outputs)
        found: list[Any] = tape.gradient(
            outputs,
            call.sources,
            cotangents,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [tf.convert_to_tensor(gradient) for gradient in found]

    def functions(self) -> Functions:
        """Return what there is to verify."""
        tensors = [*self.call.sources, *(y for outputs in self.ladder for y in outputs)]
        return Functions(
            point=list(map(_view, self.call.sources)),
            values=[_arrays(outputs) for outputs in self.ladder],
            evaluate=self._evaluate,
            slopes=self._claimed,
            dtype=coarsest(tensors, self._operations),
            symmetric=_reads_one_triangle(self._operations),
        )

    def require_right(self) -> None:
        """Raise if the answer is not the derivative.

        Raises:
            WrongDerivativeError: If differences disagree with it.
        """
        functions = self.functions()
        wrong = disagreement(functions) if functions.values else None
        if wrong is None or any(map(redefines_slope, self._operations)):
            return
        index = _source(functions)
        raise _withheld(
            *wrong, self.call.name, self.call.names[index], self._operations
        )

    def _evaluate(self, direction: Arrays, t: float) -> list[Arrays]:
        call, values = self.call, {}
        moved = list(map(_moved_by, call.sources, direction, [t] * len(direction)))
        if call.variables is None:
            call = call.at(moved)
        else:
            handles = [id(variable.handle) for variable in call.sources]
            values = dict(zip(handles, moved, strict=True))
        if self._values is not None:
            ladder = self._values(_dynamic(call), values)
        else:
            ladder = self._run(call, values)[1:]
        return list(map(_arrays, _levels(ladder)))

    def _run(self, call: Call, values: Any = None) -> Any:
        return self._replica(_dynamic(call), values or {})

    def _claimed(self, direction: Arrays, weights: list[Arrays]) -> Array:
        return np.array(self._slopes(self, direction, weights), np.float64)


def _source(functions: Functions) -> int:
    """Return the index of the first source with a wrong derivative."""
    places = range(len(functions.point))
    return next((i for i in places if disagreement(functions, [i])), 0)


def verify(
    concrete: Any,
    tensors: Sequence[Any],
    answer: Any,
    *,
    variables: Sequence[tf.Variable],
    outputs: Callable[[Any], Sequence[tf.Tensor]],
    slope: Callable[[Arrays, Arrays], float],
    name: str,
    names: Sequence[str],
) -> None:
    """Refuse the first answer of a compiled function if its derivative is wrong.

    For functions that are compiled elsewhere, as by `minimize`; a transform verifies
    its own. It costs one evaluation where all is right, writes to copies only, and says
    nothing of functions that draw random numbers.

    Args:
        concrete: The function, which reads what is differentiated from variables, or
            takes it first.
        tensors: What it was called with.
        answer: What it returned.
        variables: What is differentiated; none if it is the first ones of `tensors`.
        outputs: From an answer to what has the derivative: a value, or residuals.
        slope: From a direction (an array for each variable) and weights (one for each
            output) to the slope that the answer claims for the weighted sum.
        name: What the user calls the function.
        names: What the user calls what is differentiated.

    Raises:
        WrongDerivativeError: If differences disagree with the slope.
    """
    if not certified(concrete):
        return
    replica = Replica(concrete, variables)
    operations = list(every(concrete.graph.get_operations()))
    handles = [id(variable.handle) for variable in variables]
    sources: Sequence[Any] = variables or tensors[: len(names)]

    def evaluate(direction: Arrays, t: float) -> list[Arrays]:
        moved = list(map(_moved_by, sources, direction, [t] * len(sources)))
        if handles:
            found = replica(tensors, dict(zip(handles, moved, strict=True)))
        else:
            found = replica([*moved, *tensors[len(moved) :]])
        return [_arrays(outputs(found))]

    values = outputs(answer)
    functions = Functions(
        point=list(map(_view, sources)),
        values=[_arrays(values)],
        evaluate=evaluate,
        slopes=lambda v, weights: np.array([slope(v, weights[0])]),
        dtype=coarsest([*sources, *values], operations),
        symmetric=_reads_one_triangle(operations),
    )
    with suited(concrete.graph):
        wrong = disagreement(functions)
    if wrong is None or any(map(redefines_slope, operations)):
        return
    raise _withheld(*wrong, name, names[_source(functions)], operations)


def _reads_one_triangle(operations: Sequence[tf.Operation]) -> bool:
    return any(op.type in ("Cholesky", "SelfAdjointEigV2") for op in operations)


def _withheld(
    level: int,
    wrong: Slope,
    name: str,
    source: str,
    operations: Sequence[tf.Operation],
) -> WrongDerivativeError:
    known = (
        f"; perhaps {kind} at {line_of(op)}: {reason}"
        for kind, reason in SUSPICIOUS.items()
        for op in operations
        if op.type == kind
    )
    order = "second derivative" if level else "derivative"
    return WrongDerivativeError(
        f"TensorFlow's {order} of `{name}` is wrong, by `{source}`.",
        got=f"along a random direction {wrong}{next(known, '')}",
        hint="tfgrad.explain(f, x); tfgrad.finite_difference; another form of it; "
        "jit=False, if XLA compiles it; verify=False for the numbers as they are",
    )


def certified(concrete: Any) -> bool:
    """Return whether the answers of a trace can be verified."""
    if tf.distribute.has_strategy():
        return False
    return unrepeatable(concrete.graph) is None


def wrong_gradient(
    call: Call,
    evaluate: Callable[[Call], Sequence[tf.Tensor]],
    weights: Sequence[tf.Tensor] | None,
    gradients: Sequence[tf.Tensor],
) -> tuple[int, Slope] | None:
    """Return the first source whose gradient, taken eagerly, is wrong, and how wrong.

    Args:
        call: Where.
        evaluate: What was differentiated.
        weights: One cotangent for each output; None means ones.
        gradients: What is to be verified, one for each source.
    """

    def weighted(call: Call) -> list[Arrays]:
        outputs = evaluate(call)
        pairs = zip(outputs, weights or map(tf.ones_like, outputs), strict=True)
        return [[np.asarray(sum(inner([u], [y]) for u, y in pairs))]]

    def slopes(direction: Arrays, scale: list[Arrays]) -> Array:
        return np.array([scale[0][0] * slope_along(gradients, direction)])

    at = _arrays(call.sources)
    functions = Functions(
        point=at,
        values=weighted(call),
        evaluate=lambda v, t: _moved(
            call, [x + t * d for x, d in zip(at, v, strict=True)], weighted
        ),
        slopes=slopes,
        dtype=coarsest([*call.sources, *evaluate(call)]),
    )
    for index in range(len(functions.point)):
        wrong = disagreement(functions, [index])
        if wrong is not None:
            return index, wrong[1]
    return None


def times(blocks: Sequence[Any], direction: Sequence[Any]) -> Arrays:
    """Return a Jacobian, given as a flat list of its blocks, times a direction."""
    count = len(direction)
    vectors = _arrays(direction)
    return [
        np.sum(
            [
                np.tensordot(block, v, v.ndim)
                for block, v in zip(
                    _arrays(blocks[i : i + count]), vectors, strict=True
                )
            ],
            axis=0,
        )
        for i in range(0, len(blocks), count)
    ]


def inner(left: Sequence[Any], right: Sequence[Any]) -> float:
    """Return the sum of the products of all elements."""
    pairs = zip(_arrays(left), _arrays(right), strict=True)
    return sum(float(np.sum(a * b)) for a, b in pairs)


def slope_along(gradients: Sequence[Any], direction: Arrays) -> float:
    """Return the slope that gradients claim along a direction of `verification`'s."""
    total = 0.0
    for gradient, v in zip(gradients, direction, strict=True):
        part = moving_part(v.size)  # all else of the direction is zero
        # NaN times 0 would blame this source.
        if not is_still(v) and np.any(v.reshape(-1)[part]):
            total += inner(*([x.reshape(-1)[part]] for x in (_view(gradient), v)))
    return total


def redefines_slope(op: tf.Operation) -> bool:
    """Return whether `op` says that the derivative is not the slope."""
    if op.type.startswith(_BY_DESIGN):
        return True
    if op.type == "StopGradient":
        own = is_in_moments(op) or _is_in(op, "reduce_logsumexp")
        return not own and not made_by_gradient(op)
    if op.type != "IdentityN":
        return False
    try:
        kind = op.get_attr("_gradient_op_type")
    except ValueError:
        return False
    return b"CustomGradient" in kind and not _is_in(op, "ctc_loss", "swish", "silu")


def _is_in(op: tf.Operation, *functions: str) -> bool:
    """Return whether one of TensorFlow's own functions made `op`."""
    return any(
        frame.name.startswith(functions) and "tensorflow" in frame.filename
        for frame in frames_of(op)
    )


def _view(source: Any) -> Array:
    """Return the values of a source, without a copy if that can be."""
    tensor = tf.convert_to_tensor(source)
    try:
        return np.asarray(memoryview(tensor))
    except (TypeError, ValueError, BufferError):  # NumPy has no such dtype by itself
        return np.asarray(tensor, tensor.dtype.as_numpy_dtype)


def _moved_by(source: Any, direction: Array, t: float) -> tf.Tensor:
    """Return a source moved along a direction, in its own dtype."""
    if is_still(direction):
        return tf.convert_to_tensor(source)
    if direction.size > MOST_MOVING:
        # One copy of all, and only the part that moves is computed with.
        part, flat = moving_part(direction.size), tf.reshape(source, [-1])
        moved = flat[part] + t * direction.reshape(-1)[part]
        places = {"begin": [part.start], "end": [part.stop], "strides": [1]}
        updated = tf.raw_ops.TensorStridedSliceUpdate(input=flat, value=moved, **places)
        return tf.reshape(updated, source.shape)
    dtype = source.dtype.as_numpy_dtype
    return tf.constant((_view(source) + t * direction).astype(dtype))


def _moved(call: Call, point: Arrays, evaluate: Callable[[Call], Any]) -> Any:
    """Return what `evaluate` gives, eagerly, for a call moved to `point`."""
    values = _tensors(point, call.sources)
    if call.variables is None:
        return evaluate(call.at(values))
    with restored(call.sources):
        # A function that leaves TensorFlow reads the variables themselves.
        for variable, value in zip(call.sources, values, strict=True):
            variable.assign(value)
        return evaluate(call)


def _levels(found: Iterable[Any]) -> Ladder:
    return list(map(tf.nest.flatten, found))


def _dynamic(call: Call) -> list[Any]:
    return list(filter(is_dynamic, tf.nest.flatten(call.nests)))


def _arrays(tensors: Sequence[Any]) -> Arrays:
    return [np.asarray(tensor, np.float64) for tensor in tensors]


def _tensors(arrays: Arrays, like: Sequence[Any]) -> list[tf.Tensor]:
    return [
        tf.constant(x.astype(other.dtype.as_numpy_dtype, copy=False))
        for x, other in zip(arrays, like, strict=True)
    ]
