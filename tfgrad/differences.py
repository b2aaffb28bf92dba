"""Finite differences with an error bar; they need nothing but the function.

The method is a central difference extrapolated once (Richardson), of fourth order. Its
step comes from the dtype and the scale of the point, so there is nothing to tune. Its
error is estimated from both sides: rounding, which grows as the step shrinks, and
truncation, which grows as the step does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError, ScalarObjectiveError

Array = np.ndarray[Any, np.dtype[np.float64]]

EPSILONS = {
    tf.bfloat16: 2.0**-7,
    tf.float16: 2.0**-10,
    tf.float32: 2.0**-23,
    tf.float64: 2.0**-52,
}
"""The machine epsilon of each float dtype (NumPy's finfo knows no bfloat16)."""

REFINEMENTS = 5
"""How often the step is quartered while truncation outweighs rounding."""


class Tolerance(NamedTuple):
    """Relative disagreements that pass.

    Attributes:
        asked: Where the user asked for a check: its differences are extrapolated.
        unasked: Where nobody did: two evaluations have to suffice.
    """

    asked: float
    unasked: float


TOLERANCES = {
    tf.float64: Tolerance(1e-6, 1e-4),
    tf.float32: Tolerance(3e-4, 2e-2),
    tf.float16: Tolerance(3e-2, 0.2),
    tf.bfloat16: Tolerance(3e-2, 0.3),
}
"""What passes, by the coarsest dtype involved."""


class FiniteDifference(NamedTuple):
    """A derivative by finite differences: the value, and how far off it may be.

    Attributes:
        value: The derivative.
        error: An estimate of `|value - exact|`, structured like `value`; `inf` where
            `f` is not finite on both sides of the point.
    """

    value: nested.Nest
    error: nested.Nest


@dataclass(frozen=True)
class Slope:
    """A derivative along one direction, by autodiff and by finite differences.

    All that compare the two have this judge: `check_grads`, and the check of the first
    answer of each trace. How the difference and its error are found is their own.

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

    def __str__(self) -> str:
        """Return the numbers, as messages show them."""
        found = f"differences {self.numerical:.6g} ± {self.error:.1g}"
        return f"{self.autodiff:.6g}, {found}"

    @property
    def scale(self) -> float:
        """The size of the slope."""
        return max(abs(self.autodiff), abs(self.numerical))

    @property
    def gap(self) -> float:
        """How far the two are apart."""
        return abs(self.autodiff - self.numerical)

    def agrees_with(self, other: Slope) -> bool:
        """Return whether the error bars of the two finite differences meet."""
        apart = abs(self.numerical - other.numerical)
        return apart <= self.error + other.error

    @property
    def excess(self) -> float:
        """How far the disagreement is beyond what is allowed."""
        allowed = self.rtol * self.scale + 3 * self.error
        return self.gap - allowed

    @property
    def verdict(self) -> str:
        """Return "pass", "fail" or "inconclusive"."""
        if not np.isfinite(self.autodiff):
            return "fail"
        if not np.isfinite(self.error):
            return "inconclusive"
        if self.excess > 0 or self.kink:
            return "inconclusive" if self.is_subgradient else "fail"
        if self.scale == 0:  # exactly flat, and autodiff says so
            return "pass"
        # What is let through: 5 % of the slope, or little more than asked for.
        hidden = max(0.05, 3 * self.rtol) * self.scale
        return "inconclusive" if 3 * self.error > hidden else "pass"

    @property
    def is_subgradient(self) -> bool:
        """Whether autodiff's slope lies between the two slopes of a kink."""
        if self.kink is None:
            return False
        slack = self.rtol * max(map(abs, self.kink)) + 3 * self.error
        return min(self.kink) - slack <= self.autodiff <= max(self.kink) + slack


def finite_difference(
    f: Callable[[Any], Any], x: nested.Nest, direction: nested.Nest | None = None
) -> FiniteDifference:
    """Return a derivative of `f` at `x` by finite differences, with its error estimate.

    Use it to check a derivative, or where there is none to be had: `f` is only ever
    called, with eager tensors, so NumPy and any other code may be inside. It costs four
    calls of `f` a direction (up to 24 where `f` bends sharply); a gradient has as many
    directions as elements. Central differences see no kink: |x| has slope 0 at 0.

    Args:
        f: Takes `x`, returns one float tensor, array or number.
        x: A float number or array of any shape, or a nest of them. A plain number is
            float32; pass float64 for about ten correct digits instead of four.
        direction: What to move `x` along: structure and shapes of `x`, any length. None
            means the derivative for a number `x`, the gradient for any other.

    Returns:
        A `FiniteDifference(value, error)`. With a direction, or for a number `x`,
        `value` has the shape of `f(x)`: the Jacobian times the direction. So for an
        elementwise `f`, `direction=tf.ones_like(x)` gives the elementwise derivative.
        Without a direction, `value` is the gradient: structure, shapes, dtypes of `x`.

    Raises:
        ScalarObjectiveError: If a gradient is asked for and `f(x)` is not one number.
        InvalidArgumentError: If `x` or `direction` is not float or not finite, if they
            do not match, or if `f` does not return a float tensor.

    Example:
        >>> x = tf.constant(2.0, tf.float64)
        >>> value, error = finite_difference(lambda x: x**3, x)
        >>> print(f"{value:.8f}", bool(abs(value - 12.0) <= error < 1e-8))
        12.00000000 True

    References:
        Press et al. (2007), Numerical Recipes, section 5.7 (the step and the error);
        Richardson (1911), Philosophical Transactions A 210 (the extrapolation).
    """
    if not callable(f):
        raise InvalidArgumentError(
            "The function comes first, then its argument.",
            got=f"f={nested.describe(f)}",
            hint="finite_difference(f, x), with f not called",
        )
    point = nested.to_tensors(x, "x")
    require_finite(point, "x")
    leaves = tf.nest.flatten(point)
    if not leaves:
        raise InvalidArgumentError(
            "`x` must be an array, or a nest of arrays.",
            got=f"x={nested.describe(x)}, which holds none",
            hint="np.zeros(0) for an array without numbers",
        )
    tangents = None if direction is None else _tangents(direction, point)
    output = _float_output(f, f(point))
    epsilon = max(EPSILONS[tensor.dtype] for tensor in (*leaves, output))

    def function(arrays: list[Array]) -> Array:
        moved = list(map(_like, arrays, leaves))
        value = _float_output(f, f(tf.nest.pack_sequence_as(point, moved)))
        return np.asarray(value, np.float64)

    if tangents is None and len(leaves) == 1 and leaves[0].shape.rank == 0:
        tangents = [np.ones(())]
    if tangents is None:
        if tf.size(output) != 1:
            raise ScalarObjectiveError(
                "A gradient needs a function that returns one number.",
                got=f"`{nested.name_of(f)}` returned {nested.describe(output)}",
                hint="tf.reduce_sum(...) around it, or direction=tf.ones_like(x) for "
                "the derivative of an elementwise function",
            )
        pairs = _gradient(function, _arrays(leaves), epsilon)
        packed = (list(map(_like, part, leaves)) for part in pairs)
        return FiniteDifference(*(tf.nest.pack_sequence_as(point, p) for p in packed))
    value, error = _along(function, _arrays(leaves), tangents, epsilon)
    return FiniteDifference(_like(value, output), _like(error, output))


def line_derivative(
    line: Callable[[float], Array],
    step: float,
    epsilon: float,
    sensitivity: Callable[[Array], Any] = np.zeros_like,
    noise: float | None = None,
    refinements: int = REFINEMENTS,
) -> tuple[Array, Array]:
    """Return the derivative of `line` at 0 and its error estimate, both elementwise.

    Args:
        line: `line(t)` is the function at the point moved by `t`: a float64 array.
        step: The first step to try; see `step_for`.
        epsilon: The machine epsilon of what the line is computed in.
        sensitivity: Given the derivative, the sum over the arguments of |gradient|
            times |argument|: how far the line moves when the arguments are rounded.
            Without it, they are taken to be exact.
        noise: The rounding error of a value, if it is known; else it is taken to be
            eight roundings: what functions of a dozen operations were seen to need.
        refinements: How often the step may be quartered.
    """
    value: Array = np.asarray(np.nan)
    error: Array = np.asarray(np.inf)
    for _ in range(1 + refinements):
        with np.errstate(all="ignore"):  # where it is not finite, the error is inf
            slope, largest, truncation = _richardson(line, step)
            known = 8 * epsilon * largest if noise is None else noise
            evaluation = np.maximum(known, epsilon * largest)
            rounding = (evaluation + epsilon * sensitivity(slope)) / step
            total = np.where(np.isfinite(slope), rounding + truncation, np.inf)
        value = np.where(total < error, slope, value)
        error = np.fmin(total, error)
        if np.all(truncation <= rounding):  # False where they are NaN
            break
        step /= 4
    return value, error


def step_for(leaves: list[Array], epsilon: float) -> float:
    """Return the step for a fourth-order difference: a power of two, so it is exact.

    The best step is near epsilon^(1/5) times the scale on which `f` bends (Numerical
    Recipes, 5.7), and the size of the point is the best guess of that scale.
    """
    size = sum(leaf.size for leaf in leaves)
    mean_square = sum(float(np.vdot(leaf, leaf)) for leaf in leaves) / max(size, 1)
    scale = max(1.0, mean_square**0.5)
    return float(2.0 ** np.round(np.log2(epsilon**0.2 * scale)))


def rounding_error(values: Array) -> Array:
    """Return the rounding error of some nine values, evenly spaced along axis 0.

    Fourth differences wipe out what is smooth on the scale of their spacing, and leave
    what changes from one value to the next (Moré and Wild 2011, SIAM J. Sci. Comput.
    33, 4.1).
    """
    differences = np.diff(values, 4, axis=0)
    root_mean_square: Array = np.sqrt(np.mean(differences**2, axis=0) / 70)
    return root_mean_square  # 70: (8 choose 4)


def require_finite(nest: nested.Nest, name: str) -> None:
    """Refuse a nest of tensors that are symbolic, or hold a NaN or an infinity."""
    for path, leaf in nested.named_leaves(nest, name):
        if not hasattr(leaf, "numpy"):
            raise InvalidArgumentError(
                "Finite differences need numbers: call them outside of tf.function.",
                got=f"`{path}` is a symbolic tensor: {nested.describe(leaf)}",
                hint="the same call, outside of the tf.function",
            )
        array = np.asarray(leaf, np.float64)
        if not np.all(np.isfinite(array)):
            bad = np.argwhere(~np.isfinite(array))[0]
            raise InvalidArgumentError(
                f"`{name}` must be finite.",
                got=f"`{path}` holds {array[tuple(bad)]} at {bad.tolist()}",
                hint="a point where the function is defined",
            )


def _richardson(
    line: Callable[[float], Array], step: float
) -> tuple[Array, Array, Array]:
    """Return the extrapolated slope, the largest value, and the truncation error."""
    right, left = line(step), line(-step)
    far_right, far_left = line(2 * step), line(-2 * step)
    near, far = (right - left) / (2 * step), (far_right - far_left) / (4 * step)
    largest = np.max(np.abs([right, left, far_right, far_left]), axis=0)
    return (4 * near - far) / 3, largest, np.abs(near - far) / 3


def _gradient(
    function: Callable[[list[Array]], Array], point: list[Array], epsilon: float
) -> tuple[list[Array], list[Array]]:
    """Return the gradient and its error, one element of `point` after the other."""
    values, errors, tangents = ([np.zeros_like(x) for x in point] for _ in range(3))
    for tangent, value, error in zip(tangents, values, errors, strict=True):
        for index in np.ndindex(tangent.shape):
            tangent[index] = 1.0
            slope, bar = _along(function, point, tangents, epsilon)
            value[index], error[index] = slope.item(), bar.item()
            tangent[index] = 0.0
    return values, errors


def _along(
    function: Callable[[list[Array]], Array],
    point: list[Array],
    tangents: list[Array],
    epsilon: float,
) -> tuple[Array, Array]:
    """Return the derivative of `function` along `tangents`, and its error."""
    pairs = list(zip(point, tangents, strict=True))
    moving = np.concatenate([x[v != 0] for x, v in pairs])
    length = max(np.max(np.abs(v), initial=0.0) for v in tangents) or 1.0

    def line(t: float) -> Array:
        return function([x + t * v for x, v in pairs])

    # Without a gradient, |slope| and the largest coordinate that moves have to stand in
    # for the sum of |gradient| times |argument|.
    reach = np.max(np.abs(moving), initial=0.0) / length
    step = step_for([moving], epsilon) / length
    return line_derivative(line, step, epsilon, lambda slope: np.abs(slope) * reach)


def _float_output(f: Callable[..., Any], output: Any) -> tf.Tensor:
    """Return what `f` returned as a float tensor, or refuse it."""
    is_array = isinstance(output, tf.Tensor | np.ndarray | np.generic)
    if is_array or isinstance(output, float) or nested.is_variable(output):
        tensor = tf.convert_to_tensor(output)
        if tensor.dtype.is_floating:
            return tensor
    raise InvalidArgumentError(
        "`f` must return one float tensor.",
        got=f"`{nested.name_of(f)}` returned {nested.describe(output)}",
        hint="return the one tensor to differentiate, cast to a float dtype if need be",
    )


def _tangents(direction: nested.Nest, point: nested.Nest) -> list[Array]:
    """Return the leaves of `direction`, which must match `point`."""
    tangent = nested.to_tensors(direction, "direction", nested.weak_dtype(point))
    require_finite(tangent, "direction")
    if not _match(tangent, point):
        raise InvalidArgumentError(
            "`direction` must have the structure and the shapes of `x`.",
            got=f"shapes {_shapes(tangent)} for `direction`, {_shapes(point)} for `x`",
            hint="tf.nest.map_structure(tf.ones_like, x), or leave `direction` out",
        )
    return _arrays(tf.nest.flatten(tangent))


def _match(a: nested.Nest, b: nested.Nest) -> bool:
    try:
        tf.nest.assert_same_structure(a, b)
    except (TypeError, ValueError):
        return False
    pairs = zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True)
    return all(x.shape == y.shape for x, y in pairs)


def _shapes(nest: nested.Nest) -> str:
    return str(tf.nest.map_structure(lambda leaf: tuple(leaf.shape), nest))


def _arrays(leaves: list[tf.Tensor]) -> list[Array]:
    return [np.asarray(leaf, np.float64) for leaf in leaves]


def _like(array: Array, leaf: tf.Tensor) -> tf.Tensor:
    return tf.constant(array.astype(leaf.dtype.as_numpy_dtype))
