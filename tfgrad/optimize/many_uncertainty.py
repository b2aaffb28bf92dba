"""How well the parameters of many results are known: `uncertainty`, all rows at once.

References:
    `tfgrad.optimize.uncertainty` for those.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.matrices import hvp
from tfgrad.derivatives.tracing import quiet
from tfgrad.derivatives.vectorized import is_straight
from tfgrad.differences import EPSILONS
from tfgrad.nested import Nest, name_of, ravel, unravel
from tfgrad.optimize.blocks import by_rows, mapped, slots_for
from tfgrad.optimize.history import Array
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.rows import Starts
from tfgrad.optimize.uncertainty import OfFunction, spread_of_square


@dataclass(frozen=True)
class OfRows:
    """A function that was minimised in many rows, to be asked for second derivatives.

    The rows ended at `x`, shape `[count, n]`; `sides` are their bounds, if any.
    """

    f: Any
    rows: Starts
    sides: list[Array]
    x: Array

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing: functions seldom can be."""
        return type(None), ()

    def of(self, index: int) -> OfFunction:
        """Return what the result of one row asks for its errors."""

        def of_row(x: Nest) -> Any:
            return self.f(x, *self.rows.arguments(index))

        of_row.__name__ = name_of(self.f)
        pairs = [self.rows.unraveled(side[index : index + 1]) for side in self.sides]
        bounds = [tf.nest.map_structure(lambda b: b[0], side) for side in pairs]
        return OfFunction(
            of_row, None, Problem, has_aux=False, bounds=tuple(bounds) or None
        )

    def covariance(self) -> Array:
        """Return the inverse of the Hessian of each row, `[count, n, n]`."""
        is_held = np.zeros(self.x.shape, bool)
        if self.sides:
            lower, upper = self.sides
            is_held = (self.x <= lower) | (self.x >= upper)
        square = hessians(self.f, self.rows, self.x)
        epsilon = EPSILONS[tf.as_dtype(self.x.dtype)]
        spread = spread_of_square(square, 1.0, is_held, epsilon)
        covariance = spread.covariance()
        covariance[np.any(spread.loose, axis=(1, 2))] = np.nan
        return covariance.astype(self.x.dtype)


def hessians(f: Any, rows: Starts, x: Array) -> Array:
    """Return the Hessian of each row at x, shape `[count, n, n]`."""
    product, leaves = hvp(f), tf.nest.flatten(rows.first)
    identity = tf.eye(x.shape[1], dtype=x.dtype)

    def column(unit: tf.Tensor, row: list[tf.Tensor]) -> tf.Tensor:
        of_row = tf.nest.pack_sequence_as(rows.data, row[1:])
        point, direction = (
            tf.nest.pack_sequence_as(rows.first, unravel(v, leaves))
            for v in (row[0], unit)
        )
        return ravel(tf.nest.flatten(product(point, *of_row, direction)))

    arrays = [x, *rows.arrays]
    first = [tf.constant(array[0]) for array in arrays]
    column(identity[0], first)  # the first answer is verified
    one = tf.function(column, autograph=False).get_concrete_function(identity[0], first)
    spec = tf.TensorSpec(identity[0].shape, identity.dtype)
    width = slots_for(sum(array[:1].nbytes for array in arrays), len(x))
    specs = [tf.TensorSpec([width, *array.shape[1:]], array.dtype) for array in arrays]

    def columns(*, vectorises: bool) -> Any:
        def of_block(unit: tf.Tensor, block: list[tf.Tensor]) -> Any:
            by_row = functools.partial(column, unit)
            return mapped(by_row, block, spec, vectorises=vectorises)

        traced = tf.function(of_block, autograph=False)
        with quiet():
            return traced.get_concrete_function(spec, specs)

    is_fast = is_straight(one.graph.get_operations())
    columns_of = by_rows(columns, may_vectorise=is_fast)
    found = np.empty([*x.shape, x.shape[1]], x.dtype)
    for begin in range(0, len(x), width):
        some = np.arange(begin, min(begin + width, len(x)))
        # A block is always full: it is traced once.
        block = [tf.constant(array[np.resize(some, width)]) for array in arrays]
        for j, unit in enumerate(identity):
            found[some, :, j] = columns_of(unit, block).numpy()[: len(some)]
    return found
