"""The check of each trace's first derivative; one found wrong is not returned.

The check runs at the first call of a trace, whether or not the user asked for it, so it
must raise no false alarm. Along a random direction, the derivative is compared with a
central difference, which costs two evaluations. Only if the two differ, more steps are
tried: the derivative is wrong if the differences on both sides of the point agree with
each other, at one step and at a shorter one, along every direction tried, and disagree
with the derivative. At a kink the two sides disagree; where rounding hides the slope,
and for a function that draws random numbers, nothing is concluded.

`check_grads` has another procedure, in `checks.slopes`: it moves one argument at a
time, spends a hundred evaluations on a verdict, names the wrong elements, and says
"inconclusive" where it cannot tell. Here all arguments move together, two evaluations
suffice for a right derivative, and a doubtful one passes. What both arrive at, a slope
beside a difference with an error bar, has one judge and one table of tolerances, in
`tfgrad.differences`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS, TOLERANCES, Slope, rounding_error

Array = np.ndarray[Any, np.dtype[np.float64]]

Arrays = list[Array]

DIRECTIONS = 3
"""Random directions; a derivative is refused if it is wrong along all of them."""

STEPS = 5
"""Steps that are tried, each a quarter of the one before."""

LARGE, LARGE_RTOL = 2**20, 0.1
"""From this many elements on, an evaluation is dear, and `rtol` at least the second."""

MOST_MOVING = 2**16
"""At most so many elements of one source are moved.

And of the sources that are `LARGE`, the smallest only: to copy one costs as much as its
gradient does. The others are reached by the same chain of ops, up to their own.
"""

STEEPER = 30.0
"""A derivative that is so many times steeper than the differences is not judged."""

SAME = 0.05
"""The slopes on both sides may differ by this part of a disagreement, not by more."""

_ROUNDINGS = 16
"""Rounding errors that a value may have accumulated."""

_TERMS = 32
"""Rounding errors that the terms of a derivative may leave where they cancel.

The terms are not known. They are taken to be of the size of the functions.
"""


class Functions(NamedTuple):
    """Some functions of one point, their values there, and their derivatives.

    Attributes:
        point: Where: one array for each source.
        values: The outputs of each function there, flat.
        evaluate: From a direction, and how far to go along it, to the outputs of each
            function there.
        slopes: From a direction, and weights of the outputs of each function, to the
            claimed slopes of the weighted sums.
        dtype: The coarsest dtype that they are computed in.
        symmetric: Whether matrices that are symmetric stay so: an op that reads one
            triangle only has a gradient for both.
    """

    point: Arrays
    values: list[Arrays]
    evaluate: Callable[[Arrays, float], list[Arrays]]
    slopes: Callable[[Arrays, list[Arrays]], Array]
    dtype: tf.DType
    symmetric: bool = False


def disagreement(
    functions: Functions, moving: Sequence[int] | None = None
) -> tuple[int, Slope] | None:
    """Return where a derivative is wrong, None if all are right or it cannot be told.

    Args:
        functions: What to verify.
        moving: The places of the sources that move; None means all.

    Returns:
        The index of the function, and its slope.
    """
    try:
        with np.errstate(all="ignore"):  # what is not finite compares as False
            return _disagreement(functions, moving)
    except _RefusedError:  # not defined on all sides of the point
        return None


def coarsest(
    tensors: Iterable[Any], operations: Iterable[tf.Operation] = ()
) -> tf.DType:
    """Return the dtype with the least precision among `tensors`.

    Args:
        tensors: What goes in and comes out.
        operations: What is computed with; some of them may round to another dtype.
    """
    dtypes = {tf.as_dtype(tensor.dtype) for tensor in tensors}
    casts = (op for op in operations if op.type == "Cast")
    dtypes |= {op.outputs[0].dtype for op in casts if op.inputs[0].dtype.is_floating}
    return max(dtypes & EPSILONS.keys(), key=EPSILONS.__getitem__)


def random_like(tensors: Iterable[Any], seed: int = 0) -> list[tf.Tensor]:
    """Return normally distributed tensors of the shapes and dtypes of `tensors`."""
    generator = np.random.default_rng(seed)
    return [tf.constant(generator.normal(size=t.shape), t.dtype) for t in tensors]


def random_weights(generator: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return random weights of both signs, none of which is close to zero."""
    weights = generator.uniform(-1.0, 1.0, size=shape)
    return np.asarray(weights + np.copysign(0.5, weights))


class _RefusedError(Exception):
    """A user's function raised at a point that only we asked for."""


