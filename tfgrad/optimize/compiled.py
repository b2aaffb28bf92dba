"""Functions of tensors: compiled once, kept in the process, called at little cost."""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

# Nothing public calls a function with an executor of its own; and no stubs know this.
from tensorflow.python.eager import execute  # type: ignore[attr-defined]

from tfgrad.derivatives.tracing import concrete_of
from tfgrad.diagnosis.graphs import bodies

MOST_KEPT = 128
"""Compiled functions that are kept; the least recently used goes first."""

KEPT: OrderedDict[Any, Any] = OrderedDict()
"""Compiled functions that do not depend on the user's function: made only once."""


IN_SEQUENCE = "SINGLE_THREADED_EXECUTOR"
"""TensorFlow's executor that runs one op after the other: a fifth faster where ops are
short. In it, branches and updates of variables may wait for ever."""


def direct(
    concrete: Any, captured: Sequence[Any] | None = None, executor: str = ""
) -> Callable[..., Any]:
    """Return a concrete function of tensors, to be called with them in a flat row.

    Args:
        concrete: The function.
        captured: What to take in place of its `captured_inputs`.
        executor: Which one of TensorFlow's runs it; "" for the default.

    A call looks neither at the number and dtypes of the tensors nor at the answer,
    which would take half of the time of a short one; and no tape records it.
    """
    function = concrete.inference_fn
    captured = list(concrete.captured_inputs if captured is None else captured)
    pack = _packer(concrete.structured_outputs)
    context: Any = getattr(function, "_bound_context", None)  # as in TensorFlow 2.21
    if pack is None or not hasattr(context, "function_call_options"):
        return lambda *tensors: function.call_preflattened([*tensors, *captured])
    name, count = function.name.decode(), len(function.function_type.flat_outputs)
    options = {**context.function_call_options.as_attrs(), "executor_type": executor}
    attributes = tuple(itertools.chain(*options.items()))

    def call(*tensors: Any) -> Any:
        inputs = [*tensors, *captured]
        return pack(iter(execute.execute(name, count, inputs, attributes, context)))

    vars(call)["concrete"] = concrete  # with which its graph would go
    return call


def _packer(structure: Any) -> Callable[[Iterator[Any]], Any] | None:
    """Return what puts tensors in a structure of specs; None for other things in it."""
    if isinstance(structure, tf.TensorSpec | tf.Tensor):
        return None if structure.dtype in (tf.variant, tf.resource) else next
    if structure is None:
        return lambda tensors: None
    if isinstance(structure, tf.experimental.Optional):
        spec = tf.type_spec_from_value(structure)
        whole = functools.partial(tf.nest.pack_sequence_as, spec)
        return lambda tensors: whole([next(tensors)], expand_composites=True)
    kind, is_dict = type(structure), isinstance(structure, dict)
    if not isinstance(structure, list | tuple) and kind is not dict:
        return None
    keys = sorted(structure) if is_dict else range(len(structure))
    parts = [_packer(structure[key]) for key in keys]
    packers = [part for part in parts if part is not None]
    if len(packers) < len(structure):
        return None
    if is_dict:
        return lambda t: {k: p(t) for k, p in zip(keys, packers, strict=True)}
    if hasattr(structure, "_fields"):
        return lambda tensors: kind(*[pack(tensors) for pack in packers])
    return lambda tensors: kind([pack(tensors) for pack in packers])


def concrete_for(
    function: Callable[..., Any], *nests: Any, in_turn: bool = False
) -> Any:
    """Return a function of nests like these, traced: of their leaves in a row.

    Instead of tensors, there may be specs.
    """
    specs = tf.nest.map_structure(spec_of, nests)
    return concrete_of(function, specs, in_turn=in_turn)


