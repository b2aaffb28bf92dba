"""The public edge of every transform: values become tensors, variables are found."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.tracing import Traces, converted
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    is_array_like,
    map_leaves,
    name_of,
    named_leaves,
    to_tensors,
    variables_of,
    weak_dtype,
)


@dataclass(frozen=True)
class Call:
    """One call of a user's function, in tensors, with the sources to differentiate.

    Attributes:
        f: The user's function, AutoGraph applied.
        name: What to call it in messages.
        parameters: The names of its positional parameters.
        args: Its positional arguments: nests of tensors and of static Python values.
        kwargs: Its keyword arguments, likewise.
        argnums: Which positional arguments are differentiated: one, or a tuple of them.
        variables: The nest of variables differentiated instead, or None; the empty tuple means
            all trainable ones that `f` reads.
    """

    f: Callable[..., Any]
    name: str
    parameters: tuple[str, ...]
    args: tuple[Nest, ...]
    kwargs: Mapping[str, Nest]
    argnums: int | tuple[int, ...]
    variables: Nest | None

    @property
    def differentiated(self) -> Nest:
        """The nest of what is differentiated: it has the structure of an answer."""
        if self.variables is not None:
            return self.variables
        if isinstance(self.argnums, int):
            return self.args[self.argnums]
        return tuple(self.args[i] for i in self.argnums)

    @property
    def sources(self) -> list[Any]:
        """What the tape has to watch, flat: tensors, or variables."""
        flat: list[Any] = tf.nest.flatten(self.differentiated)
        return flat

    @property
    def names(self) -> list[str]:
        """What the user calls each source."""
        if self.variables is not None:
            pairs = named_leaves(self.variables, "wrt")
            return [f"{path} ({variable.name})" for path, variable in pairs]
        argnums = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        nests = [named_leaves(self.args[i], self.parameters[i]) for i in argnums]
        return [path for pairs in nests for path, _ in pairs]

    def at(self, inputs: Sequence[tf.Tensor]) -> Call:
        """Return the same call with other values for the differentiated arguments."""
        values = self.pack(inputs)
        if isinstance(self.argnums, int):
            values = (values,)
        argnums = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        args = list(self.args)
        for i, value in zip(argnums, values, strict=True):
            args[i] = value
        return replace(self, args=tuple(args))

    def output(self) -> Any:
        """Return what the user's function returns."""
        return self.f(*self.args, **self.kwargs)

    def pack(self, flat: Sequence[Any]) -> Nest:
        """Return one value per source in the structure that the user passed."""
        return tf.nest.pack_sequence_as(self.differentiated, list(flat))


def transform(
    f: Callable[..., Any],
    body: Callable[[Call], Any],
    *,
    argnums: int | Sequence[int] = 0,
    wrt: Nest | None = None,
    jit: bool = False,
) -> Callable[..., Any]:
    """Return the function that answers each call of `f` with `body`, compiled.

    Args:
        f: The user's function.
        body: Takes a `Call`, returns a nest of tensors. It runs inside the trace.
        argnums: Positions of the differentiated arguments, negative ones from the end.
        wrt: Variables to differentiate instead.
        jit: Compile with XLA.
    """
    _check_transform(f, argnums, wrt)
    name, parameters = name_of(f), _parameters(f)

    def run(f: Callable[..., Any], args: Any, kwargs: Any, chosen: Any, on: Any) -> Any:
        return body(Call(f, name, parameters(len(args)), args, kwargs, chosen, on))

    traces = Traces(run, f, jit=jit)

    @tf.autograph.experimental.do_not_convert
    def transformed(*args: Any, **kwargs: Any) -> Any:
        variables = None if wrt is None else variables_of(wrt)
        chosen = () if wrt is not None else _positions(argnums, len(args), name)
        if kwargs or not all(map(_is_float_tensor, args)):
            args, kwargs = _to_tensors(args, kwargs, chosen, parameters(len(args)))
        if tf.executing_eagerly():
            return traces(args, kwargs, chosen, variables)
        # Inside another trace the ops go straight into it: no call, no second trace.
        return run(converted(f), args, kwargs, chosen, variables)

    return functools.wraps(f)(transformed) if inspect.isfunction(f) else transformed


def _check_transform(f: Any, argnums: Any, wrt: Any) -> None:
    if not callable(f):
        raise InvalidArgumentError(
            "A transform takes the function, and returns one that takes the point.",
            got=f"f={describe(f)}",
            hint="tfgrad.grad(f)(x)",
        )
    if wrt is not None and argnums != 0:
        raise InvalidArgumentError(
            "Either `argnums` or `wrt` says what is differentiated.",
            got=f"argnums={argnums!r} together with wrt",
            hint="one transform for the arguments and one for the variables",
        )
    numbers = argnums if isinstance(argnums, list | tuple) else [argnums]
    if not numbers or any(type(number) is not int for number in numbers):
        raise InvalidArgumentError(
            "`argnums` must be a position, or a tuple of positions, of arguments.",
            got=f"argnums={argnums!r}",
            hint="argnums=0, or argnums=(0, 1)",
        )


def _parameters(f: Callable[..., Any]) -> Callable[[int], tuple[str, ...]]:
    """Return the function from a count of positional arguments to their names."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # builtins and some callables have no signature
        parameters = ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = tuple(p.name for p in parameters if p.kind in positional)

    @functools.cache
    def names(count: int) -> tuple[str, ...]:
        return tuple(known[i] if i < len(known) else f"args[{i}]" for i in range(count))

    return names


def _positions(argnums: Any, count: int, name: str) -> int | tuple[int, ...]:
    """Return `argnums` with negative positions counted from the end."""
    numbers = argnums if isinstance(argnums, list | tuple) else (argnums,)
    positions = tuple(n + count if n < 0 else n for n in numbers)
    if any(not 0 <= p < count for p in positions) or len(set(positions)) < len(numbers):
        raise InvalidArgumentError(
            "`argnums` must name different positional arguments of the call.",
            got=f"argnums={argnums!r}, and `{name}` was called with {count} of them",
            hint="the differentiated arguments by position, all else by keyword",
        )
    return positions if isinstance(argnums, list | tuple) else positions[0]


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, tf.Tensor) and value.dtype.is_floating


def _to_tensors(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    chosen: int | tuple[int, ...],
    names: tuple[str, ...],
) -> tuple[tuple[Nest, ...], dict[str, Nest]]:
    """Return all arguments in tensors; the differentiated ones must be of a float dtype."""
    weak = weak_dtype(args, kwargs)
    active = (chosen,) if isinstance(chosen, int) else chosen
    values = [
        to_tensors(arg, names[i], weak) if i in active else _passive(arg, names[i], weak)
        for i, arg in enumerate(args)
    ]
    options = {key: _passive(value, key, weak) for key, value in kwargs.items()}
    return tuple(values), options


def _passive(value: Nest, name: str, weak: tf.DType) -> Nest:
    """Return `value` with arrays and floats as tensors: new numbers must not retrace."""

    def convert(leaf: Any, path: str) -> Any:
        if isinstance(leaf, float) and not isinstance(leaf, np.generic):
            return tf.constant(leaf, weak)
        if is_array_like(leaf):
            array = np.array(leaf)
            return tf.constant(array, weak if array.dtype.kind == "f" else None)
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != object:
            return tf.convert_to_tensor(leaf)
        return leaf

    return map_leaves(convert, value, name)
