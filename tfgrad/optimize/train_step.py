"""`train_step`: one update of some variables, compiled, for a loop of one's own."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfgrad.derivatives.arguments import arguments_in_tensors, parameter_names
from tfgrad.derivatives.signatures import (
    MOST_TRACES,
    OpenTraces,
    is_dynamic,
    signature,
)
from tfgrad.derivatives.tracing import not_converted
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    name_of,
    open_modules,
    require_bool,
    variables_of,
    weak_dtype,
)
from tfgrad.optimize.distribute import out_of_scope, replicas_of, scope_of
from tfgrad.optimize.methods.keras_optimizer import (
    build,
    by_name,
    check_free,
    check_strategy,
    named,
    optimizer_names,
    plain,
    rates_of,
    require_optimizer,
)
from tfgrad.optimize.options import require_no
from tfgrad.optimize.update import Update, explained


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
        jit: Compile with XLA, if there is one replica.
        verify: Compare the first gradient of each trace with differences, and refuse a
            loss whose gradient would lack a term, as `grad` does. It costs the time of
            some evaluations when the loss is traced, and none later; nothing is
            written. Losses that draw random numbers are not compared.
        **unknown: Refused with a TypeError that says what to write instead.

    Returns:
        A function with the arguments of `loss` that updates the variables and returns
        the loss before the update, of shape `[]`. Its `optimizer` is the optimizer, its
        `variables` are what it updates. It may be called in a `tf.function`, in the
        `train_step` of a `keras.Model`, and under a strategy of `tf.distribute`: in
        `strategy.run`, or, outside of it, by each process of several. Each replica then
        evaluates the loss of arguments of its own. The loss that is returned, and the
        gradient, are the means of theirs, weighted by rows (the first dimension), and
        the optimizer moves the variables once for all, as it would in one process. A
        single process outside of `strategy.run` computes all by itself.

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
    with scope_of(tf.nest.flatten(open_modules(wrt))):
        chosen = _optimizer(optimizer, learning_rate)
    update = Update(loss, chosen, has_aux=has_aux, verify=verify)
    return TrainStep(update, wrt, jit=jit)


def _optimizer(optimizer: Any, learning_rate: Any) -> Any:
    """Return the optimizer: the instance that is given, or a new one of that name."""
    is_named = isinstance(optimizer, str)
    if not is_named:
        require_optimizer(optimizer, learning_rate, "optimizer")
    is_traced = not tf.executing_eagerly()
    if is_traced and (is_named or _is_made_in_trace(optimizer)):
        raise InvalidArgumentError(
            "A step and its optimizer are made once, outside of a tf.function: each "
            "trace of that would begin anew, with new moments.",
            got=f"optimizer={describe(optimizer)} in a function that is being traced",
            hint="step = tfgrad.train_step(...) before it, and step(x, y) in it",
        )
    if not is_named:
        return optimizer
    return by_name(named(optimizer, optimizer_names(), "optimizer"), learning_rate)()


def _is_made_in_trace(optimizer: Any) -> bool:
    """Return whether the variables of an optimizer have no values yet."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return False
    with tf.init_scope():
        return not all(bool(plain(v).is_initialized()) for v in optimizer.variables)


