"""Bounds and constraints: from the user's nests to one vector, and what they allow.

References:
    Nocedal and Wright (2006), Numerical Optimization, 2nd edition: theorem 12.1 (the
    conditions of Karush, Kuhn and Tucker), section 16.7 (the projected gradient).
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.matrices import jacobian
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of, named_leaves, ravel, unravel
from tfgrad.optimize.data import can_take
from tfgrad.optimize.methods.scipy import SCIPY
from tfgrad.optimize.problem import Problem

Array = np.ndarray[Any, np.dtype[np.float64]]

NUMBERS = (numbers.Real, type(None), tf.bfloat16.as_numpy_dtype)
"""The types of a bound; NumPy's truth values, texts and dates are none of them."""

LEAST = 2.0**-126
"""The least positive number of float32 and bfloat16 that XLA does not take for zero."""

KINDS = {"eq": (0.0, 0.0), "ineq": (0.0, np.inf)}
"""SciPy's dicts: what the value of the function has to lie between."""


def require_support(name: str, method: Any, bounds: Any, constraints: Any) -> None:
    """Refuse bounds and constraints that a method, one of any kind, would not heed."""
    given = {"bounds": bounds is not None, "constraints": bool(_listed(constraints))}
    for what, is_given in given.items():
        is_able = getattr(method, what, False)
        is_able |= what == "bounds" and hasattr(method, "within")
        if is_given and not is_able:
            able = [repr(n) for n, other in SCIPY.items() if getattr(other, what)]
            able = ["'lbfgs'", *able] if what == "bounds" else able
            raise InvalidArgumentError(
                f"`{name}` knows no {what}.",
                got=f"{what} with this method",
                hint=f"method= one of {', '.join(able)}",
            )


class Limits:
    """What x has to keep to, in terms of one vector of shape `[n]`.

    Args:
        problem: Whose variables, or values, these are.
        bounds: SciPy's `Bounds`, a list of `(lower, upper)` for each element, or a pair
            `(lower, upper)` of numbers, None, or nests like the point: vectors then,
            infinite where there is none.
        constraints: SciPy's constraints, one or a list, of functions of the point.

    Attributes:
        bounds: The lower and the upper bounds; None if all are infinite.

    Raises:
        InvalidArgumentError: If one of them is none, or does not fit the point.
    """

    def __init__(self, problem: Problem, bounds: Any, constraints: Any) -> None:
        self.lower, self.upper = pair = _flat_bounds(problem, bounds)
        are_any = bounds is not None and any(np.any(np.isfinite(b)) for b in pair)
        self.bounds = pair if are_any else None
        self.functions = [_constraint(problem, c) for c in _listed(constraints)]

    @property
    def are_any(self) -> bool:
        """Whether there is any bound or constraint."""
        return self.bounds is not None or bool(self.functions)

    def clip(self, x: Array) -> Array:
        """Return the nearest point within the bounds."""
        return np.clip(x, self.lower, self.upper)

    def check(self, x: Array) -> None:
        """Refuse constraints that say nothing at the start, x."""
        for function in self.functions:
            function.check(x)

    def violation(self, x: Array) -> float:
        """Return by how much x breaks a limit, at most."""
        worst = np.maximum(self.lower - x, x - self.upper).max(initial=0.0)
        for function in self.functions:
            value, _ = function.at(x)
            lower, upper = function.lower, function.upper
            worst = max(worst, np.maximum(lower - value, value - upper).max(initial=0))
        return float(worst)


