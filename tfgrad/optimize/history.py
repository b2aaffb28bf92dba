"""Rows: what happened at each step of a run, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

History = dict[str, Array]
"""Arrays by name, one row per state: row k is the point after k steps."""


@dataclass(frozen=True)
class Rows:
    """What happened at consecutive steps: arrays with one row per step.

    Attributes:
        columns: By name, arrays of shape `[rows, ...]`; `step` and `seconds` among
            them.
    """

    columns: History

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def part(self, which: Any) -> Rows:
        """Return the rows that a slice, or an array of indices or bools, selects."""
        return Rows({name: column[which] for name, column in self.columns.items()})

    def timed(self, began: float, ended: float) -> Rows:
        """Return the rows with `seconds`, spread evenly over (began, ended]."""
        seconds = np.linspace(began, ended, len(self) + 1)[1:]
        return Rows({**self.columns, "seconds": seconds})


def split(vectors: Any, like: list[Any]) -> list[Array]:
    """Return vectors `[rows, n]` as leaves with these shapes behind an axis of rows."""
    shapes = [tuple(leaf.shape) for leaf in like]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    pairs = zip(np.split(vectors, ends, axis=1), shapes, strict=True)
    return [part.reshape(len(part), *shape) for part, shape in pairs]


class Table:
    """The rows of a run under way, appended in place."""

    def __init__(self, columns: History | None = None) -> None:
        self._columns: History = dict(columns or {})
        self._count = len(Rows(self._columns))

    def append(self, rows: Rows) -> None:
        """Add rows; a column that they, or those before, do not have is NaN there."""
        count = self._count + len(rows)
        for name in {**self._columns, **rows.columns}:
            new, old = rows.columns.get(name), self._columns.get(name)
            new = _unknown(old, len(rows)) if new is None else new
            old = _unknown(new, self._count) if old is None else old
            if len(old) < count:
                shape = (max(count, 2 * self._count), *new.shape[1:])
                grown = np.empty(shape, new.dtype)
                grown[: self._count] = old[: self._count]
                old = grown
            old[self._count : count] = new
            self._columns[name] = old
        self._count = count

    def columns(self) -> History:
        """Return the rows so far, by column."""
        return {name: column[: self._count] for name, column in self._columns.items()}


def _unknown(like: Any, count: int) -> Array:
    is_real = like.dtype.kind not in "iub"
    return np.full((count, *like.shape[1:]), np.nan if is_real else 0, like.dtype)
