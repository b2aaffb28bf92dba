"""Nests: convert them, name their leaves, flatten them and pack them again.

A *nest* is what `tf.nest` says it is: tensors, numbers and arrays in lists, tuples,
named tuples and dicts of any depth. One rule is added: a list of plain numbers (or of
such lists) is an *array*, as it is for `tf.constant`.

Plain numbers have no dtype of their own. They take the widest float dtype of the arrays
they come with, float32 when they come alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError

Nest = Any
"""Tensors, arrays and numbers in lists, tuples, named tuples and dicts of any depth."""


def is_number(value: object) -> bool:
    """Return whether `value` is a plain Python `int` or `float` (`bool` is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool | np.generic)


def is_array_like(value: object) -> bool:
    """Return whether `value` is a list of plain numbers, at any depth: an array."""
    if not isinstance(value, list) or not value:
        return False
    return all(is_number(v) for v in value) or all(is_array_like(v) for v in value)


def is_variable(value: object) -> bool:
    """Return whether `value` is a `tf.Variable` or a `keras.Variable`."""
    return isinstance(value, tf.Variable | keras.Variable)


def describe(value: Any) -> str:
    """Return shape and dtype of an array, or type and value of anything else."""
    if is_variable(value):
        return f"a variable of shape {tuple(value.shape)}, {_dtype_name(value)}"
    if isinstance(value, tf.Tensor | np.ndarray):
        shape = tf.TensorShape(value.shape)
        known = "unknown" if shape.rank is None else tuple(shape)
        return f"shape {known}, {_dtype_name(value)}"
    if inspect.isroutine(value):  # its repr has an address in memory, and no more
        return f"the function `{value.__name__}`"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def require_bool(**options: Any) -> None:
    """Refuse options that are neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool | np.bool_):
            raise InvalidArgumentError(
                f"`{name}` must be True or False.",
                got=f"{name}={value!r}",
                hint=f"{name}=True",
            )


def name_of(function: Callable[..., Any]) -> str:
    """Return the name to call `function` by in a message or a tag."""
    inner = getattr(function, "python_function", function)
    name = getattr(inner, "__name__", None) or type(inner).__name__
    return "f" if name == "<lambda>" else str(name)


def argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """Return what `function` calls its first `count` positional arguments.

    >>> argument_names(lambda x, y, *rest: x, 3)
    ['x', 'y', 'args[2]']
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # builtins and some callables have no signature
        parameters = []
    named = [p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return [*named[:count], *(f"args[{i}]" for i in range(len(named), count))]


def named_leaves(nest: Nest, name: str) -> list[tuple[str, Any]]:
    """Return (name, leaf) pairs in `tf.nest` order, each named as one would type it.

    >>> named_leaves({"w": 1.0, "b": (2.0, 3.0)}, "params")
    [("params['b'][0]", 2.0), ("params['b'][1]", 3.0), ("params['w']", 1.0)]
    """
    if is_array_like(nest) or not tf.nest.is_nested(nest):
        return [(name, nest)]
    if isinstance(nest, Mapping):
        children = [(f"{name}[{key!r}]", nest[key]) for key in _keys(nest, name)]
    elif hasattr(nest, "_fields"):
        children = [(f"{name}.{field}", getattr(nest, field)) for field in nest._fields]
    elif isinstance(nest, list | tuple):
        children = [(f"{name}[{i}]", child) for i, child in enumerate(nest)]
    else:  # attrs classes, and whatever else tf.nest learns to take apart
        leaves = tf.nest.flatten(nest)
        return [(f"leaf {i} of {name}", leaf) for i, leaf in enumerate(leaves)]
    return [pair for path, child in children for pair in named_leaves(child, path)]


def map_leaves(function: Callable[[Any, str], Any], nest: Nest, name: str) -> Nest:
    """Return the nest of `function(leaf, name of the leaf)`, structured like `nest`."""
    leaves = [function(leaf, path) for path, leaf in named_leaves(nest, name)]
    return tf.nest.pack_sequence_as(_arrays_as_leaves(nest), leaves)


def weak_dtype(*nests: Nest) -> tf.DType:
    """Return the dtype of plain numbers beside `nests`: the widest float in them."""
    dtypes = []
    for leaf in (leaf for nest in nests for _, leaf in named_leaves(nest, "")):
        with contextlib.suppress(AttributeError, TypeError):  # NumPy's dates, texts
            dtypes.append(tf.as_dtype(leaf.dtype))
    floats = [dtype for dtype in dtypes if dtype.is_floating]
    return max(floats, key=lambda dtype: (dtype.size, dtype.name), default=tf.float32)


def to_tensors(nest: Nest, name: str, dtype: tf.DType | None = None) -> Nest:
    """Return `nest` with float tensors as leaves, ready to be differentiated.

    Args:
        nest: Float tensors, float arrays, variables (read), numbers, lists of numbers.
        name: What the caller calls it, for messages.
        dtype: What plain numbers become; None means `weak_dtype(nest)`.

    Raises:
        InvalidArgumentError: If a leaf is no float array; its name is in the message.
    """
    weak = weak_dtype(nest) if dtype is None else dtype
    return map_leaves(lambda leaf, path: to_tensor(leaf, path, weak), nest, name)


def to_tensor(leaf: Any, name: str, weak: tf.DType) -> tf.Tensor:
    """Return one leaf as a float tensor; plain numbers become `weak`."""
    if isinstance(leaf, tf.Tensor):
        tensor = leaf
    elif is_variable(leaf):
        tensor = tf.convert_to_tensor(leaf)
    elif is_number(leaf) or is_array_like(leaf):
        return tf.constant(_rectangular(leaf, name), weak)
    elif isinstance(leaf, np.ndarray | np.generic) or hasattr(leaf, "__array__"):
        tensor = _array_to_tensor(leaf, name)
    else:
        raise InvalidArgumentError(
            f"`{name}` must be made of float tensors, arrays or numbers.",
            got=f"`{name}` is {_article(leaf)}: {describe(leaf)}",
            hint="tf.constant(...) of the numbers in it, or leave it out of the nest",
        )
    if tensor.dtype.is_floating:
        return tensor
    if tensor.dtype.is_complex:
        raise InvalidArgumentError(
            f"`{name}` must be real: complex derivatives have no single convention.",
            got=f"`{name}` has {describe(tensor)}",
            hint="real and imaginary parts as two real arguments, tf.complex inside f",
        )
    raise InvalidArgumentError(
        f"`{name}` must be of a float dtype: integers have no derivative.",
        got=f"`{name}` has {describe(tensor)}",
        hint=f"tf.cast({name}, tf.float32), or write the numbers as floats",
    )


def variables_of(wrt: Nest) -> Nest:
    """Return the nest of `tf.Variable`s in `wrt`, modules replaced by lists of them.

    Args:
        wrt: A `tf.Variable`, `keras.Variable`, `tf.Module`, `keras.Model`, or a nest of
            them.

    Raises:
        InvalidArgumentError: If there is no variable, a value, or a non-float variable.
    """
    nest = map_leaves(_as_tf_variable, open_modules(wrt), "wrt")
    if not tf.nest.flatten(nest):
        raise InvalidArgumentError(
            "`wrt` must hold at least one variable.",
            got=f"wrt={describe(wrt)}, which holds none",
            hint="call the model once on an input to build it, or pass its variables",
        )
    return nest


def open_modules(wrt: Nest) -> Nest:
    """Return `wrt` with each module or model replaced by its list of variables."""
    return tf.nest.map_structure(
        lambda leaf: (
            list(leaf.trainable_variables)
            if hasattr(leaf, "trainable_variables")
            else leaf
        ),
        wrt,
    )


is_mapped: ContextVar[bool] = ContextVar("is_mapped", default=False)
"""Whether what is traced is the function of a `tf.vectorized_map`."""


def either(condition: tf.Tensor, a: Nest, b: Nest) -> Nest:
    """Return `a` where the condition holds, else `b`: leaf by leaf.

    The leaves of both have the same shapes, and the condition has shape `[]` or theirs:
    of other shapes, the two ops here make different things. Broadcasting takes
    `tf.where` four times as long for a number, and eight times for a short vector. Of
    the op without it, `tf.vectorized_map` makes half as much again for XLA to compile.
    """
    where = tf.where if is_mapped.get() else tf.compat.v1.where
    return tf.nest.map_structure(lambda x, y: where(condition, x, y), a, b)


def ravel(leaves: Iterable[tf.Tensor]) -> tf.Tensor:
    """Return the elements of all `leaves`, of one dtype, as a vector of shape `[n]`."""
    flat = [
        leaf
        if isinstance(leaf, tf.Tensor) and leaf.shape.rank == 1
        else tf.reshape(leaf, [-1])
        for leaf in leaves
    ]
    return flat[0] if len(flat) == 1 else tf.concat(flat, axis=0)


def unravel(vector: tf.Tensor, like: Iterable[Any]) -> list[tf.Tensor]:
    """Return the vector's elements in the shapes of `like`: the inverse of `ravel`."""
    like = list(like)
    if len(like) == 1 and like[0].shape.rank == 1:
        return [tf.convert_to_tensor(vector)]
    known = [leaf.shape.is_fully_defined() for leaf in like]
    pairs = list(zip(like, known, strict=True))
    shapes = [np.array(x.shape, np.int32) if k else tf.shape(x) for x, k in pairs]
    sizes = [x.shape.num_elements() if k else tf.size(x) for x, k in pairs]
    parts = [vector] if len(like) == 1 else tf.split(vector, sizes)
    return [tf.reshape(part, s) for part, s in zip(parts, shapes, strict=True)]


def same_keys(a: Nest, b: Nest) -> bool:
    """Return whether the dicts in two nests of one structure have the same keys."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return set(a) == set(b) and all(same_keys(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return all(same_keys(x, y) for x, y in zip(a, b, strict=False))
    return isinstance(a, Mapping) == isinstance(b, Mapping)


def _keys(nest: Mapping[Any, Any], name: str) -> list[Any]:
    """Return the keys of a dict in the order of tf.nest, or refuse it."""
    if not isinstance(nest, MutableMapping):
        raise InvalidArgumentError(
            "A mapping in a nest must be a dict, or another that can be copied.",
            got=f"`{name}` is {_article(nest)}",
            hint=f"dict({name})",
        )
    try:
        return sorted(nest)
    except TypeError:
        kinds = sorted({type(key).__name__ for key in nest})
        raise InvalidArgumentError(
            "The keys of a dict must be of one kind, so that they have an order.",
            got=f"`{name}` has keys of type {' and '.join(kinds)}",
            hint="text for all keys",
        ) from None


def _dtype_name(value: Any) -> str:
    try:
        return str(tf.as_dtype(value.dtype).name)
    except TypeError:  # NumPy's dates and structures
        return str(value.dtype)


def _article(leaf: object) -> str:
    return "missing" if leaf is None else f"of type {type(leaf).__name__}"


def _rectangular(leaf: Any, name: str) -> np.ndarray:
    try:
        return np.array(leaf, dtype=np.float64)
    except ValueError as error:
        lengths = sorted({len(row) for row in leaf})
        raise InvalidArgumentError(
            f"`{name}` must be rectangular: lists of numbers are one array.",
            got=f"`{name}` has rows of {' and '.join(map(str, lengths))} numbers",
            hint="a tuple or a dict of arrays, each with a shape of its own",
        ) from error


def _array_to_tensor(leaf: Any, name: str) -> tf.Tensor:
    array = np.asarray(leaf)
    try:
        return tf.convert_to_tensor(array)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise InvalidArgumentError(
            f"`{name}` must be an array of numbers that TensorFlow can hold.",
            got=f"`{name}` has shape {array.shape}, {array.dtype}",
            hint="numpy.asarray(..., dtype=float), with all rows of one length",
        ) from error


def _arrays_as_leaves(nest: Nest) -> Nest:
    """Return `nest` with None for each list of numbers, as a template to pack."""
    if is_array_like(nest):
        return None
    if isinstance(nest, MutableMapping):
        template = copy.copy(nest)  # keeps the type: OrderedDict, defaultdict, ...
        for key, child in nest.items():
            template[key] = _arrays_as_leaves(child)
        return template
    if hasattr(nest, "_fields"):
        return type(nest)(*map(_arrays_as_leaves, nest))
    if isinstance(nest, list | tuple):
        return type(nest)(map(_arrays_as_leaves, nest))
    return nest


def _as_tf_variable(leaf: Any, name: str) -> tf.Variable:
    if not is_variable(leaf):
        raise InvalidArgumentError(
            "`wrt` names variables; values are positional arguments.",
            got=f"`{name}` is {describe(leaf)}",
            hint="the tf.Variable that the function reads, or an argument of its own",
        )
    variable: tf.Variable = leaf.value if isinstance(leaf, keras.Variable) else leaf
    if not variable.dtype.is_floating:
        raise InvalidArgumentError(
            f"`{name}` must be a real float variable.",
            got=f"{leaf.name!r} of {describe(variable)}",
            hint="leave it out of `wrt`, or make it a float variable",
        )
    return variable
