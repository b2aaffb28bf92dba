"""`train_step`: one update of some variables, compiled, for a loop of one's own."""

from __future__ import annotations

import contextlib
import difflib
import functools
import re
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfgrad.derivatives.arguments import arguments_in_tensors, parameter_names
from tfgrad.derivatives.calls import Call, Compiled
from tfgrad.derivatives.certificates import certified, inner, verify
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.replicas import Replica
from tfgrad.derivatives.signatures import (
    MOST_TRACES,
    OpenTraces,
    is_dynamic,
    signature,
)
from tfgrad.derivatives.soundness import UnverifiableGradientError
from tfgrad.derivatives.tracing import as_written, not_converted, trace
from tfgrad.diagnosis.lines import line_of_error
from tfgrad.errors import InvalidArgumentError, NoGradientError
from tfgrad.nested import (
    Nest,
    describe,
    name_of,
    open_modules,
    require_bool,
    variables_of,
    weak_dtype,
)
from tfgrad.optimize.distribute import Replicas, out_of_scope
from tfgrad.optimize.evaluator import dense
from tfgrad.optimize.methods.keras_optimizer import (
    by_name,
    check_free,
    optimizer_names,
    plain,
    require_optimizer,
)
from tfgrad.optimize.options import require_no
from tfgrad.optimize.sparse import SparseRecording, summed_for


def train_step(
    loss: Callable[..., Any],
    *,
    wrt: Nest,
    optimizer: Any = "adam",
    learning_rate: Any = None,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
    **unknown: Any,
) -> TrainStep:
    """Return the function that takes one step of an optimizer down `loss`.

    Use it in a loop of your own: two networks in turn, a replay buffer, an inner loop.
    Where one loss is minimised over data, `minimize(loss, wrt=..., data=...)` runs the
    loop as well. Define the step once, outside of the loop: its first call for each
    structure and dtypes of the arguments traces `loss`, later ones run compiled. From
    the second shape on, dimensions that vary are left open.

    Args:
        loss: Takes nests of tensors, returns one float number (shape `[]`).
        wrt: The variables to update: a `tf.Variable`, a `keras.Variable`, a nest of
            them, a `tf.Module` or a `keras.Model`, of which the trainable ones. A model
            that is not built yet is built by the first call.
        optimizer: The name of a Keras optimizer, or an instance, which is the one that
            moves: its rate may be assigned and its state be saved. Any object with
            `apply_gradients` will do.
        learning_rate: With a name: a positive number, a variable, which is followed, or
            a Keras schedule; None means the optimizer's default.
        has_aux: `loss` returns `(value, aux)`, and so does the step.
        jit: Compile with XLA.
        verify: Compare the first gradient of each trace with differences, and refuse a
            loss whose gradient would lack a term, as `grad` does. It costs the time of
            some evaluations when the loss is traced, and none later; nothing is
            written. Losses that draw random numbers are not compared.
        **unknown: Refused with a TypeError that says what to write instead.

    Returns:
        A function with the arguments of `loss` that updates the variables and returns
        the loss before the update, of shape `[]`. Its `optimizer` is the optimizer, its
        `variables` are what it updates. It may be called in a `tf.function`, in the
        `train_step` of a `keras.Model`, and in `strategy.run` of `tf.distribute`: there
        the optimizer takes the mean of the replicas' gradients, once for all, as it
        would in one process. Outside of `strategy.run`, each process computes it all.

    Raises:
        InvalidArgumentError: If there is no such optimizer, if it is bound to other
            variables, or if `wrt` holds none. By the step, if `loss` reads none.
        ScalarObjectiveError: By the step, if `loss` returns anything but one number.
        NoGradientError: By the step, if a path from a variable to the loss is cut.
        WrongDerivativeError: By the step, if its first gradient is wrong; nothing was
            updated.

    Example:
        >>> w = tf.Variable(1.0)
        >>> step = train_step(
        ...     lambda x, y: (w * x - y) ** 2, wrt=w, optimizer="sgd", learning_rate=0.1
        ... )
        >>> float(step(1.0, 3.0)), round(float(w), 4)  # 1 + 0.1 * 2 * (3 - 1)
        (4.0, 1.4)
        >>> int(step.optimizer.iterations)
        1

    References:
        Goodfellow, Bengio and Courville (2016), Deep Learning, algorithm 8.1.
    """
    require_no(train_step, unknown)
    if not callable(loss):
        raise InvalidArgumentError(
            "The first argument is the loss function, and not its value.",
            got=f"loss={describe(loss)}",
            hint="tfgrad.train_step(lambda x, y: ..., wrt=model)",
        )
    require_bool(has_aux=has_aux, jit=jit, verify=verify)
    with _scope_of(tf.nest.flatten(open_modules(wrt))):
        chosen = _optimizer(optimizer, learning_rate)
    return TrainStep(loss, wrt, chosen, has_aux=has_aux, jit=jit, verify=verify)


