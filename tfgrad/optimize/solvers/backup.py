"""The variables as they were before the last step, at the cost of what the step moves.

A step that moves a few rows of a large table must not copy the table. So where an
optimizer moves no other rows than those of a sparse gradient, the backup takes over the
rows that the step before has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class Backup:
    """Copies of the variables that an optimizer moves.

    Attributes:
        variables: The copies, each of a shape and dtype as in `moved`.
    """

    def __init__(
        self, moved: Sequence[tf.Variable], owners: Sequence[Any], optimizer: Any
    ) -> None:
        self._moved = list(moved)
        self.variables = [tf.Variable(v, trainable=False) for v in moved]
        free = [getattr(owner, "constraint", None) is None for owner in owners]
        is_fit = _moves_rows_alone(optimizer) and all(free)
        self._is_behind: tf.Variable | None = None  # by no more rows than `_rows`
        if is_fit:
            self._is_behind = tf.Variable(tf.constant(False), trainable=False)
        self._rows: dict[int, tf.Variable] = {}

    def keep(self, gradient: Sequence[Any]) -> None:
        """Copy the variables, which are moved next; it may be part of a trace.

        Args:
            gradient: What they are moved by, a tensor or `tf.IndexedSlices` for each.
        """
        parts = zip(self.variables, self._moved, gradient, strict=True)
        for i, (kept, variable, slices) in enumerate(parts):
            if self._is_behind is None or not isinstance(slices, tf.IndexedSlices):
                kept.assign(variable.read_value())
                continue
            if i not in self._rows:
                with tf.init_scope():
                    self._rows[i] = _row_numbers(slices.indices.dtype)
            rows = self._rows[i]
            tf.cond(
                self._is_behind.read_value(),
                lambda kept=kept, variable=variable, rows=rows: _take_over(
                    kept, variable, rows.read_value()
                ),
                lambda kept=kept, variable=variable: kept.assign(
                    variable.read_value(), read_value=False
                ),
            )
            rows.assign(slices.indices)
        if self._rows and self._is_behind is not None:
            self._is_behind.assign(True)

    def forget(self) -> None:
        """Copy all with the next step: somebody else may have changed the variables."""
        if self._is_behind is not None:
            self._is_behind.assign(False)


def _take_over(kept: tf.Variable, variable: tf.Variable, rows: tf.Tensor) -> Any:
    values = variable.sparse_read(rows)
    return kept.scatter_update(tf.IndexedSlices(values, rows)).op


def _row_numbers(dtype: tf.DType) -> tf.Variable:
    """Return a variable for as many row numbers as come."""
    none = tf.zeros([0], dtype)
    return tf.Variable(none, shape=[None], trainable=False, validate_shape=False)


def _moves_rows_alone(optimizer: Any) -> bool:
    """Return whether a sparse gradient leaves all other rows as they are."""
    if type(optimizer) is not keras.optimizers.SGD:
        return False
    others = ("momentum", "weight_decay", "use_ema", "gradient_accumulation_steps")
    return not any(getattr(optimizer, name, None) for name in others)
