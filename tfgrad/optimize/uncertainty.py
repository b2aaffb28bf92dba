"""How well the parameters of a result are known: covariances and standard errors.

A covariance S is kept as a root, S = A A'. The standard error of a function of the
parameters with the Jacobian J is then the length of the rows of J A, to all digits; it
is known, too, where the data determine the function and not the parameters.

References:
    Seber and Wild (1989), Nonlinear Regression, section 5.1: errors of a fit, and of
    functions of its parameters. Pawitan (2001), In All Likelihood, sections 2.5 and
    9.6: errors by the Hessian of a negative log likelihood, the observed information.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.matrices import hessian, jacobian
from tfgrad.diagnosis.sources import restored
from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of, ravel, to_tensors
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.data import can_take
from tfgrad.optimize.history import Array
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.residuals import MOST_ELEMENTS, Residuals
from tfgrad.optimize.result import OptimizeResult
from tfgrad.optimize.resume import has_value, repeats
from tfgrad.runs.values import as_array

ROUNDINGS = 10
"""Rounding errors, for each parameter, of the eigenvalues of a matrix of derivatives
beside the largest one: sums over data have more than the matrix itself."""


class Spread(NamedTuple):
    """What is known of n parameters, each in units of `1 / scale`.

    Of many problems, all have one more axis in front.

    Attributes:
        root: A, shape `[n, n]`: the covariance is A A'. Zero along what the data do not
            determine.
        loose: Orthonormal directions that the data do not determine, as columns, shape
            `[n, n]`; zero for the others.
        scale: Shape `[n]`; in these units the parameters are of one size.
        is_held: Which parameters are at a bound: nothing is known of their errors.
        little: The part of a direction up to which it is rounding.
    """

    root: Array
    loose: Array
    scale: Array
    is_held: Array
    little: float

    def covariance(self) -> Array:
        """Return the matrix: NaN where a parameter is held, infinite where loose."""
        root = self.root / self.scale[..., None]
        matrix: Array = root @ np.swapaxes(root, -1, -2)
        matrix[_either(self._is_loose)] = np.inf
        matrix[_either(self.is_held)] = np.nan
        return matrix

    def errors(self) -> Array:
        """Return the standard error of each parameter, shape `[n]`."""
        errors: Array = np.linalg.norm(self.root, axis=-1) / self.scale
        errors[self._is_loose] = np.inf
        errors[self.is_held] = np.nan
        return errors

    @property
    def _is_loose(self) -> Array:
        is_loose: Array = np.linalg.norm(self.loose, axis=-1) > self.little
        return is_loose

    def errors_of(self, jacobian: Array) -> Array:
        """Return those of functions with this Jacobian, `[m, n]`: shape `[m]`."""
        rows = jacobian / self.scale
        errors: Array = np.linalg.norm(rows @ self.root, axis=1)
        along = np.linalg.norm(rows @ self.loose, axis=1)
        errors[along > self.little * np.linalg.norm(rows, axis=1)] = np.inf
        errors[np.any(jacobian[:, self.is_held] != 0, axis=1)] = np.nan
        errors[~np.all(np.isfinite(jacobian), axis=1)] = np.nan
        return errors

    def error_of(self, g: Callable[..., Any], x: Nest, variables: Any) -> Nest:
        """Return the standard error of each number that g returns at x.

        `variables` are those that x holds the values of, if any.
        """
        reads = variables is not None and can_take(g, 0)
        if not (callable(g) and (reads or can_take(g, 1))):
            raise InvalidArgumentError(
                "`error_of` takes a function of the parameters.",
                got=f"`{name_of(g)}`, which does not take them as one argument"
                if callable(g)
                else f"g={describe(g)}",
                hint="result.error_of(lambda x: ...), structured like result.x",
            )
        if reads:
            with at_point(variables, x):
                value, answer = g(), jacobian(g, wrt=list(variables))()
        else:
            value, answer = g(x), jacobian(g)(x)
        value = to_tensors(value, f"{name_of(g)}(x)")
        outputs, blocks = tf.nest.flatten(value), tf.nest.flatten(answer)
        matrices = _stacked(blocks, _sizes(outputs), _sizes(x))
        errors = [
            tf.constant(np.reshape(self.errors_of(matrix), y.shape), y.dtype)
            for matrix, y in zip(matrices, outputs, strict=True)
        ]
        return tf.nest.pack_sequence_as(value, errors)


def spread_of_factor(factor: Array, rows: Any, variance: Any, is_held: Array) -> Spread:
    """Return the spread of a fit, by singular values: J'J itself knows half the digits.

    Args:
        factor: The Jacobian J of all residuals, or the triangle that QR leaves; of many
            fits `[count, n, n]`, and the others likewise.
        rows: How many residuals there are.
        variance: Of a residual; NaN if it is not known.
        is_held: Which parameters are at a bound; the errors of the others are those of
            a fit in which they are fixed.
    """
    n, epsilon = factor.shape[-1], np.finfo(factor.dtype).eps
    j = np.where(is_held[..., None, :], 0, factor).astype(np.float64)
    is_known = (variance >= 0) & np.all(np.isfinite(j), axis=(-2, -1))
    variance, j = np.where(is_known, variance, 0), _where(is_known, j)
    scale = np.linalg.norm(j, axis=-2)
    scale[scale == 0] = 1.0
    j /= scale[..., None, :]
    _, s, vt = np.linalg.svd(np.linalg.qr(j, mode="r") if j.shape[-2] > n else j)
    s = np.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, n - s.shape[-1])])
    most = s.max(axis=-1, initial=0.0, keepdims=True)
    is_seen = s > np.maximum(rows, n)[..., None] * epsilon * most
    parts = np.sqrt(variance)[..., None] / np.where(is_seen, s, np.inf)
    return _spread(np.swapaxes(vt, -1, -2), parts, is_seen, scale, is_held, epsilon)


def spread_of_square(
    square: Array, variance: float, is_held: Array, epsilon: float
) -> Spread:
    """Return the spread of the inverse of a Hessian, or of J'J, times the variance.

    Args:
        square: The matrix, `[n, n]`; of many problems `[count, n, n]`. Nothing is known
            of one that is not finite.
        variance: As of `spread_of_factor`.
        is_held: Likewise.
        epsilon: The rounding error of the dtype that it was computed in.
    """
    n = square.shape[-1]
    square = np.where(_either(is_held), np.eye(n), square.astype(np.float64))
    square = (square + np.swapaxes(square, -1, -2)) / 2
    square = _where(np.all(np.isfinite(square), axis=(-2, -1)), square)
    sizes = np.abs(np.diagonal(square, axis1=-2, axis2=-1))
    scale = np.sqrt(np.where(sizes > 0, sizes, 1.0))
    scaled = square / scale[..., None, :] / scale[..., :, None]
    values, vectors = np.linalg.eigh(scaled)
    largest = np.max(np.abs(values), axis=-1, initial=0.0, keepdims=True)
    is_seen = values > ROUNDINGS * n * epsilon * largest
    parts = variance**0.5 / np.sqrt(np.where(is_seen, values, np.inf))
    return _spread(vectors, parts, is_seen, scale, is_held, epsilon)


def _spread(
    vectors: Array,
    parts: Array,
    is_seen: Array,
    scale: Array,
    is_held: Array,
    epsilon: float,
) -> Spread:
    """Return the spread with the root `parts` along vectors, which are columns."""
    root, loose = vectors * parts[..., None, :], vectors * ~is_seen[..., None, :]
    return Spread(root, loose, scale, is_held, epsilon**0.5)


def _either(is_one: Array) -> Array:
    """Return which elements of a matrix are in such a row or column."""
    return is_one[..., :, None] | is_one[..., None, :]


def _where(is_known: Any, matrices: Array) -> Array:
    """Return the matrices that are known, and zeros for the others."""
    known: Array = np.where(np.asarray(is_known)[..., None, None], matrices, 0.0)
    return known


class OfFit(NamedTuple):
    """What a fit leaves for `spread_of_factor`: small, and free of the function."""

    factor: Array
    rows: int
    variance: float
    is_held: Array

    def spread(self, result: OptimizeResult | None = None) -> Spread:
        """Return what is known of the parameters, whatever the result."""
        return spread_of_factor(*self)


@dataclass(frozen=True)
class OfFunction:
    """A function that was minimised, to be asked for its second derivatives.

    It holds the user's function and no trace of it, which would take more memory.

    Attributes:
        variables: Those that were moved; None for a function of values.
        kind: What `f` is the function of, or part of: a `Problem`.
        obstacle: Why there are no errors, a key of `OBSTACLES`; "" if there are.
        fit: What a fit has left, if it is small.
    """

    f: Callable[..., Any]
    variables: Sequence[tf.Variable] | None
    kind: Callable[..., Problem]
    has_aux: bool
    bounds: Any
    obstacle: str = ""
    fit: OfFit | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what is left of a fit: functions seldom can be."""
        return _first, (self.fit,)

    def spread(self, result: OptimizeResult) -> Spread:
        """Return what is known of the parameters: evaluate second derivatives."""
        if self.fit is not None:
            return self.fit.spread(result)
        if self.obstacle:
            _refuse(self.obstacle)
        with at_point(self.variables, result.x):
            problem = self.problem_at(result)
            is_held = held(problem, self.bounds, result.x)
            if isinstance(problem, Residuals):
                return _spread_of_large_fit(problem, result, is_held)
            square = _require_finite(_hessian(problem, result.x), is_held)
        spread = spread_of_square(square, 1.0, is_held, _epsilon(result.x))
        if np.any(spread.loose):
            free = square[np.ix_(~is_held, ~is_held)]
            least = np.linalg.eigvalsh((free + free.T) / 2)[0]
            raise InvalidArgumentError(
                "Errors are those of a minimum, where the Hessian is positive.",
                got=f"a Hessian whose smallest eigenvalue is {least:.4g}",
                hint="more steps to the minimum; or hold, by bounds that are equal, "
                "what the data do not determine",
            )
        return spread

    def problem_at(self, result: OptimizeResult) -> Problem:
        """Return the problem, if f is what it was; variables are at the result."""
        start = result.x if self.variables is None else None
        wrt = None if self.variables is None else list(self.variables)
        problem = self.kind(self.f, start, wrt, has_aux=self.has_aux, verify=False)
        value = problem.evaluate(problem.x.start()).value
        if not repeats(problem):
            _refuse("random")
        if not has_value(value, result.fun, result.history):
            raise InvalidArgumentError(
                "Errors are those of the function that was minimised.",
                got=f"f = {float(value):.8g} at the result, where it was "
                f"{float(result.fun):.8g}: what `{problem.name}` reads has changed",
                hint="minimize(f, result.x), and the errors of that result",
            )
        return problem


