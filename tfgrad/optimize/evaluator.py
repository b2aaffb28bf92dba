"""A user's function and its derivatives, compiled: from arguments to `Evaluation`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.certificates import slope_along, verify
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.signatures import is_dynamic
from tfgrad.derivatives.soundness import may_drop
from tfgrad.derivatives.tracing import Traces
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, name_of, named_leaves, ravel

SMALL = 10
"""Parameters, and numbers in an aux value, up to which each step's are kept in the
history."""

BITS = {2: tf.int16, 4: tf.int32, 8: tf.int64}
"""Whole numbers of as many bytes as a float has."""

UNSIGNED = {2: tf.uint16, 4: tf.uint32, 8: tf.uint64}
"""The same without a sign."""

LARGE = 2**18
"""Numbers from which on an array is not copied where that can be helped."""

COLUMNS = "step", "fun", "grad_max", "expected", "learning_rate", "x", "seconds"
"""What else a history holds."""

JOINED = 2**12
"""Numbers in a leaf up to which copying it takes less than three ops of its own do."""


class Evaluation(NamedTuple):
    """The function at one point.

    Attributes:
        value: Its value, shape `[]`.
        gradient: The gradient, times the loss scale that was asked for: a list with a
            tensor (or `tf.IndexedSlices` with distinct rows) for each leaf; of
            `Problem.at`, a vector. Empty where it is not carried along.
        grad_max: Its largest |element|, without the scale. Evaluators leave it out, ():
            what takes it computes it, so that no trace of a new function has to; see
            `measured`.
        aux: The numbers that the function returned besides, if they are few.
        linear: For sums of squares, the linear model: see `residuals.Residuals`.
    """

    value: tf.Tensor
    gradient: Any
    grad_max: Any
    aux: dict[str, tf.Tensor]
    linear: Any = ()


class Evaluator:
    """A user's function and its derivatives, compiled once for each signature.

    A `tf.function` keeps its evaluator, so that it is traced once for all runs.

    Args:
        f: The function.
        variables: What it is differentiated by: a nest of variables; None for its first
            argument; the empty tuple for all trainable variables that it reads.
        has_aux: `f` returns `(value, aux)`.
        jit: Compile with XLA by itself, whatever loop it is part of.
        verify: Compare the first gradient of each trace with differences.
        is_inlined: Whether second derivatives, too, have to be traced without a call of
            the graph of the gradient.

    Attributes:
        variables: As above; the variables that were found, after the first call.
        kept: What others compiled for this function, by a key of theirs.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        variables: Nest,
        *,
        has_aux: bool,
        jit: bool = False,
        verify: bool = True,
        is_inlined: bool = False,
    ) -> None:
        self._is_inlined = is_inlined
        self.variables = variables
        self.has_aux = has_aux
        self.f, self.name = f, name_of(f)
        self.kept: dict[Any, Any] = {}
        check = self._check if verify and not is_inlined else None
        in_turn = variables is not None  # as layers of Keras do
        self.evaluate = Traces(
            self._evaluate, python_of(f), jit=jit, check=check, in_turn=in_turn
        )
        self.products = Traces(self.multiply, python_of(f), jit=False, in_turn=in_turn)

    def record(self, f: Callable[..., Any], arguments: tuple[Nest, ...]) -> Recording:
        """Return the evaluation of `f` on a tape."""
        call = self.call(f, arguments)
        return Recording(objective(self.has_aux), call, has_aux=self.has_aux)

    def call(self, f: Callable[..., Any], arguments: tuple[Nest, ...]) -> Call:
        """Return the call of `f`, to be differentiated."""
        return Call(f, self.name, ("x",), arguments, {}, 0, self.variables)

    def _evaluate(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], scale: Any
    ) -> Evaluation:
        recording = self.record(f, arguments)
        if is_open(self.variables):
            self.variables = list(recording.sources)
        else:
            self._require_reads(recording)
        value, gradient, linear = self.value(recording, scale)
        has_path = tf.executing_eagerly() or not recording.is_stopped
        if not has_path and recording.sources:  # eagerly, a branch may be constant
            raise self._unread("reads {} only through tf.stop_gradient or a shape")
        return Evaluation(value, gradient, (), small(recording.aux), linear)

    def _require_reads(self, recording: Recording) -> None:
        """Refuse a function that reads nothing of what it is differentiated by."""
        if tf.executing_eagerly() or self._is_inlined:
            return
        if self.variables is None:
            reads = any(source.consumers() for source in recording.sources)
        else:
            graph = tf.compat.v1.get_default_graph()
            read = {id(tensor) for tensor in graph.external_captures}
            reads = any(id(variable.handle) in read for variable in recording.sources)
        if not reads:
            raise self._unread("reads nothing of {}")

    def _unread(self, how: str) -> InvalidArgumentError:
        how = how.format("its argument" if self.variables is None else "`wrt`")
        return InvalidArgumentError(
            "The function must depend on what it is minimised over.",
            got=f"`{self.name}` {how}",
            hint="compute what depends on it inside of the function",
        )

    def check(self, arguments: tuple[Nest, ...]) -> None:
        """Refuse a gradient, traced without numbers, that differences disagree with."""
        self._check(self.evaluate(arguments, None), arguments, None)

    def _check(
        self, answer: Evaluation, arguments: tuple[Nest, ...], scale: Any
    ) -> None:
        """Refuse a first gradient that differences of f disagree with."""
        concrete = None
        if tf.executing_eagerly() and scale is None:
            concrete = self.evaluate.concrete(arguments, scale)
        if concrete is None:  # it is part of another trace, or runs eagerly
            return
        is_of_values = self.variables is None
        variables = [] if is_of_values else tf.nest.flatten(self.variables)
        nest, root = (arguments[0], "x") if is_of_values else (self.variables, "wrt")
        gradient = dense(answer.gradient)
        verify(
            concrete,
            list(filter(is_dynamic, tf.nest.flatten(arguments))),
            answer,
            variables=variables,
            outputs=lambda evaluation: [evaluation.value],
            slope=lambda v, weights: float(weights[0]) * slope_along(gradient, v),
            name=self.name,
            names=[path for path, _ in named_leaves(nest, root)],
        )

    def value(
        self, recording: Recording, scale: Any
    ) -> tuple[tf.Tensor, list[Any], Any]:
        """Return the value, the gradient times a scale, and a linear model."""
        value = recording.output
        weight = None if scale is None else tf.cast(scale, value.dtype)
        return value, recording.gradients(weight, sparse=True), ()

    def multiply(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], direction: list[Any]
    ) -> list[tf.Tensor]:
        """Return the Hessian times a direction."""
        # Reverse over reverse, as in tfgrad.hvp: no op of TensorFlow refuses it.
        call = self.call(f, arguments)
        if self._is_sound(arguments):
            recording = Recording(
                lambda call: dense(self.evaluate(call.args, None).gradient), call
            )
        else:  # the trace of the gradient lacks a term: f is traced again, repaired
            recording = Recording(
                lambda call: self.record(call.f, call.args).gradients(), call
            )
        return recording.gradients(direction)

    def _is_sound(self, arguments: tuple[Nest, ...]) -> bool:
        """Return whether the trace of the gradient can be differentiated as it is."""
        if self._is_inlined:
            return False
        graph = self.evaluate.graph(arguments, None)
        return graph is not None and not may_drop(graph.get_operations())


