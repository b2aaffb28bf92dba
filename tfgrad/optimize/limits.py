"""Bounds and constraints: from the user's nests to one vector, and what they allow.

References:
    Nocedal and Wright (2006), Numerical Optimization, 2nd edition: theorem 12.1 (the
    conditions of Karush, Kuhn and Tucker), section 16.7 (the projected gradient).
"""

from __future__ import annotations

import copy
import hashlib
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.matrices import jacobian
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of, named_leaves, ravel, unravel
from tfgrad.optimize.methods.scipy import SCIPY, SciPyMethod
from tfgrad.optimize.objective import Objective

Array = np.ndarray[Any, np.dtype[np.float64]]

MOST_SHOWN = 80
"""Characters up to which numbers are shown as such."""

KINDS = {"eq": (0.0, 0.0), "ineq": (0.0, np.inf)}
"""SciPy's dicts: what the value of the function has to lie between."""


def require_support(
    name: str, method: SciPyMethod | None, bounds: Any, constraints: Any
) -> None:
    """Refuse bounds and constraints that a method would not heed.

    Args:
        name: What to call the method.
        method: The method, if it is one of SciPy's.
        bounds: As for `minimize`.
        constraints: As for `minimize`.

    Raises:
        InvalidArgumentError: With the names of the methods that do.
    """
    given = {"bounds": bounds is not None, "constraints": _is_given(constraints)}
    for what, is_given in given.items():
        if is_given and not getattr(method, what, False):
            able = [repr(n) for n, other in SCIPY.items() if getattr(other, what)]
            raise InvalidArgumentError(
                f"`{name}` knows no {what}.",
                got=f"{what} with this method",
                hint=f"method= one of {', '.join(able)}",
            )


def limits_facts(bounds: Any, constraints: Any) -> dict[str, str]:
    """Return what makes bounds and constraints the same ones in another process."""
    sides = [bounds.lb, bounds.ub] if hasattr(bounds, "lb") else bounds
    entries = _listed(constraints)
    return {
        "bounds": "none" if bounds is None else _text(sides),
        "constraints": ", ".join(map(_constraint_text, entries)) or "none",
    }


def _constraint_text(entry: Any) -> str:
    if isinstance(entry, Mapping):
        fun: Any = entry.get("fun")
        return f"{entry.get('type')} {name_of(fun)}"
    what = name_of(entry.fun) if hasattr(entry, "fun") else "linear"
    parts = [getattr(entry, name, None) for name in ("A", "lb", "ub")]
    numbers = [_dense(part) for part in parts if part is not None]
    return f"{what} {_text(numbers)}"


def _text(nest: Nest) -> str:
    """Return the numbers of a nest while they are few, else a sum that tells them."""
    leaves = [np.asarray(leaf).tolist() for leaf in tf.nest.flatten(nest)]
    text = ", ".join(map(str, leaves))
    if len(text) <= MOST_SHOWN:
        return text
    return f"those of sum {hashlib.sha256(text.encode()).hexdigest()[:12]}"


class Limits:
    """What x has to keep to, in terms of one vector of shape `[n]`.

    Args:
        objective: Whose variables, or values, these are.
        bounds: SciPy's `Bounds`, a list of `(lower, upper)` for each element, or a pair
            `(lower, upper)` of numbers, None, or nests like the point.
        constraints: SciPy's constraints, one or a list, of functions of the point.

    Attributes:
        lower: Of shape `[n]`; minus infinity where there is none.
        upper: Likewise.
        functions: The constraints.

    Raises:
        InvalidArgumentError: If one of them is none, or does not fit the point.
    """

    def __init__(self, objective: Objective, bounds: Any, constraints: Any) -> None:
        """Bring them in form; no constraint is evaluated."""
        self.lower, self.upper = _flat_bounds(objective, bounds)
        self.functions = [_constraint(objective, c) for c in _listed(constraints)]

    @property
    def are_any(self) -> bool:
        """Whether there is something to keep to."""
        is_bounded = np.any(np.isfinite(self.lower)) or np.any(np.isfinite(self.upper))
        return bool(is_bounded) or bool(self.functions)

    def clip(self, x: Array) -> Array:
        """Return the nearest point within the bounds."""
        return np.clip(x, self.lower, self.upper)

    def violation(self, x: Array) -> float:
        """Return by how much x breaks a limit, at most."""
        worst = np.maximum(self.lower - x, x - self.upper).max(initial=0.0)
        for function in self.functions:
            value, _ = function.at(x)
            lower, upper = function.lower, function.upper
            worst = max(worst, np.maximum(lower - value, value - upper).max(initial=0))
        return float(worst)

    def slope(self, x: Array, grad: Array, gtol: float) -> float:
        """Return the largest |element| of the gradient that no limit holds up.

        That of the projected gradient; with constraints, of the gradient of the
        Lagrangian with the multipliers that make it least.

        Args:
            x: Where.
            grad: The gradient there, shape `[n]`.
            gtol: What a slope is called zero up to: a limit is active within 10 of it.
        """
        if not self.functions:
            return float(np.max(np.abs(self.clip(x - grad) - x), initial=0.0))
        rows, lower, upper = [np.eye(len(x))], [self.lower - x], [self.upper - x]
        for function in self.functions:
            value, slope = function.at(x)
            rows.append(slope)
            lower.append(function.lower - value)
            upper.append(function.upper - value)
        normals = np.concatenate(rows)
        near = 10 * max(gtol, 1e-6)
        at_lower = np.concatenate(lower) >= -near
        at_upper = np.concatenate(upper) <= near
        return _least_residual(normals, grad, at_lower, at_upper)

    def for_scipy(self, ask: Callable[..., Any]) -> list[Any]:
        """Return SciPy's constraints, which are asked for by number."""
        return [f.for_scipy(i, ask) for i, f in enumerate(self.functions)]


