"""What a function is differentiated with respect to: float arguments, or variables."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError


@dataclass(frozen=True)
class Sources:
    """The float arguments of a call of `f`, or the variables that it reads.

    Attributes:
        f: The function.
        args: Its arguments; float leaves are tensors, all others are as they came.
        tensors: The float leaves, flat; empty if variables are asked for.
        variables: The variables that are asked for; empty if arguments are.
        names: What the user calls each of them.
        integers: What the user calls the integer leaves: they have no derivative.
    """

    f: Callable[..., Any]
    args: tuple[Any, ...]
    tensors: tuple[tf.Tensor, ...]
    variables: tuple[tf.Variable, ...]
    names: tuple[str, ...]
    integers: tuple[str, ...]

    def call(self, *tensors: tf.Tensor) -> Any:
        """Return what `f` returns with `tensors` in the places of the float leaves."""
        if not tensors:
            return self.f(*self.args)
        given = iter(tensors)

        def fill(leaf: Any) -> Any:
            return next(given) if _is_float_tensor(leaf) else leaf

        return self.f(*tf.nest.map_structure(fill, self.args))


def sources_of(f: Callable[..., Any], args: tuple[Any, ...], wrt: Any) -> Sources:
    """Return what `f(*args)` is differentiated with respect to.

    Args:
        f: The function.
        args: Its arguments.
        wrt: Variables, as `variables_of` takes them; None means the float arguments.

    Raises:
        InvalidArgumentError: If `f` is no function, if `wrt` holds no float variable,
            or if there are no numbers, in a trace.
    """
    if not callable(f):
        raise InvalidArgumentError(
            "The function comes first, then its arguments.",
            got=f"f={nested.describe(f)}",
            hint="check_grads(f, x) or explain(f, x), with f not called",
        )
    if not tf.executing_eagerly():
        raise InvalidArgumentError(
            "Checks and explanations need numbers: call them outside of tf.function.",
            got=f"a call for `{nested.name_of(f)}` while a function is being traced",
            hint="the same call outside of the tf.function",
        )
    leaves, names = nested.named_leaves, nested.argument_names(f, len(args))
    weak = nested.weak_dtype(*args)
    has_float = any(_is_float(leaf) for arg in args for _, leaf in leaves(arg, ""))

    def convert(leaf: Any, name: str) -> Any:
        if _is_float(leaf) or (nested.is_number(leaf) and not has_float):
            return nested.to_tensor(leaf, name, weak)
        return leaf

    filled = tuple(map(functools.partial(nested.map_leaves, convert), args, names))
    named = [pair for pairs in map(leaves, filled, names) for pair in pairs]
    integers = tuple(name for name, leaf in named if _is_integer_array(leaf))
    if wrt is not None:
        variables = tuple(tf.nest.flatten(nested.variables_of(wrt)))
        opened = tf.nest.flatten(nested.open_modules(wrt))
        return Sources(f, filled, (), variables, tuple(map(variable_name, opened)), ())
    chosen = {name: leaf for name, leaf in named if _is_float_tensor(leaf)}
    return Sources(f, filled, (*chosen.values(),), (), (*chosen,), integers)


def variable_name(variable: Any) -> str:
    """Return the path of a Keras variable, the name of any other."""
    return str(getattr(variable, "path", variable.name)).removesuffix(":0")


@contextlib.contextmanager
def restored(variables: Sequence[tf.Variable]) -> Iterator[None]:
    """Give the variables their values back at the end, whatever happens in between."""
    before = [tf.identity(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _is_float(leaf: Any) -> bool:
    if nested.is_array_like(leaf):
        return True
    if isinstance(leaf, float) or nested.is_variable(leaf):
        return True
    is_array = isinstance(leaf, tf.Tensor | np.ndarray | np.generic)
    return is_array and bool(tf.as_dtype(leaf.dtype).is_floating)


def _is_float_tensor(leaf: Any) -> bool:
    return isinstance(leaf, tf.Tensor) and bool(leaf.dtype.is_floating)


def _is_integer_array(leaf: Any) -> bool:
    is_array = isinstance(leaf, tf.Tensor | np.ndarray | np.generic)
    return is_array and bool(tf.as_dtype(leaf.dtype).is_integer)
