"""One update of variables by an optimizer, as part of a trace; in replicas, too."""

from __future__ import annotations

import contextvars
import re
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call, Compiled
from tfgrad.derivatives.certificates import Ladder, certified, slope_along, verify
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.replicas import Replica
from tfgrad.derivatives.signatures import is_dynamic, signature
from tfgrad.derivatives.soundness import UnverifiableGradientError
from tfgrad.derivatives.tracing import as_written, trace
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
    whole,
)
from tfgrad.optimize.evaluator import dense
from tfgrad.optimize.parts import GivenParts, Part, weighted

Nests = tuple[Any, Any]
"""The arguments of a call, and the keyword arguments, in tensors."""

Found = tuple[tf.Tensor, Any, list[Any]]
"""The loss, aux (None if there is none), and a gradient or None for each variable."""


class Update:
    """The value, the gradient, and what an optimizer makes of it.

    Args:
        loss: The user's function.
        optimizer: The optimizer.
        has_aux: `loss` returns `(value, aux)`.
        verify: Refuse a gradient that lacks a term, or that differences disagree with.

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
        self.loss, self.optimizer = loss, optimizer
        self._has_aux, self._verify = has_aux, verify
        self._compiled = Compiled(loss, self._answer)
        self.variables: list[Any] = []
        self.sources: list[tf.Variable] = []
        self.replicas = ONE

    def bind(
        self, variables: list[Any], sources: list[tf.Variable], replicas: Replicas
    ) -> None:
        """Update these from now on."""
        self.variables, self.sources, self.replicas = variables, sources, replicas

    def step(self, *nests: Any) -> Any:
        """Update the variables; return the loss before that, or `(loss, aux)`."""
        context: Any = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return self._step_of_replica(nests, context)
        with out_of_scope():
            value, aux, gradients = self.evaluate(nests)
            self.move(gradients)
        return self._returned(value, aux)

    def _step_of_replica(self, nests: Nests, context: Any) -> Any:
        """Update the variables once, by what all replicas add up to.

        Within them, optimizers clip each share by itself, wait for ever where one share
        overflows, and refuse to accumulate. So the update is taken out of the replicas.
        """
        parts = self._parts(nests, Replicas(context.strategy))
        (value, aux, gradients), averages = self._evaluate_part(nests, parts)

        def update(strategy: Any, *totals: Any) -> None:
            def first(total: Any) -> Any:
                return strategy.experimental_local_results(total)[0]

            gradients, averages = (list(map(first, each)) for each in totals)
            with out_of_scope():
                parts.settle(averages)
                self.move(gradients)

        context.merge_call(update, args=(gradients, averages))
        return self._returned(value, aux)

    def compiled(self, nests: Nests, specs: Sequence[Any], *, jit: bool) -> Any:
        """Return the step as a function of the tensors in `nests`, traced for specs.

        Raises:
            WrongDerivativeError: If the gradient there is wrong; nothing is written.
        """
        flat = tf.nest.flatten(nests)

        def evaluated(*dynamic: Any) -> Found:
            left = iter(dynamic)
            filled = [next(left) if is_dynamic(leaf) else leaf for leaf in flat]
            return self.evaluate(tf.nest.pack_sequence_as(nests, filled))

        def traced(_: Any) -> Any:  # `Compiled` knows whether AutoGraph is wanted
            return tf.function(evaluated, autograph=False).get_concrete_function(*specs)

        evaluate = explained(traced, self.loss)
        if self._verify:
            with as_written(optimized=False):  # optimizing takes longer than it saves
                self._require_right(evaluate, list(filter(is_dynamic, flat)))

        def stepped(*dynamic: Any) -> Any:
            value, aux, gradients = evaluate(*dynamic)
            self.move(gradients)
            return self._returned(value, aux)

        if not isinstance(self.optimizer, keras.optimizers.Optimizer):
            return stepped  # what it keeps in Python, a trace would freeze
        jit = jit and self.replicas.count == 1
        whole = tf.function(stepped, autograph=False, jit_compile=jit or None)
        return self._guarded(whole.get_concrete_function(*specs))

    def evaluate(self, nests: Nests) -> Found:
        """Return the loss, aux, and the gradients for the optimizer.

        Several processes take the mean of what each computes of its own arguments.
        """
        if not self.replicas.is_clustered:
            return self._found(nests)
        parts = self._parts(nests, self.replicas)

        def one(*nests: Any) -> Any:
            return self._evaluate_part(nests, parts)

        found, averages = self.replicas.run(one, *nests)
        parts.settle(averages)
        return found

    def _returned(self, value: tf.Tensor, aux: Any) -> Any:
        return (value, aux) if self._has_aux else value

    def _require_right(self, evaluate: Any, tensors: Sequence[Any]) -> None:
        """Refuse a first gradient that differences disagree with; nothing is written.

        Raises:
            WrongDerivativeError: If they do.
        """
        if not certified(evaluate) or self.replicas.count > 1:
            return
        answer = Replica(evaluate)(tensors)
        value, _, gradients = answer
        weight = float(self._weight(value))
        read = [i for i, gradient in enumerate(gradients) if gradient is not None]
        slopes = dense([gradients[i] for i in read])
        if weight != 1 and not all(np.all(np.isfinite(slope)) for slope in slopes):
            return  # an overflow of the loss scale is the optimizer's affair

        def slope(direction: Any, weights: Any) -> float:
            along = slope_along(slopes, [direction[i] for i in read])
            return float(weights[0]) * along / weight

        verify(
            evaluate,
            tensors,
            answer,
            variables=self.sources,
            outputs=lambda found: [found[0]],
            slope=slope,
            name=name_of(self.loss),
            names=[getattr(v, "path", v.name) for v in self.variables],
        )

    def _guarded(self, step: Callable[..., Any]) -> Callable[..., Any]:
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
            traced = tf.function(lambda *n: self._found(n), autograph=False)
            return traced.get_concrete_function(*nests)

        with ThreadPoolExecutor(1) as thread:  # in which no strategy is at work
            run = contextvars.copy_context().run
            traced = thread.submit(run, explained, compiled, self.loss).result()
        parts = GivenParts(replicas, whole(written_variables(traced)))
        self._shared = place, parts
        return parts

    def _evaluate_part(
        self, nests: Nests, parts: GivenParts
    ) -> tuple[Found, list[tf.Tensor]]:
        """Return, in a replica, `evaluate` of all, and averages to be settled."""
        aux: Any = None
        gradients: list[Any] = []

        def compute(_: Nest, tensors: Any, share: tf.Tensor) -> Part:
            nonlocal aux, gradients
            value, aux, gradients = self._found(nests, share)
            found = dense([g for g in gradients if g is not None])
            return Part([weighted(value, share), *found], [])

        tensors = filter(is_dynamic, tf.nest.flatten(nests))
        part, averages = parts.of_replica(compute, (), tuple(tensors))
        value, *found = part.means
        left = iter(found)
        gradients = [None if g is None else next(left) for g in gradients]
        return (value, aux, gradients), averages

    def _found(self, nests: Nests, share: Any = None) -> Found:
        """Return the loss, aux, and the gradients times a share, shape `[]`."""
        found: Found = self._compiled(*nests, 0, tuple(self.sources), share)
        return found

    def _answer(self, call: Call) -> tuple[Found, Ladder]:
        share = call.direction
        recording = SparseRecording(
            objective(self._has_aux), call, has_aux=self._has_aux
        )
        value = recording.output
        weight = weighted(self._weight(value), share)
        if self._verify and share is None:
            gradients = recording.gradients(weight)
        else:
            gradients = recording.pull([weight])
        if all(gradient is None for gradient in gradients):
            raise _reads_none(call)
        if share is None:  # else they become dense
            gradients = summed_for(self.optimizer, gradients, self.sources)
        return (value, recording.aux, gradients), []

    def _weight(self, value: tf.Tensor) -> tf.Tensor:
        """Return what the optimizer wants the gradient multiplied by: its scale."""
        scale = getattr(self.optimizer, "scale_loss", lambda loss: loss)
        return tf.cast(scale(tf.ones_like(value)), value.dtype)

    def move(self, gradients: Sequence[Any]) -> None:
        """Let the optimizer move the variables."""
        if isinstance(self.optimizer, keras.optimizers.Optimizer):
            self.optimizer.apply(gradients, self.variables)
            return
        pairs = zip(gradients, self.variables, strict=True)
        self.optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])


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


class SparseRecording(Recording):
    """A recording whose gradients stay sparse, and None where there is no path."""

    def _dense(self, found: Sequence[Any]) -> list[Any]:
        return list(found)


def summed_for(
    optimizer: Any, gradients: Sequence[Any], sources: Sequence[Any]
) -> list[Any]:
    """Return the gradients as the optimizer needs them: rows that repeat added up."""
    if _adds_rows(optimizer):
        return list(gradients)
    slices = tf.IndexedSlices
    pairs = zip(gradients, sources, strict=True)
    return [
        rows_summed(g, s.shape[0] or tf.shape(s)[0]) if isinstance(g, slices) else g
        for g, s in pairs
    ]


def rows_summed(slices: tf.IndexedSlices, rows: Any) -> tf.IndexedSlices:
    """Return the slices with rows that stand there twice added up, at the first place.

    Keras's optimizers need that: the square of a sum is not the sum of the squares. The
    number of slices stays, as XLA and collectives want it: those left over are zeros,
    for row 0. Nothing is sorted, which would take twice as long in the graph, and six
    times as long under XLA.
    """
    indices, count = slices.indices, tf.size(slices.indices)
    places = tf.range(count)
    first = tf.gather(tf.math.unsorted_segment_min(places, indices, rows), indices)
    values = tf.math.unsorted_segment_sum(slices.values, first, count)
    kept = tf.where(first == places, indices, tf.zeros_like(indices))
    return tf.IndexedSlices(values, kept, slices.dense_shape)


def _adds_rows(optimizer: Any) -> bool:
    """Return whether all that is done with a gradient is to subtract a multiple."""
    if type(optimizer) is not keras.optimizers.SGD:
        return False
    clips = optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue
    return all(clip is None for clip in clips)
