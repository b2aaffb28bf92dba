"""What a compiled function depends on: which calls can share one, and which cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

MOST_TRACES = 64
"""Compiled functions kept for one transform; the least recently used goes first."""

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
    if isinstance(key, tf.TypeSpec):
        spec: Any = key
        return type(spec), spec.dtype, spec.shape.rank
    return tuple(map(rank_signature, key)) if type(key) is tuple else key


class OpenTraces:
    """One trace for each structure, dtypes and ranks; dimensions that vary are open.

    A first trace is made for the very shapes, which suits fixed batches best. The
    second shape makes another one, in which the dimensions that differ are open, as
    `tf.function(reduce_retracing=True)` does.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._first = threading.RLock()
        self._widest: dict[Any, tuple[list[Any], Any]] = {}

    def of(self, nests: Any, trace: Callable[[list[Any]], Any]) -> Any:
        """Return the trace that takes `nests`; a new one if there is none.

        Args:
            nests: Nests of tensors and static values.
            trace: As in `add`.
        """
        key = signature(nests)
        found = self._known.get(key)
        if found is not None:
            return found
        tensors = filter(is_dynamic, tf.nest.flatten(nests))
        specs = [tf.type_spec_from_value(tensor) for tensor in tensors]
        with self._first:  # other threads wait until it is there
            found = self.fitting(key, specs)
            if found is None:
                found = self.add(key, specs, trace)
        if len(self._known) >= 2 * MOST_TRACES:
            self._known.clear()
        self._known[key] = found
        return found

    def fitting(self, key: Any, specs: list[Any]) -> Any:
        """Return the trace that takes such tensors; None if there is none.

        Args:
            key: The signature of what holds them.
            specs: A `TypeSpec` for each.
        """
        if not self._widest:  # at a first call, which should cost little
            return None
        wide, traced = self._widest.get(rank_signature(key), (specs, None))
        pairs = zip(wide, specs, strict=True)
        return traced if all(s.is_subtype_of(w) for w, s in pairs) else None

    def add(self, key: Any, specs: list[Any], trace: Callable[[list[Any]], Any]) -> Any:
        """Return a new trace for such tensors, and for those before.

        Args:
            key: As in `fitting`.
            specs: As in `fitting`.
            trace: Makes a trace for specs; raises if it has to know shapes that are
                open in them.
        """
        family = rank_signature(key)
        wide, traced = self._widest.get(family, (specs, None))
        if traced is not None:
            pairs = zip(wide, specs, strict=True)
            wide = [w.most_specific_common_supertype([spec]) for w, spec in pairs]
        try:
            traced = trace(wide)
        except Exception:
            if wide is specs:
                raise
            return trace(specs)
        if len(self._widest) >= MOST_TRACES:
            self._widest.clear()
        self._widest[family] = wide, traced
        return traced

    def drop(self, key: Any) -> None:
        """Forget the trace for such tensors."""
        self._widest.pop(rank_signature(key), None)
