"""The function being minimised, as a pure function: a point in, an `Evaluation` out."""

from __future__ import annotations

import contextlib
import gc
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.certificates import slope_along, verify
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.signatures import is_dynamic, signature
from tfgrad.derivatives.soundness import may_drop
from tfgrad.derivatives.tracing import Traces
from tfgrad.diagnosis.explain import explain
from tfgrad.diagnosis.graphs import inlined, written_variables
from tfgrad.diagnosis.report import Explanation
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    is_variable,
    name_of,
    named_leaves,
    open_modules,
    ravel,
    to_tensors,
    unravel,
    variables_of,
)
from tfgrad.optimize.compiled import direct

SMALL = 10
"""Parameters, and numbers in an aux value, up to which each step's are kept in the
history."""

FEW = 3
"""Leaves of a point that are put together by themselves; more, in a compiled call."""

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
"""Ops that call another graph: XLA compiles a loop around the derivative of one anew
for each value that the loop is called with."""


class Evaluation(NamedTuple):
    """The function at one point.

    Attributes:
        value: Its value, shape `[]`.
        gradient: The gradient, times the loss scale that was asked for: a list with a
            tensor (or `tf.IndexedSlices` with distinct rows) for each leaf; of
            `Problem.at`, a vector. Empty where it is not carried along.
        grad_max: Its largest |element|, without the scale.
        aux: The numbers that the function returned besides, if they are few.
        linear: For sums of squares, the linear model: see `residuals.Residuals`.
    """

    value: tf.Tensor
    gradient: Any
    grad_max: tf.Tensor
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
        """Compile nothing yet."""
        self._is_inlined = is_inlined
        self.variables = variables
        self.has_aux = has_aux
        self.f, self.name = f, name_of(f)
        self.kept: dict[Any, Any] = {}
        python = getattr(f, "python_function", None)
        # The ops of a tf.function belong in our graph: XLA needs that, see `CALLS`.
        plain = python if callable(python) and _is_plain(f) else f
        check = self._check if verify and not is_inlined else None
        self.evaluate = Traces(self._evaluate, plain, jit=jit, check=check)
        self.products = Traces(self._multiply, plain, jit=False)

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
        value, gradient, linear = self._value(recording, scale)
        grad_max = largest(gradient, scale, value.dtype)
        aux = small(_named(recording.aux))
        return Evaluation(value, gradient, grad_max, aux, linear)

    def _require_reads(self, recording: Recording) -> None:
        """Refuse a function that reads nothing of what it is differentiated by."""
        if tf.executing_eagerly():
            return
        if self.variables is None:
            reads = any(source.consumers() for source in recording.sources)
        else:
            graph = tf.compat.v1.get_default_graph()
            read = {id(tensor) for tensor in graph.external_captures}
            reads = any(id(variable.handle) in read for variable in recording.sources)
        if not reads:
            what = "of its argument" if self.variables is None else "of `wrt`"
            raise InvalidArgumentError(
                "The function must depend on what it is minimised over.",
                got=f"`{self.name}` reads nothing {what}",
                hint="compute what depends on it inside of the function",
            )

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

    def _value(
        self, recording: Recording, scale: Any
    ) -> tuple[tf.Tensor, list[Any], Any]:
        return recording.output, recording.gradients(scale, sparse=True), ()

    def _multiply(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], direction: list[Any]
    ) -> list[tf.Tensor]:
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