class _Flags(NamedTuple):
    """What `train_step` was asked for."""

    has_aux: bool
    jit: bool
    verify: bool


class TrainStep:
    """What `train_step` returns.

    Attributes:
        optimizer: The optimizer that moves the variables.
        variables: The variables, in the order of the optimizer's; empty until the first
            call if the model is not built before.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        wrt: Nest,
        optimizer: Any,
        *,
        has_aux: bool,
        jit: bool,
        verify: bool,
    ) -> None:
        """Trace nothing yet; `train_step` documents the arguments."""
        self.optimizer = optimizer
        self.variables: list[Any] = []
        self._loss, self._wrt = loss, wrt
        self._sources: list[tf.Variable] = []  # what the tape watches
        self._flags = _Flags(has_aux, jit, verify)
        self._names = parameter_names(loss)
        self._evaluated = Compiled(loss, self._answer)
        self._traces = OpenTraces()
        self._short_cuts: dict[Hashable, Callable[..., Any]] = {}
        if not _is_unbuilt(wrt):
            self._bind()

    def __repr__(self) -> str:
        """Return the names of the loss and of the optimizer."""
        kind = type(self.optimizer).__name__
        return f"<train_step of {name_of(self._loss)} by {kind}>"

    @not_converted
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Update the variables; return the loss before that, or `(loss, aux)`."""
        if not tf.executing_eagerly():
            nests = self._in_tensors(args, kwargs)
            self._bind_if_unbuilt(nests)
            return self._step(*nests)
        _check_compiled()
        short_cut = None if kwargs else self._short_cuts.get(signature(args))
        if short_cut is not None:
            return short_cut(*tf.nest.flatten(args))
        nests = self._in_tensors(args, kwargs)
        self._bind_if_unbuilt(nests)
        traced = self._traces.of(nests, functools.partial(self._trace, nests))
        dynamic = _tensors(nests)
        if len(dynamic) == len(tf.nest.flatten((args, kwargs))) == len(_tensors(args)):
            if len(self._short_cuts) >= 2 * MOST_TRACES:
                self._short_cuts.clear()
            # Calls with nothing but tensors, the commonest, take this short cut.
            self._short_cuts[signature(args)] = traced
        return traced(*dynamic)

    def _in_tensors(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        weak = weak_dtype(args, kwargs, self._sources)
        return arguments_in_tensors(args, kwargs, (), self._names(len(args)), weak)

    def _trace(self, nests: Any, specs: Sequence[Any]) -> Any:
        flat = tf.nest.flatten(nests)

        def evaluated(*dynamic: Any) -> Any:
            left = iter(dynamic)
            filled = [next(left) if is_dynamic(leaf) else leaf for leaf in flat]
            return self._evaluate(*tf.nest.pack_sequence_as(nests, filled))

        def compiled(_: Any) -> Any:  # `Compiled` knows whether AutoGraph is wanted
            traced = tf.function(evaluated, autograph=False)
            return traced.get_concrete_function(*specs)

        evaluate = _out_of_scope(lambda: _explained(compiled, self._loss))
        if self._flags.verify:
            with as_written(optimized=False):  # optimizing takes longer than it saves
                self._require_right(evaluate, _tensors(nests))

        def stepped(*dynamic: Any) -> Any:
            answer, gradients = evaluate(*dynamic)
            self._apply(gradients)
            return answer

        if not isinstance(self.optimizer, keras.optimizers.Optimizer):
            return stepped  # what it keeps in Python, a trace would freeze
        options = {"autograph": False, "jit_compile": self._flags.jit or None}
        whole = tf.function(stepped, **options)
        return _out_of_scope(lambda: whole.get_concrete_function(*specs))

    def _require_right(self, evaluate: Any, tensors: Sequence[Any]) -> None:
        """Refuse a first gradient that differences disagree with; nothing is written.

        Raises:
            WrongDerivativeError: If they do.
        """
        if not certified(evaluate) or any(map(_strategy_of, self._sources)):
            return
        answer, gradients = Replica(evaluate)(tensors)
        value = answer[0] if self._flags.has_aux else answer
        weight = float(self._weight(tf.ones_like(value)))
        slopes = [0.0 if g is None else g for g in dense(gradients)]
        if weight != 1 and not all(np.all(np.isfinite(slope)) for slope in slopes):
            return  # an overflow of the loss scale is the optimizer's affair
        verify(
            evaluate,
            tensors,
            (answer, gradients),
            variables=self._sources,
            outputs=lambda found: [found[0][0] if self._flags.has_aux else found[0]],
            slope=lambda v, weights: float(weights[0]) * inner(slopes, v) / weight,
            name=name_of(self._loss),
            names=[getattr(v, "path", v.name) for v in self.variables],
        )

    def _step(self, args: Any, kwargs: Any) -> Any:
        answer, gradients = self._evaluate(args, kwargs)
        self._apply(gradients)
        return answer

    def _evaluate(self, args: Any, kwargs: Any) -> Any:
        return self._evaluated(args, kwargs, 0, tuple(self._sources), None)

    def _answer(self, call: Call) -> tuple[tuple[Any, list[Any]], Any]:
        """Return the loss, and aux, and the gradients for the optimizer, in a trace."""
        has_aux = self._flags.has_aux
        recording = SparseRecording(objective(has_aux), call, has_aux=has_aux)
        value = recording.output
        weight = self._weight(value)
        if self._flags.verify:
            gradients = recording.gradients(weight)
        else:
            gradients = recording.pull([weight])
        if all(gradient is None for gradient in gradients):
            raise _reads_none(call)
        gradients = summed_for(self.optimizer, gradients)
        answer = (value, recording.aux) if has_aux else value
        return (answer, gradients), []

    def _weight(self, value: tf.Tensor) -> tf.Tensor:
        """Return what the loss is multiplied by: its scale, over the replicas."""
        # An optimizer adds up what the replicas hand to it.
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        one = tf.ones_like(value) / tf.cast(replicas, value.dtype)
        scale = getattr(self.optimizer, "scale_loss", lambda loss: loss)
        return tf.cast(scale(one), value.dtype)

    def _apply(self, gradients: Sequence[Any]) -> None:
        """Update the variables: in a replica, once, by what all of them add up to.

        There, optimizers clip each share by itself, wait for ever where one share
        overflows, and refuse to accumulate. So the update is taken out of the replicas.
        """
        context: Any = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            self._update(gradients)
            return
        found = [i for i, gradient in enumerate(gradients) if gradient is not None]
        replicas = Replicas(context.strategy)
        sums = replicas.total(dense([gradients[i] for i in found]))

        def update(strategy: Any, sums: Sequence[Any]) -> None:
            total: list[Any] = [None] * len(gradients)
            for i, each in zip(found, sums, strict=True):
                total[i] = strategy.experimental_local_results(each)[0]
            with out_of_scope():
                self._update(total)

        context.merge_call(update, args=(sums,))

    def _update(self, gradients: Sequence[Any]) -> None:
        if isinstance(self.optimizer, keras.optimizers.Optimizer):
            self.optimizer.apply(gradients, self.variables)
            return
        pairs = zip(gradients, self.variables, strict=True)
        self.optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])

    def _bind_if_unbuilt(self, nests: Any) -> None:
        if self.variables:
            return
        args, kwargs = nests

        # Layers make their variables while they are traced; nothing is computed.
        def compiled(loss: Callable[..., Any]) -> Any:
            traced = tf.function(loss, autograph=False)
            return traced.get_concrete_function(*args, **kwargs)

        _explained(compiled, self._loss)
        self._bind()

    def _bind(self) -> None:
        """Build the optimizer, outside of any trace: inside, some go wrong silently."""
        sources = tf.nest.flatten(variables_of(self._wrt))
        pairs = zip(sources, tf.nest.flatten(open_modules(self._wrt)), strict=True)
        each = {id(source): (source, variable) for source, variable in pairs}
        variables = [variable for _, variable in each.values()]
        check_free(self.optimizer, variables)
        _check_strategy(self.optimizer, variables)
        if not getattr(self.optimizer, "built", True):
            with tf.init_scope(), _scope_of(variables):
                self.optimizer.build(variables)
        self._sources = [source for source, _ in each.values()]
        self.variables = variables