OBSTACLES = {
    "data": (
        "Errors need a function of the parameters alone.",
        "a result over `data=`: each value is that of a batch",
        "minimize of the loss over all of the data, from result.x",
    ),
    "constraints": (
        "Errors need a minimum that nothing but bounds holds.",
        "a result under `constraints=`",
        "minimize(f, result.x, bounds=...) if they do not hold x where it is",
    ),
    "random": (
        "Errors need a function that has one value at one point.",
        "one that draws random numbers, writes to variables, or cannot be compiled",
        "tf.random.stateless_normal with a fixed seed; no assign inside",
    ),
    "size": (
        "Errors need a matrix of all pairs of parameters.",
        "more pairs than 2**25",
        "fewer parameters; or tfgrad.hvp, which has the Hessian times a direction",
    ),
}
"""Rule, got and hint of the reasons why there are no errors."""


def _refuse(obstacle: str) -> NoReturn:
    rule, got, hint = OBSTACLES[obstacle]
    raise InvalidArgumentError(rule, got=got, hint=hint)


def _first(only: Any) -> Any:
    return only


def source_of(
    run: Minimisation, kind: Callable[..., Problem], fit: OfFit | None = None
) -> OfFunction:
    """Return what a result keeps of its function; nothing is computed."""
    problem, options = run.problem, run.options
    has_data = run.training is not None or problem.source is not None
    obstacle = "constraints" if options.constraints else ""
    return OfFunction(
        f=problem.f,
        variables=None if problem.x.takes_values else problem.x.variables,
        kind=kind,
        has_aux=problem.options["has_aux"],
        bounds=options.bounds,
        obstacle="data" if has_data else obstacle,
        fit=fit,
    )


