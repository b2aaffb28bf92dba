"""`solution`: a minimiser as a differentiable function of what it depends on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.arguments import arguments_in_tensors, parameter_names
from tfgrad.derivatives.calls import require_function
from tfgrad.derivatives.keeping import kept
from tfgrad.derivatives.matrices import hessian, hvp
from tfgrad.derivatives.repairs import repaired, wants_marks
from tfgrad.derivatives.reverse import grad
from tfgrad.derivatives.signatures import is_dynamic
from tfgrad.derivatives.tapes import constant, unrecorded
from tfgrad.derivatives.tracing import Traces, converted, not_converted
from tfgrad.derivatives.verification import random_like
from tfgrad.diagnosis.graphs import trace
from tfgrad.diagnosis.number_causes import INDEFINITE, UNSOLVED
from tfgrad.differences import EPSILONS
from tfgrad.errors import ConvergenceError, InvalidArgumentError, NoGradientError
from tfgrad.nested import (
    Nest,
    describe,
    name_of,
    ravel,
    require_bool,
    to_tensors,
    unravel,
    weak_dtype,
)
from tfgrad.optimize.chain import pure_method
from tfgrad.optimize.chunks import in_trace
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.implicit import (
    MOST_FOR_MATRIX,
    Args,
    Minimum,
    System,
    attached,
    refined,
    withheld,
)
from tfgrad.optimize.methods.lbfgs import LBFGS, MEMORY
from tfgrad.optimize.methods.levenberg_marquardt import LevenbergMarquardt
from tfgrad.optimize.methods.newton import Newton
from tfgrad.optimize.methods.protocol import Method
from tfgrad.optimize.options import check_count, require_no
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.residuals import DTYPES, Residuals
from tfgrad.optimize.solvers import Ruled, State
from tfgrad.optimize.solvers.pure import PureStepper
from tfgrad.optimize.stopping import RUNNING, Tolerances, code_of, status_of
from tfgrad.optimize.unknowns import require_numbers

NO_MORE = ("nonfinite", "unbounded", "steps")
"""Statuses with which a run has not arrived, whatever Newton steps from there find."""

ROUGH = 1e-6
"""The part of the fall of f so far that may be left to Newton's method, where it costs
little: its square root is the distance, relative to that from the start, of the step
before. Where Newton's steps do not arrive from there, the method goes on."""

LEVENBERG_MARQUARDT = LevenbergMarquardt()

METHODS: dict[str, Method] = {
    "lbfgs": LBFGS(2 * MEMORY),
    "newton": Newton(),
}
"""The methods by name, the same objects always: what is compiled for them is kept.
L-BFGS keeps fewer pairs than `minimize` does of few numbers, with which a turn under
XLA takes half as long again; with half of these, the second penalty function of Moré,
Garbow and Hillstrom ends where its Hessian is not positive."""


class Settings(NamedTuple):
    """How a problem is solved.

    Attributes:
        method: The method.
        residuals: Whether f returns residuals.
        gauss_newton: Whether the derivative takes J'J for the Hessian.
        steps: The most steps of the method.
        bounds: Lower and upper bounds of the elements of x, of any length; None for no
            bounds.
    """

    method: Method
    residuals: bool
    gauss_newton: bool
    steps: int
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None


class Report(NamedTuple):
    """How a solution was found; all of shape `[]`.

    Attributes:
        has_arrived: Whether the method and Newton's steps after it ended at a point
            without slope.
        is_positive: Whether f bends up there in all directions.
        code: How the method ended.
        step: After how many steps.
        fun: The value of f there.
        grad_max: The largest |element| of its gradient.
        error: See `implicit.Minimum`.
        least: The least curvature, see `implicit.Inverse`.
    """

    has_arrived: Any
    is_positive: Any
    code: tf.Tensor
    step: tf.Tensor
    fun: tf.Tensor
    grad_max: tf.Tensor
    error: tf.Tensor
    least: tf.Tensor


