"""The modes of a check: reverse, forward, compiled; each a table row per argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tfgrad.checks.report import Check, Element
from tfgrad.checks.scalar import Point, Scalar, forward_slope, inner
from tfgrad.checks.slopes import Probe, place_of
from tfgrad.differences import Array, Slope

_SAME = 100
"""Machine epsilons by which two orders of the same operations may differ."""

Derivatives = Callable[[Sequence[Array]], tuple[float, list[Array]]]
"""From arrays to the value of a scalar function and its gradient."""

Gap = Callable[[Sequence[Array]], Array]
"""From arrays to how far two ways to compute something are apart there."""

Norm = Callable[[Array], float]


@dataclass(frozen=True)
class Level:
    """The function of one order: the output, or the weighted gradient of the last one.

    Attributes:
        order: 1 for the output, 2 for its gradient.
        scalar: The function, eager.
        evaluate: The same from arrays to a number, by the fastest way that is right.
        derive: Its value and its gradient, in reverse mode, run eagerly.
        value: Its value at the point.
        gradient: Its gradient there, in reverse mode.
        magnitude: The size of the terms that it sums.
    """

    order: int
    scalar: Scalar
    evaluate: Callable[[Sequence[Array]], float]
    derive: Derivatives
    value: float
    gradient: list[Array]
    magnitude: float


@dataclass(frozen=True)
class Setting:
    """What all checks of one call share.

    Attributes:
        point: Where to check.
        directions: Random directions for each argument, each of length 1.
        epsilon: The machine epsilon of the coarsest dtype involved.
        rtol: The relative disagreement that is allowed.
        full: Look at every element of an argument that fails.
    """

    point: Point
    directions: list[list[Array]]
    epsilon: float
    rtol: float
    full: bool

    def along(self, level: Level, index: int) -> list[Array]:
        """Return the directions for one argument: its gradient's own first."""
        own = level.gradient[index]
        length = float(np.linalg.norm(own))
        known = np.isfinite(length) and length > 0
        first = [own / length] if known else []
        return [*first, *self.directions[index]][: len(self.directions[index])]

    def slack(self, level: Level, index: int, norm: Norm) -> float:
        """Return how far two ways to compute one gradient may be apart."""
        sizes = [norm(gradient) for gradient in level.gradient]
        return self.epsilon * max(_SAME * sizes[index], max(sizes))

    def rounding(self, gap: Gap) -> Array:
        """Return how much a gap varies if the point is moved by some machine epsilons.

        Where large terms cancel, as at a minimum, two right computations differ by
        rounding, and that gap varies. The gap that a bug makes does not.
        """
        generator = np.random.default_rng(0)
        gaps = [gap(self.point.arrays)]
        for _ in range(3):
            turns = (generator.uniform(-1, 1, a.shape) for a in self.point.arrays)
            pairs = zip(self.point.arrays, turns, strict=True)
            gaps.append(gap([a * (1 + 4 * self.epsilon * turn) for a, turn in pairs]))
        return np.nan_to_num(2 * np.ptp(gaps, axis=0))


def reverse(level: Level, setting: Setting) -> list[Check]:
    """Compare the gradient with finite differences."""
    probe = Probe(
        level.evaluate,
        setting.point,
        level.gradient,
        epsilon=setting.epsilon,
        magnitude=level.magnitude,
        rtol=setting.rtol,
    )
    checks = []
    for index, name in enumerate(setting.point.names):
        tangents = setting.along(level, index)
        slopes = [probe.slope(index, tangent) for tangent in tangents]
        slope = _telling(slopes)
        numbers = slope.autodiff, slope.numerical, slope.error
        check = Check(name, level.order, "reverse", slope.verdict, *numbers)
        check = replace(check, note=_note(slope, slopes))
        if slope.verdict == "fail":
            elements, complete = probe.wrong_elements(index, setting.full)
            size = setting.point.arrays[index].size
            check = replace(check, size=size, elements=elements, complete=complete)
        checks.append(check)
    return checks


def forward(level: Level, setting: Setting) -> list[Check]:
    """Compare the slope in forward mode with the gradient: no differences are needed.

    All arguments move at once; each of them alone only to find out which one is wrong.

    Raises:
        Exception: If an op in the function cannot be differentiated forward.
    """
    every = range(len(setting.point.names))
    together = _forward(level, setting, every)
    if together.verdict == "pass" or len(every) == 1:
        return [together]
    alone = [_forward(level, setting, [index]) for index in every]
    return [check for check in alone if check.verdict == "fail"] or [together]


def _forward(level: Level, setting: Setting, moving: Sequence[int]) -> Check:
    point = setting.point
    tangents = [np.zeros_like(array) for array in point.arrays]
    for index in moving:
        # A random direction: the gradient's own is zero where an element is missing.
        direction = point.cast(index, setting.directions[index][-1])
        tangents[index] = direction.astype(np.float64)
    run = forward_slope(level.scalar, point, tangents)

    def gap(arrays: Sequence[Array]) -> Array:
        slope = float(run(*point.at(arrays)))
        return np.asarray(slope - _inner(level.derive(arrays)[1], tangents))

    slope = float(run(*point.at(point.arrays)))
    expected = _inner(level.gradient, tangents)
    allowed = sum(setting.slack(level, index, _length) for index in moving)
    if not abs(slope - expected) <= allowed:
        allowed += float(setting.rounding(gap))
    verdict = "pass" if abs(slope - expected) <= allowed else "fail"
    name = _together([point.names[index] for index in moving])
    return Check(name, level.order, "forward", verdict, slope, expected, allowed)