class _Line:
    """Weighted sums of the outputs of some functions, along one direction."""

    def __init__(self, functions: Functions, direction: Arrays) -> None:
        generator = np.random.default_rng(1)
        self._functions = functions
        self._direction = direction
        self._weights = [
            [random_weights(generator, y.shape) for y in outputs]
            for outputs in functions.values
        ]

    def __call__(self, t: float) -> Array:
        """Return the sum for each function at the point moved by `t`."""
        try:
            outputs = self._functions.evaluate(self._direction, t)
        except Exception as error:  # a user's function may raise anything
            raise _RefusedError from error
        return self.summed(outputs)

    def summed(self, outputs: list[Arrays]) -> Array:
        """Return the weighted sum of the outputs of each function."""
        return np.array(
            [
                sum(float(np.sum(w * y)) for w, y in zip(weights, leaves, strict=True))
                for weights, leaves in zip(self._weights, outputs, strict=True)
            ]
        )

    def sizes(self) -> Array:
        """Return the size of the terms of each sum at the point."""
        pairs = zip(self._weights, self._functions.values, strict=True)
        return np.array(
            [
                sum(float(np.sum(np.abs(w * y))) for w, y in zip(ws, ys, strict=True))
                for ws, ys in pairs
            ]
        )

    @property
    def dtype(self) -> tf.DType:
        """What the functions are computed in."""
        return self._functions.dtype

    def underflow(self) -> float:
        """Return what the smallest numbers of the dtype may add up to."""
        counts = [y.size for outputs in self._functions.values for y in outputs]
        smallest = 2.0**-24 if self._functions.dtype == tf.float16 else 0.0
        return smallest * sum(counts)

    def claimed(self) -> Array:
        """Return the derivative of each sum, as it is to be verified."""
        return self._functions.slopes(self._direction, self._weights)


def _disagreement(
    functions: Functions, moving: Sequence[int] | None
) -> tuple[int, Slope] | None:
    epsilon = float(EPSILONS[functions.dtype])
    rtol = TOLERANCES[functions.dtype].unasked
    is_large = sum(x.size for x in functions.point) > LARGE
    if is_large:
        rtol = max(rtol, LARGE_RTOL)
    settled: list[Slope | None] = []
    suspects = np.ones(len(functions.values), bool)
    for trial in range(DIRECTIONS):
        line = _Line(functions, _direction(functions, trial, moving))
        center = line.summed(functions.values)
        claimed = line.claimed()
        step = epsilon ** (0.4 if is_large else 1 / 3)  # a second one would be dear
        rounding = epsilon * _ROUNDINGS * line.sizes() / step

        def apart(
            slope: Array, claimed: Array = claimed, noise: Array = rounding
        ) -> Any:
            size = np.maximum(np.abs(claimed), np.abs(slope))
            allowed = (rtol + epsilon ** (2 / 3)) * size + noise
            is_apart = ~(np.abs(claimed - slope) <= allowed)
            return is_apart & np.isfinite(slope)

        right = line(step)
        if not np.any(apart((right - center) / step)):
            return None
        sides = _Sides(line, center, step, right)
        suspects &= np.isfinite(center) & apart(sides.slopes[0])
        while np.any(suspects) and len(sides.slopes) < STEPS:
            sides.go_on()
            suspects &= apart(sides.slopes[-1])
        if not np.any(suspects):
            return None
        settled = _settled(line, center, claimed, sides, rtol)
        suspects &= np.array([wrong is not None for wrong in settled])
        if not np.any(suspects):
            return None
    return next((i, s) for i, s in enumerate(settled) if s and suspects[i])


class _Sides:
    """The slopes on both sides of a point, at ever smaller steps.

    Args:
        line: The functions.
        center: Their values at the point.
        step: The first step.
        ahead: Their values there.
    """

    def __init__(self, line: _Line, center: Array, step: float, ahead: Array) -> None:
        self._line = line
        self._center = center
        self.steps = [step]
        self.right = [(ahead - center) / step]
        self.left = [(center - line(-step)) / step]

    @property
    def slopes(self) -> Arrays:
        """The central differences, one for each step."""
        return [(a + b) / 2 for a, b in zip(self.right, self.left, strict=True)]

    def of_each(self) -> list[tuple[Array, Array]]:
        """Return for each function the slopes on the right and those on the left."""
        columns = np.transpose(self.right), np.transpose(self.left)
        return list(zip(*columns, strict=True))

    def go_on(self) -> None:
        """Try a quarter of the last step."""
        step = self.steps[-1] / 4
        self.steps.append(step)
        self.right.append((self._line(step) - self._center) / step)
        self.left.append((self._center - self._line(-step)) / step)


