"""One update of variables by an optimizer, as part of a trace; in replicas, too."""

from __future__ import annotations

import contextvars
import re
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import tensorflow as tf

from tfgrad.derivatives.calls import Call, Compiled
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.signatures import is_dynamic, signature
from tfgrad.derivatives.soundness import UnverifiableGradientError
from tfgrad.derivatives.tracing import trace
from tfgrad.diagnosis.graphs import written_variables
from tfgrad.diagnosis.lines import line_of_error
from tfgrad.errors import InvalidArgumentError, NoGradientError
from tfgrad.nested import Nest, name_of
from tfgrad.optimize.distribute import (
    LOST,
    ONE,
    Replicas,
    lost_worker,
    out_of_scope,
    replicas_of,
    whole,
)
from tfgrad.optimize.evaluator import dense
from tfgrad.optimize.parts import GivenParts, Part, weighted
from tfgrad.optimize.sparse import SparseRecording, summed_for

Nests = tuple[Any, Any]
"""The arguments of a call, and the keyword arguments, in tensors."""


class Update:
    """The value, the gradient, and what an optimizer makes of it.

    Args:
        loss: The user's function.
        optimizer: The optimizer.
        has_aux: `loss` returns `(value, aux)`.
        verify: Refuse a gradient that lacks a term.

    Attributes:
        variables: What is updated, in the order of the optimizer's.
        sources: The same, as a tape watches them.
        replicas: Those that have copies of them.
    """

    _shared: tuple[Any, Any] = None, None  # the graph and arguments, and their parts

    def __init__(
        self,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        has_aux: bool,
        verify: bool,
    ) -> None:
        """Know no variables yet."""
        self._loss, self._optimizer = loss, optimizer
        self._has_aux, self._verify = has_aux, verify
        self.variables: list[Any] = []
        self.sources: list[tf.Variable] = []
        self.replicas = ONE

    def bind(self, variables: list[Any], sources: list[tf.Variable]) -> None:
        """Update these from now on.

        Raises:
            InvalidArgumentError: If they are of several strategies.
        """
        self.replicas = replicas_of(variables)
        self.variables, self.sources = variables, sources

    def step(self, *nests: Any) -> Any:
        """Update the variables; return the loss before that, or `(loss, aux)`."""
        context: Any = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return self._step_of_replica(nests, context)
        with out_of_scope():
            answer, gradients = self.evaluate(nests)
            self.move(gradients)
        return answer

    def _step_of_replica(self, nests: Nests, context: Any) -> Any:
        """Update the variables once, by what all replicas add up to.

        Within them, optimizers clip each share by itself, wait for ever where one share
        overflows, and refuse to accumulate. So the update is taken out of the replicas.
        """
        parts = self._parts(nests, Replicas(context.strategy))
        answer, gradients, averages = self._evaluate_part(nests, parts)

        def update(strategy: Any, *totals: Any) -> None:
            def first(total: Any) -> Any:
                return strategy.experimental_local_results(total)[0]

            gradients, averages = (list(map(first, each)) for each in totals)
            with out_of_scope():
                parts.settle(averages)
                self.move(gradients)

        context.merge_call(update, args=(gradients, averages))
        return answer

    def evaluate(self, nests: Nests) -> tuple[Any, list[Any]]:
        """Return the loss, and aux, and the gradients for the optimizer.

        Several processes take the mean of what each computes of its own arguments.
        """
        if not self.replicas.is_clustered:
            return self._gradients(nests)
        parts = self._parts(nests, self.replicas)

        def one(*nests: Any) -> Any:
            return self._evaluate_part(nests, parts)

        answer, gradients, averages = self.replicas.run(one, *nests)
        parts.settle(averages)
        return answer, gradients

    def guarded(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a compiled step that says what to do where another worker is lost."""
        replicas = self.replicas
        if not replicas.is_clustered:
            return step

        def run(*tensors: Any) -> Any:
            try:
                return step(*tensors)
            except LOST as error:
                raise lost_worker(error, replicas) or error from None

        return run

    def _parts(self, nests: Nests, replicas: Replicas) -> GivenParts:
        """Return how results of replicas are combined; it depends on what f writes.

        A gradient that lacks a term is refused here: to look for it takes traces, which
        replicas that talk to each other do not allow. All replicas of a step share what
        the first of them has found.
        """
        place = weakref.ref(tf.compat.v1.get_default_graph()), signature(nests)
        if self._shared[0] == place:
            return self._shared[1]

        def compiled(_: Any) -> Any:
            traced = tf.function(lambda *n: self._gradients(n), autograph=False)
            return traced.get_concrete_function(*nests)

        with ThreadPoolExecutor(1) as thread:  # in which no strategy is at work
            run = contextvars.copy_context().run
            traced = thread.submit(run, explained, compiled, self._loss).result()
        parts = GivenParts(replicas, whole(written_variables(traced)))
        self._shared = place, parts
        return parts

    def _evaluate_part(
        self, nests: Nests, parts: GivenParts
    ) -> tuple[Any, list[Any], list[tf.Tensor]]:
        """Return, in a replica, `evaluate` of all, and averages to be settled."""
        gradients: list[Any] = []
        rest: list[Any] = []

        def compute(_: Nest, tensors: Any, share: tf.Tensor) -> Part:
            answer, gradients[:] = self._gradients(nests, share)
            value, *rest[:] = answer if self._has_aux else (answer,)
            found = dense([g for g in gradients if g is not None])
            return Part([weighted(value, share), *found], [])

        tensors = filter(is_dynamic, tf.nest.flatten(nests))
        part, averages = parts.of_replica(compute, (), tuple(tensors))
        value, *found = part.means
        left = iter(found)
        gradients = [None if g is None else next(left) for g in gradients]
        return (value, *rest) if self._has_aux else value, gradients, averages

    def _gradients(self, nests: Nests, share: Any = None) -> tuple[Any, list[Any]]:
        """Return the loss, and aux, and its gradients times a share."""

        def answer(call: Call) -> tuple[Any, Any]:
            recording = SparseRecording(
                objective(self._has_aux), call, has_aux=self._has_aux
            )
            value = recording.output
            weight = weighted(self.weight(value), share)
            if self._verify and share is None:
                gradients = recording.gradients(weight)
            else:
                gradients = recording.pull([weight])
            if all(gradient is None for gradient in gradients):
                raise _reads_none(call)
            if share is None:  # else they become dense
                gradients = summed_for(self._optimizer, gradients, self.sources)
            return ((value, recording.aux) if self._has_aux else value, gradients), []

        compiled = Compiled(self._loss, answer)
        found: tuple[Any, list[Any]] = compiled(*nests, 0, tuple(self.sources), None)
        return found

    def weight(self, value: tf.Tensor) -> tf.Tensor:
        """Return what the optimizer wants the gradient multiplied by: its scale."""
        scale = getattr(self._optimizer, "scale_loss", lambda loss: loss)
        return tf.cast(scale(tf.ones_like(value)), value.dtype)

    def move(self, gradients: Sequence[Any]) -> None:
        """Let the optimizer move the variables."""
        if isinstance(self._optimizer, keras.optimizers.Optimizer):
            self._optimizer.apply(gradients, self.variables)
            return
        pairs = zip(gradients, self.variables, strict=True)
        self._optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])


def explained(compile: Callable[[Any], Any], loss: Callable[..., Any]) -> Any:
    """Return `compile(loss)`; say what is wrong where `loss` leaves TensorFlow."""
    try:
        return trace(compile, loss)
    except UnverifiableGradientError as error:
        hint = "the same in tf.math; or tfgrad.check_grads of it, then verify=False"
        raise NoGradientError(error.rule, got=error.got, hint=hint) from None
    except NotImplementedError as error:
        if not re.search("numpy|eager", str(error)):
            raise
        raise InvalidArgumentError(
            f"`{name_of(loss)}` must be made of tf functions: the step is compiled.",
            got=f"{str(error).strip().splitlines()[-1]}, at {line_of_error(error)}",
            hint="the same in tf.math or tf.experimental.numpy; what NumPy computes as "
            "an argument",
        ) from None


def _reads_none(call: Call) -> NoGradientError:
    shown = ", ".join(call.names[:3])
    return NoGradientError(
        f"`{call.name}` must read a variable that is to be updated.",
        got=f"no path from {shown} to the loss",
        hint="the prediction inside of the loss, so that each call computes it anew; "
        "tfgrad.explain(loss, ..., wrt=...)",
    )
