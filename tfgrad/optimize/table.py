"""The history of a run under way."""

from __future__ import annotations

import numpy as np

from tfgrad.optimize.loop import Rows
from tfgrad.optimize.result import History


class Table:
    """Rows, appended in place: the end of a long run must not wait for a copy."""

    def __init__(self) -> None:
        """Begin with none."""
        self._columns: History = {}
        self._count = 0

    def append(self, rows: Rows) -> None:
        """Add rows; memory doubles when it is full."""
        count = self._count + len(rows)
        for name, column in rows.columns.items():
            kept = self._columns.setdefault(name, column[:0])
            if len(kept) < count:
                shape = (max(count, 2 * self._count), *column.shape[1:])
                self._columns[name] = np.empty(shape, column.dtype)
                self._columns[name][: self._count] = kept[: self._count]
            self._columns[name][self._count : count] = column
        self._count = count

    def columns(self) -> History:
        """Return the rows so far, by column."""
        return {name: column[: self._count] for name, column in self._columns.items()}