def evaluator_of(
    kind: type[Evaluator], f: Callable[..., Any], variables: Nest, **options: Any
) -> Evaluator:
    """Return the evaluator of a function: that of a `tf.function` is kept with it."""
    if not hasattr(f, "python_function"):
        return kind(f, variables, **options)
    owned = vars(f).setdefault("_tfgrad_evaluators", {})
    ids = None if variables is None else (*map(id, tf.nest.flatten(variables)),)
    key = kind, ids, tuple(options.items())
    if key not in owned:
        owned[key] = kind(f, variables, **options)
    kept: Evaluator = owned[key]
    return kept


def is_open(variables: Nest) -> bool:
    """Return whether the variables of a function are still to be found."""
    return isinstance(variables, tuple) and not variables


def small(aux: Any) -> dict[str, tf.Tensor]:
    """Return the numbers in an aux value that a history can keep, by their names.

    Raises:
        InvalidArgumentError: If one has the name of a column that is there already, or
            none.
    """
    values = aux if isinstance(aux, dict) else {} if aux is None else {"aux": aux}
    for name in values:
        if not isinstance(name, str) or name in COLUMNS:
            raise InvalidArgumentError(
                "What is in `aux` has names, others than the columns of every history.",
                got=f"aux[{name!r}]",
                hint=f'another name, such as "my_{name}"',
            )
    pairs = [pair for name, nest in values.items() for pair in named_leaves(nest, name)]
    tensors = {
        name: tf.convert_to_tensor(leaf)
        for name, leaf in pairs
        if isinstance(leaf, tf.Tensor | int | float)
    }
    count = sum(tensor.shape.num_elements() or SMALL + 1 for tensor in tensors.values())
    return tensors if count <= SMALL else {}


