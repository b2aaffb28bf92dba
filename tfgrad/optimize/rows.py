"""The starts and the arguments of many problems: arrays with a row for each."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.tapes import is_watched
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    is_variable,
    map_leaves,
    named_leaves,
    to_tensors,
    weak_dtype,
)
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.history import Array, split
from tfgrad.optimize.problem import Problem

CLOSED = "a closure over what is the same in all rows: lambda x, y: f(x, y, a)"


class Starts:
    """The starts and the arguments of many problems, as for `minimize_many`, checked.

    Attributes:
        count: How many there are.
        first: The start of the first.
        data: The arguments of the first, tensors.
        arrays: The leaves of all arguments, with a row for each problem.
        x: The starts as vectors, shape `[count, n]`.

    Raises:
        InvalidArgumentError: If the numbers of rows differ, or there are none.
    """

    def __init__(self, f: Any, x0s: Nest, args: tuple[Nest, ...]) -> None:
        for path, leaf in named_leaves(x0s, "x0s"):
            if is_variable(leaf):
                raise InvalidArgumentError(
                    "`x0s` holds values, with a row for each problem.",
                    got=f"`{path}` is {describe(leaf)}",
                    hint="variable.numpy() as the start",
                )
        starts = to_tensors(x0s, "x0s", weak_dtype(x0s, *args))
        leaves = [leaf.numpy() for leaf in tf.nest.flatten(starts)]
        dtypes = sorted({leaf.dtype.name for leaf in leaves})
        if len(dtypes) != 1:
            raise InvalidArgumentError(
                "The starts must be of one dtype.",
                got=f"leaves of {' and '.join(dtypes) or 'nothing'}",
                hint="np.float64 for all of them",
            )
        dtype = leaves[0].dtype

        nests, named = [], []
        for i, nest in enumerate(args):
            name = f"args[{i}]"
            arrays = map_leaves(functools.partial(_array, dtype=dtype), nest, name)
            nests.append(arrays)
            named += named_leaves(arrays, name)
        self.arrays = [array for _, array in named]
        own = named_leaves(tf.nest.pack_sequence_as(starts, leaves), "x0s")
        self.count = _count(named or own)
        shared = any(leaf.shape[:1] != (self.count,) for leaf in leaves)
        self.data = tuple(
            tf.nest.map_structure(lambda a: tf.constant(a[0]), nest) for nest in nests
        )
        if named and not shared and all(leaf.ndim == 1 for leaf in leaves):
            # As many numbers as there are rows: one for each, or all for each.
            row = tf.nest.pack_sequence_as(starts, [tf.constant(a[0]) for a in leaves])
            shared = not _takes(f, row, self.data) and _takes(f, starts, self.data)
        first = [tf.constant(leaf if shared else leaf[0]) for leaf in leaves]
        self.first = tf.nest.pack_sequence_as(starts, first)
        self._check_dtypes(f, named, dtype)
        if sum(leaf.shape.num_elements() for leaf in first) == 0:
            raise InvalidArgumentError(
                "A start must hold at least one number.",
                got=f"x0s={describe(x0s)}",
                hint="an array with a row for each problem",
            )
        self.x = self.vectors(leaves, shared=shared)

    def _check_dtypes(self, f: Any, named: list[tuple[str, Array]], dtype: Any) -> None:
        """Refuse arguments that f takes in the dtype of the starts only."""
        others = [(path, array) for path, array in named if array.dtype != dtype]
        if not others or _takes(f, self.first, self.data):
            return
        cast = tf.nest.map_structure(lambda a: tf.cast(a, dtype), self.data)
        if _takes(f, self.first, cast):
            found = [f"`{path}` is {array.dtype.name}" for path, array in others]
            raise InvalidArgumentError(
                "Tensors and integers among the arguments keep their dtype, and f "
                "must be able to take it.",
                got=f"{', '.join(found)}, beside starts of {dtype.name}",
                hint=f"tf.cast({others[0][0]}, tf.{dtype.name})",
            )

    def arguments(self, index: int) -> tuple[Nest, ...]:
        """Return what f takes besides x in one row: nests of tensors."""
        leaves = [tf.constant(array[index]) for array in self.arrays]
        packed: tuple[Nest, ...] = tf.nest.pack_sequence_as(self.data, leaves)
        return packed

    def vectors(self, leaves: list[Array], *, shared: bool) -> Array:
        """Return leaves as vectors, `[count, n]`: a view of one row if it is shared."""
        if shared:
            row = np.concatenate([np.ravel(leaf) for leaf in leaves])
            return np.broadcast_to(row, (self.count, row.size))
        parts = [np.reshape(leaf, (self.count, -1)) for leaf in leaves]
        return np.concatenate(parts, axis=1)

    def unraveled(self, vectors: Array) -> Nest:
        """Return vectors `[count, n]` in the structure of the starts."""
        leaves = split(vectors, tf.nest.flatten(self.first))
        return tf.nest.pack_sequence_as(self.first, leaves)


def sides_of(problem: Problem, rows: Starts, bounds: Any) -> list[Array]:
    """Return lower and upper bounds, `[count, n]` each; nothing if there are none."""
    if bounds is None:
        return []
    own: list[Any] = [None, None]
    if isinstance(bounds, tuple) and len(bounds) == 2:
        own = [_with_rows(rows, side) for side in bounds]
        pairs = zip(own, bounds, strict=True)
        bounds = tuple(None if found is not None else side for found, side in pairs)
    shared = Limits(problem, bounds, ())
    pairs = zip(own, (shared.lower, shared.upper), strict=True)
    sides = [np.asarray(b if a is None else a, rows.x.dtype) for a, b in pairs]
    lower, upper = (np.broadcast_to(side, rows.x.shape) for side in sides)
    is_wrong = np.any(~(lower <= upper), axis=1)
    if np.any(is_wrong):
        row = int(np.argmax(is_wrong))
        raise InvalidArgumentError(
            "No lower bound may be above its upper bound, and none may be NaN.",
            got=f"row {row}: lower {lower[row]}, upper {upper[row]}",
            hint="bounds=(lower, upper), in this order",
        )
    return [lower, upper]


def _takes(f: Any, x: Nest, data: tuple[Nest, ...]) -> bool:
    """Return whether f can be called so."""
    python = getattr(f, "python_function", f)  # a tf.function would be traced for it
    try:
        python(x, *data)
    except Exception:  # a user's function may raise anything
        return False
    return True


def _array(leaf: Any, path: str, dtype: Any) -> Array:
    """Return an argument as an array; NumPy's floats and numbers in `dtype`."""
    if is_variable(leaf) or isinstance(leaf, tf.Tensor):
        tensor = tf.convert_to_tensor(leaf)
        if is_watched(tensor):
            raise InvalidArgumentError(
                "Many minimisations cannot be differentiated by what they are given.",
                got=f"`{path}` is {describe(leaf)}, which a tape watches",
                hint="tfgrad.solution(f, x0, *args) of each row, which has a "
                "derivative; or the call outside of the tape",
            )
        return np.asarray(tensor)
    array = np.asarray(leaf)
    if array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"`{path}` must be an array of numbers, with a row for each problem.",
            got=f"`{path}` is {describe(leaf)}",
            hint=CLOSED,
        )
    return array.astype(dtype, copy=False) if array.dtype.kind == "f" else array


