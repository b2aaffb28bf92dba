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
from tfgrad.derivatives.soundness import every, may_drop
from tfgrad.derivatives.tracing import Traces
from tfgrad.diagnosis.explain import explain
from tfgrad.diagnosis.graphs import inlined, written_variables
from tfgrad.diagnosis.lines import line_of
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
from tfgrad.optimize.data import Source, arguments_of, require_rows
from tfgrad.optimize.distribute import (
    is_one_of_several,
    left_scope,
    replicas_of,
    whole,
)
from tfgrad.optimize.parts import Part, Parts, weighted, without_nan

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
        parts: What to put evaluations together from; None for one of the whole.
        like: An evaluation of one batch, or its specs, where `parts` go through data.

    Attributes:
        variables: As above; the variables that were found, after the first call.
        kept: What others compiled for this function, by a key of theirs.
    """

    is_sum = False
    """Whether the value is a sum over the rows of a batch, or else their mean."""

    def __init__(
        self,
        f: Callable[..., Any],
        variables: Nest,
        *,
        has_aux: bool,
        jit: bool = False,
        verify: bool = True,
        is_inlined: bool = False,
        parts: Parts | None = None,
        like: Any = None,
    ) -> None:
        """Compile nothing yet."""
        self._is_inlined = is_inlined or parts is not None
        self._parts, self._like, self._jit = parts, like, jit
        self.variables = variables
        self.has_aux = has_aux
        self.f, self.name = f, name_of(f)
        self.kept: dict[Any, Any] = {}
        python = getattr(f, "python_function", None)
        # The ops of a tf.function belong in our graph: XLA needs that, see `CALLS`.
        plain = python if callable(python) and _is_plain(f) else f
        check = self._check if verify and not is_inlined else None
        if parts is None:
            self.evaluate = Traces(self._evaluate, plain, jit=jit, check=check)
            self.products = Traces(self._multiply, plain, jit=False)
        else:
            self.evaluate = Traces(self._evaluate_parts, plain, jit=False, check=check)
            self.products = Traces(self._multiply_parts, plain, jit=False)

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

    # --- of parts ---

    def _evaluate_parts(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], scale: Any
    ) -> Evaluation:
        """Return what `_evaluate` does, put together from parts."""
        assert self._parts is not None
        if tf.executing_eagerly() and self._parts.is_shared:  # no trace: say why
            traced = tf.function(self._evaluate_parts, autograph=False)
            return traced(f, arguments, scale)
        point, batch = self._split(arguments)
        evaluate = self._evaluate
        if self._jit:
            evaluate = tf.function(evaluate, autograph=False, jit_compile=True)

        def compute(given: Nest, batch: tuple[Nest, ...], share: Any) -> Part:
            point, scales = given
            weights = [*scales] if self.is_sum or share is None else [*scales, share]
            # In float64: a third of the rows is no third in float32.
            wide = [tf.cast(each, tf.float64) for each in weights]
            weight = tf.reduce_prod(tf.stack(wide)) if wide else None
            found: Evaluation = evaluate(f, (*point, *batch), weight)
            found = found._replace(gradient=dense(found.gradient))
            return self._as_part(found, share)

        def like() -> Part:
            return self._as_part(self._like, None)

        scales = () if scale is None else (scale,)
        part = self._parts.put_together(
            compute, (point, scales), batch, like, self._joined
        )
        found = {**part.means, **part.sums}
        value, gradient = found["value"], found["gradient"]
        grad_max = largest(gradient, scale, value.dtype)
        aux = {**part.means["aux"], **part.sums["aux"]}
        return Evaluation(value, gradient, grad_max, aux, self._linear_of(part))

    def _as_part(self, evaluation: Evaluation, share: Any) -> Part:
        """Return an evaluation as a part; what is a mean of it, times its share."""
        floats = {n: a for n, a in evaluation.aux.items() if a.dtype.is_floating}
        counts = {n: a for n, a in evaluation.aux.items() if a.dtype.is_integer}
        aux = {name: weighted(a, share) for name, a in floats.items()}
        value, gradient = evaluation.value, evaluation.gradient
        if self.is_sum:
            both = {"value": value, "gradient": gradient}
            return Part(
                {"aux": aux}, {**both, "aux": counts}, self._of_linear(evaluation)
            )
        both = {
            "value": weighted(value, share),
            "gradient": [without_nan(leaf, share) for leaf in gradient],
        }
        return Part({**both, "aux": aux}, {"aux": counts})

    def _of_linear(self, evaluation: Evaluation) -> Any:
        """Return what the linear model of all is made of."""
        return ()

    def _joined(self, a: Any, b: Any) -> Any:
        """Return the linear model of two parts together."""
        return ()

    def _linear_of(self, part: Part) -> Any:
        """Return the linear model of all parts."""
        return ()

    def _multiply_parts(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], direction: list[Any]
    ) -> list[tf.Tensor]:
        assert self._parts is not None
        point, batch = self._split(arguments)

        def compute(given: Nest, batch: tuple[Nest, ...], share: Any) -> Part:
            point, direction = given
            product = self._multiply(f, (*point, *batch), direction)
            if self.is_sum:
                return Part((), product)
            return Part([without_nan(weighted(p, share), share) for p in product], ())

        def like() -> Part:
            return Part((), direction) if self.is_sum else Part(direction, ())

        part = self._parts.put_together(compute, (point, direction), batch, like)
        product: list[tf.Tensor] = part.sums if self.is_sum else part.means
        return product

    def _split(self, arguments: tuple[Nest, ...]) -> tuple[Any, Any]:
        """Return the arguments before the batch, and those made of it."""
        count = int(self.variables is None)
        return arguments[:count], arguments[count:]

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
        value = recording.output
        weight = None if scale is None else tf.cast(scale, value.dtype)
        if self._parts is not None:  # it was looked at as a whole, outside of replicas
            one = tf.ones_like(value) if weight is None else weight
            return value, recording.pull([one]), ()
        return value, recording.gradients(weight, sparse=True), ()

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
        source: The data, if each evaluation goes through all of it.
        replicas: Who evaluates.
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
        flags = {"has_aux": has_aux, "jit": jit, "verify": verify}
        self.options = {**flags, **self.options}
        self.evaluator = evaluator_of(self.kind, f, variables, **self.options)
        self.example: tuple[Nest, ...] = ()
        self.source: Source | None = None
        self.replicas = left_scope() if self.takes_values else replicas_of(self.owners)
        self._at: Callable[[tf.Tensor], Evaluation] | None = None
        self._is_put_together = False

    def go_through(self, source: Source) -> None:
        """Let each evaluation go through all batches of a source.

        Raises:
            InvalidArgumentError: If the source has no end, or cannot be gone through
                again; if f does not take its batches.
        """
        is_endless = getattr(source, "is_endless", False)
        if is_endless or not source.is_repeatable:
            raise InvalidArgumentError(
                "A method that takes f for one function goes through all of the data "
                "at each evaluation.",
                got=f"{source}, {'without end' if is_endless else 'from an iterator'}",
                hint="arrays, a data set without .repeat(), or data=make, where make() "
                "returns the iterator",
            )
        batch = source.example()
        before = int(self.takes_values)
        self._take = arguments_of(self.f, before, batch)
        self.source, self.example = source, self._take(batch)

    def distribute(self, written: Sequence[tf.Variable]) -> None:
        """Let each replica evaluate its share of a batch, from now on.

        Args:
            written: The variables that f writes.
        """
        require_rows(self.example)
        parts = Parts(self.replicas, written)
        self.evaluator = self.kind(
            self.f, self._differentiated, **self.options, parts=parts
        )

    def _put_together(self, source: Source) -> None:
        """Let evaluations be those of all batches, from now on."""
        self.replicas.require_same(self.example)
        if self.replicas.count > 1:
            require_rows(self.example)
        arguments = self.arguments(tf.nest.flatten(self.template), self.example)
        traced = self.evaluator.evaluate.compiled(arguments, None)
        if traced is None:
            like, written = self.evaluator.evaluate(arguments, None), []
            require_compiled(self.name, self.replicas.count)
        else:
            refuse_draws(traced, self.name)
            like, written = traced.structured_outputs, written_variables(traced)
        specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in self.leaves]
        like = like._replace(gradient=specs)
        parts = Parts(self.replicas, whole(written), source, self._take)
        if self.options["verify"] and not written:  # on the first batch, once
            self.evaluator.evaluate(arguments, None)
        options = {**self.options, "verify": False, "parts": parts, "like": like}
        self.evaluator = self.kind(self.f, self._differentiated, **options)

    @property
    def _differentiated(self) -> Any:
        return None if self.takes_values else self.template

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

    def find(self) -> None:
        """Find the variables that f reads, if they were not named: trace f once."""
        if not self.takes_values and is_open(self.template):
            self._find()
        if self.source is not None and not self._is_put_together:
            self._is_put_together = True
            self._put_together(self.source)

    def _find(self) -> None:
        if is_open(self.evaluator.variables):
            self.evaluator.evaluate(self.example, None)
        found = whole(self.evaluator.variables)
        kept = [v for v in found if _is_trainable(v, _keras_owners(found))]
        if not kept:
            raise InvalidArgumentError(
                "Without `x0` and `wrt`, the function must read trainable variables.",
                got=f"`{self.name}` reads none",
                hint="minimize(f, x0) for a function of values, or tf.Variable in f",
            )
        self.replicas = replicas_of(kept)
        if len(kept) < len(found):
            self.evaluator = self.kind(self.f, kept, **self.options)
            self.evaluator.evaluate(self.example, None)
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
        if self.source is not None and self.source.error is not None:
            raise self.source.error
        return evaluation

    def at(self, x: tf.Tensor) -> Evaluation:
        """Return value and gradient at a point given as one vector, `[n]`.

        `evaluate` has been called before, so that f is traced.
        """
        if self._at is None:
            self._at = self._evaluation_of_vectors()
        evaluation = self._at(x)
        if self.source is not None and self.source.error is not None:
            raise self.source.error
        return evaluation

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
        written = whole(written)
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
        read = whole(self.evaluator.evaluate.variables())
        return [v for v in read if id(v) not in own]

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
            None if f calls a graph that cannot be made part of its own, or if there is
            data to go through.
        """
        if self.source is not None:
            return None
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
            arguments = self.arguments(x, batch or self.example)
            return explain(value, *arguments, wrt=wrt)
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
        options = {**self.options, "jit": False, "is_inlined": True}
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
    return whole if scale is None else whole / tf.cast(scale, dtype)


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


def refuse_draws(traced: Any, name: str) -> None:
    """Refuse a function that draws random numbers where it has to have one value."""
    for op in every(traced.graph.get_operations()):
        if any(part in op.type for part in ("Random", "Multinomial", "Rng")):
            raise InvalidArgumentError(
                "A method that takes f for one function needs the same value at the "
                "same point.",
                got=f"`{name}` draws random numbers: {op.type} at {line_of(op)}",
                hint='training=False in the loss, or method="adam"',
            )


def require_compiled(name: str, count: int) -> None:
    """Refuse a function that leaves TensorFlow where there are replicas."""
    if count > 1:
        raise InvalidArgumentError(
            "Under a strategy, the function must be made of tf functions.",
            got=f"`{name}`, which cannot be compiled, on {count} replicas",
            hint="the same in tf.math or tf.experimental.numpy; NumPy in the data",
        )


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
    if x0 is None and wrt is None and is_one_of_several():
        raise InvalidArgumentError(
            "With several workers, `wrt` names the variables: they tell who writes.",
            got=f"neither `x0` nor `wrt` for `{name_of(f)}`",
            hint="minimize(loss, wrt=model, ...)",
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