def _settled(
    line: _Line, center: Array, claimed: Array, sides: _Sides, rtol: float
) -> list[Slope | None]:
    """Return the slope of each function along the line; None if it is not wrong."""
    epsilon, sizes = float(EPSILONS[line.dtype]), line.sizes()
    steps = np.array(sides.steps)
    largest = float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))
    floor = _TERMS * (epsilon * largest + line.underflow())

    def judged(noise: Array) -> list[Slope | None]:
        rows = zip(claimed, sides.of_each(), noise, sizes, strict=True)
        slopes = [
            _slope(value, *both, 4 * rounding / steps, size, floor, rtol)
            for value, both, rounding, size in rows
        ]
        # What is no number is wrong only where the differences are known.
        return [
            slope if np.isfinite(slope.error) and slope.verdict == "fail" else None
            for slope in slopes
        ]

    noise = epsilon * sizes
    if not any(judged(noise)):
        return [None for _ in center]
    # The noise, and whether f is random, are measured here only: it takes evaluations.
    is_random = ~(np.abs(line(0.0) - center) <= _ROUNDINGS * noise)
    found = judged(np.maximum(noise, _noise(line, steps[-1])))
    return [None if r else wrong for r, wrong in zip(is_random, found, strict=True)]


def _slope(
    claimed: float,
    right: Array,
    left: Array,
    errors: Array,
    value: float,
    floor: float,
    rtol: float,
) -> Slope:
    """Return the claimed slope beside the surest difference.

    The error of that is of rounding, and how far both sides and two steps are apart.
    """
    steepest = np.maximum(np.abs(right), np.abs(left))
    secants, vanishes = steepest[2:], 2 * steepest[2:] <= steepest[1:-1]
    # Richardson's extrapolation removes what curvature adds to one-sided slopes.
    right, left = ((4 * side[1:] - side[:-1]) / 3 for side in (right, left))
    slopes = (right + left) / 2
    apart = np.maximum(np.abs(right - left)[1:], np.abs(np.diff(slopes)))
    slopes, errors = slopes[1:], errors[2:]
    if np.isfinite(claimed):
        # A slope far steeper than all differences is that of a feature smaller than all
        # steps, such as an epsilon under a root.
        usable = abs(claimed) <= STEEPER * np.abs(slopes) + floor
    else:
        usable = errors <= SAME * np.maximum(secants, value)
        usable &= vanishes | (apart <= SAME * secants + errors)
    bars = np.max([4 * errors, apart / SAME, np.full_like(errors, floor)], axis=0) / 3
    bars = np.where(usable & np.isfinite(bars), bars, np.inf)
    best = np.argmin(bars)
    return Slope(float(claimed), float(slopes[best]), float(bars[best]), rtol)


def _noise(line: _Line, step: float) -> Array:
    """Return three times the rounding error of the values."""
    values = np.array([line(k * step / 8) for k in range(-4, 5)])
    return 3 * rounding_error(values)


def _direction(
    functions: Functions, trial: int, moving: Sequence[int] | None
) -> Arrays:
    """Return a random direction: each element moves by its own size."""
    point = functions.point
    generator = np.random.default_rng(trial)
    if moving is None:
        large = sorted((x.size, i) for i, x in enumerate(point) if x.size > LARGE)
        still = {i for _, i in large[1:]}
        moving = [i for i in range(len(point)) if i not in still]
    direction = []
    for i, x in enumerate(point):
        if i not in moving:
            direction.append(np.broadcast_to(np.zeros((), x.dtype), x.shape))
            continue
        v, part = np.zeros(x.shape, x.dtype), moving_part(x.size)
        flat = x.reshape(-1)[part]
        v.reshape(-1)[part] = _scale(flat) * generator.normal(size=flat.shape)
        if functions.symmetric and _is_symmetric(x):
            v = (v + np.swapaxes(v, -1, -2)) / 2
        direction.append(v)
    return direction


def is_still(direction: Array) -> bool:
    """Return whether an array of a direction is zero, and takes no memory."""
    return direction.ndim > 0 and not any(direction.strides)


def moving_part(size: int) -> slice:
    """Return the elements of an array of that size that a direction moves.

    Of a large array these are a part, since moving all costs more than evaluating f.
    """
    if size <= MOST_MOVING:
        return slice(0, size)
    first = np.random.default_rng(size).integers(max(size - MOST_MOVING, 0) + 1)
    return slice(int(first), int(first) + MOST_MOVING)


def _is_symmetric(x: Array) -> bool:
    if x.ndim < 2 or x.shape[-1] != x.shape[-2]:
        return False
    return np.array_equal(x, np.swapaxes(x, -1, -2))


def _scale(x: Array) -> Array:
    typical = float(np.sqrt(np.mean(x**2))) if x.size else 0.0
    return np.where(x == 0, typical or 1.0, np.abs(x))