def _count(named: list[tuple[str, Array]]) -> int:
    """Return the number of rows that all leaves have."""
    for path, leaf in named:
        if leaf.ndim == 0:
            raise InvalidArgumentError(
                f"`{path}` must have an axis in front, with a row for each problem.",
                got=f"`{path}` has shape ()",
                hint=CLOSED,
            )
    counts = {path: len(leaf) for path, leaf in named}
    if len(set(counts.values())) > 1:
        some = ", ".join(f"`{path}` has {count}" for path, count in counts.items())
        raise InvalidArgumentError(
            "All arguments must have the same number of rows, one for each problem.",
            got=some,
            hint=CLOSED,
        )
    count = next(iter(counts.values()))
    if count == 0:
        raise InvalidArgumentError(
            "There must be at least one row.",
            got=f"`{named[0][0]}` has shape {named[0][1].shape}",
            hint="arrays with a row for each problem",
        )
    return count


def _with_rows(rows: Starts, side: Any) -> Array | None:
    """Return a side of the bounds that has a row for each problem, as vectors."""
    given = named_leaves(side, "x")
    like = named_leaves(rows.first, "x")
    leaves = [np.asarray(leaf) for _, leaf in given]
    fits = all(leaf.dtype.kind in "fiu" for leaf in leaves)
    found = {path: leaf.shape for (path, _), leaf in zip(given, leaves, strict=True)}
    fits &= found == {path: (rows.count, *leaf.shape) for path, leaf in like}
    return rows.vectors(leaves, shared=False) if fits else None