@contextlib.contextmanager
def at_point(variables: Sequence[tf.Variable] | None, x: Nest) -> Iterator[None]:
    """Put variables to a point, and back to where they were."""
    variables = variables or ()
    with restored(variables):
        for variable, leaf in zip(variables, tf.nest.flatten(x), strict=False):
            variable.assign(leaf)
        yield


def held(problem: Problem, bounds: Any, x: Nest) -> Array:
    """Return which parameters are at a bound, shape `[n]`."""
    limits = Limits(problem, bounds, ())
    point = np.concatenate([np.ravel(as_array(leaf)) for leaf in tf.nest.flatten(x)])
    is_held: Array = (point <= limits.lower) | (point >= limits.upper)
    return is_held


def _hessian(problem: Problem, x: Nest) -> Array:
    """Return the matrix, in the order of the flattened x, where the variables are."""
    sizes = _sizes(x)
    if sum(sizes) ** 2 > MOST_ELEMENTS:
        _refuse("size")
    has_aux, point = problem.options["has_aux"], problem.x.arguments(tf.nest.flatten(x))
    answer = hessian(problem.f, wrt=problem.x.wrt, has_aux=has_aux)(*point)
    blocks = tf.nest.flatten(answer[0] if has_aux else answer)
    return np.vstack(_stacked(blocks, sizes, sizes))