def compiled(
    level: Level, setting: Setting, mode: str, derive: Derivatives
) -> list[Check]:
    """Compare what the compiled function returns with the eager one, by element."""
    found = derive(setting.point.arrays)
    checks = _compiled(level, setting, mode, found, [0.0] * (1 + len(found[1])))
    if all(check.verdict == "pass" for check in checks):
        return checks

    def gap(arrays: Sequence[Array]) -> Array:
        return _flat(*derive(arrays)) - _flat(*level.derive(arrays))

    ends = np.cumsum([1, *(array.size for array in found[1])])
    parts = np.split(setting.rounding(gap), ends[:-1])
    return _compiled(level, setting, mode, found, list(map(_largest, parts)))


def _compiled(
    level: Level,
    setting: Setting,
    mode: str,
    compiled: tuple[float, list[Array]],
    roundings: list[float],
) -> list[Check]:
    """Return the checks, given the rounding of the value and of each argument's gap."""
    value, gradient = compiled
    size = max(abs(level.value), level.magnitude)
    apart = abs(value - level.value)
    same_value = apart <= _SAME * setting.epsilon * size + roundings[0]
    note = f"its value is {value:.6g}, and {level.value:.6g} eagerly"
    note = "" if same_value else note
    checks = []
    for index, name in enumerate(setting.point.names):
        found, expected = gradient[index].ravel(), level.gradient[index].ravel()
        allowed = setting.slack(level, index, _largest) + roundings[1 + index]
        gaps = np.abs(found - expected)
        gaps = np.where(np.isnan(gaps), np.inf, gaps)  # NaN in one of them, or in both
        gaps = np.where(np.isnan(found) & np.isnan(expected), 0.0, gaps)
        order = np.argsort(-gaps)
        wrong = [int(i) for i in order if gaps[i] > allowed]
        verdict = "pass" if same_value and not wrong else "fail"
        numbers = (0.0, 0.0)
        if gaps.size:
            numbers = float(found[order[0]]), float(expected[order[0]])
        check = Check(name, level.order, mode, verdict, *numbers, allowed)
        shape = gradient[index].shape
        elements = tuple(
            Element(place_of(i, shape), float(found[i]), float(expected[i]), allowed)
            for i in wrong
        )
        checks.append(replace(check, note=note, size=found.size, elements=elements))
    return checks


def symmetry(
    level: Level, setting: Setting, weights: list[Array], derive: Derivatives
) -> Check:
    """Compare u·Hv with v·Hu, which a gradient of something has to have equal.

    Args:
        level: The second order: its gradient is Hu.
        setting: What all checks share; the last random directions are v.
        weights: u.
        derive: The function whose gradient is Hv.
    """
    directions = [tangents[-1] for tangents in setting.directions]

    def gap(arrays: Sequence[Array]) -> Array:
        one, other = derive(arrays)[1], level.derive(arrays)[1]
        return np.asarray(_inner(one, weights) - _inner(other, directions))

    _, product = derive(setting.point.arrays)
    one, other = _inner(product, weights), _inner(level.gradient, directions)
    sizes = sum(_length(a) for a in (*product, *level.gradient))
    # The size of the gradient, too: what it is computed from may cancel in Hu and Hv.
    allowed = setting.epsilon * (_SAME * sizes + level.magnitude)
    if not abs(one - other) <= allowed:
        allowed += float(setting.rounding(gap))
    verdict = "pass" if abs(one - other) <= allowed else "fail"
    name = _together(setting.point.names)
    return Check(name, level.order, "symmetry", verdict, one, other, allowed)


def _together(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else "all"


def _telling(slopes: Sequence[Slope]) -> Slope:
    """Return the slope that decides: the worst failure, or else the surest one."""
    failed = [slope for slope in slopes if slope.verdict == "fail"]
    if failed:
        return max(failed, key=lambda slope: slope.excess)
    return min(slopes, key=lambda slope: (slope.verdict != "pass", -slope.scale))


def _note(slope: Slope, slopes: Sequence[Slope]) -> str:
    """Return what to know about the slope that decides, among all slopes."""
    if not np.isfinite(slope.autodiff):
        return "the gradient is not finite; tfgrad.explain(f, ...) says where and why"
    kinks = [other.kink for other in slopes if other.kink is not None]
    if kinks:
        left, right = kinks[0]
        return f"a kink: the slope is {left:.4g} on one side, {right:.4g} on the other"
    if slope.error == np.inf:
        return "the slope changes with the step: kinks or infinities are all around"
    if slope.verdict == "inconclusive":
        return "rounding hides the slope; float64 or another point would show it"
    return ""


def _inner(a: Sequence[Array], b: Sequence[Array]) -> float:
    return sum(inner(x, y) for x, y in zip(a, b, strict=True))


def _flat(value: float, gradient: Sequence[Array]) -> Array:
    return np.concatenate([[value], *(array.ravel() for array in gradient)])


def _length(array: Array) -> float:
    return float(np.linalg.norm(array))


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))