@not_converted
def solution(
    f: Callable[..., Any],
    x0: Nest,
    *args: Any,
    method: Any = "lbfgs",
    residuals: bool = False,
    gauss_newton: bool = False,
    steps: int = 1000,
    bounds: Any = None,
    verify: bool = True,
    **unknown: Any,
) -> Nest:
    """Return the minimiser x of `f(x, *args)`, differentiable by all that f reads.

    Use it where a minimisation is part of what is differentiated: hyper-parameters,
    bilevel problems, layers that solve something, calibration. `minimize` has no
    derivative, and refuses to be differentiated.

    The derivative is that of the implicit function theorem, and not of the steps: at x
    the gradient of f vanishes whatever the arguments are, so a change of them moves x
    by minus the inverse Hessian times the change of the gradient. It costs a solution
    of linear equations with the Hessian, whatever the number of steps: up to 200
    numbers in x by its inverse, formed once for all weights of x; beyond, by conjugate
    gradients on products with it. It can be differentiated again.

    Called by itself, it compiles f once if f is a `tf.function`, or reads nothing that
    may change; else at each call. Inside a `tf.function` or a transform, all of it is
    part of that trace, the minimisation one loop of it.

    Args:
        f: Returns one float number (shape `[]`), smooth where its minimum is. The
            answer can be differentiated by the arguments of f, by tensors that f closes
            over and by variables that f reads, with a tape or a transform (`wrt=` for
            variables).
        x0: Where to start: float tensors, arrays, numbers, nests of them, of one dtype.
            The last solution is a good start. The answer does not depend on the start,
            and has no derivative by it.
        *args: What f takes besides: nests of tensors, arrays, numbers.
        method: "lbfgs", "newton", or a method of your own (see
            `tfgrad.optimize.methods.protocol`). The rules by which it ends are those of
            `minimize`, or, up to 200 numbers without bounds, a fall of f still expected
            of 1e-6 of the fall so far; then Newton steps leave an error of some 1e-12
            of x (float64; 1e-5 in float32), so that the derivative has at least half of
            the digits of the dtype.
        residuals: f returns residuals, as for `least_squares`, and the minimum is that
            of half the sum of their squares, found by Levenberg-Marquardt.
        gauss_newton: With `residuals`, take J'J for the Hessian, without the term with
            second derivatives of the residuals: cheaper, never indefinite, and exact
            only where the residuals vanish at the solution.
        steps: How many steps the method may take.
        bounds: What x must lie between, as for `minimize`. An element that is held by
            its bound does not move: its derivative is zero, and that of the others is
            what it is with that element fixed.
        verify: Called by itself, compare the first and second derivatives of f at the
            first solution of each structure, shapes and dtypes with differences along a
            random direction of x and of the arguments, as `hvp` does.
        **unknown: Refused with a TypeError that says what to write instead.

    Returns:
        x, structured like `x0`. Inside a trace it is NaN where there is no solution, or
        none with a derivative; `tfgrad.explain` then names this function and why.

    Raises:
        InvalidArgumentError: If an argument breaks its rule; nothing was traced.
        ConvergenceError: Called by itself, if the method did not arrive at a solution,
            or if the Hessian there is not positive, so that the solution is no minimum,
            or one of many.
        NoGradientError: While it is differentiated, if a path from a source to the
            gradient of f is cut.
        WrongDerivativeError: Called by itself, if TensorFlow's derivative of f is
            wrong, see `grad`.

    Example:
        >>> def ridge(w, penalty):
        ...     return (w - 3) ** 2 + penalty * w**2  # least at 3 / (1 + penalty)
        >>> float(solution(ridge, 0.0, 1.0))
        1.5
        >>> import tfgrad
        >>> slope = tfgrad.grad(lambda penalty: solution(ridge, 0.0, penalty))
        >>> print(f"{slope(1.0):.4f}")  # -3 / (1 + penalty)**2
        -0.7500

    References:
        `tfgrad.optimize.implicit` for those.
    """
    require_no(solution, unknown)
    require_function(f)
    require_bool(residuals=residuals, gauss_newton=gauss_newton, verify=verify)
    check_count("steps", steps)
    weak = weak_dtype(x0, args)
    point = _checked_point(x0, weak)
    names = parameter_names(f)(1 + len(args))[1:]
    arguments, _ = arguments_in_tensors(args, {}, (), names, weak)
    settings = Settings(
        _method(method, residuals, gauss_newton, bounds),
        residuals,
        gauss_newton,
        int(steps),
        _checked_bounds(f, point, bounds),
    )
    if not tf.executing_eagerly():
        x, _ = _solve(settings, converted(f), point, arguments)
        return x
    traces = kept(_traces, f, settings, verify)
    x, report = traces(point, arguments)
    _require_solved(f, report)
    return x


