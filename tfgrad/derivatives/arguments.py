"""What the user passed, in tensors: arguments, their names, and directions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    argument_names,
    describe,
    is_array_like,
    map_leaves,
    same_keys,
    to_tensor,
    to_tensors,
)


def parameter_names(f: Callable[..., Any]) -> Callable[[int], tuple[str, ...]]:
    """Return the function from a count of positional arguments to their names."""
    return functools.cache(lambda count: tuple(argument_names(f, count)))


def positions_of(argnums: Any, count: int, name: str) -> int | tuple[int, ...]:
    """Return `argnums` with negative positions counted from the end."""
    numbers = argnums if isinstance(argnums, list | tuple) else (argnums,)
    positions = tuple(n + count if n < 0 else n for n in numbers)
    if any(not 0 <= p < count for p in positions) or len(set(positions)) < len(numbers):
        raise InvalidArgumentError(
            "`argnums` must name different positional arguments of the call.",
            got=f"argnums={argnums!r}, and `{name}` was called with {count} of them",
            hint="grad(f)(x), hvp(f)(x, v), with x by position; wrt= for variables",
        )
    return positions if isinstance(argnums, list | tuple) else positions[0]


def arguments_in_tensors(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    chosen: int | tuple[int, ...],
    names: tuple[str, ...],
    weak: tf.DType,
) -> tuple[tuple[Nest, ...], dict[str, Nest]]:
    """Return all arguments in tensors; the differentiated ones must be float."""
    active = (chosen,) if isinstance(chosen, int) else chosen
    values = [
        to_tensors(arg, names[i], weak)
        if i in active
        else _passive(arg, names[i], weak)
        for i, arg in enumerate(args)
    ]
    options = {key: _passive(value, key, weak) for key, value in kwargs.items()}
    return tuple(values), options


def _passive(value: Nest, name: str, weak: tf.DType) -> Nest:
    """Return `value`, its numbers as tensors: new numbers must not retrace."""

    def convert(leaf: Any, path: str) -> Any:
        if isinstance(leaf, float) and not isinstance(leaf, np.generic):
            return tf.constant(leaf, weak)
        if is_array_like(leaf):
            array = np.array(leaf)
            return tf.constant(array, weak if array.dtype.kind == "f" else None)
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype != object:
            return tf.convert_to_tensor(np.asarray(leaf))
        return leaf

    return map_leaves(convert, value, name)


def direction_in_tensors(
    direction: Nest, like: Nest, name: str = "v", what: str = "what is differentiated"
) -> Nest:
    """Return `direction` as tensors, refused unless it is structured like `like`.

    Args:
        direction: Tensors, arrays or numbers; arrays take the dtypes of `like`.
        like: Tensors or variables.
        name: What the caller calls the direction.
        what: What the caller calls `like`.
    """
    others = iter(tf.nest.flatten(like))

    def mismatch(got: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"`{name}` must have the structure and the shapes of {what}.",
            got=got,
            hint="tf.nest.map_structure(tf.ones_like, ...) of that shows them",
        )

    def convert(leaf: Any, path: str) -> tf.Tensor:
        other = next(others, None)
        tensor = to_tensor(leaf, path, tf.float32 if other is None else other.dtype)
        if other is None:
            return tensor
        if not tensor.shape.is_compatible_with(other.shape):
            raise mismatch(f"`{path}` of {describe(tensor)} for {describe(other)}")
        return tf.cast(tensor, other.dtype)

    converted = map_leaves(convert, direction, name)
    if not same_keys(converted, like):
        raise mismatch(f"other keys: {describe(direction)}")
    try:
        tf.nest.assert_same_structure(converted, like, check_types=False)
    except (TypeError, ValueError) as error:
        raise mismatch(str(error).splitlines()[0]) from None
    return tf.nest.pack_sequence_as(like, tf.nest.flatten(converted))
