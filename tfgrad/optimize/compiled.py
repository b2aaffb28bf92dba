"""Functions of tensors: compiled once, kept in the process, called at little cost."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

# No stubs know these. Nothing public calls a graph as a module of XLA's, nor a function
# with an executor of its own.
from tensorflow.compiler.tf2xla.ops import gen_xla_ops  # type: ignore[import-not-found]
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python.eager import execute  # type: ignore[attr-defined]

from tfgrad.derivatives.tracing import concrete_of, suited
from tfgrad.diagnosis.graphs import bodies, leading_to, operations_of

MOST_KEPT = 128
"""Compiled functions that are kept; the least recently used goes first."""

KEPT: OrderedDict[Any, Any] = OrderedDict()
"""Compiled functions that do not depend on the user's function: made only once."""

ONE_KERNEL = {b"inlineable": b"false", b"xla_cpu_small_call": b"true"}
"""What XLA has to be told of a call that it is to make one kernel of."""

KNOWN = "2.21."
"""The TensorFlow whose XLA was seen to do it: another might stop the process."""

ELEMENTS = {
    "bool": "i1", "int32": "i32", "int64": "i64", "float16": "f16",
    "bfloat16": "bf16", "float32": "f32", "float64": "f64",
}  # fmt: skip
"""What a module of XLA's calls the dtypes."""

KERNEL_OPS = frozenset({
    "Abs", "AddV2", "Any", "Bitcast", "Cast", "ConcatV2", "Const", "DivNoNan", "Equal",
    "ExpandDims", "Fill", "FloorMod", "GatherV2", "Greater", "GreaterEqual",
    "IsFinite", "IsInf", "Less", "LessEqual", "LogicalAnd", "LogicalNot", "LogicalOr",
    "MatMul", "MatrixDiagPartV3", "MatrixDiagV3", "MatrixTriangularSolve", "Max",
    "Maximum", "Min", "Minimum", "Mul", "Neg", "NotEqual", "Pack",
    "Placeholder", "RealDiv", "Reshape", "Select", "SelectV2", "Sign", "Split", "Sqrt",
    "Square", "Squeeze", "Sub", "Sum", "TensorScatterUpdate", "Unpack",
})  # fmt: skip
"""The ops of which XLA was seen to make one kernel. At others it may stop the process:
at a sort, a transform, a scatter to several places."""

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


def compiled_once(
    function: Callable[..., Any], jit: Any, *, suits: bool
) -> Callable[..., Any]:
    """Return a function of nests, compiled for the first that it is called with.

    They may hold variables, iterators and other composites. Within another trace, it is
    part of that.

    Args:
        function: The function.
        jit: Compile with XLA.
        suits: Let TensorFlow optimise it if it is large, see `tracing.suited`.
    """
    traced = tf.function(function, autograph=False, jit_compile=jit)
    call: Callable[..., Any] | None = None

    def run(*nests: Any) -> Any:
        nonlocal call
        if not tf.executing_eagerly():
            return traced(*nests)
        if call is None:
            specs = tf.nest.map_structure(tf.type_spec_from_value, nests)
            concrete = traced.get_concrete_function(*specs)
            with suited(concrete.graph) if suits else contextlib.nullcontext():
                call = direct(concrete)
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


def in_one_kernel(function: Callable[[Any], list[Any]], nest: Any) -> list[Any]:
    """Return a function of a nest, computed by one kernel if XLA can do that.

    Of short vectors, a compiled loop spends its time on starting one kernel after the
    other. XLA makes a single one of a call that it is told to take for small, and not
    to inline. A function in a graph cannot be told so; a module that calls it can.

    Args:
        function: Takes the nest, returns a list of tensors. One with other ops than
            `KERNEL_OPS`, or that does not use all that it takes, is left as it is.
        nest: Of tensors.
    """
    tensors = tf.nest.flatten(nest)
    concrete = concrete_for(function, nest)
    takes, gives = concrete.inputs, concrete.outputs
    devices = {device.device_type for device in tf.config.list_logical_devices()}
    may_be_one = (
        tf.__version__.startswith(KNOWN)
        and devices == {"CPU"}
        and not concrete.captured_inputs
        and KERNEL_OPS.issuperset(operations_of(concrete.graph))
        and {tensor.ref() for tensor in takes} <= leading_to(concrete.graph, gives)
        and all(tensor.dtype.name in ELEMENTS for tensor in (*takes, *gives))
        and all(tensor.shape.is_fully_defined() for tensor in (*takes, *gives))
    )
    if not may_be_one:
        return function(nest)
    concrete.add_to_graph(tf.compat.v1.get_default_graph())
    results: list[Any] = gen_xla_ops.xla_call_module(
        tensors,
        version=5,
        module=_module(takes, gives),
        Sout=[tensor.shape for tensor in gives],
        Tout=[tensor.dtype for tensor in gives],
        dim_args_spec=[],
        platforms=["CPU"],
        function_list=[concrete],
    )
    # A message of XLA's: one field of pairs of texts.
    pairs = (_field(1, name) + _field(2, text) for name, text in ONE_KERNEL.items())
    told = b"".join(_field(1, pair) for pair in pairs)
    value = attr_value_pb2.AttrValue(s=told)
    results[0].op._set_attr("_XlaFrontendAttributes", value)
    return results


def _field(number: int, value: bytes) -> bytes:
    return bytes([8 * number + 2, len(value)]) + value


def _module(tensors: Sequence[Any], results: Sequence[Any]) -> str:
    """Return the module that calls a function from these tensors to those."""
    takes, gives = ([_type(tensor) for tensor in row] for row in (tensors, results))
    names = [f"%a{i}" for i in range(len(takes))]
    given = (f"{name}: {kind}" for name, kind in zip(names, takes, strict=True))
    returned = (f"%r#{i}" for i in range(len(gives)))
    call = "{called_index = 0 : i64, has_token_input_output = false}"
    return f"""
        func.func public @main({", ".join(given)}) -> ({", ".join(gives)}) {{
          %r:{len(gives)} = "stablehlo.custom_call"({", ".join(names)}) {{
            call_target_name = "tf.call_tf_function", api_version = 2 : i32,
            tf.backend_config = {call}
          }} : ({", ".join(takes)}) -> ({", ".join(gives)})
          return {", ".join(returned)} : {", ".join(gives)}
        }}"""


def _type(tensor: Any) -> str:
    sizes = "".join(f"{size}x" for size in tensor.shape)
    return f"tensor<{sizes}{ELEMENTS[tensor.dtype.name]}>"