def _traces(f: Callable[..., Any], settings: Settings, verify: bool) -> Traces:
    def check(found: tuple[Nest, Report], _: Nest, args: tuple[Nest, ...]) -> None:
        _require_solved(f, found[1])
        _verify(f, settings, found[0], args)

    run = functools.partial(_solve, settings)
    return Traces(run, f, jit=False, check=check if verify else None)


def _verify(f: Any, settings: Settings, x: Nest, args: tuple[Nest, ...]) -> None:
    """Refuse a function of whose first or second derivatives TensorFlow has one wrong.

    Raises:
        WrongDerivativeError: In this case.
    """

    def value(*point: Any) -> tf.Tensor:
        return _value(settings, f(*point))

    value.__name__ = name_of(f)
    point = (x, *args)
    floats = [
        i
        for i, nest in enumerate(point)
        if all(is_dynamic(a) and a.dtype.is_floating for a in tf.nest.flatten(nest))
    ]
    # An argument that no derivative is asked by may be cut.
    for argnums in (tuple(floats), (0,)):
        direction = tuple(
            tf.nest.pack_sequence_as(point[i], random_like(tf.nest.flatten(point[i])))
            for i in argnums
        )
        with contextlib.suppress(NoGradientError):
            hvp(value, argnums)(*point, direction)
            return


def _solve(
    settings: Settings, f: Callable[..., Any], x0: Nest, args: tuple[Nest, ...]
) -> tuple[Nest, Report]:
    """Return the solution with its derivative, and how it was found: in a trace."""
    if tf.executing_eagerly():
        raise InvalidArgumentError(
            "The function has to stay within TensorFlow, so that it can be traced.",
            got=f"`{name_of(f)}`, which leaves it",
            hint="the same in tf.math or tf.experimental.numpy",
        )
    leaves = [tf.stop_gradient(leaf) for leaf in tf.nest.flatten(x0)]
    tensors = list(filter(is_dynamic, tf.nest.flatten(args)))

    def of_vector(x: tf.Tensor, tensors: Args) -> Any:
        left = iter(tensors)
        filled = [next(left) if is_dynamic(a) else a for a in tf.nest.flatten(args)]
        point = tf.nest.pack_sequence_as(x0, unravel(x, leaves))
        return f(point, *tf.nest.pack_sequence_as(args, filled))

    start = ravel(leaves)
    of_vector = _right(of_vector, start, tensors)
    of_vector.__name__ = name_of(f)
    system = _system(settings, of_vector, start)
    may_be_rough = system.matrix is not None and not system.bounds
    attempts = 2 if may_be_rough and not settings.residuals else 1

    def forward(start: tf.Tensor, *tensors: tf.Tensor) -> Any:
        problem = _problem(settings, of_vector, start, tensors)
        stepper = _Stepper(problem, settings.method, system.bounds)
        first, _ = stepper.start(stepper.clip(problem.x.start()))

        def goes_on(attempt: Any, last: State, minimum: Minimum) -> Any:
            report = _report(last, minimum)
            is_over = report.has_arrived & report.is_positive
            is_over |= ~_is(last, "converged")
            return (attempt == 0) | (attempt < attempts) & ~is_over

        def body(attempt: Any, last: State, _: Minimum) -> Any:
            stepper.is_rough = attempt + 1 < attempts
            code = tf.where(_is(last, "converged"), RUNNING, last.code)
            last, left = last._replace(code=code), settings.steps - last.step
            last = in_trace(Ruled(stepper, Tolerances()), last, left)
            return attempt + 1, last, refined(system, last.x, start, tensors)

        begun = 0, stepper.begun(first), Minimum.unknown(system, start)
        _, last, minimum = tf.while_loop(goes_on, body, begun, parallel_iterations=1)
        return minimum, _report(last, minimum)

    (minimum, report), outside = constant(forward, start, *tensors)
    floats = [source for source in outside if source.dtype.is_floating]
    system = system._replace(outside=floats)
    x = withheld(minimum.x, report.has_arrived, UNSOLVED)
    x = withheld(x, report.is_positive, INDEFINITE)
    x = attached(system, minimum.inverse, x, tensors)
    return tf.nest.pack_sequence_as(x0, unravel(x, leaves)), report