def _scope_of(variables: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Return the scope that the variables were made in: of a strategy, or of none."""
    strategy = next(filter(None, map(_strategy_of, variables)), None)
    if strategy is tf.distribute.get_strategy() or not variables:
        return contextlib.nullcontext()
    return out_of_scope() if strategy is None else strategy.scope()


def _out_of_scope(compile: Callable[[], Any]) -> Any:
    """Return `compile()`, run where no strategy's scope is open.

    In a scope optimizers refuse to work; what is traced outside can be called inside.
    """
    if not (tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context()):
        return compile()
    with ThreadPoolExecutor(1) as thread:  # a scope is open in one thread
        return thread.submit(compile).result()


def _check_compiled() -> None:
    """Refuse a step that each replica would take by itself, and none for all."""
    context: Any = tf.distribute.get_replica_context()
    if context is not None and context.num_replicas_in_sync > 1:
        raise InvalidArgumentError(
            "In `strategy.run`, a step is part of a compiled function.",
            got="a call in eager mode",
            hint="tf.function(lambda *batch: strategy.run(step, args=batch))",
        )


def _explained(compile: Callable[[Any], Any], loss: Callable[..., Any]) -> Any:
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


def _optimizer(optimizer: Any, learning_rate: Any) -> Any:
    """Return the optimizer: the instance that is given, or a new one of that name."""
    if not isinstance(optimizer, str):
        require_optimizer(optimizer, learning_rate, "optimizer")
        return optimizer
    if not tf.executing_eagerly():
        raise InvalidArgumentError(
            "A step by the name of an optimizer is made once, outside of a "
            "tf.function: each trace of that would begin anew, with new moments.",
            got=f"optimizer={optimizer!r} in a function that is being traced",
            hint="step = tfgrad.train_step(...) before it, and step(x, y) in it",
        )
    names = optimizer_names()
    kind = names.get(optimizer.lower())
    if kind is None:
        close = difflib.get_close_matches(optimizer.lower(), names, cutoff=0.4)
        raise InvalidArgumentError(
            "`optimizer` must be the name of a Keras optimizer, or an instance.",
            got=f"optimizer={optimizer!r}",
            hint=" or ".join(map(repr, close or sorted(names))),
        )
    return by_name(kind, learning_rate)()


def _check_strategy(optimizer: Any, variables: Sequence[Any]) -> None:
    """Refuse an optimizer made for other replicas than the variables."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return
    theirs = _replicated(getattr(optimizer, "_distribution_strategy", None))
    for variable in variables:
        strategy = _strategy_of(variable)
        if _replicated(strategy) is not theirs:
            both = map(_replicated, (strategy, theirs))
            of, by = (type(s).__name__ if s else "no strategy" for s in both)
            raise InvalidArgumentError(
                "The variables and the optimizer must be of one strategy.",
                got=f"{variable.name!r} of {of}, and an optimizer of {by}",
                hint="the optimizer made in strategy.scope(), or its name",
            )


def _strategy_of(variable: Any) -> Any:
    return getattr(plain(variable), "distribute_strategy", None)


def _replicated(strategy: Any) -> Any:
    """Return the strategy if it has more than one replica; else None."""
    many = strategy is not None and strategy.num_replicas_in_sync > 1
    return strategy if many else None


def _reads_none(call: Call) -> NoGradientError:
    shown = ", ".join(call.names[:3])
    return NoGradientError(
        f"`{call.name}` must read a variable that is to be updated.",
        got=f"no path from {shown} to the loss",
        hint="the prediction inside of the loss, so that each call computes it anew; "
        "tfgrad.explain(loss, ..., wrt=...)",
    )


def _tensors(nest: Nest) -> list[Any]:
    return list(filter(is_dynamic, tf.nest.flatten(nest)))


def _is_unbuilt(wrt: Nest) -> bool:
    """Return whether a Keras model or layer in `wrt` has variables still to be made."""
    leaves = tf.nest.flatten(wrt)
    layers = [leaf for leaf in leaves if isinstance(leaf, keras.layers.Layer)]
    return any(not leaf.built or not leaf.variables for leaf in layers)