class Constraint:
    """One constraint on the flat point: lower <= function <= upper, an object of SciPy.

    `evaluate` returns value `[m]` and Jacobian `[m, n]` at a point.
    """

    def __init__(
        self,
        entry: Any,
        evaluate: Callable[[Array], tuple[Array, Array]],
        lower: Any,
        upper: Any,
    ) -> None:
        self._entry, self._evaluate = entry, evaluate
        self.lower = np.asarray(lower, np.float64)
        self.upper = np.asarray(upper, np.float64)
        self._x, self._known = b"", (np.zeros(0), np.zeros((0, 0)))

    def at(self, x: Array) -> tuple[Array, Array]:
        """Return value and Jacobian at x; SciPy asks for them one after the other."""
        if self._x != x.tobytes():
            self._known = self._evaluate(x)
            self._x = x.tobytes()
        return self._known

    def check(self, x: Array) -> None:
        """Refuse limits that do not fit the value, or that nothing keeps to."""
        value, _ = self.at(x)
        try:
            is_fitting = np.broadcast_to(self.lower <= self.upper, value.shape)
        except ValueError:
            is_fitting = np.array(False)
        if not np.all(is_fitting):
            raise InvalidArgumentError(
                "The limits of a constraint are numbers, the lower one not above the "
                "upper one, for each value of its function.",
                got=f"lb={self.lower}, ub={self.upper} for {len(value)} of them",
                hint="NonlinearConstraint(fun, lb, ub), with infinities for no limit",
            )

    def for_scipy(self) -> Any:
        """Return SciPy's object with functions of a vector."""
        if hasattr(self._entry, "A"):
            return self._entry  # linear: SciPy needs no function of ours
        functions = {
            "fun": lambda x: self.at(np.array(x))[0],
            "jac": lambda x: self.at(np.array(x))[1],
        }
        if isinstance(self._entry, Mapping):
            return {"type": self._entry["type"], **functions}
        changed = copy.copy(self._entry)
        changed.fun, changed.jac = functions.values()
        return changed


def _constraint(problem: Problem, entry: Any) -> Constraint:
    if isinstance(entry, Mapping) and entry.get("type") in KINDS:
        fun, extra = entry.get("fun"), entry.get("args", ())
        if callable(fun) and isinstance(extra, list | tuple):
            function = _Function(problem, fun, entry.get("jac"), tuple(extra))
            return Constraint(entry, function, *KINDS[entry["type"]])
    elif callable(getattr(entry, "fun", None)):
        function = _Function(problem, entry.fun, entry.jac, ())
        return Constraint(entry, function, entry.lb, entry.ub)
    elif hasattr(entry, "A"):
        matrix = entry.A.toarray() if hasattr(entry.A, "toarray") else entry.A
        matrix = np.atleast_2d(np.asarray(matrix))
        n = int(sum(leaf.shape.num_elements() for leaf in problem.x.leaves))
        if matrix.shape[1] != n or not np.all(np.isfinite(matrix)):
            raise InvalidArgumentError(
                "A LinearConstraint has a finite number for each element of the point.",
                got=f"A of {describe(matrix)}, for a point of {n}",
                hint=f"an array of shape (m, {n})",
            )
        return Constraint(entry, lambda x: (matrix @ x, matrix), entry.lb, entry.ub)
    raise InvalidArgumentError(
        "`constraints` holds SciPy's dicts, LinearConstraint or NonlinearConstraint.",
        got=f"constraints={describe(entry)}",
        hint='{"type": "ineq", "fun": lambda x: x[0] - 1}, which keeps it >= 0',
    )