def spec_of(leaf: Any) -> Any:
    """Return the spec of a tensor, a composite or a number; a spec as it is."""
    if isinstance(leaf, tf.TypeSpec):
        return leaf
    is_plain = isinstance(leaf, bool | int | float)
    return tf.type_spec_from_value(tf.convert_to_tensor(leaf) if is_plain else leaf)


def compiled(
    function: Callable[..., Any], *nests: Any, in_sequence: bool = True
) -> Callable[..., Any]:
    """Return the same, to be called with tensors alone; see `OfVariables.traced`."""
    return OfVariables.traced(function, nests, (), in_sequence=in_sequence).own


class OfVariables(NamedTuple):
    """A traced function that reads and writes variables, which others may replace.

    Attributes:
        concrete: The function.
        variables: The variables that it was traced with.
        executor: What runs it.
        own: The function of these variables, to be called with tensors alone.
    """

    concrete: Any
    variables: Sequence[tf.Variable]
    executor: str
    own: Callable[..., Any]

    @classmethod
    def traced(
        cls,
        function: Callable[..., Any],
        nests: Sequence[Any],
        variables: Sequence[tf.Variable],
        *,
        in_sequence: bool,
    ) -> OfVariables:
        """Return a function of nests like these, traced.

        Args:
            function: The function.
            nests: As above.
            variables: The variables that it reads and writes.
            in_sequence: Whether its ops are short: no user's function is among them.
        """
        concrete = concrete_for(function, *nests, in_turn=bool(variables))
        operations = concrete.graph.get_operations()
        in_sequence = in_sequence and all(map(_is_plain, operations))
        executor = IN_SEQUENCE if in_sequence else ""
        return cls(concrete, variables, executor, direct(concrete, executor=executor))

    def of(self, variables: Sequence[tf.Variable]) -> Callable[..., Any] | None:
        """Return the function of other variables; None if it has captured more."""
        if not variables or variables is self.variables:
            return self.own
        pairs = zip(self.variables, variables, strict=True)
        handles = {id(old.handle): new.handle for old, new in pairs}
        captured = self.concrete.captured_inputs
        if any(id(tensor) not in handles for tensor in captured):
            return None
        handed = [handles[id(tensor)] for tensor in captured]
        return direct(self.concrete, handed, self.executor)


def _is_plain(op: tf.Operation) -> bool:
    """Return whether an op is no loop, branch or call, and touches no variable."""
    return not bodies(op) and all(tensor.dtype != tf.resource for tensor in op.inputs)


def compiled_once(function: Callable[..., Any], jit: Any) -> Callable[..., Any]:
    """Return a function of nests, compiled for the first that it is called with.

    They may hold variables, iterators and other composites. Within another trace, it is
    part of that.
    """
    traced = tf.function(function, autograph=False, jit_compile=jit)
    call: Callable[..., Any] | None = None

    def run(*nests: Any) -> Any:
        nonlocal call
        if not tf.executing_eagerly():
            return traced(*nests)
        if call is None:
            specs = tf.nest.map_structure(tf.type_spec_from_value, nests)
            call = direct(traced.get_concrete_function(*specs))
        leaves = tf.nest.flatten(nests, expand_composites=True)
        return call(*[x.handle if isinstance(x, tf.Variable) else x for x in leaves])

    return run


def kept(place: Any, key: Any, make: Callable[[], Any]) -> Any:
    """Return the entry of a key in a dict (None: `KEPT`); make it if it is missing."""
    if place is not None:
        if key not in place:
            place[key] = make()
        return place[key]
    if key not in KEPT:
        KEPT[key] = make()
        if len(KEPT) > MOST_KEPT:
            KEPT.popitem(last=False)
    KEPT.move_to_end(key)
    return KEPT[key]


def shapes_of(nest: Any) -> tuple[Any, ...]:
    """Return a key of the shapes and dtypes of the tensors in a nest."""
    leaves = tf.nest.flatten(nest, expand_composites=True)
    return tuple((leaf.shape, leaf.dtype) for leaf in leaves)
