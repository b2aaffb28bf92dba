"""What a compiled function depends on: which calls can share one, and which cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

_DYNAMIC = (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)

_BY_VALUE = (bool, int, float, complex, str, bytes, tf.DType)
"""Types of static values that are compared by value; others, by identity."""


class Shape(tuple[Any, ...]):
    """The dtype and the dimensions of a tensor."""

    __slots__ = ()


def is_dynamic(leaf: object) -> bool:
    """Return whether `leaf` is an input of a compiled function; the rest is static."""
    return isinstance(leaf, _DYNAMIC)


def signature(nest: Any) -> Any:
    """Return a hashable key of the structure, specs and static values in `nest`."""
    if isinstance(nest, _DYNAMIC):
        shape = nest.shape
        if not isinstance(nest, tf.Tensor) or shape.rank is None:
            return tf.type_spec_from_value(nest)
        # Plain numbers compare much faster than TensorFlow's own objects do.
        return Shape((nest.dtype.as_datatype_enum, *shape.as_list()))
    if nest is None or type(nest) is int:
        return nest
    if isinstance(nest, list | tuple):
        return type(nest), *map(signature, nest)
    if isinstance(nest, Mapping):
        if not nest:
            return type(nest)
        return type(nest), *((key, signature(nest[key])) for key in _ordered(nest))
    if type(nest) in _BY_VALUE:
        return type(nest), nest
    # Equal objects may behave differently, so the key is the id. The trace keeps the
    # object alive, so no other object gets that id.
    return type(nest), id(nest)


def _ordered(nest: Mapping[Any, Any]) -> list[Any]:
    """Return the keys in the order of tf.nest; as they come if they have none."""
    try:
        return sorted(nest)
    except TypeError:  # it will be refused where it is taken apart
        return list(nest)


def rank_signature(key: Any) -> Any:
    """Return a signature without the sizes of dimensions."""
    if type(key) is Shape:
        return key[0], len(key)
    return tuple(map(rank_signature, key)) if type(key) is tuple else key


def opened(key: Any, other: Any) -> list[tuple[int, ...]]:
    """Return for each tensor in a signature which dimensions differ from another's.

    Args:
        key: A signature.
        other: One with the same `rank_signature`.
    """
    if type(key) is Shape:
        sizes = zip(key[1:], other[1:], strict=True)
        return [tuple(axis for axis, (a, b) in enumerate(sizes) if a != b)]
    if isinstance(key, tf.TypeSpec):
        return [()]
    if type(key) is not tuple:
        return []
    pairs = zip(key, other, strict=True)
    return [found for a, b in pairs for found in opened(a, b)]
