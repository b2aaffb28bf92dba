"""One trace for each structure and dtypes: a dimension that varies is left open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.signatures import is_dynamic, signature
from tfgrad.derivatives.tracing import MOST_TRACES

Traced = Callable[..., Any]
"""A function of the tensors in some nests, flat."""


class OpenTraces:
    """The function that takes nests of given structure, dtypes and shapes, traced.

    A first trace is made for the very shapes, which suits fixed batches best. The
    second shape makes another one, in which the dimensions that differ are open, as
    `tf.function(reduce_retracing=True)` does.

    Args:
        trace: `trace(nests, specs)`: traces for nests like these, with a `TypeSpec` for
            each tensor in them.
    """

    def __init__(self, trace: Callable[[Any, list[Any]], Traced]) -> None:
        """Trace nothing yet."""
        self._trace = trace
        self._open: dict[Hashable, tuple[list[Any], Traced]] = {}
        self._known: dict[Hashable, Traced] = {}
        self._first = threading.RLock()

    def __call__(self, nests: Any) -> Traced:
        """Return the trace for `nests`; a new one if none takes them."""
        key = signature(nests)
        found = self._known.get(key)
        if found is None:
            with self._first:  # other threads wait until it is there
                found = self._fitting(nests)
            if len(self._known) >= 2 * MOST_TRACES:
                self._known.clear()
            self._known[key] = found
        return found

    def _fitting(self, nests: Any) -> Traced:
        dynamic = filter(is_dynamic, tf.nest.flatten(nests))
        specs = [tf.type_spec_from_value(leaf) for leaf in dynamic]
        family = signature(tf.nest.map_structure(_without_shape, nests))
        wider, traced = self._open.get(family, (specs, None))
        pairs = list(zip(wider, specs, strict=True))
        if traced is not None:
            if all(spec.is_subtype_of(wide) for wide, spec in pairs):
                return traced
            wider = [wide.most_specific_common_supertype([s]) for wide, s in pairs]
        try:
            traced = self._trace(nests, wider)
        except Exception:
            if wider is specs:
                raise
            return self._trace(nests, specs)  # it may need the very shape
        if len(self._open) >= MOST_TRACES:
            self._open.clear()
        self._open[family] = wider, traced
        return traced


def _without_shape(leaf: Any) -> Any:
    """Return what a trace cannot leave open: type, dtype and rank; static values."""
    if not is_dynamic(leaf):
        return leaf
    return str((type(leaf).__name__, leaf.dtype.name, leaf.shape.rank))