def _report(last: State, minimum: Minimum) -> Report:
    """Return the report on where a method, and Newton's steps after it, have ended."""
    # Where f does not bend up, Newton's steps do not tell.
    has_arrived = minimum.is_exact | ~minimum.is_positive
    for status in NO_MORE:
        has_arrived &= ~_is(last, status)
    return Report(
        has_arrived & (last.code != RUNNING),
        minimum.is_positive,
        last.code,
        last.step,
        last.evaluation.value,
        last.evaluation.grad_max,
        minimum.error,
        minimum.inverse.least_curvature(),
    )


def _is(last: State, status: str) -> Any:
    return last.code == code_of(status)


def _right(
    of_vector: Callable[..., Any], x: tf.Tensor, args: Args
) -> Callable[..., Any]:
    """Return the function with right derivatives of any order: tapes ask for three."""
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in (x, *args)]
    traced = unrecorded(lambda: trace(lambda x, *args: of_vector(x, args), specs))
    is_right = not wants_marks(traced.graph.get_operations())
    return of_vector if is_right else repaired(of_vector)


def _problem(
    settings: Settings, of_vector: Callable[..., Any], x: tf.Tensor, args: Args
) -> Any:
    """Return the problem of a function of one vector, with the arguments given."""

    def f(x: tf.Tensor) -> Any:
        return of_vector(x, args)

    f.__name__ = of_vector.__name__
    kind = Residuals if settings.residuals else Problem
    return kind(f, x, None, has_aux=False, verify=False)


class _Stepper(PureStepper):
    """A pure method whose steps are not recorded."""

    lookahead = 0
    is_rough: Any = False

    def accept(self, state: State, evaluation: Evaluation) -> State:
        """Take a step; where Newton's method goes on from near, arrive early."""
        new = super().accept(state, evaluation)
        expected = tf.maximum(new.expected, state.expected)
        is_near = expected <= ROUGH * (new.first - new.evaluation.value)
        is_near &= self.is_rough & new.accepted & (new.code == RUNNING)
        return new._replace(code=tf.where(is_near, code_of("converged"), new.code))

    def row(self, x: Any, evaluation: Evaluation) -> dict[str, Any]:
        """Return nothing."""
        return {}


def _system(
    settings: Settings, of_vector: Callable[..., Any], like: tf.Tensor
) -> System:
    """Return the equations of the minimum of a function of one vector."""

    @not_converted  # the user's function is as AutoGraph has made it already
    def f(x: tf.Tensor, args: list[tf.Tensor]) -> tf.Tensor:
        return _value(settings, of_vector(x, args))

    f.__name__ = of_vector.__name__
    n = like.shape[0]
    is_small = n is not None and n <= MOST_FOR_MATRIX
    gradient, second = grad(f, verify=False), hessian(f, verify=False)
    times = hvp(f, verify=False)

    def along(x: tf.Tensor, v: tf.Tensor, args: Args) -> tf.Tensor:
        if settings.gauss_newton:
            return _problem(settings, of_vector, x, args).hvp(x, v)
        return times(x, list(args), v)

    def matrix(x: tf.Tensor, args: Args) -> tf.Tensor:
        if settings.gauss_newton:
            jacobian = _problem(settings, of_vector, x, args).jacobian([x])
            return tf.matmul(jacobian, jacobian, transpose_a=True)
        return second(x, list(args))

    return System(
        value=lambda x, args: f(x, list(args)),
        gradient=lambda x, args: gradient(x, list(args)),
        product=along,
        matrix=matrix if is_small else None,
        outside=[],
        # No tensors: they would belong to this graph, and a derivative is of another.
        bounds=settings.bounds and tuple(map(np.array, settings.bounds)),
    )


