"""Levenberg-Marquardt: Gauss-Newton steps, in a trust region, for sums of squares.

Each `update` judges the trial by what the linear model of the residuals had promised,
adapts the radius, and minimises the model within it. The Jacobian is evaluated where a
trial was taken, and only there. Its columns are scaled by the largest norm each of them
has had, so that the units of the parameters make no difference.

The minimiser of the model is found from singular values: of the triangle that QR leaves
of the Jacobian or, of more than `MOST_FOR_QR` parameters, as roots of the eigenvalues
of J'J, which is faster and sees half as many digits. A Jacobian that is too large to be
formed (`optimize.residuals` says when) is left to conjugate gradients on products with
J and J', in the trust region of `methods.newton`.

References:
    Moré (1978), The Levenberg-Marquardt algorithm: implementation and theory, in
    Numerical Analysis, Lecture Notes in Mathematics 630: the scaling (section 6), the
    radius (section 4), the Newton iteration for the damping (algorithm 5.5).
    Bates and Watts (1981), A relative offset orthogonality convergence criterion for
    nonlinear least squares, Technometrics 23: the rule to stop by.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either
from tfgrad.optimize.methods.bounded import Bounds
from tfgrad.optimize.methods.newton import Newton
from tfgrad.optimize.methods.protocol import Method, Move, Point

MOST_FOR_QR = 100
"""Parameters up to which the triangle of QR is used: it takes as long as QR itself."""

ACCEPTABLE = 1e-4
"""The least part of the promised decrease for which a trial is taken (Moré)."""

BAD, GOOD = 0.25, 0.75
"""Below and above these parts the radius shrinks and grows (Moré, algorithm 7.1)."""

CLOSE = 0.1
"""How far a step may be from the length that the radius says, relatively (Moré)."""

LITTLE = 0.01
"""The part of the residuals that may be left to a step which moves no parameter: what
exact data leave is far smaller than what moved the parameters."""

MOST_ROOTS = 20
"""Newton iterations for one damping; two or three are usual."""

MOST_TRIALS = 40
"""Trials in a row that are not taken; a radius is then 1e-12 of what it was or less."""

MOST_IDLE = 3
"""Of these, how many may be at the level of rounding."""

RUNS, ORTHOGONAL, STANDS, VANISHED, ROUNDED, STUCK = range(6)
"""Verdicts on the current point: it is a solution by one of three rules, or there is no
way on."""


class Linear(NamedTuple):
    """The residuals around a point, in scaled parameters: J D^-1 = U diag(s) V'.

    Attributes:
        s: Singular values, shape `[n]`; zero where they are rounding.
        v: Right singular vectors, as columns, shape `[n, n]`.
        c: The residuals along the left ones, U'r, shape `[n]`; zero where `s` is.
        scale: The diagonal of D, shape `[n]`.
        reach: How large the parts of the linear model are, |J||x|, shape `[]`: what
            rounding in the residuals is measured by.
        is_known: Whether all of the Jacobian was finite.
    """

    s: tf.Tensor
    v: tf.Tensor
    c: tf.Tensor
    scale: tf.Tensor
    reach: tf.Tensor
    is_known: Any


class Step(NamedTuple):
    """A step of the model; all of shape `[]`.

    Attributes:
        length: In scaled parameters.
        slope: Of f along it, at its start.
        promised: How much f falls by the model.
        damping: What was added to the squares of the singular values.
    """

    length: tf.Tensor
    slope: tf.Tensor
    promised: tf.Tensor
    damping: tf.Tensor


class State(NamedTuple):
    """What the method remembers; numbers have shape `[]`.

    Attributes:
        linear: The model around the current point.
        step: From there to the trial.
        radius: What the length of a step may be.
        trials: How many were tried from the current point.
        idle: How many of them were at the level of rounding and changed nothing.
        steps: How many were taken.
        least: A sum of squares that counts as none.
        verdict: On the current point.
    """

    linear: Linear
    step: Step
    radius: tf.Tensor
    trials: tf.Tensor
    idle: tf.Tensor
    steps: tf.Tensor
    least: tf.Tensor
    verdict: tf.Tensor


class Linearizable(Protocol):
    """What the method asks of the residuals."""

    def fits_in_memory(self) -> bool:
        """Return whether the Jacobian is small enough to be formed and factorised."""

    def linearize(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the residuals at `x`, shape `[m]`, and their Jacobian, `[m, n]`."""

    def gauss_newton(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return J'J at `x` times `v`."""


class LevenbergMarquardt:
    """Damped Gauss-Newton steps for f = half a sum of squares.

    Args:
        is_open: Leave it to others to say what a solution is.
        residuals: What is squared; None waits for `bind`.
        bounds: Lower and upper bounds of x, shape `[n]` each, infinite where there is
            none. Every trial is within them; the start has to be. A parameter at a
            bound that the gradient points beyond is held there.
    """

    name = "levenberg-marquardt"
    failure = "trustregion"

    def __init__(
        self,
        *,
        is_open: bool = False,
        residuals: Linearizable | None = None,
        bounds: Any = None,
    ) -> None:
        """Remember them."""
        self._is_open = is_open
        self._residuals = residuals
        self._bounds = bounds

    def get_config(self) -> dict[str, Any]:
        """Return what the run hangs on: nothing; rules may change as it goes on."""
        return {}

    def bind(self, objective: Any) -> Method:
        """Return the method for these residuals, with or without matrices."""
        if not objective.fits_in_memory():
            return Newton(_GaussNewton(objective))
        return LevenbergMarquardt(
            is_open=self._is_open, residuals=objective, bounds=self._bounds
        )

    def _box(self, like: tf.Tensor) -> Bounds:
        return Bounds(*(tf.cast(b, like.dtype) for b in self._bounds))

    def init(self, start: Point) -> Move:
        """Return a step that is no longer than x, in scaled parameters.

        They have the unit of the residuals, whose length it may have where x is zero.
        """
        zero, none = tf.zeros_like(start.fun), tf.constant(0)
        linear = self._linearize(start.x, tf.zeros_like(start.x))
        radius = tf.norm(linear.scale * start.x)
        state = State(
            linear=linear,
            step=Step(zero, zero, zero, zero),
            radius=tf.where(radius > 0, radius, tf.sqrt(2 * start.fun)),
            trials=none,
            idle=none,
            steps=none,
            least=EPSILONS[start.fun.dtype] ** 2 * tf.minimum(start.fun, 1),
            verdict=none,
        )
        return self._search(start, state)

    def update(self, new: Point, old: Point, state: State) -> Move:
        """Take the trial if f fell as promised; trust the model more, or less."""
        is_level, is_flatter = _compare(new, old, state)
        ratio = (old.fun - new.fun) / state.step.promised
        if self._bounds is not None:  # which may cut a step until it leads upwards
            ratio = tf.where(state.step.promised > 0, ratio, -tf.ones_like(ratio))
        # Where f cannot tell, the gradient can: take it, or not, and keep the radius.
        ratio = tf.where(is_level, tf.cast(is_flatter, ratio.dtype) / 2, ratio)
        ratio = tf.where(new.is_finite, ratio, -tf.ones_like(ratio))
        is_taken = ratio > ACCEPTABLE
        radius, damping = _trust(ratio, new, old, state)
        linear: Linear = tf.cond(
            is_taken,
            lambda: self._linearize(new.x, state.linear.scale),
            lambda: state.linear,
        )
        state = state._replace(
            linear=linear,
            step=state.step._replace(damping=damping),
            radius=radius,
            trials=tf.where(is_taken, 0, state.trials + 1),
            idle=tf.where(is_taken | ~is_level, 0, state.idle + 1),
            steps=state.steps + tf.cast(is_taken, tf.int32),
        )
        move = self._search(either(is_taken, new, old), state)
        return move._replace(accepted=is_taken)

    def why(self, state: State) -> tuple[str, str] | None:
        """Return the status and the sentence for a point that cannot be improved."""
        part = f"{_tolerance(state.radius.dtype):.1g}"
        return {
            ORTHOGONAL: (
                "gtol",
                "The residuals are orthogonal to what the parameters can do, but for "
                f"at most {part} of them.",
            ),
            STANDS: (
                "xtol",
                f"The Gauss-Newton step changes no parameter by more than {part}, "
                "relatively.",
            ),
            VANISHED: (
                "target",
                f"The residuals have vanished: f is at most {float(state.least):.2g}.",
            ),
            ROUNDED: (
                "precision",
                "Rounding hides what any further step would change.",
            ),
        }.get(int(state.verdict))

    def _linearize(self, x: tf.Tensor, scale: tf.Tensor) -> Linear:
        """Return the model around `x`, in parameters that are scaled at least so."""
        assert self._residuals is not None
        n: Any = x.shape[0]
        residuals, jacobian = self._residuals.linearize(x)
        is_known = tf.reduce_all(tf.math.is_finite(jacobian))
        jacobian = tf.where(is_known, jacobian, tf.zeros_like(jacobian))
        if self._bounds is not None:
            gradient = tf.linalg.matvec(jacobian, residuals, transpose_a=True)
            is_free = self._box(x).free(Point(x, residuals[0], gradient))
            jacobian = tf.where(is_free, jacobian, tf.zeros_like(jacobian))
        norms = tf.norm(jacobian, axis=0)
        scale = tf.maximum(scale, norms)
        scale = tf.where(scale > 0, scale, tf.ones_like(scale))
        factor = _by_triangle if n <= MOST_FOR_QR else _by_eigenvalues
        s, v, c = factor(jacobian / scale, residuals)
        is_rounding = s <= n * EPSILONS[s.dtype] * tf.reduce_max(s)
        s, c = (tf.where(is_rounding, tf.zeros_like(part), part) for part in (s, c))
        return Linear(s, v, c, scale, tf.norm(norms * x), is_known)

    def _search(self, here: Point, state: State) -> Move:
        linear = state.linear
        z, step = _minimiser(linear, state.radius, state.step.damping)
        x = here.x + tf.linalg.matvec(linear.v, z) / linear.scale
        if self._bounds is not None:
            x = self._box(x).clip(x)
            step = _along(linear, x - here.x, step.damping)
        state = state._replace(step=step)
        verdict = self._verdict(here, state, stands=tf.reduce_all(x == here.x))
        is_over = verdict != RUNS
        x = tf.where(is_over, here.x, x)  # one trial is made, even of a start
        state = state._replace(verdict=verdict)
        return Move(x, state, failed=is_over, expected=step.promised)

    def _verdict(self, here: Point, state: State, stands: Any) -> tf.Tensor:
        """Return what to make of the current point."""
        linear, dtype = state.linear, here.x.dtype
        enough = tf.constant(_tolerance(dtype), dtype)
        is_rounded = state.idle >= MOST_IDLE
        is_over = is_rounded | stands | (state.trials >= MOST_TRIALS) | ~linear.is_known
        # Where rounding does not forbid it, the run goes on to a tenth of what is
        # enough: near a solution that is one more step.
        enough = tf.where(is_over, enough, enough / 10)
        part = tf.math.divide_no_nan(tf.norm(linear.c), tf.sqrt(2 * here.fun))
        step = tf.linalg.matvec(linear.v, _newton(linear)) / linear.scale
        is_short = tf.reduce_all(tf.abs(step) <= enough * tf.abs(here.x))
        # Without any slope, a model has run off to where it says nothing of the data.
        has_slope = tf.reduce_any(linear.s > 0)
        rules = {
            STANDS: has_slope & is_short & ((part <= LITTLE) | is_over),
            VANISHED: here.fun <= state.least,
            ORTHOGONAL: has_slope & (part <= enough),
        }
        verdict = tf.where(is_over, tf.where(is_rounded, ROUNDED, STUCK), RUNS)
        for position, holds in rules.items():
            if not self._is_open:
                holds &= linear.is_known
                verdict = tf.where(holds, position, verdict)
        return verdict


class _GaussNewton:
    """J'J in place of the Hessian."""

    def __init__(self, residuals: Linearizable) -> None:
        self._residuals = residuals

    def hvp(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return J'J at `x` times `v`."""
        return self._residuals.gauss_newton(x, v)


def _along(linear: Linear, step: tf.Tensor, damping: tf.Tensor) -> Step:
    """Return what the model says of a step that bounds have cut short."""
    scaled = linear.scale * step
    change = linear.s * tf.linalg.matvec(linear.v, scaled, transpose_a=True)
    slope = tf.reduce_sum(linear.c * change)
    promised = -slope - tf.reduce_sum(change * change) / 2
    return Step(tf.norm(scaled), slope, promised, damping)


def _by_triangle(a: tf.Tensor, r: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return singular values, right vectors and U'r, by way of QR."""
    n: Any = a.shape[1]
    both = tf.concat([a, r[:, None]], axis=1)
    missing = tf.maximum(n - tf.shape(both)[0], 0)
    triangle = tf.linalg.qr(tf.pad(both, [[0, missing], [0, 0]])).r[:n]
    triangle.set_shape([n, n + 1])
    s, u, v = tf.linalg.svd(triangle[:, :n])
    return s, v, tf.linalg.matvec(u, triangle[:, n], transpose_a=True)


def _by_eigenvalues(
    a: tf.Tensor, r: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Return the same from the eigenvalues of A'A, which know half of the digits."""
    n: Any = a.shape[1]
    squares, v = tf.linalg.eigh(tf.matmul(a, a, transpose_a=True))
    largest = tf.reduce_max(squares)
    is_rounding = squares <= n * EPSILONS[squares.dtype] * largest
    s = tf.sqrt(tf.where(is_rounding, tf.zeros_like(squares), squares))
    gradient = tf.linalg.matvec(a, r, transpose_a=True)
    return (
        s,
        v,
        tf.math.divide_no_nan(tf.linalg.matvec(v, gradient, transpose_a=True), s),
    )


def _newton(linear: Linear) -> tf.Tensor:
    """Return the Gauss-Newton step, along the right singular vectors."""
    return -tf.math.divide_no_nan(linear.c, linear.s)


def _minimiser(
    linear: Linear, radius: tf.Tensor, guess: tf.Tensor
) -> tuple[tf.Tensor, Step]:
    """Return where the model is least within the radius, along the singular vectors.

    That is the Gauss-Newton step if it is short enough; else a damped step whose length
    is the radius, up to `CLOSE`: the root of a function of the damping (Moré, 5.5).
    """
    s, sc = linear.s, linear.s * linear.c
    full = _newton(linear)
    fits = tf.norm(full) <= (1 + CLOSE) * radius

    def is_off(i: Any, damping: Any, low: Any, high: Any, z: Any) -> tf.Tensor:
        off: tf.Tensor = tf.abs(tf.norm(z) - radius) > CLOSE * radius
        return ~fits & off & (i < MOST_ROOTS)

    def body(i: Any, damping: Any, low: Any, high: Any, z: Any) -> Any:
        length = tf.norm(z)
        is_long = length > radius
        low = tf.where(is_long, tf.maximum(low, damping), low)
        high = tf.where(is_long, high, tf.minimum(high, damping))
        slope = -tf.reduce_sum(z**2 / (s**2 + damping)) / length
        damping -= (length / radius) * (length - radius) / slope
        is_within = (low < damping) & (damping < high)
        middle = tf.maximum(1e-3 * high, tf.sqrt(low * high))
        damping = tf.where(is_within, damping, middle)
        return i + 1, damping, low, high, -sc / (s**2 + damping)

    zero, high = tf.zeros_like(radius), tf.norm(sc) / radius
    guess = tf.where((guess > 0) & (guess < high), guess, 1e-3 * high)
    start = (0, guess, zero, high, -sc / (s**2 + guess))
    _, damping, *_, z = tf.while_loop(is_off, body, start, parallel_iterations=1)
    z, damping = tf.where(fits, full, z), tf.where(fits, zero, damping)
    length, bend = tf.norm(z), tf.reduce_sum((s * z) ** 2)
    damped = damping * length**2
    return z, Step(length, -(bend + damped), bend / 2 + damped, damping)


def _trust(
    ratio: tf.Tensor, new: Point, old: Point, state: State
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the new radius, and a guess of the damping for it (Moré, section 4)."""
    step, first = state.step, (state.steps == 0) & (state.trials == 0)
    radius = tf.where(first, tf.minimum(state.radius, step.length), state.radius)
    # The minimiser of the parabola through f and its slope here, and f at the trial.
    parabola = step.slope / (2 * (step.slope + old.fun - new.fun))
    hopeless = ~new.is_finite | (new.fun >= 100 * old.fun)
    least, most = (tf.constant(bound, radius.dtype) for bound in (0.1, 0.5))
    part = tf.where(new.fun <= old.fun, most, parabola)
    part = tf.clip_by_value(tf.where(hopeless, least, part), least, most)
    shrunk = part * tf.minimum(radius, 10 * step.length)
    grows = (ratio >= GOOD) | (step.damping == 0)
    grown = tf.where(grows, 2 * step.length, radius)
    eased = tf.where(grows, step.damping / 2, step.damping)
    is_bad = ratio <= BAD
    return (
        tf.where(is_bad, shrunk, grown),
        tf.where(is_bad, step.damping / part, eased),
    )


def _compare(new: Point, old: Point, state: State) -> tuple[Any, Any]:
    """Return whether rounding hides what the trial changed, and if it is flatter.

    The error of a residual is that of the terms it is the difference of.
    """
    size, linear = tf.sqrt(2 * old.fun), state.linear
    noise = EPSILONS[size.dtype] * size * (size + linear.reach)
    is_level = (tf.abs(old.fun - new.fun) <= noise) & (state.step.promised <= noise)
    before, after = (tf.norm(p.grad / linear.scale) for p in (old, new))
    return is_level, after < before


def _tolerance(dtype: tf.DType) -> float:
    """Return what is small enough: half of the digits."""
    return float(EPSILONS[dtype]) ** 0.5
