"""What may be logged: each value checked and converted before anything is written."""

from __future__ import annotations

import contextlib
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError

_RESERVED = "_hparams_/"

_REAL_KINDS = "biufV"
"""NumPy's kinds of dtypes for real numbers; "V" is that of bfloat16 and its kin."""


def to_step(value: Any, name: str) -> int:
    """Return `value` as a step: a whole number from 0 up, of any integer type."""
    try:
        if type(value) is not int and nested.is_variable(value):
            value = as_array(value)
        step = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        step = -1
    if 0 <= step < 2**63:
        return step
    raise InvalidArgumentError(
        "A step is a whole number, 0 or more.",
        got=f"{name}={nested.describe(value)}",
        hint=f"{name}=0 for the start, then the number of steps done",
    )


def to_number(value: Any, tag: str) -> float:
    """Return `value` as one float; NaN and infinities are numbers here."""
    if type(value) is float:
        return value
    with contextlib.suppress(OverflowError):  # 10**400
        if isinstance(value, numbers.Real):  # Python's, and NumPy's scalars
            return float(value)
        array = real_array(value)
        if array is not None and array.ndim == 0:
            return float(array)
    raise InvalidArgumentError(
        "A scalar is one real number.",
        got=f"{tag!r} is {nested.describe(value)}",
        hint="float(...) of a number, tf.reduce_mean of a vector, .text for a string",
    )


def to_steps(values: Any) -> np.ndarray:
    """Return `values` as int64 steps of shape `[n]` that grow."""
    steps = as_array(values) if real_array(values) is not None else np.asarray(None)
    if steps.size == 0 and steps.ndim == 1:
        return steps.astype(np.int64)
    if steps.ndim != 1 or steps.dtype.kind not in "iu":
        raise InvalidArgumentError(
            "The steps of a history are one row of whole numbers.",
            got=f"steps of {_describe(values)}",
            hint="range(len(values)), or an integer array of shape (n,)",
        )
    falls = np.flatnonzero(steps[1:] <= steps[:-1])
    if falls.size:
        at = int(falls[0])
        raise InvalidArgumentError(
            "The steps of a history grow from row to row.",
            got=f"step {steps[at + 1]} after step {steps[at]}, in row {at + 1}",
            hint="one call for each pass over the steps, each in a run of its own",
        )
    for row in (0, -1):
        to_step(steps[row], f"steps[{row}]")
    return steps.astype(np.int64)


def to_column(values: Any, tag: str, length: int) -> np.ndarray:
    """Return `values` as float64 of shape `[length]`."""
    column = real_array(values)
    if column is not None and column.shape == (length,):
        return column
    raise InvalidArgumentError(
        "A history has one real number per step and tag.",
        got=f"{tag!r} is {_describe(values)}, for {length} steps",
        hint='arrays of one length; a column of a matrix as {"x/0": x[:, 0], ...}',
    )


def is_array(value: Any) -> bool:
    """Return whether `value` is a tensor, a variable, or NumPy's array or number."""
    kinds = np.ndarray | np.generic | tf.Tensor
    return isinstance(value, kinds) or nested.is_variable(value)


def as_array(value: Any) -> np.ndarray:
    """Return a tensor, variable or anything that NumPy takes as an array."""
    # np.asarray alone fails for a bfloat16 tensor of shape [].
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def real_array(value: Any) -> np.ndarray | None:
    """Return `value` as a float64 array; None if it does not hold real numbers."""
    try:
        array = as_array(value)
        return array.astype(np.float64) if array.dtype.kind in _REAL_KINDS else None
    except (TypeError, ValueError, NotImplementedError):
        return None  # a ragged list, a symbolic tensor, a structured dtype


def to_text(value: str) -> str:
    r"""Return `value` with the characters escaped that UTF-8 does not have.

    Half a surrogate pair, as in the name of a file that is no UTF-8, becomes "\udc80".
    """
    return value.encode("utf-8", "backslashreplace").decode()


def check_tag(tag: Any) -> None:
    """Raise unless `tag` can name a curve: a string that is not empty."""
    if isinstance(tag, str) and tag and tag.isprintable():
        if not tag.startswith(_RESERVED):
            return
        raise InvalidArgumentError(
            f'Tags that begin with "{_RESERVED}" are those of the HParams tab.',
            got=f"tag={tag!r}",
            hint="Run(..., hparams={...}), or another tag",
        )
    raise InvalidArgumentError(
        "A tag is a string of printable characters, and not empty.",
        got=f"tag={tag!r}",
        hint='a name such as "loss" or "gradient/norm"',
    )


def check_mapping(value: Any, name: str) -> None:
    """Raise unless `value` is a mapping."""
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(
            f"`{name}` maps names to values.",
            got=f"{name}={nested.describe(value)}",
            hint='a dict such as {"loss": 0.5}',
        )


def _describe(values: Any) -> str:
    if isinstance(values, list | tuple):
        return f"a {type(values).__name__} of {len(values)}"
    return nested.describe(values)
