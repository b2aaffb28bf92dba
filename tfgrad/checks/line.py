"""A function along a line through a point: its values, their noise, its kinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from tfgrad.checks.scalar import Point, inner
from tfgrad.differences import Array, rounding_error


@dataclass(frozen=True)
class Line:
    """A scalar function as one argument moves along a direction.

    Attributes:
        evaluate: The function, of arrays shaped like those of the point.
        point: Where the line is at 0.
        index: Which argument moves.
        direction: Along what.
        gradient: The gradient with respect to that argument, by autodiff.
    """

    evaluate: Callable[[Sequence[Array]], float]
    point: Point
    index: int
    direction: Array
    gradient: Array
    _known: dict[float, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, t: float) -> Array:
        """Return the value at `t`, corrected for the rounding of the argument."""
        return np.asarray(self._values(t)[1])

    @property
    def nearest(self) -> float:
        """The smallest |t| so far at which there is a value, apart from 0."""
        return min(abs(t) for t in self._known if t)

    def noise(self, spacing: float, largest: float) -> float:
        """Return the rounding error of the values, by Hamming's differences.

        Args:
            spacing: The first spacing. It grows while the values hardly change.
            largest: The largest one.
        """
        while True:
            places = spacing * np.arange(-4, 5)
            pairs = [self._values(t) for t in places]
            if len({raw for raw, _ in pairs}) > 5:
                break
            if spacing >= largest:  # flat, with jumps at most: nothing is rounded here
                return 0.0
            spacing *= 4
        return float(rounding_error(np.array([corrected for _, corrected in pairs])))

    def kink(self, steps: Sequence[float], noise: float) -> tuple[float, float] | None:
        """Return the slopes on both sides, if no smaller step closes the gap."""
        with np.errstate(all="ignore"):  # one side may be outside of the domain
            left = [float((self(0.0) - self(-h)) / h) for h in steps]
            right = [float((self(h) - self(0.0)) / h) for h in steps]
        gaps = np.abs(np.subtract(right, left))
        resolved = [k for k, h in enumerate(steps) if 20 * noise / h < max(gaps)]
        if not resolved or not gaps[resolved[-1]] > 0.5 * max(gaps):
            return None
        return left[resolved[-1]], right[resolved[-1]]

    def _values(self, t: float) -> tuple[float, float]:
        """Return the value at `t` as it is, and corrected for rounding."""
        if t not in self._known:
            self._known[t] = self._new_values(t)
        return self._known[t]

    def _new_values(self, t: float) -> tuple[float, float]:
        moved = list(self.point.arrays)
        moved[self.index] = moved[self.index] + t * self.direction
        try:
            value = self.evaluate(moved)
        except tf.errors.OpError:  # not defined there, as for a singular matrix
            return np.nan, np.nan
        # The argument is rounded to its dtype. To first order that moves the value by
        # the gradient times the rounding, which is known exactly here.
        held = self.point.cast(self.index, moved[self.index]).astype(np.float64)
        rounding = held - moved[self.index]
        return value, value - inner(self.gradient, rounding)