class _Function:
    """A user's function of the point, as one of a vector, with its Jacobian."""

    def __init__(
        self, problem: Problem, fun: Any, jac: Any, extra: tuple[Any, ...]
    ) -> None:
        self._x, self._fun, self._extra = problem.x, fun, extra
        self._jac = jac if callable(jac) else None
        self._derivative: Callable[..., Any] | None = None

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Return value `[m]` and Jacobian `[m, n]`."""
        if self._derivative is not None:
            return self._differentiated(x)
        arguments = *self._put(x), *self._extra
        count = len(arguments)
        if not can_take(self._fun, count):
            raise InvalidArgumentError(
                "The function of a constraint takes what f takes, and `args`.",
                got=f"`{name_of(self._fun)}`, which does not take {count} arguments",
                hint="lambda x: x[0] - 1; of variables, lambda: variable[0] - 1",
            )
        answer = self._fun(*arguments)
        value = self._array(answer)
        if self._jac is None:
            if any(isinstance(y, tf.Tensor) for y in tf.nest.flatten(answer)):
                self._derivative = jacobian(self._vector, wrt=self._x.wrt, has_aux=True)
                return self._differentiated(x)
            return value, self._differences(x)
        answer = self._jac(*arguments)
        slope = self._array(answer, "the Jacobian of ")
        if slope.size != value.size * x.size:
            raise InvalidArgumentError(
                "The Jacobian of a constraint has a row for each value of it.",
                got=f"{describe(answer)} for {value.size} values of {x.size} elements",
                hint="leave `jac` out: functions of TensorFlow are differentiated",
            )
        return value, np.reshape(slope, (value.size, x.size))

    def _put(self, x: Array) -> tuple[Nest, ...]:
        """Return what the function takes at x; variables are assigned."""
        vector = tf.constant(x, self._x.leaves[0].dtype)
        return self._x.arguments(unravel(vector, self._x.leaves))

    def _differentiated(self, x: Array) -> tuple[Array, Array]:
        assert self._derivative is not None
        blocks, value = self._derivative(*self._put(x))
        blocks = tf.nest.flatten(blocks)
        rows = [np.reshape(np.asarray(block), (len(value), -1)) for block in blocks]
        return np.asarray(value, np.float64), np.hstack(rows).astype(np.float64)

    def _vector(self, *arguments: Nest) -> tuple[tf.Tensor, tf.Tensor]:
        leaves = tf.nest.flatten(self._fun(*arguments, *self._extra))
        vector = ravel(map(tf.convert_to_tensor, leaves))
        return vector, vector

    def _array(self, answer: Nest, what: str = "") -> Array:
        """Return the numbers that the user's function returned, as one vector."""
        leaves = [np.asarray(leaf) for leaf in tf.nest.flatten(answer)]
        if not leaves or any(leaf.dtype.kind not in "iuf" for leaf in leaves):
            raise InvalidArgumentError(
                "A constraint is a function that returns numbers.",
                got=f"{what}`{name_of(self._fun)}` returned {describe(answer)}",
                hint='{"type": "ineq", "fun": lambda x: x[0] - 1}, which keeps it >= 0',
            )
        return np.concatenate([np.ravel(leaf) for leaf in leaves]).astype(np.float64)

    def _differences(self, x: Array) -> Array:
        """Return central differences: NumPy's functions have no derivative."""

        def value(x: Array) -> Array:
            return self._array(self._fun(*self._put(x), *self._extra))

        sizes = 6e-6 * np.maximum(1.0, np.abs(x))  # the cube root of 2**-52
        pairs = zip(np.diag(sizes), sizes, strict=True)
        columns = [(value(x + step) - value(x - step)) / (2 * h) for step, h in pairs]
        return np.stack(columns, axis=1)


def _listed(constraints: Any) -> Sequence[Any]:
    if constraints is None:
        return []
    is_list = isinstance(constraints, Sequence)
    return constraints if is_list else [constraints]