def _least_residual(normals: Array, grad: Array, at_lower: Any, at_upper: Any) -> float:
    """Return max |grad - normals' multipliers|, signs of the multipliers kept to."""
    from scipy.optimize import lsq_linear

    active = at_lower | at_upper
    if not np.any(active):
        return float(np.max(np.abs(grad)))
    least = np.where(at_upper[active], -np.inf, 0.0)
    most = np.where(at_lower[active], np.inf, 0.0)
    matrix = normals[active].T
    if not np.all(np.isfinite(matrix)):
        return np.inf
    found = lsq_linear(matrix, grad, (least, most), method="bvls", tol=1e-14)
    return float(np.max(np.abs(grad - matrix @ found.x)))


@dataclass
class Constraint:
    """One constraint on the flat point: lower <= function <= upper.

    Attributes:
        entry: SciPy's object.
        evaluate: Returns value `[m]` and Jacobian `[m, n]` at a point.
        lower: Shape `[m]` or a number.
        upper: Likewise.
    """

    entry: Any
    evaluate: Callable[[Array], tuple[Array, Array]]
    lower: Any
    upper: Any
    _last: tuple[bytes, tuple[Array, Array]] = (b"", (np.zeros(0), np.zeros((0, 0))))

    def at(self, x: Array) -> tuple[Array, Array]:
        """Return value and Jacobian at x; SciPy asks for them one after the other."""
        if self._last[0] != x.tobytes():
            self._last = x.tobytes(), self.evaluate(x)
        return self._last[1]

    def for_scipy(self, number: int, ask: Callable[..., Any]) -> Any:
        """Return SciPy's object with functions that ask for this constraint."""

        def fun(x: Array) -> Any:
            return ask("constraint", number, np.array(x))[0]

        def jac(x: Array) -> Any:
            return ask("constraint", number, np.array(x))[1]

        if isinstance(self.entry, Mapping):
            return {"type": self.entry["type"], "fun": fun, "jac": jac}
        if not hasattr(self.entry, "fun"):
            return self.entry  # linear: SciPy needs no function of ours
        changed = copy.copy(self.entry)
        changed.fun, changed.jac = fun, jac
        return changed


def _constraint(objective: Objective, entry: Any) -> Constraint:
    if isinstance(entry, Mapping) and entry.get("type") in KINDS:
        if callable(entry.get("fun")):
            extra = tuple(entry.get("args", ()))
            function = _Function(objective, entry["fun"], entry.get("jac"), extra)
            return Constraint(entry, function, *KINDS[entry["type"]])
    elif callable(getattr(entry, "fun", None)):
        jac = entry.jac if callable(entry.jac) else None
        function = _Function(objective, entry.fun, jac, ())
        lower, upper = (np.asarray(v, np.float64) for v in (entry.lb, entry.ub))
        return Constraint(entry, function, lower, upper)
    elif hasattr(entry, "A"):
        matrix = np.atleast_2d(_dense(entry.A))
        lower, upper = (np.asarray(v, np.float64) for v in (entry.lb, entry.ub))
        return Constraint(entry, lambda x: (matrix @ x, matrix), lower, upper)
    raise InvalidArgumentError(
        "`constraints` holds SciPy's dicts, LinearConstraint or NonlinearConstraint.",
        got=f"constraints={describe(entry)}",
        hint='{"type": "ineq", "fun": lambda x: x[0] - 1}, which keeps it >= 0',
    )


def _dense(matrix: Any) -> Any:
    return matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)


