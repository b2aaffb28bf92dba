"""Whether a function is the one of another process, as far as reading it can tell."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import numpy as np
import tensorflow as tf

NUMBERS = (bool, int, float, complex, str, np.ndarray, np.generic, tf.Tensor)


def fingerprint(f: Callable[..., Any]) -> str:
    """Return a digest of a function's code and of the numbers that it names.

    Of equal ones it is equal, under one version of Python. Two that differ elsewhere,
    as in functions that they call, may share it; "" is that of what is not written in
    Python.
    """
    function = inspect.unwrap(getattr(f, "python_function", f))
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return ""
    digest = hashlib.sha256()
    for part in (*_parts_of_code(code), *_parts_of_names(function)):
        digest.update(part)
        digest.update(b"|")
    return digest.hexdigest()


def _parts_of_code(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts_of_code(constant)
        else:
            yield repr(constant).encode()


def _parts_of_names(function: Any) -> Iterator[bytes]:
    """Yield the numbers behind the names in a function, and its defaults."""
    values: dict[Any, Any] = dict(enumerate(function.__defaults__ or ()))
    # A name of an outer function may have none yet; a compiled function tells none.
    with contextlib.suppress(ValueError, TypeError):
        names = inspect.getclosurevars(function)
        values = {**values, **names.globals, **names.nonlocals}
    for name, value in values.items():
        if isinstance(value, NUMBERS) and not tf.is_symbolic_tensor(value):
            array = np.asarray(value)
            if array.dtype.hasobject:  # of which the bytes are addresses
                array = np.array(str(array.tolist()))
            yield f"{name} {array.dtype}{array.shape}".encode() + array.tobytes()
