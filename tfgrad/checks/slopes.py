"""One slope against a finite difference: the verdict, and the elements to blame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tensorflow as tf

from tfgrad.checks.report import Element
from tfgrad.checks.scalar import Point
from tfgrad.differences import Array, line_derivative, step_for

_MOST_ELEMENTS = 5
"""How many wrong elements are looked for."""

_FEW = 64
"""Up to so many elements are looked at one by one."""


@dataclass(frozen=True)
class Slope:
    """A derivative along one direction, by autodiff and by finite differences.

    Attributes:
        autodiff: The gradient times the direction.
        numerical: The finite difference.
        error: Its error estimate.
        rtol: The relative disagreement that is allowed beyond three error estimates.
        kink: The slopes on the left and on the right, where they stay apart.
    """

    autodiff: float
    numerical: float
    error: float
    rtol: float
    kink: tuple[float, float] | None = None

    @property
    def scale(self) -> float:
        """The size of the slope."""
        return max(abs(self.autodiff), abs(self.numerical))

    @property
    def excess(self) -> float:
        """How far the disagreement is beyond what is allowed."""
        allowed = self.rtol * self.scale + 3 * self.error
        return abs(self.autodiff - self.numerical) - allowed

    @property
    def verdict(self) -> str:
        """Return "pass", "fail" or "inconclusive"."""
        if not np.isfinite(self.autodiff):
            return "fail"
        if not np.isfinite(self.error):
            return "inconclusive"
        if self.excess > 0:
            return "inconclusive" if self.is_subgradient else "fail"
        # An error bar of 5 % of the slope lets errors of that size through.
        return "inconclusive" if 3 * self.error > 0.05 * self.scale else "pass"

    @property
    def is_subgradient(self) -> bool:
        """Whether autodiff answers between the two slopes of a kink."""
        if self.kink is None:
            return False
        slack = self.rtol * max(map(abs, self.kink)) + 3 * self.error
        return min(self.kink) - slack <= self.autodiff <= max(self.kink) + slack


class Probe:
    """A scalar function near a point, with its gradient by autodiff.

    Args:
        evaluate: The function, of arrays shaped like those of the point.
        point: The point.
        gradient: What autodiff says there, one array for each of the point.
        epsilon: The machine epsilon of the coarsest dtype in the function.
        magnitude: The size of the terms that it sums.
        rtol: The relative disagreement that is allowed.
    """

    def __init__(
        self,
        evaluate: Callable[[Sequence[Array]], float],
        point: Point,
        gradient: Sequence[Array],
        *,
        epsilon: float,
        magnitude: float,
        rtol: float,
    ) -> None:
        """Evaluate nothing yet."""
        self._evaluate = evaluate
        self._point = point
        self._gradient = gradient
        self._epsilon = epsilon
        self._magnitude = magnitude
        self._rtol = rtol

    def slope(self, index: int, direction: Array) -> Slope:
        """Return the slope as argument `index` moves along `direction`."""
        line = _Line(self._line(index, direction))
        moving = self._point.arrays[index][direction != 0]
        step = step_for([moving], self._epsilon)
        autodiff = float(np.vdot(self._gradient[index], direction))

        def compare(noise: float, kink: tuple[float, float] | None = None) -> Slope:
            numerical, error = line_derivative(line, step, self._epsilon, noise=noise)
            return Slope(autodiff, float(numerical), float(error), self._rtol, kink)

        size = max(abs(float(line(0.0))), self._magnitude)
        slope = compare(8 * self._epsilon * size)
        if slope.verdict == "pass" and 3 * slope.error <= 3e-3 * slope.scale:
            return slope
        # The guess of the noise decides this verdict, so the noise is measured.
        slope = compare(max(3 * _noise(line), self._epsilon * size))
        if slope.verdict == "pass":
            return slope
        kink = self._kink(line, step)
        return replace(slope, kink=kink)

    def wrong_elements(
        self, index: int, full: bool
    ) -> tuple[tuple[Element, ...], bool]:
        """Return wrong elements of the gradient of one argument, and whether all.

        Args:
            index: Which argument.
            full: Look at all elements one by one. Otherwise, if there are many, groups
                of them that are wrong are halved until a few are found.
        """
        shape = self._point.arrays[index].shape
        size = int(np.prod(shape))
        complete = full or size <= _FEW
        groups = [np.array([i]) for i in range(size)] if complete else [np.arange(size)]
        found: list[tuple[float, Element]] = []
        while groups and (complete or len(found) < _MOST_ELEMENTS):
            group = groups.pop(0)
            direction = np.zeros(size)
            # Signs keep errors of opposite sign from cancelling in all groups alike.
            direction[group] = 1 - 2 * (group * 7919 // 13 % 2)
            slope = self.slope(index, direction.reshape(shape))
            if slope.verdict != "fail":
                continue
            if group.size > 1:
                groups += np.array_split(group, 2)
                continue
            place = tuple(int(i) for i in np.unravel_index(group[0], shape))
            sign = direction[group[0]]
            numbers = sign * slope.autodiff, sign * slope.numerical, slope.error
            found.append((slope.excess, Element(place, *numbers)))
        found.sort(key=lambda pair: -pair[0])
        return tuple(element for _, element in found), complete

    def _line(self, index: int, direction: Array) -> Callable[[float], Array]:
        """Return the function along a line, corrected for the rounding of arguments."""
        point, gradient = self._point, self._gradient[index]

        def line(t: float) -> Array:
            moved = list(point.arrays)
            moved[index] = moved[index] + t * direction
            try:
                value = self._evaluate(moved)
            except tf.errors.OpError:  # not defined there, as for a singular matrix
                value = np.nan
            # The arguments are rounded to their dtype; to first order that moves the
            # value by the gradient times the rounding, which is known exactly here.
            held = point.cast(index, moved[index]).astype(np.float64)
            rounding = held - moved[index]
            return np.asarray(value - np.vdot(gradient, rounding))

        return line

    def _kink(
        self, line: Callable[[float], Array], step: float
    ) -> tuple[float, float] | None:
        """Return the slopes on both sides, if a smaller step does not close the gap."""
        steps = [step, step / 4, step / 16]
        with np.errstate(all="ignore"):
            middle = line(0.0)
            left = [float((middle - line(-h)) / h) for h in steps]
            right = [float((line(h) - middle) / h) for h in steps]
            gaps = np.abs(np.subtract(right, left))
            size = max(abs(float(middle)), self._magnitude)
            noise = 16 * self._epsilon * size / steps[-1]
        apart = gaps[-1] > 0.5 * gaps[0] and gaps[-1] > 3 * noise
        return (left[-1], right[-1]) if apart else None


class _Line:
    """A function along a line that remembers the smallest step it was asked for."""

    def __init__(self, function: Callable[[float], Array]) -> None:
        self._function = function
        self.step = np.inf

    def __call__(self, t: float) -> Array:
        if t != 0:
            self.step = min(self.step, abs(t))
        return self._function(t)


def _noise(line: _Line) -> float:
    """Return the rounding error of the values of `line`, by Hamming's differences.

    Fourth differences wipe out what is smooth on the scale of the steps, and leave what
    changes from one value to the next (Moré and Wild 2011, SIAM J. Sci. Comput. 33).
    """
    steps = line.step / 2 * np.arange(-4, 5)
    differences = np.diff([float(line(t)) for t in steps], 4)
    return float(np.sqrt(np.mean(differences**2) / 70))  # 70: (8 choose 4)