class TrainStep:
    """What `train_step` returns."""

    def __init__(self, update: Update, wrt: Nest, *, jit: bool) -> None:
        self._update, self._wrt, self._jit = update, wrt, jit
        self._names = parameter_names(update.loss)
        self._forget()
        if not _is_unbuilt(wrt):
            self._bind()

    def __repr__(self) -> str:
        kind = type(self.optimizer).__name__
        return f"<train_step of {name_of(self._update.loss)} by {kind}>"

    @property
    def optimizer(self) -> Any:
        """The optimizer that moves the variables."""
        return self._update.optimizer

    @property
    def variables(self) -> list[Any]:
        """The variables, in the order of the optimizer's.

        Empty until the first call of a step whose model is not built before.
        """
        return self._update.variables

    @not_converted
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Update the variables; return the loss before that, or `(loss, aux)`."""
        if not tf.executing_eagerly():
            return self._update.step(*self._prepared(args, kwargs))
        _check_compiled()
        if any(map(operator.is_not, rates_of(self.optimizer), self._rates)):
            self._forget()
        short_cut = None if kwargs else self._short_cuts.get(signature(args))
        if short_cut is not None:
            return short_cut(*tf.nest.flatten(args))
        nests = self._prepared(args, kwargs)
        traced = self._traces.of(nests, functools.partial(self._compiled, nests))
        dynamic = _tensors(nests)
        if len(dynamic) == len(tf.nest.flatten((args, kwargs))) == len(_tensors(args)):
            if len(self._short_cuts) >= 2 * MOST_TRACES:
                self._short_cuts.clear()
            # Calls with nothing but tensors, the commonest, take this short cut.
            self._short_cuts[signature(args)] = traced
        return traced(*dynamic)

    @out_of_scope()  # there, optimizers refuse to work
    def _compiled(self, nests: Any, specs: Sequence[Any]) -> Any:
        return self._update.compiled(nests, specs, jit=self._jit)

    def _forget(self) -> None:
        """Drop the traces: they have the optimizer's rate as it was, if a schedule."""
        self._rates = rates_of(self.optimizer)
        self._traces = OpenTraces()
        self._short_cuts: dict[Hashable, Callable[..., Any]] = {}

    def _prepared(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments in tensors, with the variables made and bound."""
        weak = weak_dtype(args, kwargs, self._update.sources)
        nests = arguments_in_tensors(args, kwargs, (), self._names(len(args)), weak)
        if not self.variables:
            if _is_unbuilt(self._wrt):
                self._build(*nests)
            self._bind()
        return nests

    def _build(self, args: Any, kwargs: Any) -> None:
        """Trace the loss alone: layers make their variables; nothing is computed."""
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:  # they had no values
            raise InvalidArgumentError(
                "Under a strategy, a model is built before its step is called.",
                got="a model without variables",
                hint="keras.Input as its first layer, or model.build(shape), in "
                "strategy.scope()",
            )

        def compiled(loss: Callable[..., Any]) -> Any:
            traced = tf.function(loss, autograph=False)
            return traced.get_concrete_function(*args, **kwargs)

        explained(compiled, self._update.loss)

    def _bind(self) -> None:
        """Build the optimizer, outside of any trace: inside, some go wrong silently."""
        sources = tf.nest.flatten(variables_of(self._wrt))
        pairs = zip(sources, tf.nest.flatten(open_modules(self._wrt)), strict=True)
        each = {id(source): (source, variable) for source, variable in pairs}
        variables = [variable for _, variable in each.values()]
        check_free(self.optimizer, variables)
        replicas = replicas_of(variables)
        check_strategy(self.optimizer, variables)
        if not getattr(self.optimizer, "built", True):
            with tf.init_scope(), scope_of(variables):
                build(self.optimizer, variables)
        sources = [source for source, _ in each.values()]
        self._update.bind(variables, sources, replicas)


def _check_compiled() -> None:
    """Refuse a step that each replica would take by itself, and none for all."""
    context: Any = tf.distribute.get_replica_context()
    if context is not None and context.num_replicas_in_sync > 1:
        raise InvalidArgumentError(
            "In `strategy.run`, a step is part of a compiled function.",
            got="a call in eager mode",
            hint="tf.function(lambda *batch: strategy.run(step, args=batch))",
        )


def _tensors(nest: Nest) -> list[Any]:
    return list(filter(is_dynamic, tf.nest.flatten(nest)))


def _is_unbuilt(wrt: Nest) -> bool:
    """Return whether a Keras model or layer in `wrt` has variables still to be made."""
    leaves = tf.nest.flatten(wrt)
    layers = [leaf for leaf in leaves if isinstance(leaf, keras.layers.Layer)]
    return any(not leaf.built or not leaf.variables for leaf in layers)
