"""Keras's optimizers, and any object with `apply_gradients`, as methods of the loop."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import describe
from tfgrad.optimize.distribute import scope_of, strategy_of


@functools.cache
def optimizer_names() -> dict[str, type[keras.optimizers.Optimizer]]:
    """Return every Keras optimizer that stands alone, by its name in lower case."""
    base = keras.optimizers.Optimizer
    return {
        name.lower(): kind
        for name, kind in inspect.getmembers(keras.optimizers, inspect.isclass)
        if issubclass(kind, base) and kind is not base and not _needs_arguments(kind)
    }


def named(
    name: str, names: Mapping[str, Any], argument: str, also: Iterable[str] = ()
) -> Any:
    """Return what a name stands for, whatever its case; `also` may be meant, too.

    Raises:
        InvalidArgumentError: If there is no such name.
    """
    if name.lower() in names:
        return names[name.lower()]
    close = difflib.get_close_matches(name.lower(), [*names, *also], n=3, cutoff=0.4)
    kind = "a Keras optimizer" if argument == "optimizer" else "a method"
    raise InvalidArgumentError(
        f"`{argument}` must be the name of {kind}, or an optimizer.",
        got=f"{argument}={name!r}",
        hint=" or ".join(map(repr, close or sorted(names))),
    )


Factory = Callable[[Sequence[Any]], Any]
"""Returns an optimizer for some variables, not yet built."""


def require_optimizer(given: Any, learning_rate: Any, argument: str) -> None:
    """Refuse what is no optimizer, or has a learning rate and is given another.

    Raises:
        InvalidArgumentError: If a rule is broken.
    """
    if inspect.isclass(given) or not hasattr(given, "apply_gradients"):
        raise InvalidArgumentError(
            f"`{argument}` must be a name, or an optimizer with `apply_gradients`.",
            got=f"{argument}={describe(given)}",
            hint=f'{argument}="adam", or {argument}=keras.optimizers.Adam(1e-3)',
        )
    if learning_rate is not None:
        raise InvalidArgumentError(
            "`learning_rate` goes with the name of an optimizer; an instance has one.",
            got=f"learning_rate={learning_rate!r} with {argument}={describe(given)}",
            hint=f"{type(given).__name__}(learning_rate={learning_rate!r})",
        )


def optimizer_factory(method: Any, learning_rate: Any) -> Factory:
    """Return the function that makes an optimizer of a run's own.

    Args:
        method: The class of a Keras optimizer, an instance (cloned from its
            configuration), or any object with `apply_gradients` (used as it is if it
            cannot be cloned).
        learning_rate: For a class: see `by_name`.

    Raises:
        InvalidArgumentError: If there is no such method, or the learning rate is no
            such thing.
    """
    if inspect.isclass(method) and method in optimizer_names().values():
        make = by_name(method, learning_rate)
        return lambda variables: make()
    require_optimizer(method, learning_rate, "method")

    def clone(variables: Sequence[Any]) -> Any:
        # An optimizer keeps moments, and two runs must not share them.
        check_free(method, variables)
        try:
            with warnings.catch_warnings(action="ignore"):  # Keras's, about lambdas
                return type(method).from_config(method.get_config())
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return method

    return clone


def by_name(kind: Any, learning_rate: Any) -> Callable[[], Any]:
    """Return the function that makes an optimizer of a class of Keras's.

    Args:
        kind: The class.
        learning_rate: A positive number, a Keras schedule, or a variable, which is
            followed; None means the optimizer's default.

    Raises:
        InvalidArgumentError: If the learning rate is none of these.
    """
    rate = None if learning_rate is None else _rate(learning_rate)
    return kind if rate is None else lambda: kind(rate)


class Followed:
    """The learning rate that a variable of the user's holds, as Keras takes one."""

    def __init__(self, variable: Any) -> None:
        self._variable = plain(variable)

    def __call__(self) -> tf.Tensor:
        """Return the rate of now."""
        return self._variable.read_value()

    def assign(self, rate: Any) -> None:
        """Put a rate into the variable: `optimizer.learning_rate = rate` does."""
        self._variable.assign(tf.cast(rate, self._variable.dtype))