def _spread_of_large_fit(
    fit: Residuals, result: OptimizeResult, is_held: Array
) -> Spread:
    """Return the spread from the Jacobian, or from products with J'J."""
    leaves, n = tf.nest.flatten(result.x), len(is_held)
    known: Any = result
    variance = float(known.residual_std) ** 2
    count = sum(_sizes(known.residuals))
    if count * n <= MOST_ELEMENTS:
        factor = np.asarray(fit.jacobian(leaves))
        return spread_of_factor(factor, count, variance, is_held)
    if n**2 > MOST_ELEMENTS:
        _refuse("size")
    x, identity = ravel(leaves), tf.eye(n, dtype=leaves[0].dtype)
    square = np.stack([fit.hvp(x, identity[i]).numpy() for i in range(n)])
    square = _require_finite(square, is_held)
    return spread_of_square(square, variance, is_held, _epsilon(result.x))


def _require_finite(square: Array, is_held: Array) -> Array:
    free = square[np.ix_(~is_held, ~is_held)]
    if not np.all(np.isfinite(free)):
        raise InvalidArgumentError(
            "Errors need a finite Hessian at the result.",
            got=f"{np.sum(~np.isfinite(free))} of {free.size} elements are not",
            hint="tfgrad.explain(f, result.x), which says where they come from",
        )
    return square


def _stacked(blocks: Sequence[Any], rows: list[int], columns: list[int]) -> list[Array]:
    """Return, for each output, the rows of its blocks by the leaves, side by side."""
    count = len(columns)
    each = [
        np.asarray(block, np.float64).reshape(rows[i // count], columns[i % count])
        for i, block in enumerate(blocks)
    ]
    return [np.hstack(each[i * count : (i + 1) * count]) for i in range(len(rows))]


def _sizes(x: Nest) -> list[int]:
    return [as_array(leaf).size for leaf in tf.nest.flatten(x)]


def _epsilon(x: Nest) -> float:
    return max(EPSILONS[tf.as_dtype(leaf.dtype)] for leaf in tf.nest.flatten(x))
