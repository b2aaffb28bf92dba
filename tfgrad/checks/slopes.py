"""One slope against a finite difference: the verdict, and the elements to blame.

`derivatives.verification` says how this differs from the check of first answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import tensorflow as tf

from tfgrad.checks.report import Element
from tfgrad.checks.scalar import Point, inner
from tfgrad.differences import (
    REFINEMENTS,
    Array,
    Slope,
    line_derivative,
    rounding_error,
    step_for,
)

_MOST_ELEMENTS = 5
"""How many wrong elements are looked for."""

_SHARP = 1e-4
"""Error bars up to this part of the slope are small enough to trust a first guess."""

_STEPS = 8
"""How many steps, each a quarter of the one before, are tried before giving up: the
last is a dozen roundings of the argument, in single precision."""

_FEW = 32
"""Up to so many elements are looked at one by one."""


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


@dataclass(frozen=True)
class Probe:
    """A scalar function near a point, with its gradient by autodiff.

    Attributes:
        evaluate: The function, of arrays shaped like those of the point.
        point: The point.
        gradient: What autodiff says there, one array for each of the point.
        epsilon: The machine epsilon of the coarsest dtype in the function.
        magnitude: The size of the terms that it sums.
        rtol: The relative disagreement that is allowed.
    """

    evaluate: Callable[[Sequence[Array]], float]
    point: Point
    gradient: Sequence[Array]
    epsilon: float
    magnitude: float
    rtol: float

    def slope(self, index: int, direction: Array, *, careful: bool = True) -> Slope:
        """Return the slope as argument `index` moves along `direction`.

        Args:
            index: Which argument.
            direction: Along what.
            careful: Where the verdict depends on it, look for kinks and measure noise.
        """
        gradient = self.gradient[index]
        line = Line(self.evaluate, self.point, index, direction, gradient)
        step = step_for([self.point.arrays[index][direction != 0]], self.epsilon)
        size = max(abs(float(line(0.0))), self.magnitude)

        def compare(noise: float, step: float, refinements: int) -> Slope:
            numerical, error = line_derivative(
                line, step, self.epsilon, noise=noise, refinements=refinements
            )
            autodiff = inner(gradient, direction)
            return Slope(autodiff, float(numerical), float(error), self.rtol)

        # Eight roundings: what functions of a dozen operations were seen to need.
        guess = 8 * self.epsilon * size
        slope = compare(guess, step, REFINEMENTS)
        sharp = slope.verdict == "pass" and slope.error <= _SHARP * slope.scale
        if sharp or not careful:
            return slope
        # The verdict depends on the guessed noise, so the noise is measured.
        passed = slope.verdict == "pass"
        steps = [step / 4**k for k in range(_STEPS)]
        nearest = line.nearest / 2 if passed else steps[-1]
        noise = max(3 * line.noise(nearest, step), self.epsilon * size)
        # Both sides of |x| at 0 are equal, so that differences agree with the slope 0.
        is_flat = slope.scale <= slope.error
        kink = None
        if is_flat or not passed:
            kink = line.kink(steps, max(guess, noise))
        if replace(slope, kink=kink).is_subgradient:
            return replace(slope, kink=kink)
        slope = compare(noise, step, REFINEMENTS)
        if slope.verdict != "pass":
            slope = _settled([compare(noise, smaller, 0) for smaller in steps])
        return slope if slope.verdict == "pass" else replace(slope, kink=kink)

    def wrong_elements(
        self, index: int, full: bool
    ) -> tuple[tuple[Element, ...], bool]:
        """Return wrong elements of the gradient by one argument; whether these are all.

        Args:
            index: Which argument.
            full: Look at all elements one by one. Otherwise, if there are many, groups
                of them that are wrong are halved until a few are found.
        """
        shape = self.point.arrays[index].shape
        size = int(np.prod(shape))
        complete = full or size <= _FEW
        groups = [np.array([i]) for i in range(size)] if complete else [np.arange(size)]
        # Random signs, so that errors do not cancel in all groups alike.
        signs = np.random.default_rng(size).choice([-1.0, 1.0], size)
        found: list[tuple[float, Element]] = []
        while groups and (complete or len(found) < _MOST_ELEMENTS):
            group = groups.pop(0)
            direction = np.zeros(size)
            direction[group] = signs[group]
            slope = self.slope(index, direction.reshape(shape), careful=False)
            if slope.verdict != "fail":
                continue
            if group.size > 1:
                groups += np.array_split(group, 2)
                continue
            place = place_of(group[0], shape)
            sign = signs[group[0]]
            numbers = sign * slope.autodiff, sign * slope.numerical, slope.error
            found.append((slope.excess, Element(place, *numbers)))
        found.sort(key=lambda pair: -pair[0])
        return tuple(element for _, element in found), complete


def place_of(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the place in an array of an element of its flat form."""
    return tuple(int(i) for i in np.unravel_index(index, shape))


def _settled(slopes: list[Slope]) -> Slope:
    """Return the surest of the slopes, at ever smaller steps, that has settled.

    Many small kinks, as in a network of relus, escape the error estimate of one step;
    but then the slope changes with the step. So a slope counts if all finer steps agree
    with it (Lepski's rule; Goldenshluger and Nemirovski 1997, Math. Methods Statist.
    6). Where the first step does not, there are such kinks, and the slope at a step may
    be off by as much as it differs from the next.
    """
    slopes = [slope for slope in slopes if np.isfinite(slope.error)] or slopes
    settled = [
        slope
        for k, slope in enumerate(slopes)
        if all(map(slope.agrees_with, slopes[k + 1 :]))
    ]
    if settled[0] is not slopes[0]:
        settled = [
            replace(one, error=one.error + abs(one.numerical - other.numerical))
            for one, other in itertools.pairwise(settled)
        ]
    unknown = replace(slopes[0], error=np.inf)
    return min(settled, key=lambda slope: slope.error, default=unknown)