def dense(gradient: Sequence[Any]) -> list[tf.Tensor]:
    """Return the gradient with dense tensors for `tf.IndexedSlices`."""
    return [
        tf.math.unsorted_segment_sum(leaf.values, leaf.indices, _rows(leaf))
        if isinstance(leaf, tf.IndexedSlices)
        else leaf
        for leaf in gradient
    ]


def _rows(slices: tf.IndexedSlices) -> Any:
    shape: Any = slices.dense_shape
    return shape[0]


def measured(
    evaluation: Evaluation, scale: Any = None, *, is_xla: bool = False
) -> Evaluation:
    """Return an evaluation with `grad_max`; an empty leaf of the gradient counts as 0.

    Where the gradient is a tensor, its last axis is that of the parameters. XLA wants
    the leaves as they are; all else has less to do where small ones are joined.
    """
    if tf.is_tensor(evaluation.grad_max):
        return evaluation
    gradient, dtype = evaluation.gradient, evaluation.value.dtype
    is_vector = isinstance(gradient, tf.Tensor)
    leaves, axis = [gradient] if is_vector else gradient, -1 if is_vector else None
    values = [getattr(leaf, "values", leaf) for leaf in leaves]
    filled = [leaf for leaf in values if leaf.shape.num_elements() != 0]
    if tf.executing_eagerly():  # NumPy takes a fifth of the time
        each = [np.max(np.abs(leaf.numpy()), initial=0) for leaf in filled]
        whole = tf.constant(np.max(np.array(each, dtype.as_numpy_dtype)), dtype)
    else:
        is_joined = axis is None and not is_xla
        whole = _most(_joined(filled) if is_joined else filled, dtype, axis)
    if scale is not None:
        whole /= tf.cast(scale, dtype)
    return evaluation._replace(grad_max=whole)


def _most(
    leaves: Sequence[tf.Tensor], dtype: tf.DType, axis: int | None = None
) -> tf.Tensor:
    """Return the largest |element| of all leaves in `dtype`; NaN if one of them is.

    Of a vector or of each row of a matrix, `axis` is -1; of all numbers, None.

    The bits of floats that are not negative, taken for whole numbers, are in the order
    of the floats, NaN last (IEEE 754). The maximum that XLA computes of floats skips
    NaN (TensorFlow 2.21), and is slower. Of a large leaf no |x| is made, a copy of its
    size; a vector is met by XLA, which makes none.
    """
    most = []
    for leaf in leaves:
        whole = BITS[leaf.dtype.size]
        if axis is None and (leaf.shape.num_elements() or 0) >= LARGE:
            # As unsigned numbers, those below 0 are in the order of their |x|, above
            # all others.
            below = tf.reduce_max(tf.bitcast(leaf, UNSIGNED[leaf.dtype.size]))
            below = tf.bitwise.bitwise_and(tf.bitcast(below, whole), whole.max)
            bits = tf.maximum(tf.reduce_max(tf.bitcast(leaf, whole)), below)
        else:
            bits = tf.bitcast(tf.abs(leaf), whole)
            bits = tf.reduce_max(bits, axis) if leaf.shape.rank != 0 else bits
        if leaf.dtype != dtype:
            number = tf.cast(tf.bitcast(bits, leaf.dtype), dtype)
            bits = tf.bitcast(number, BITS[dtype.size])
        most.append(bits)
    bits = tf.reduce_max(tf.stack(most), 0) if len(most) > 1 else most[0]
    return tf.bitcast(bits, dtype)


def _joined(leaves: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Return the leaves with small ones of the same dtype in one vector."""
    groups: dict[Any, list[tf.Tensor]] = {}
    for i, leaf in enumerate(leaves):
        is_small = (leaf.shape.num_elements() or JOINED + 1) <= JOINED
        groups.setdefault(leaf.dtype.name if is_small else i, []).append(leaf)
    return [
        tf.concat([tf.reshape(leaf, [-1]) for leaf in group], 0)
        if len(group) > 1
        else group[0]
        for group in groups.values()
    ]


def flat(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation with the gradient as one dense vector."""
    gradient = dense(evaluation.gradient)
    is_vector = len(gradient) == 1 and gradient[0].shape.rank == 1
    return evaluation._replace(gradient=gradient[0] if is_vector else ravel(gradient))


def python_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return what to trace for `f`: of a tf.function without options, its body.

    Its ops belong in our graph: XLA needs that, see `traced.CALLS`.
    """
    python = getattr(f, "python_function", None)
    asks = ("_jit_compile", "input_signature")
    is_asking = any(getattr(f, name, None) for name in asks)
    return python if inspect.isfunction(python) and not is_asking else f
