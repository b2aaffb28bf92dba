"""A derivative against differences of what it is the derivative of: right, or refused.

Unlike a gradient check, which a person asks for and reads, this runs unasked. So it
must not cry wolf: three random directions all have to disagree, by ten error bars,
where no kink explains it. What it is there to find, a term that is missing, does so
with ease.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.differences import EPSILONS, line_derivative, step_for

Array = np.ndarray[Any, np.dtype[np.float64]]

DIRECTIONS = 3
"""Random directions of which one has to agree."""

ERROR_BARS = 10
"""How far off a derivative may be. A jump within the first step is seen 7 bars off."""

RTOL = {tf.float64: 1e-6, tf.float32: 1e-3}
"""Relative disagreement, beyond error bars, that passes; 3e-2 in half precision."""


_ROUNDINGS = 32
"""Rounding errors that the terms of a derivative may gather."""


class Disagreement(NamedTuple):
    """One element of a directional derivative that is wrong.

    Attributes:
        element: Its place in the flattened function value.
        claimed: What was to be verified.
        difference: What the finite difference gives.
        error: The error bar of the difference.
    """

    element: int
    claimed: float
    difference: float
    error: float

    def __str__(self) -> str:
        """Return the numbers, as messages show them."""
        return (
            f"{self.claimed:.6g}, differences {self.difference:.6g} ± {self.error:.1g}"
        )


def disagreement(
    function: Callable[[list[Array]], Array],
    product: Callable[[list[Array]], Array],
    point: list[Array],
    dtype: tf.DType,
    first_step: float | None = None,
) -> Disagreement | None:
    """Return where a derivative is wrong, None if it is right or cannot be told.

    Args:
        function: Takes a point, returns a vector (flattened).
        product: Takes a direction, returns the claimed Jacobian of `function` at
            `point` times it.
        point: Where.
        dtype: What `function` is computed in.
        first_step: How far to move at first; None chooses what suits a smooth function.
    """
    try:
        return _disagreement(function, product, point, dtype, first_step)
    except _RefusedError:  # f is not defined on all sides of the point
        return None


def wrong_gradient(
    call: Call,
    evaluate: Callable[[Call], Sequence[tf.Tensor]],
    weights: Sequence[tf.Tensor] | None,
    gradients: Sequence[tf.Tensor],
) -> tuple[int, Disagreement] | None:
    """Return the first source whose gradient is wrong, by its place, and how wrong.

    Args:
        call: Where.
        evaluate: What was differentiated.
        weights: One cotangent for each output; None means ones.
        gradients: What is to be verified, one for each source.
    """

    def weighted(call: Call) -> list[tf.Tensor]:
        outputs = evaluate(call)
        pairs = zip(outputs, weights or map(tf.ones_like, outputs), strict=True)
        return [tf.reduce_sum(output * weight) for output, weight in pairs]

    def function(point: list[Array]) -> Array:
        return np.sum(evaluate_at(call, point, weighted), keepdims=True)

    point, dtype = point_of(call), coarsest([*call.sources, *evaluate(call)])
    slopes = [np.asarray(gradient, np.float64) for gradient in gradients]
    everywhere = range(len(point))
    if _disagreement_along(function, slopes, point, everywhere, dtype) is None:
        return None
    for index in everywhere:
        wrong = _disagreement_along(function, slopes, point, [index], dtype)
        if wrong is not None:
            return index, wrong
    return None


def random_like(tensors: Iterable[Any], seed: int = 0) -> list[tf.Tensor]:
    """Return normally distributed tensors of the shapes and dtypes of `tensors`."""
    generator = np.random.default_rng(seed)
    return [tf.constant(generator.normal(size=t.shape), t.dtype) for t in tensors]


def coarsest(
    tensors: Iterable[Any], operations: Iterable[tf.Operation] = ()
) -> tf.DType:
    """Return the dtype with the least precision among `tensors`.

    Args:
        tensors: What goes in and comes out.
        operations: What is computed with; some of them may round to another dtype.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    casts = (op for op in operations if op.type == "Cast")
    dtypes |= {op.outputs[0].dtype for op in casts if op.inputs[0].dtype.is_floating}
    return max(dtypes & EPSILONS.keys(), key=EPSILONS.__getitem__)


def rounding(epsilon: float, outputs: Iterable[Any]) -> float:
    """Return what rounding may leave of a derivative whose terms cancel.

    The terms are not known. They are taken to be of the size of the function, or 1.
    """
    sizes = (np.max(np.abs(np.asarray(y, np.float64)), initial=0.0) for y in outputs)
    return _ROUNDINGS * epsilon * max(1.0, *map(float, sizes))


def evaluate_at(
    call: Call, point: Sequence[Array], evaluate: Callable[[Call], Sequence[tf.Tensor]]
) -> Array:
    """Return what `evaluate` gives for a call moved to `point`, as one vector."""
    with _moved(call, point) as moved:
        leaves = [np.asarray(leaf, np.float64) for leaf in evaluate(moved)]
    return np.concatenate([leaf.ravel() for leaf in leaves])


