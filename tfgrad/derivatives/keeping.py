"""Which functions may keep a compiled form: those whose meaning cannot change.

`jvp` and `vjp` take the function anew at each call. A trace holds the values that the
function read from outside when it was traced. So it may be used again only if none of
them can have changed: for a `tf.function`, whose own rule that is, and for a function
that reads numbers, text, tensors, variables, libraries, and functions of the same kind.
"""

from __future__ import annotations

import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import tensorflow as tf

MOST_FUNCTIONS = 16
"""User functions whose compiled forms are kept; the least recently used goes first."""

_CONSTANT = (bool, int, float, complex, str, bytes, type(None), tf.DType)

_LIBRARIES = {"tensorflow", "keras", "numpy", "math", "scipy", "tfgrad", "builtins"}

_kept: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()
_lock = threading.Lock()


def kept(make: Callable[..., Any], f: Any, *options: Any) -> Any:
    """Return `make(f, *options)`, the same object as before where that is safe."""
    state = _state(f, set())
    if state is None:
        return make(f, *options)
    key = (make, *options, *state)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key][0]
    made = make(f, *options)
    with _lock:
        _kept[key] = made, f  # an object that is kept alive keeps its id
        if len(_kept) > MOST_FUNCTIONS:
            _kept.popitem(last=False)
    return made


def _state(value: Any, seen: set[int]) -> tuple[Any, ...] | None:
    """Return a key that changes with the value; None if it can change unnoticed."""
    if isinstance(value, _CONSTANT):
        return type(value), value
    if isinstance(value, tf.Tensor | tf.Variable | types.BuiltinFunctionType):
        return (id(value),)
    if hasattr(value, "python_function"):  # a tf.function
        return (id(value),)
    if isinstance(value, types.ModuleType):
        return (id(value),) if _is_library(value.__name__) else None
    if _is_library(getattr(value, "__module__", None) or ""):
        is_fixed = isinstance(value, types.FunctionType | type | tf.Module)
        return (id(value),) if is_fixed else None
    if not isinstance(value, types.FunctionType):
        return None
    if id(value) in seen:
        return (id(value),)
    seen.add(id(value))
    states = [_state(part, seen) for part in _read(value)]
    if any(state is None for state in states):
        return None
    return id(value.__code__), *map(tuple, filter(None, states))


def _read(function: types.FunctionType) -> list[Any]:
    """Return what a function reads from outside: closure, defaults and globals."""
    cells = function.__closure__ or ()
    values = [cell.cell_contents for cell in cells if _is_filled(cell)]
    values += function.__defaults__ or ()
    values += (function.__kwdefaults__ or {}).values()
    names = _names(function.__code__)
    return values + [
        function.__globals__[n] for n in names if n in function.__globals__
    ]


def _names(code: types.CodeType) -> list[str]:
    """Return the names that a function, or one within it, may read from its module."""
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return [*code.co_names, *(name for each in inner for name in _names(each))]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None or True
    except ValueError:
        return False


def _is_library(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in _LIBRARIES
