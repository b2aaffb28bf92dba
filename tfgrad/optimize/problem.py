"""The function being minimised, as a pure function: a point in, an `Evaluation` out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.signatures import signature
from tfgrad.derivatives.soundness import every
from tfgrad.derivatives.tracing import Traces, is_optimized, suited
from tfgrad.diagnosis.graphs import draws, written_variables
from tfgrad.diagnosis.lines import line_of
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    name_of,
    ravel,
    unravel,
)
from tfgrad.optimize.compiled import direct, kept
from tfgrad.optimize.data import Source, arguments_of, require_rows
from tfgrad.optimize.distribute import Copies, left_scope, replicas_of, whole
from tfgrad.optimize.evaluator import (
    Evaluation,
    Evaluator,
    dense,
    evaluator_of,
    flat,
    is_open,
    measured,
)
from tfgrad.optimize.parts import EvaluatorOfParts, Parts
from tfgrad.optimize.unknowns import Unknowns

FEW = 3
"""Leaves of a point that are put together by themselves; more, in a compiled call."""


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
        x: The point that is moved.
        evaluator: The function, compiled.
        example: What `f` takes besides: the arguments made of a batch, if there is
            data.
        source: The data, if each evaluation goes through all of it.
        replicas: Who evaluates.
    """

    kind: type[Evaluator] = Evaluator
    kind_of_parts: type[EvaluatorOfParts] = EvaluatorOfParts
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
        self.x = Unknowns(f, x0, wrt)
        self.f, self.name = f, name_of(f)
        flags = {"has_aux": has_aux, "jit": jit, "verify": verify}
        self.options = {**flags, **self.options}
        self.evaluator: Evaluator | EvaluatorOfParts
        self.evaluator = evaluator_of(self.kind, f, self.x.wrt, **self.options)
        self.example: tuple[Nest, ...] = ()
        self.source: Source | None = None
        is_ours = self.x.takes_values
        self.replicas = left_scope() if is_ours else replicas_of(self.x.owners)
        self._at: Callable[[tf.Tensor], Evaluation] | None = None

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
        before = int(self.x.takes_values)
        self._take = arguments_of(self.f, before, batch)
        self.source, self.example = source, self._take(batch)

    def distribute(
        self, written: Sequence[tf.Variable], copies: Copies, *, are_own: bool
    ) -> None:
        """Let each replica evaluate its share of a batch, from now on.

        Args:
            written: The variables that f writes.
            copies: Where the gradient on other devices of this process is kept.
            are_own: Whether each worker has a batch of its own.
        """
        require_rows(self.example)
        self._take_apart(Parts(self.replicas, written, are_own=are_own), copies=copies)

    def _put_together(self, source: Source) -> None:
        """Let evaluations be those of all batches, from now on."""
        if not source.is_own:
            self.replicas.require_same(self.example)
        if self.replicas.count > 1:
            require_rows(self.example)
        arguments = self.x.arguments(tf.nest.flatten(self.x.template), self.example)
        traced = self.evaluator.evaluate.compiled(arguments, None)
        if traced is None:
            like, written = self.evaluator.evaluate(arguments, None), []
            require_compiled(self.name, self.replicas.count)
        else:
            refuse_draws(traced, self.name)
            like, written = traced.structured_outputs, written_variables(traced)
        specs = [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in self.x.leaves]
        like = like._replace(gradient=specs)
        parts = Parts(
            self.replicas, whole(written), source, self._take, are_own=source.is_own
        )
        if self.options["verify"] and not written:  # on the first batch, once
            self.evaluator.evaluate(arguments, None)
        self._take_apart(parts, like)

    def _take_apart(
        self, parts: Parts, like: Any = None, copies: Copies | None = None
    ) -> None:
        """Let evaluations be put together from parts, from now on."""
        of_part = self.kind(self.f, self.x.wrt, **self.options, is_inlined=True)
        jit = self.options["jit"]
        self.evaluator = self.kind_of_parts(of_part, parts, like, copies, jit=jit)

    def find(self) -> None:
        """Find the variables that f reads, if they were not named: trace f once."""
        if not self.x.takes_values and is_open(self.x.template):
            self._find()
        is_put_together = isinstance(self.evaluator, EvaluatorOfParts)
        if self.source is not None and not is_put_together:
            self._put_together(self.source)

    def _find(self) -> None:
        if is_open(self.evaluator.variables):
            self.evaluator.evaluate(self.example, None)
        found = whole(self.evaluator.variables)
        owners = _keras_owners(found)  # a frozen layer says it of its own
        kept = [v for v in found if owners.get(id(v), v).trainable]
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
        self.x.found(kept)

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
        return measured(self._evaluate(x, batch, scale), scale)

    def _evaluate(
        self, x: Any, batch: tuple[Nest, ...] = (), scale: Any = None
    ) -> Evaluation:
        """Return the same without `grad_max`."""
        arguments = self.x.arguments(x, batch)
        evaluation: Evaluation = self.evaluator.evaluate(arguments, scale)
        if self.source is not None and self.source.error is not None:
            raise self.source.error
        return evaluation

    def at(self, x: tf.Tensor) -> Evaluation:
        """Return the same as `evaluate`, but for `grad_max`, at a vector `[n]`."""
        if self._at is None:
            if not self.evaluator.evaluate.has(self.given, None):
                return flat(self._evaluate(unravel(x, self.x.leaves)))
            self._at = self._evaluation_of_vectors()
        evaluation = self._at(x)
        if self.source is not None and self.source.error is not None:
            raise self.source.error
        return evaluation

    def _evaluation_of_vectors(self) -> Callable[[tf.Tensor], Evaluation]:
        """Return the function from a vector to the evaluation there."""
        leaves = self.x.leaves

        def evaluate(x: tf.Tensor) -> Evaluation:
            return flat(self._evaluate(unravel(x, leaves)))

        if self.graph() is None:
            return evaluate
        if self.x.takes_values and len(leaves) <= FEW:
            concrete = self.evaluator.evaluate.concrete(self.given, None)
            how = "direct", signature(self.x.template), is_optimized()
            with suited(concrete.graph):
                call = kept(self.evaluator.kept, how, lambda: direct(concrete))
            is_vector = [leaf.shape.rank for leaf in leaves] == [1]

            def at(x: tf.Tensor) -> Evaluation:
                if not tf.executing_eagerly():  # as part of a loop
                    return evaluate(x)
                try:
                    if is_vector:  # which asks no tensor for its shape
                        found: Evaluation = call(x)
                        return found._replace(gradient=dense(found.gradient)[0])
                    return flat(call(*unravel(x, leaves)))
                except tf.errors.OpError:  # which the other one explains
                    return evaluate(x)

            return at
        key = "at", signature(self.x.template)
        traces: Callable[[tf.Tensor], Evaluation] = kept(
            self.evaluator.kept,
            key,
            lambda: Traces(
                lambda _, x: evaluate(x),
                self.f,
                jit=False,
                in_turn=not self.x.takes_values,
            ),
        )
        return traces

    def hvp(
        self, x: tf.Tensor, v: tf.Tensor, batch: tuple[Nest, ...] = ()
    ) -> tf.Tensor:
        """Return the Hessian at x times v, all vectors; variables are put to x."""
        leaves = self.x.leaves
        arguments = self.x.arguments(unravel(x, leaves), batch)
        product: list[tf.Tensor] = self.evaluator.products(
            arguments, unravel(v, leaves)
        )
        return ravel(product)

    @property
    def given(self) -> tuple[Nest, ...]:
        """What f is called with besides a batch: a point of values, or nothing."""
        return (self.x.template,) if self.x.takes_values else ()

    def graph(self, batch: tuple[Nest, ...] = (), scale: Any = None) -> Any:
        """Return the graph of an evaluation; None if f cannot be compiled."""
        return self.evaluator.evaluate.graph((*self.given, *batch), scale)

    def inlined(self) -> Problem:
        """Return the same problem, to be traced anew without a call of a graph."""
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        other._at = None
        options = {**self.options, "jit": False, "is_inlined": True}
        other.evaluator = self.kind(self.f, self.evaluator.variables, **options)
        return other


def _keras_owners(variables: Sequence[tf.Variable]) -> dict[int, Any]:
    """Return the `keras.Variable`s that hold some of these, by the id of that.

    A `tf.Variable` does not know its owner; the garbage collector does.
    """
    keras = sys.modules.get("keras")
    if keras is None:
        return {}
    holders = gc.get_referrers(*variables) if variables else []
    return {id(h.value): h for h in holders if isinstance(h, keras.Variable)}


def drawing(traced: Any) -> tf.Operation | None:
    """Return an op of a trace that draws random numbers, if there is one."""
    for op in every(traced.graph.get_operations()):
        if draws([op.type]):
            return op
    return None


def refuse_draws(traced: Any, name: str) -> None:
    """Refuse a function that draws random numbers where it has to have one value."""
    if (op := drawing(traced)) is not None:
        raise InvalidArgumentError(
            "A method that takes f for one function needs the same value at the same "
            "point.",
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