class KerasMethod:
    """An optimizer at work on variables, which it moves where they are.

    Attributes:
        name: What to call the method: its class in lower case.
        optimizer: The optimizer.
        is_compiled: Whether its updates may be part of a trace: whether it has
            `build(variables)` and `variables`, as Keras's optimizers have, and so keeps
            its state in variables that exist before the first update.
    """

    def __init__(self, factory: Factory, variables: Sequence[Any]) -> None:
        """Build the optimizer, outside of any trace: inside, some go wrong silently."""
        self._variables = list(variables)
        # Keras keeps its learning rate in floatx; float64 steps should not carry a rate
        # rounded to float32.
        double = all(tf.as_dtype(v.dtype) == tf.float64 for v in self._variables)
        self._floatx = "float64" if double else keras.config.floatx()
        with self._precision(), scope_of(self._variables):
            self.optimizer = factory(self._variables)
            kind = self.optimizer
            self.is_compiled = hasattr(kind, "build") and hasattr(kind, "variables")
            if self.is_compiled:
                build(kind, self._variables)
        self.name = type(self.optimizer).__name__.lower()

    def settings(self) -> Any:
        """Return what updates depend on besides variables; None if that is unknown."""
        kind, names = type(self.optimizer), ("weight_decay", "exclude_layers")
        is_known = kind in optimizer_names().values()
        is_known &= all(getattr(v, "constraint", None) is None for v in self._variables)
        if not is_known or any(getattr(self.optimizer, name, None) for name in names):
            return None  # what is decayed depends on names of variables, too
        try:
            config = {**self.optimizer.get_config(), "name": ""}
        except TypeError:  # a rate that a variable of the user's holds
            return None
        rate = config.pop("learning_rate", None)  # a number is held by a variable
        return (kind, self._floatx, repr(config)) if isinstance(rate, float) else None

    @property
    def is_scaled(self) -> bool:
        """Whether `update` wants the gradient multiplied by `scale`."""
        return isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)

    def scale(self) -> tf.Tensor | None:
        """Return what `update` wants the gradient multiplied by, if anything."""
        if not self.is_scaled:
            return None
        scale: tf.Tensor = self.optimizer.scale_loss(tf.constant(1.0))
        return scale

    def update(self, gradient: Sequence[Any]) -> None:
        """Take one step."""
        with self._precision():
            pairs = list(zip(gradient, self._variables, strict=True))
            self.optimizer.apply_gradients(pairs)

    def variables(self) -> list[tf.Variable]:
        """Return what the optimizer keeps from step to step, as far as it tells."""
        return [plain(v) for v in getattr(self.optimizer, "variables", ())]

    def rate(self) -> tf.Tensor | None:
        """Return the learning rate of the next step, if there is one."""
        rate = getattr(self.optimizer, "learning_rate", None)
        return None if rate is None else tf.convert_to_tensor(rate)

    def finish(self) -> bool:
        """Do what the optimizer wants done at the end; return whether that moved x."""
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        if not getattr(inner, "use_ema", False):
            return False
        self.optimizer.finalize_variable_values(self._variables)
        return True

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        before = keras.config.floatx()
        keras.config.set_floatx(self._floatx)
        try:
            yield
        finally:
            keras.config.set_floatx(before)


def build(optimizer: Any, variables: Sequence[Any]) -> None:
    """Let an optimizer make its state for some variables.

    Raises:
        InvalidArgumentError: If it needs to know of them what TensorFlow's do not tell.
    """
    try:
        optimizer.build(variables)
    except AttributeError as error:
        if all(isinstance(v, keras.Variable) for v in variables):
            raise
        raise InvalidArgumentError(
            f"`{type(optimizer).__name__}` works on Keras variables only.",
            got=f"tf.Variables, which lack what it needs ({error})",
            hint="keras.Variable(...), a Keras model, or another method",
        ) from error


def plain(variable: Any) -> tf.Variable:
    """Return the `tf.Variable` of a variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def check_free(optimizer: Any, variables: Sequence[Any]) -> None:
    """Refuse an optimizer that was built for other variables than these."""
    bound = {id(plain(v)) for v in getattr(optimizer, "_trainable_variables", ())}
    if bound and not bound.issuperset(id(plain(v)) for v in variables):
        raise InvalidArgumentError(
            "A Keras optimizer moves the variables that it was built for, and no "
            "others.",
            got=f"an instance of {type(optimizer).__name__}, built for others than "
            "those that are to be moved",
            hint="a new instance, or its name with `learning_rate`",
        )


def check_strategy(optimizer: Any, variables: Sequence[Any]) -> None:
    """Refuse an optimizer made for other replicas than the variables."""
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        return
    theirs = _replicated(getattr(optimizer, "_distribution_strategy", None))
    for variable in variables:
        strategy = _replicated(strategy_of(variable))
        if strategy is not theirs:
            both = strategy, theirs
            of, by = (type(s).__name__ if s else "no strategy" for s in both)
            raise InvalidArgumentError(
                "The variables and the optimizer must be of one strategy.",
                got=f"{variable.name!r} of {of}, and an optimizer of {by}",
                hint="the optimizer made in strategy.scope(), or its name",
            )


def rates_of(optimizer: Any) -> tuple[Any, ...]:
    """Return what an optimizer's rate is made of: variables, schedules, functions.

    A trace reads a variable anew, but keeps the schedule that it has seen.
    """
    parts = getattr(optimizer, "optimizers", None)  # a MultiOptimizer
    parts = parts or [getattr(optimizer, "inner_optimizer", optimizer)]
    return tuple(getattr(part, "_learning_rate", None) for part in parts)


def _replicated(strategy: Any) -> Any:
    """Return the strategy if it has more than one replica; else None."""
    many = strategy is not None and strategy.num_replicas_in_sync > 1
    return strategy if many else None


def _needs_arguments(kind: type) -> bool:
    """Return whether it wraps other optimizers, which only an instance can say."""
    parameters = inspect.signature(kind).parameters.values()
    named = (p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty for p in named)


def _is_schedule(rate: Any) -> bool:
    return isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)


def _rate(learning_rate: Any) -> Any:
    """Return what Keras takes as the learning rate that a user means."""
    if _is_schedule(learning_rate):
        return learning_rate
    is_variable = isinstance(learning_rate, tf.Variable | keras.Variable)
    try:
        rate = float(plain(learning_rate))
    except (TypeError, ValueError):
        rate = math.nan
    if isinstance(learning_rate, str | bool | np.bool_) or not (0 < rate < math.inf):
        raise InvalidArgumentError(
            "`learning_rate` must be a positive number, a variable of one, or a Keras "
            "schedule.",
            got=f"learning_rate={describe(learning_rate)}",
            hint="learning_rate=0.1, or keras.optimizers.schedules.CosineDecay(...)",
        )
    return Followed(learning_rate) if is_variable else rate