def point_of(call: Call) -> list[Array]:
    """Return the values of what is differentiated."""
    return [np.asarray(source, np.float64) for source in call.sources]


@contextlib.contextmanager
def _moved(call: Call, point: Sequence[Array]) -> Iterator[Call]:
    dtypes = [source.dtype for source in call.sources]
    values = [
        tf.constant(x.astype(dtype.as_numpy_dtype))
        for x, dtype in zip(point, dtypes, strict=True)
    ]
    if call.variables is None:
        yield call.at(values)
        return
    before = [tf.identity(variable) for variable in call.sources]
    try:
        for variable, value in zip(call.sources, values, strict=True):
            variable.assign(value)
        yield call
    finally:
        for variable, value in zip(call.sources, before, strict=True):
            variable.assign(value)


def _disagreement_along(
    function: Callable[[list[Array]], Array],
    slopes: list[Array],
    point: list[Array],
    moving: Sequence[int],
    dtype: tf.DType,
) -> Disagreement | None:
    """Return where a gradient is wrong along the sources `moving`, the others held."""

    def held(moved: list[Array]) -> Array:
        whole = dict(zip(moving, moved, strict=True))
        return function([whole.get(i, leaf) for i, leaf in enumerate(point)])

    def product(direction: list[Array]) -> Array:
        pairs = zip(moving, direction, strict=True)
        return np.array([sum(float(np.vdot(slopes[i], v)) for i, v in pairs)])

    return disagreement(held, product, [point[i] for i in moving], dtype)


class _RefusedError(Exception):
    """A user's function raised at a point that only we asked for."""


def _disagreement(
    function: Callable[[list[Array]], Array],
    product: Callable[[list[Array]], Array],
    point: list[Array],
    dtype: tf.DType,
    first_step: float | None,
) -> Disagreement | None:
    center = function(point)
    if not np.array_equal(center, function(point)):
        return None  # a random function (or NaN) cannot be differenced
    generator = np.random.default_rng(0)
    worst = None
    for _ in range(DIRECTIONS):
        direction = [np.asarray(generator.normal(size=leaf.shape)) for leaf in point]
        line = _line(function, point, direction)
        step = first_step or step_for(point, float(EPSILONS[dtype]))
        step /= _size(direction)
        claimed = product(direction)
        worst = _compare(line, center, claimed, step, _size(point), dtype)
        if worst is None:
            return None
    return worst


def _line(
    function: Callable[[list[Array]], Array], point: list[Array], direction: list[Array]
) -> Callable[[float], Array]:
    def line(t: float) -> Array:
        try:
            return function([x + t * v for x, v in zip(point, direction, strict=True)])
        except Exception as error:  # a user's function may raise anything
            raise _RefusedError from error

    return line


def _compare(
    line: Callable[[float], Array],
    center: Array,
    claimed: Array,
    step: float,
    size: float,
    dtype: tf.DType,
) -> Disagreement | None:
    """Return the worst element of `claimed` that is wrong along `line`, if any."""
    with np.errstate(all="ignore"):  # what is not finite compares as False
        value, error, excess = _difference(line, claimed, step, size, dtype)
        if not np.any(excess > 0):
            return None
        # Steps of another length have to give the same: where f bends within a step,
        # the two are off by their own amounts, and the error bars may be too short for
        # both.
        other, _, other_excess = _difference(line, claimed, 0.3 * step, size, dtype)
        off = np.abs(claimed - value)
        wrong = (excess > 0) & (other_excess > 0) & (np.abs(other - value) < off / 4)
        # At a kink a derivative may be that of either side.
        near = step / 32
        right, left = (line(near) - center) / near, (center - line(-near)) / near
        wrong &= off > np.abs(right - left)
    if not np.any(wrong):
        return None
    index = int(np.argmax(np.where(wrong, excess, -np.inf)))
    return Disagreement(index, claimed[index], value[index], error[index])


def _difference(
    line: Callable[[float], Array],
    claimed: Array,
    step: float,
    size: float,
    dtype: tf.DType,
) -> tuple[Array, Array, Array]:
    """Return the slope of `line`, its error, and how far off `claimed` is."""
    value, error = line_derivative(
        line,
        step,
        float(EPSILONS[dtype]),
        lambda slope: np.max(np.abs(slope), initial=0.0) * size,
    )
    allowed = RTOL.get(dtype, 3e-2) * np.maximum(np.abs(claimed), np.abs(value))
    allowed += ERROR_BARS * (error + _root_mean_square(error))
    return value, error, np.abs(claimed - value) - allowed


def _size(leaves: Sequence[Array]) -> float:
    """Return the largest magnitude in `leaves`, 1 if it is 0."""
    return (
        max((float(np.max(np.abs(x), initial=0.0)) for x in leaves), default=0) or 1.0
    )


def _root_mean_square(errors: Array) -> float:
    finite = errors[np.isfinite(errors)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