def _value(settings: Settings, output: Nest) -> Any:
    """Return what is minimised of what f returns."""
    if not settings.residuals:
        return output
    parts = tf.nest.flatten(output)
    return tf.add_n([tf.reduce_sum(tf.square(part)) for part in parts]) / 2


def _require_solved(f: Callable[..., Any], report: Report) -> None:
    """Refuse a solution that is none, or that has no derivative.

    Raises:
        ConvergenceError: In these cases, with the numbers.
    """
    found: Any = [part.numpy() for part in report]
    numbers = Report(*found)
    name, status = name_of(f), status_of(int(numbers.code)) or "steps"
    where = (
        f"after {numbers.step} steps (status {status!r}), where f is "
        f"{numbers.fun:.6g} and its largest slope {numbers.grad_max:.3g}"
    )
    if not numbers.has_arrived:
        enough = EPSILONS[report.error.dtype] ** 0.5
        step = f"a last Newton step of {numbers.error:.2g} of x, for {enough:.2g}"
        raise ConvergenceError(
            f"The minimisation of `{name}` must arrive at a solution.",
            got=f"{'an end' if status in NO_MORE else f'{step} at most,'} {where}",
            hint="more steps=; a nearer start; method='newton'; tfgrad.minimize of it, "
            "whose result has a history",
        )
    if not numbers.is_positive:
        raise ConvergenceError(
            f"`{name}` must bend up in all directions at its solution, else that is no "
            "minimum, or one of many, without a derivative.",
            got=f"a least curvature of {numbers.least:.3g} (of the Hessian, scaled to "
            f"ones on its diagonal) {where}",
            hint="another start, if that is a saddle; a small ridge, as 1e-6 times the "
            "sum of squares of x, if the minimum is one of many",
        )


def _checked_point(x0: Nest, weak: tf.DType) -> Nest:
    """Return the start in tensors of one dtype."""
    point = to_tensors(x0, "x0", weak)
    require_numbers(point)
    leaves = tf.nest.flatten(point)
    dtypes = {leaf.dtype for leaf in leaves}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        names = " and ".join(sorted(dtype.name for dtype in dtypes))
        raise InvalidArgumentError(
            "`x0` must hold numbers of one dtype, float32 or float64.",
            got=f"x0={describe(x0)}, of {names}",
            hint="np.float64 for all of it",
        )
    return point


def _method(method: Any, residuals: bool, gauss_newton: bool, bounds: Any) -> Method:
    """Return the pure method that is meant."""
    if gauss_newton and not residuals:
        raise InvalidArgumentError(
            "`gauss_newton` is about residuals.",
            got="gauss_newton=True without residuals=True",
            hint="f that returns residuals, and residuals=True",
        )
    if residuals:
        if method != "lbfgs":
            raise InvalidArgumentError(
                "With `residuals`, the method is Levenberg-Marquardt.",
                got=f"method={method!r}",
                hint="no method; or f that returns half the sum of squares",
            )
        return LEVENBERG_MARQUARDT
    is_named = isinstance(method, str)
    known = METHODS.get(method.lower(), method) if is_named else method
    return pure_method(
        known,
        bounds,
        "`solution` takes a method that is a pure function, and one of them.",
        '"lbfgs" or "newton"',
    )


def _checked_bounds(f: Any, point: Nest, bounds: Any) -> Any:
    """Return the bounds of x as a vector, in plain numbers."""
    if bounds is None:
        return None
    for leaf in tf.nest.flatten(point):
        if not leaf.shape.is_fully_defined():
            raise InvalidArgumentError(
                "Within bounds, the shape of `x0` must be known.",
                got=f"x0={describe(leaf)}",
                hint="tf.ensure_shape(x0, ...)",
            )
    limits = Limits(Problem(f, point, None, has_aux=False), bounds, ())
    return limits.bounds and tuple(tuple(side.tolist()) for side in limits.bounds)
