"""What a compiled function depends on: which calls can share one, and which cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

_DYNAMIC = (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)


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
        return nest.dtype.as_datatype_enum, *shape.as_list()
    if nest is None or type(nest) is int:
        return nest
    if isinstance(nest, list | tuple):
        return type(nest), *map(signature, nest)
    if isinstance(nest, Mapping):
        if not nest:
            return type(nest)
        return type(nest), *((key, signature(nest[key])) for key in sorted(nest))
    try:
        hash(nest)
    except TypeError:  # variables, too: the trace keeps them, so the id stays theirs
        return type(nest), id(nest)
    return type(nest), nest
