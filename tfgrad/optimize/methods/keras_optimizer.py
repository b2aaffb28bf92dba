"""Keras's optimizers, and any object with `apply_gradients`, as methods of the loop."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.derivatives.tracing import trace
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import describe


@functools.cache
def optimizer_names() -> dict[str, type[keras.optimizers.Optimizer]]:
    """Return every Keras optimizer that stands alone, by its name in lower case."""
    base = keras.optimizers.Optimizer
    return {
        name.lower(): kind
        for name, kind in inspect.getmembers(keras.optimizers, inspect.isclass)
        if issubclass(kind, base) and kind is not base and not _needs_arguments(kind)
    }


Factory = Callable[[Sequence[Any]], Any]
"""Returns an optimizer for some variables, not yet built."""


def optimizer_factory(method: Any, learning_rate: Any) -> Factory:
    """Return the function that makes an optimizer of a run's own.

    Args:
        method: The class of a Keras optimizer, an instance (cloned from its
            configuration), or any object with `apply_gradients` (used as it is if it
            cannot be cloned).
        learning_rate: For a class: a positive number or a Keras schedule; None means
            the optimizer's default.

    Raises:
        InvalidArgumentError: If there is no such method, or the learning rate is no
            such thing.
    """
    if inspect.isclass(method) and method in optimizer_names().values():
        rate = {} if learning_rate is None else {"learning_rate": _rate(learning_rate)}
        return lambda variables: method(**rate)
    if inspect.isclass(method) or not hasattr(method, "apply_gradients"):
        raise InvalidArgumentError(
            "`method` must be a name, or an optimizer with `apply_gradients`.",
            got=f"method={describe(method)}",
            hint='method="adam", or method=keras.optimizers.Adam(1e-3)',
        )
    if learning_rate is not None:
        raise InvalidArgumentError(
            "`learning_rate` goes with the name of a method; an instance has its own.",
            got=f"learning_rate={learning_rate!r} with method={describe(method)}",
            hint=f"{type(method).__name__}(learning_rate={learning_rate!r})",
        )

    def clone(variables: Sequence[Any]) -> Any:
        # An optimizer keeps moments, and two runs must not share them.
        _check_free(method, variables)
        try:
            return type(method).from_config(method.get_config())
        except (AttributeError, NotImplementedError, TypeError):
            return method

    return clone


class KerasMethod:
    """An optimizer as a method: it updates the loop's variables where they are.

    Args:
        factory: What `optimizer_factory` returned.
        variables: What to update: `keras.Variable`s or `tf.Variable`s.

    Attributes:
        name: What to call the method: its class in lower case.
        is_compiled: Whether updates can be part of a trace: from the first one on,
            unless the optimizer keeps its state in Python, where a trace would freeze
            it.
    """

    def __init__(self, factory: Factory, variables: Sequence[Any]) -> None:
        """Build the optimizer, outside of any trace: inside, some go wrong silently."""
        self._variables = list(variables)
        # Keras keeps its learning rate in floatx; float64 steps should not carry a rate
        # rounded to float32.
        double = all(tf.as_dtype(v.dtype) == tf.float64 for v in self._variables)
        self._floatx = "float64" if double else keras.config.floatx()
        with self._precision():
            self._optimizer = factory(self._variables)
            self._is_built = hasattr(self._optimizer, "build")
            if self._is_built:
                self._build()
        self.name = type(self._optimizer).__name__.lower()
        self.is_compiled = False
        self._apply: Callable[..., Any] | None = None

    def scale(self) -> tf.Tensor | None:
        """Return what `update` wants the gradient multiplied by, if anything."""
        if not isinstance(self._optimizer, keras.optimizers.LossScaleOptimizer):
            return None
        scale: tf.Tensor = self._optimizer.scale_loss(tf.constant(1.0))
        return scale

    def update(self, gradient: Sequence[tf.Tensor]) -> None:
        """Take one step; compiled, except for a first one that may create variables."""
        self.prepare(gradient)
        if self._apply is not None:
            self._apply(*gradient)
        else:
            self._apply_gradients(self._optimizer.apply_gradients, *gradient)
            self._apply = self._compile(gradient)

    def prepare(self, gradient: Sequence[tf.Tensor]) -> None:
        """Compile the update, unless the first one may create variables."""
        if self._apply is None and self._is_built:
            self._apply = self._compile(gradient)

    def variables(self) -> list[tf.Variable]:
        """Return what the optimizer keeps from step to step, as far as it tells."""
        kept = getattr(self._optimizer, "variables", ()) if self._is_built else ()
        return [_plain(v) for v in kept]

    def finish(self) -> bool:
        """Do what the optimizer wants done at the end; return whether that moved x."""
        inner = getattr(self._optimizer, "inner_optimizer", self._optimizer)
        if not getattr(inner, "use_ema", False):
            return False
        self._optimizer.finalize_variable_values(self._variables)
        return True

    def _build(self) -> None:
        try:
            self._optimizer.build(self._variables)
        except AttributeError as error:
            if all(isinstance(v, keras.Variable) for v in self._variables):
                raise
            raise InvalidArgumentError(
                f"`{type(self._optimizer).__name__}` works on Keras variables only.",
                got=f"tf.Variables, of which it wants more ({error})",
                hint="keras.Variable(...), a Keras model, or another method",
            ) from error

    def _apply_gradients(
        self, apply_gradients: Callable[..., Any], *gradient: tf.Tensor
    ) -> None:
        with self._precision():
            apply_gradients(list(zip(gradient, self._variables, strict=True)))

    def _compile(self, gradient: Sequence[tf.Tensor]) -> Callable[..., Any]:
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in gradient]

        def compiled(apply_gradients: Callable[..., Any]) -> Any:
            body = functools.partial(self._apply_gradients, apply_gradients)
            return tf.function(body, autograph=False).get_concrete_function(*specs)

        apply_gradients = self._optimizer.apply_gradients
        state = _PythonState(self._optimizer)
        try:
            concrete: Callable[..., Any] = trace(compiled, apply_gradients)
        except Exception as error:  # an optimizer of the user's may raise anything
            reason = f"it cannot be traced ({str(error).strip().splitlines()[-1]})"
        else:
            changed = state.changed()
            if not changed:
                self.is_compiled = True
                return concrete
            reason = f"it keeps its state in Python ({', '.join(changed)})"
        state.restore()
        warnings.warn(
            f"`{self.name}` runs eagerly, which is slower: {reason}. Keep state in "
            "tf.Variable to have it compiled.",
            RuntimeWarning,
            stacklevel=2,
        )
        return functools.partial(self._apply_gradients, apply_gradients)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        before = keras.config.floatx()
        keras.config.set_floatx(self._floatx)
        try:
            yield
        finally:
            keras.config.set_floatx(before)


def _plain(variable: Any) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _check_free(optimizer: Any, variables: Sequence[Any]) -> None:
    """Refuse an optimizer that was built for other variables than these."""
    bound = {id(_plain(v)) for v in getattr(optimizer, "_trainable_variables", ())}
    if bound and not bound.issuperset(id(_plain(v)) for v in variables):
        raise InvalidArgumentError(
            "An optimizer that is bound to variables goes on with those.",
            got=f"an instance of {type(optimizer).__name__}, built for others than "
            "those that are to be moved",
            hint="a new instance, or its class or name with `learning_rate`",
        )


def _needs_arguments(kind: type) -> bool:
    """Return whether it wraps other optimizers, which only an instance can say."""
    parameters = inspect.signature(kind).parameters.values()
    named = (p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty for p in named)


class _PythonState:
    """What an object keeps in plain attributes, to see whether a trace changes it."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._before = self._attributes()

    def changed(self) -> list[str]:
        """Return the names of the attributes that are not what they were."""
        now = self._attributes()
        names = sorted(self._before.keys() | now.keys())
        return [
            name for name in names if not _same(self._before.get(name), now.get(name))
        ]

    def restore(self) -> None:
        """Put the attributes back."""
        for name in self._attributes().keys() - self._before.keys():
            delattr(self._owner, name)
        for name, value in self._before.items():
            setattr(self._owner, name, value)

    def _attributes(self) -> dict[str, Any]:
        kept = (int, float, tf.Tensor, np.ndarray, type(None))
        return {
            name: copy.copy(value)
            for name, value in getattr(self._owner, "__dict__", {}).items()
            if not name.startswith("_self_")  # TensorFlow's own notes on checkpoints
            and (type(value) in (list, dict) or isinstance(value, kept))
        }


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, int | float):
        return bool(a == b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return a is b


def _rate(learning_rate: Any) -> Any:
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        return learning_rate
    try:
        rate = float(learning_rate)
    except (TypeError, ValueError):
        rate = math.nan
    if isinstance(learning_rate, str | bool) or not (0 < rate < math.inf):
        raise InvalidArgumentError(
            "`learning_rate` must be a positive number or a Keras schedule.",
            got=f"learning_rate={learning_rate!r}",
            hint="learning_rate=0.1, or keras.optimizers.schedules.CosineDecay(...)",
        )
    return rate