def _flat_bounds(problem: Problem, bounds: Any) -> tuple[Array, Array]:
    n = int(sum(leaf.shape.num_elements() for leaf in problem.x.leaves))
    if bounds is None:
        return np.broadcast_to(-np.inf, n), np.broadcast_to(np.inf, n)  # no memory
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        # SciPy makes vectors of one element of numbers, which are for all.
        pair = tuple(b[0] if np.shape(b) == (1,) else b for b in (bounds.lb, bounds.ub))
    elif isinstance(bounds, list) and len(bounds) == n and all(map(_is_pair, bounds)):
        pair = [each[0] for each in bounds], [each[1] for each in bounds]
    elif isinstance(bounds, tuple) and len(bounds) == 2:
        pair = bounds
    else:
        raise InvalidArgumentError(
            "`bounds` is a pair (lower, upper), or SciPy's Bounds.",
            got=f"bounds={describe(bounds)}",
            hint="bounds=(0.0, None), or nests like the point: (lower, upper)",
        )
    lower = _side(problem, pair[0], -np.inf, "lower")
    upper = _side(problem, pair[1], np.inf, "upper")
    is_empty = (lower > upper) | (lower == np.inf) | (upper == -np.inf)
    if np.any(is_empty):
        i = int(np.argmax(is_empty))
        raise InvalidArgumentError(
            "No lower bound may be above its upper bound.",
            got=f"element {i}: lower {lower[i]:g}, upper {upper[i]:g}",
            hint="bounds=(lower, upper), in this order, None where there is none",
        )
    sizes = [leaf.shape.num_elements() for leaf in problem.x.leaves]
    names = [leaf.dtype.as_numpy_dtype for leaf in problem.x.leaves]
    ends = np.cumsum([0, *sizes])
    for dtype, i, j in zip(names, ends[:-1], ends[1:], strict=True):
        lower[i:j], upper[i:j] = _rounded(lower[i:j], upper[i:j], dtype)
    return lower, upper


def _rounded(lower: Array, upper: Array, dtype: Any) -> tuple[Array, Array]:
    """Return bounds as numbers of a dtype: the first ones within them, if there are.

    Between bounds without a number in between, it is the nearest one of each.
    """

    def up(side: Array, near: Array) -> Array:
        if not np.any(near < side):
            return near
        after = np.nextafter(near, dtype(np.inf))
        after = np.where(near == 0, dtype(LEAST), after)
        return np.where(near < side, after, near)

    with np.errstate(over="ignore"):
        near = lower.astype(dtype), upper.astype(dtype)
    inner = up(lower, near[0]), -up(-upper, -near[1])
    is_there = inner[0] <= inner[1]
    first, last = (np.where(is_there, *p) for p in zip(inner, near, strict=True))
    return first.astype(np.float64), last.astype(np.float64)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and len(value) == 2


def _side(problem: Problem, side: Any, none: float, name: str) -> Array:
    """Return one side of the bounds as a vector; `none` where there is no bound."""
    shapes: list[Any] = [tuple(leaf.shape) for leaf in problem.x.leaves]
    n = int(sum(np.prod(shape) for shape in shapes))
    given = named_leaves(side, name)
    paths = [path for path, _ in named_leaves(problem.x.template, name)]
    try:
        if [path for path, _ in given] == paths:
            pairs = zip(given, shapes, strict=True)
            parts = [_fitted(leaf, shape, none) for (_, leaf), shape in pairs]
            return np.concatenate([np.ravel(part) for part in parts])
        if side is None or isinstance(side, numbers.Real):
            return _fitted(side, (n,), none)
        return np.reshape(_numbers(side, none), (n,))
    except InvalidArgumentError:
        raise
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            "`bounds` must fit the point: numbers, None, or nests like it.",
            got=f"the {name} bound is {describe(side)}",
            hint=f"leaves of shapes {', '.join(map(str, shapes))}",
        ) from None


def _fitted(leaf: Any, shape: Any, none: float) -> Array:
    """Return a bound for a leaf of that shape: one number, or one for each element."""
    values = _numbers(leaf, none)
    if values.ndim == 0:
        return np.full(shape, values)
    if values.shape != tuple(shape):
        raise ValueError
    return values


def _numbers(leaf: Any, none: float) -> Array:
    """Return numbers as an array, with `none` in place of None."""
    given = np.asarray(leaf, dtype=object)
    types = {type(np.asarray(x)[()]) for x in given.flat}
    if not all(issubclass(kind, NUMBERS) for kind in types):
        raise TypeError
    is_none = np.vectorize(lambda x: x is None, otypes=[bool])(given)
    values = np.where(is_none, none, given).astype(np.float64)
    if np.any(np.isnan(values)):
        raise InvalidArgumentError(
            "`bounds` must not be NaN.",
            got=f"a bound of {describe(leaf)}",
            hint="None, or an infinity, where there is no bound",
        )
    return values