class Problem:
    """A user's function, and the point that is moved.

    Args:
        f: The function: of one nest of values, or of nothing.
        x0: Where to start; None for a function of variables.
        wrt: The variables; None and no `x0` means all trainable ones that `f` reads.
        has_aux: `f` returns `(value, aux)`.
        jit: Compile with XLA by itself, whatever loop it is part of.
        verify: Compare the first gradient with differences.

    Attributes:
        f: The function.
        name: What to call it.
        takes_values: Whether `f` takes the point as its first argument.
        template: The nest to pack an answer in.
        owners: The variables, Keras's as Keras has them: some of its optimizers ask for
            paths. None for a function of values; empty until the first evaluation if
            they are still to be found.
        evaluator: The function, compiled.
        example: What `f` takes besides: the arguments made of a batch, if there is
            data.
    """

    kind: type[Evaluator] = Evaluator
    options: Mapping[str, Any] = MappingProxyType({})  # of the evaluator
    has_hessian = True  # `hvp` multiplies by it

    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        wrt: Nest,
        *,
        has_aux: bool,
        jit: bool = False,
        verify: bool = True,
    ) -> None:
        """Check the point; nothing is traced."""
        _check_sources(f, x0, wrt)
        self.f, self.name = f, name_of(f)
        self.takes_values = x0 is not None
        self.has_aux = has_aux
        if self.takes_values:
            self.template, variables = _checked_start(x0), None
            self.owners: list[Any] = []
        else:
            variables = self.template = () if wrt is None else variables_of(wrt)
            self.owners = [] if wrt is None else tf.nest.flatten(open_modules(wrt))
            _check_distinct(tf.nest.flatten(variables))
        options = {"has_aux": has_aux, "jit": jit, "verify": verify, **self.options}
        self.evaluator = evaluator_of(self.kind, f, variables, **options)
        self.example: tuple[Nest, ...] = ()
        self._at: Callable[[tf.Tensor], Evaluation] | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that are moved; none for a function of values."""
        return [] if self.takes_values else tf.nest.flatten(self.template)

    @property
    def dtype(self) -> tf.DType | None:
        """The dtype that all leaves share; None if they do not, or are not known."""
        dtypes = {leaf.dtype for leaf in self.leaves}
        return dtypes.pop() if len(dtypes) == 1 else None

    @property
    def leaves(self) -> list[tf.TensorSpec]:
        """The specs of the leaves of the point."""
        leaves = tf.nest.flatten(self.template)
        return [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves]

    def start(self) -> list[tf.Tensor]:
        """Return the leaves of the point to start from; of variables, where they are.

        Raises:
            InvalidArgumentError: If f was to find its variables, and reads none.
        """
        if self.takes_values:
            return list(tf.nest.flatten(self.template))
        self.find()
        return [variable.read_value() for variable in self.variables]

    def find(self, batch: tuple[Nest, ...] = ()) -> None:
        """Find the variables that f reads, if they were not named: trace f once.

        Args:
            batch: What f takes besides the point.
        """
        if self.takes_values or not is_open(self.template):
            return
        if is_open(self.evaluator.variables):
            self.evaluator.evaluate(batch, None)
        found = self.evaluator.variables
        kept = [v for v in found if _is_trainable(v, _keras_owners(found))]
        if not kept:
            raise InvalidArgumentError(
                "Without `x0` and `wrt`, the function must read trainable variables.",
                got=f"`{self.name}` reads none",
                hint="minimize(f, x0) for a function of values, or tf.Variable in f",
            )
        if len(kept) < len(found):
            options = {"has_aux": self.has_aux, **self.options}
            self.evaluator = self.kind(self.f, kept, **options)
            self.evaluator.evaluate(batch, None)
        self.owners = kept
        self.template = kept if len(kept) > 1 else kept[0]

    def evaluate(
        self,
        x: Sequence[tf.Tensor] | None,
        batch: tuple[Nest, ...] = (),
        scale: tf.Tensor | None = None,
    ) -> Evaluation:
        """Return value and gradient at a point.

        Args:
            x: The leaves of the point. Variables are put there; None leaves them where
                they are.
            batch: What `f` takes besides the point.
            scale: What to multiply the gradient by: a loss scale, in the value's dtype.
        """
        arguments = self.arguments(x, batch)
        evaluation: Evaluation = self.evaluator.evaluate(arguments, scale)
        return evaluation

    def at(self, x: tf.Tensor) -> Evaluation:
        """Return value and gradient at a point given as one vector, `[n]`.

        `evaluate` has been called before, so that f is traced.
        """
        if self._at is None:
            self._at = self._evaluation_of_vectors()
        return self._at(x)

    def _evaluation_of_vectors(self) -> Callable[[tf.Tensor], Evaluation]:
        """Return the function from a vector to the evaluation there."""
        leaves = self.leaves

        def evaluate(x: tf.Tensor) -> Evaluation:
            return flat(self.evaluate(unravel(x, leaves)))

        if self.graph() is None:
            return evaluate
        if self.takes_values and len(leaves) <= FEW:
            call = direct(self.evaluator.evaluate.concrete(*self._nests()))

            def at(x: tf.Tensor) -> Evaluation:
                if not tf.executing_eagerly():  # as part of a loop
                    return evaluate(x)
                try:
                    return flat(call(*unravel(x, leaves)))
                except tf.errors.OpError:  # which the other one explains
                    return evaluate(x)

            return at
        key = "at", signature(self.template)
        if key not in self.evaluator.kept:
            self.evaluator.kept[key] = Traces(
                lambda _, x: evaluate(x), self.f, jit=False
            )
        kept: Callable[[tf.Tensor], Evaluation] = self.evaluator.kept[key]
        return kept

    def hvp(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return the Hessian at x times v, all vectors; variables are put to x."""
        leaves = self.leaves
        arguments = self.arguments(unravel(x, leaves), ())
        product: list[tf.Tensor] = self.evaluator.products(
            arguments, unravel(v, leaves)
        )
        return ravel(product)

    def assign(self, x: Sequence[tf.Tensor]) -> None:
        """Put the variables to a point, leaf by leaf; of values there are none."""
        for variable, value in zip(self.variables, x, strict=False):
            variable.assign(value)

    def restart(self, x: Sequence[tf.Tensor]) -> None:
        """Let `start` return a point from now on; variables are put there."""
        if self.takes_values:
            self.template = self.pack(x)
        self.assign(x)

    def pack(self, leaves: Sequence[Any]) -> Nest:
        """Return one tensor per leaf in the structure that the user passed."""
        return tf.nest.pack_sequence_as(self.template, list(leaves))

    def graph(self, batch: tuple[Nest, ...] = (), scale: Any = None) -> Any:
        """Return the graph of an evaluation; None if f cannot be compiled."""
        point = (self.template,) if self.takes_values else ()
        return self.evaluator.evaluate.graph((*point, *batch), scale)

    def operations(self) -> list[str]:
        """Return the types of the ops of an evaluation; none if it runs eagerly."""
        if "operations" not in self.evaluator.kept:
            self.evaluator.kept["operations"] = operations_of(self.graph())
        kept: list[str] = self.evaluator.kept["operations"]
        return kept

    def named(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """Return the leaves of a point by their names in the history."""
        return dict(named_leaves(self.pack(leaves), "x"))

    def written(self) -> list[tf.Variable]:
        """Return the variables that f writes to; none if it runs eagerly.

        Raises:
            InvalidArgumentError: If it writes to what is minimised.
        """
        if self.graph() is None:
            return []
        traced = self.evaluator.evaluate.concrete(*self._nests())
        return self.refused(written_variables(traced))

    def refused(self, written: list[tf.Variable]) -> list[tf.Variable]:
        """Return variables that f writes to; refuse those that are moved."""
        moved = {id(variable) for variable in self.variables}
        for variable in written:
            if id(variable) in moved:
                raise InvalidArgumentError(
                    "The function must leave alone what it is minimised over.",
                    got=f"`{self.name}` assigns to {variable.name!r}",
                    hint="a value computed from the variable, without assign",
                )
        return written

    def others(self) -> list[tf.Variable]:
        """Return the other variables that f reads: seeds, averages, what is frozen."""
        own = {id(variable) for variable in self.variables}
        return [v for v in self.evaluator.evaluate.variables() if id(v) not in own]

    def reads(self) -> list[Any]:
        """Return the float variables and tensors that f reads by itself."""
        traces = self.evaluator.evaluate
        floats = [v for v in traces.variables() if v.dtype.is_floating]
        return [*floats, *traces.captured()]

    def for_xla(self, *, is_bound: bool) -> Problem | None:
        """Return the problem in a form that a loop under XLA compiles once.

        Args:
            is_bound: Whether the method takes second derivatives.

        Returns:
            None if f calls a graph that cannot be made part of its own.
        """
        has_calls = not CALLS.isdisjoint(self.operations())
        if not has_calls and not is_bound:
            return self
        key = "xla", signature(self.template)
        if key not in self.evaluator.kept:
            self.evaluator.kept[key] = self._inlined()
        form: Problem | None = self.evaluator.kept[key]
        return form

    def blame(self, x: Sequence[tf.Tensor], *batch: Nest) -> str:
        """Return which op and line are not finite at a point; "" if none is found.

        Args:
            x: The leaves of the point; the variables are there.
            *batch: What else the user's function takes.
        """
        with contextlib.suppress(Exception):  # what ended is to be told in any case
            findings = self.explained(x, *batch).findings
            spoiled = (each for each in findings if each.status == "non-finite")
            found = next((each.culprit for each in spoiled if each.culprit), None)
            if found is not None:
                return f"{found.label} at {found.where}: {found.reason}; {found.hint}"
        return ""

    def explained(self, x: Sequence[tf.Tensor], *batch: Nest) -> Explanation:
        """Return what `explain` finds at a point; the variables stay where they are."""

        def value(*arguments: Nest) -> Any:
            output = self.f(*arguments)
            return output[0] if self.has_aux else output

        wrt = None if self.takes_values else self.variables
        before = [variable.read_value() for variable in self.variables]
        try:
            return explain(value, *self.arguments(x, batch), wrt=wrt)
        finally:
            self.assign(before)

    def arguments(
        self, x: Sequence[tf.Tensor] | None, batch: tuple[Nest, ...] = ()
    ) -> tuple[Nest, ...]:
        """Return what f is called with at a point, where variables are then put."""
        if self.takes_values:
            assert x is not None
            return (self.pack(x), *batch)
        if x is not None:
            self.assign(x)
        return batch

    def _inlined(self) -> Problem | None:
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        other._at = None
        options = {"has_aux": self.has_aux, "is_inlined": True, **self.options}
        other.evaluator = self.kind(self.f, self.evaluator.variables, **options)
        written = self.written()
        values = [variable.read_value() for variable in written]
        with inlined(), contextlib.suppress(Exception):  # as AutoGraph's in a function
            other.evaluate(self.start())
        for variable, value in zip(written, values, strict=True):
            variable.assign(value)
        try:
            has_calls = not CALLS.isdisjoint(operations_of(other.graph()))
        except KeyError:  # it was not traced
            return None
        return None if has_calls else other

    def _nests(self) -> tuple[Any, Any]:
        return ((self.template,) if self.takes_values else ()), None


def _keras_owners(variables: Sequence[tf.Variable]) -> dict[int, Any]:
    """Return the `keras.Variable`s that hold some of these, by the id of that.

    A `tf.Variable` does not know its owner; the garbage collector does.
    """
    keras = sys.modules.get("keras")
    if keras is None:
        return {}
    holders = gc.get_referrers(*variables) if variables else []
    return {id(h.value): h for h in holders if isinstance(h, keras.Variable)}


def _is_trainable(variable: tf.Variable, owners: dict[int, Any]) -> bool:
    """Return whether its owner says so: a frozen layer's `keras.Variable` does not."""
    owner = owners.get(id(variable))
    return bool(variable.trainable if owner is None else owner.trainable)


def is_open(variables: Nest) -> bool:
    """Return whether the variables of a function are still to be found."""
    return isinstance(variables, tuple) and not variables


def operations_of(graph: Any) -> list[str]:
    """Return the types of the ops of a graph and of all that it calls; none of None."""
    if graph is None:
        return []
    definition = graph.as_graph_def()
    bodies = [body.node_def for body in definition.library.function]
    return [node.op for nodes in [definition.node, *bodies] for node in nodes]


def small(values: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Return the numbers in nests that a history can keep, by the names of leaves."""
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


def largest(gradient: Sequence[Any], scale: Any, dtype: tf.DType) -> tf.Tensor:
    """Return the largest |element|, without the scale; an empty leaf counts as 0."""
    values = [getattr(leaf, "values", leaf) for leaf in gradient]
    sizes = [tf.abs(leaf) for leaf in values if leaf.shape.num_elements() != 0]
    each = [tf.reduce_max(leaf) if leaf.shape.rank else leaf for leaf in sizes]
    each = [tf.cast(leaf, dtype) for leaf in each]
    whole = each[0] if len(each) == 1 else tf.reduce_max(tf.stack(each))
    return whole if scale is None else whole / scale


def flat(evaluation: Evaluation) -> Evaluation:
    """Return an evaluation with the gradient as one dense vector."""
    gradient = dense(evaluation.gradient)
    is_vector = len(gradient) == 1 and gradient[0].shape.rank == 1
    return evaluation._replace(gradient=gradient[0] if is_vector else ravel(gradient))


def _is_plain(function: Any) -> bool:
    """Return whether a tf.function asks for nothing that its Python function lacks."""
    asks = ("_jit_compile", "input_signature")
    is_asking = any(getattr(function, name, None) for name in asks)
    return inspect.isfunction(function.python_function) and not is_asking


def _named(aux: Any) -> dict[str, Any]:
    if aux is None:
        return {}
    return dict(aux) if isinstance(aux, dict) else {"aux": aux}


def _check_sources(f: Any, x0: Nest, wrt: Nest) -> None:
    if not callable(f):
        raise InvalidArgumentError(
            "The first argument is the function to minimise.",
            got=f"f={describe(f)}",
            hint="tfgrad.minimize(lambda x: (x + 1) ** 2, 0.0)",
        )
    if x0 is not None and wrt is not None:
        raise InvalidArgumentError(
            "Either `x0` holds the values to start from, or `wrt` names the variables.",
            got="both `x0` and `wrt`",
            hint="minimize(f, x0), or minimize(f, wrt=variables)",
        )


def _check_distinct(variables: Sequence[tf.Variable]) -> None:
    if len({id(variable) for variable in variables}) < len(variables):
        raise InvalidArgumentError(
            "`wrt` must name each variable once.",
            got=f"{len(variables)} variables, some of them the same",
            hint="leave out the repeated ones; a model lists shared weights once",
        )


def _checked_start(x0: Nest) -> Nest:
    for path, leaf in named_leaves(x0, "x0"):
        if is_variable(leaf):
            raise InvalidArgumentError(
                "`x0` holds values; variables, which change in place, go to `wrt=`.",
                got=f"`{path}` is {describe(leaf)}",
                hint="minimize(f, wrt=variable), or variable.numpy() as the start",
            )
    point = to_tensors(x0, "x0")
    if all(leaf.shape.num_elements() == 0 for leaf in tf.nest.flatten(point)):
        raise InvalidArgumentError(
            "`x0` must hold at least one number.",
            got=f"x0={describe(x0)}",
            hint="a number, an array, or a nest of them to start from",
        )
    return point