class _Function:
    """A user's function of the point, as one of a vector, with its Jacobian."""

    def __init__(
        self, objective: Objective, fun: Any, jac: Any, extra: tuple[Any, ...]
    ) -> None:
        self._objective = objective
        self._fun = fun
        self._jac = jac
        self._extra = extra
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Return value `[m]` and Jacobian `[m, n]`."""
        arguments = self._put(x)
        if self._jac is None and self._is_tensorflow(arguments):
            blocks, value = self._differentiated(arguments)
            count, flat = len(value), tf.nest.flatten(blocks)
            rows = [np.reshape(np.asarray(block), (count, -1)) for block in flat]
            return np.asarray(value, np.float64), np.hstack(rows).astype(np.float64)
        value = self._value(x)
        if self._jac is None:
            return value, self._differences(x)
        slope = np.asarray(self._jac(*self._put(x), *self._extra), np.float64)
        return value, np.reshape(slope, (len(value), len(x)))

    def _put(self, x: Array) -> tuple[Nest, ...]:
        variables = self._objective.variables
        vector = tf.constant(x, variables[0].dtype)
        self._objective.assign(unravel(vector, variables))
        return self._objective.arguments()

    def _is_tensorflow(self, arguments: tuple[Nest, ...]) -> bool:
        if self._compiled is None:
            answer = self._fun(*arguments, *self._extra)
            if not any(isinstance(y, tf.Tensor) for y in tf.nest.flatten(answer)):
                return False
            self._compiled = jacobian(
                self._vector,
                wrt=None if arguments else self._objective.template,
                has_aux=True,
            )
        return True

    def _differentiated(self, arguments: tuple[Nest, ...]) -> Any:
        assert self._compiled is not None
        return self._compiled(*arguments)

    def _vector(self, *arguments: Nest) -> tuple[tf.Tensor, tf.Tensor]:
        vector = ravel(
            map(
                tf.convert_to_tensor,
                tf.nest.flatten(self._fun(*arguments, *self._extra)),
            )
        )
        return vector, vector

    def _value(self, x: Array) -> Array:
        answer = tf.nest.flatten(self._fun(*self._put(x), *self._extra))
        return np.concatenate([np.ravel(np.asarray(y, np.float64)) for y in answer])

    def _differences(self, x: Array) -> Array:
        """Return central differences: NumPy's functions have no derivative."""
        columns = []
        for i in range(len(x)):
            step = np.zeros_like(x)
            step[i] = 6e-6 * max(1.0, abs(x[i]))  # the cube root of 2**-52
            change = self._value(x + step) - self._value(x - step)
            columns.append(change / (2 * step[i]))
        return np.stack(columns, axis=1)


def _listed(constraints: Any) -> Sequence[Any]:
    if not _is_given(constraints):
        return []
    if isinstance(constraints, Mapping) or not isinstance(constraints, Sequence):
        return [constraints]
    return constraints


def _is_given(constraints: Any) -> bool:
    is_empty = isinstance(constraints, list | tuple) and not constraints
    return constraints is not None and not is_empty


def _flat_bounds(objective: Objective, bounds: Any) -> tuple[Array, Array]:
    shapes = [tuple(variable.shape) for variable in objective.variables]
    n = int(sum(np.prod(shape) for shape in shapes))
    pair: tuple[Any, Any]
    if bounds is None:
        return np.full(n, -np.inf), np.full(n, np.inf)
    if hasattr(bounds, "lb") and hasattr(bounds, "ub"):
        pair = bounds.lb, bounds.ub
    elif isinstance(bounds, list) and len(bounds) == n:
        pair = _column(bounds, 0), _column(bounds, 1)
    elif isinstance(bounds, tuple) and len(bounds) == 2:
        pair = bounds
    else:
        raise InvalidArgumentError(
            "`bounds` is a pair (lower, upper), or SciPy's Bounds.",
            got=f"bounds={describe(bounds)}",
            hint="bounds=(0.0, None), or nests like the point: (lower, upper)",
        )
    lower = _side(objective, pair[0], shapes, -np.inf, "lower")
    upper = _side(objective, pair[1], shapes, np.inf, "upper")
    if np.any(lower > upper):
        i = int(np.argmax(lower > upper))
        raise InvalidArgumentError(
            "No lower bound may be above its upper bound.",
            got=f"element {i}: lower {lower[i]:g}, upper {upper[i]:g}",
            hint="bounds=(lower, upper), in this order",
        )
    return lower, upper


def _column(pairs: list[Any], which: int) -> list[Any]:
    return [pair[which] for pair in pairs]


def _side(
    objective: Objective, side: Any, shapes: list[Any], none: float, name: str
) -> Array:
    """Return one side of the bounds as a vector; `none` where there is no bound."""
    n = int(sum(np.prod(shape) for shape in shapes))
    given = named_leaves(side, name)
    paths = [path for path, _ in named_leaves(objective.template, name)]
    try:
        if [path for path, _ in given] == paths:
            pairs = zip(given, shapes, strict=True)
            parts = [np.broadcast_to(_numbers(leaf), s) for (_, leaf), s in pairs]
            flat = np.concatenate([np.ravel(part) for part in parts])
        elif side is None or isinstance(side, numbers.Real):
            flat = np.full(n, _numbers(side))
        else:
            flat = np.reshape(_numbers(side), (n,))
    except (TypeError, ValueError):
        raise InvalidArgumentError(
            "`bounds` must fit the point: numbers, None, or nests like it.",
            got=f"the {name} bound is {describe(side)}",
            hint=f"leaves of shapes {', '.join(map(str, shapes))}",
        ) from None
    return np.where(np.isnan(flat), none, flat)


def _numbers(leaf: Any) -> Array:
    """Return numbers as an array, NaN for None."""
    return np.asarray(leaf, dtype=np.float64)  # which reads None as NaN
