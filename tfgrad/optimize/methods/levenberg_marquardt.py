"""Levenberg-Marquardt: Gauss-Newton steps, in a trust region, for sums of squares.

Each `update` judges the trial by what the linear model of the residuals had promised,
adapts the radius, and minimises the model within it. The columns of the Jacobian are
scaled by the largest norm each of them has had, so that the units of the parameters
make no difference.

The minimiser of the model is found from singular values: of the triangle that QR leaves
of the Jacobian or, of more than `MOST_FOR_QR` parameters, as roots of the eigenvalues
of J'J, which is faster and sees half as many digits (`optimize.residuals` makes either,
so that the method itself depends on the number of parameters only). A Jacobian that is
too large to be formed is left to conjugate gradients on products with J and J', in the
trust region of `methods.newton`.

References:
    Moré (1978), The Levenberg-Marquardt algorithm: implementation and theory, in
    Numerical Analysis, Lecture Notes in Mathematics 630: the scaling (section 6), the
    radius (section 4), the Newton iteration for the damping (algorithm 5.5).
    Bates and Watts (1981), A relative offset orthogonality convergence criterion for
    nonlinear least squares, Technometrics 23: the rule to stop by.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import either
from tfgrad.optimize.methods import bounded
from tfgrad.optimize.methods.bounded import Bounds
from tfgrad.optimize.methods.newton import Newton
from tfgrad.optimize.methods.protocol import Method, Move, Point

MOST_FOR_QR = 100
"""Parameters up to which `Point.linear` is the triangle of QR, which takes as long as
QR itself; of more, it is J'J and J'r."""

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

MOST_CUTS = 20
"""How often one step is cut at bounds, each time with a step of the others anew."""

MOST_IDLE = 3
"""Of these, how many may be at the level of rounding."""

RUNS, ORTHOGONAL, STANDS, VANISHED, STUCK = range(5)
"""Verdicts on the current point: it is a solution by one of three rules, or there is no
way on."""


STATUSES = {ORTHOGONAL: "gtol", STANDS: "xtol", VANISHED: "target"}
"""The statuses of a run that one of these rules has ended."""


def own_sentence(status: str, dtype: tf.DType, least: float) -> str:
    """Return the sentence for a run that a rule of the method has ended.

    `least` is what f is at most, if the residuals have vanished.
    """
    part = f"{tolerance(dtype):.1g}"
    return {
        "gtol": "The residuals are orthogonal to what the parameters can do, but for "
        f"at most {part} of them.",
        "xtol": f"The Gauss-Newton step changes no parameter by more than {part}, "
        "relatively.",
        "target": f"The residuals have vanished: f is at most {least:.2g}.",
    }[status]


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
        whole: Its length before bounds cut it.
    """

    length: tf.Tensor
    slope: tf.Tensor
    promised: tf.Tensor
    damping: tf.Tensor
    whole: tf.Tensor


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


class Damped:
    """Damped Gauss-Newton steps for f = half a sum of squares, of any kind.

    Args:
        is_open: Never claim a solution; the caller's rules decide.
        bounds: Lower and upper bounds of x, shape `[n]` each, infinite where there is
            none. Every trial is within them; the start has to be. A parameter at a
            bound that the gradient points beyond is held there.
    """

    name = "levenberg-marquardt"
    failure = "trustregion"
    last = 1
    """What the tolerance is multiplied by where rounding lets nobody go on."""

    def __init__(self, *, is_open: bool = False, bounds: Any = None) -> None:
        self._is_open, self._bounds = is_open, bounds

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that `update` depends on besides its arguments."""
        return (self._is_open, bounded.settings(self._bounds))

    @property
    def knows_solutions(self) -> bool:
        """Whether the verdict says where a solution is."""
        return not self._is_open

    def within(self, bounds: Any) -> Self:
        """Return the method within bounds."""
        return type(self)(is_open=self._is_open, bounds=bounds)

    def _verdict(
        self,
        here: Point,
        state: Any,
        newton: tf.Tensor,
        part: tf.Tensor,
        *,
        has_slope: Any,
        is_known: Any,
        stands: Any,
    ) -> tf.Tensor:
        """Return what to make of the current point.

        Args:
            here: The point.
            state: What the method remembers: how many trials there were.
            newton: The Gauss-Newton step, or back along it.
            part: Of the residuals, in the directions that the parameters change.
            has_slope: Whether some parameter changes them. If none does, they have run
                off to where the model no longer depends on them.
            is_known: Whether the Jacobian is finite.
            stands: Whether the trial is the point itself.
        """
        is_over = stands | (state.idle >= MOST_IDLE) | (state.trials >= MOST_TRIALS)
        is_over |= ~is_known
        verdict = either(is_over, STUCK, RUNS)
        if self._is_open:
            return verdict
        box, dtype = Bounds.of(self._bounds, here.x), here.x.dtype
        if box is not None:  # but where bounds hold all, there is none either
            has_slope |= box.holds_all(here)
        # Where rounding does not forbid it, the run goes on to a tenth of what is
        # enough: near a solution that is one more step.
        factors = tf.constant(self.last, dtype), tf.constant(0.1, dtype)
        enough = tolerance(dtype) * either(is_over, *factors)
        is_short = tf.reduce_all(tf.abs(newton) <= enough * tf.abs(here.x))
        rules = {
            STANDS: has_slope & is_short & ((part <= LITTLE) | is_over),
            VANISHED: here.fun <= state.least,
            ORTHOGONAL: has_slope & (part <= enough),
        }
        for position, holds in rules.items():
            verdict = either(holds & is_known, position, verdict)
        return verdict


class LevenbergMarquardt(Damped):
    """Damped steps within a radius that is adapted to how good the model is."""

    def bind(self, objective: Any) -> Method:
        """Return the method for these residuals, with or without matrices.

        Raises:
            InvalidArgumentError: If there are bounds, and too many parameters or
                residuals for matrices.
        """
        if objective.fits_in_memory:
            return self
        if self._bounds is not None:
            raise InvalidArgumentError(
                "Fits within bounds need a Jacobian that fits in memory.",
                got="more than 500 parameters, or a Jacobian of more than 2**25 "
                "elements",
                hint="tfgrad.minimize of half the sum of squares, with bounds",
            )
        return Newton(objective)

    def _factorised(self, point: Point, scale: tf.Tensor) -> Linear:
        """Return the model around a point, of the parameters that are free to move."""
        box = Bounds.of(self._bounds, point.x)
        return _factorise(point, scale, None if box is None else box.free(point))

    def init(self, start: Point) -> Move:
        """Return a step that is no longer than x, in scaled parameters.

        They have the unit of the residuals, whose length it may have where x is zero.
        """
        zero, none = tf.zeros_like(start.fun), tf.constant(0)
        linear = self._factorised(start, tf.zeros_like(start.x))
        radius = tf.norm(linear.scale * start.x)
        state = State(
            linear=linear,
            step=Step(zero, zero, zero, zero, zero),
            radius=either(radius > 0, radius, tf.sqrt(2 * start.fun)),
            trials=none,
            idle=none,
            steps=none,
            least=EPSILONS[start.fun.dtype] ** 2 * tf.minimum(start.fun, 1),
            verdict=none,
        )
        return self._search(start, state)

    def update(self, new: Point, old: Point, state: State) -> Move:
        """Take the trial if f fell as promised; trust the model more, or less."""
        promised, scale = state.step.promised, state.linear.scale
        ends, box = (new, old), Bounds.of(self._bounds, new.x)
        if box is not None:  # what a bound holds is not to become flat
            ends = box.reduced(new), box.reduced(old)
        is_level, is_flatter = compare(*ends, promised, scale, state.linear.reach)
        ratio = (old.fun - new.fun) / promised
        if box is not None:  # which may cut a step until it leads upwards
            ratio = either(promised > 0, ratio, -tf.ones_like(ratio))
        # Where rounding hides the change of f, the gradient decides; the radius stays.
        ratio = either(is_level, tf.cast(is_flatter, ratio.dtype) / 2, ratio)
        ratio = either(new.is_finite, ratio, -tf.ones_like(ratio))
        is_taken = ratio > ACCEPTABLE
        radius, damping = _trust(ratio, new, old, state)
        linear: Linear = tf.cond(
            is_taken,
            lambda: self._factorised(new, state.linear.scale),
            lambda: state.linear,
        )
        state = state._replace(
            linear=linear,
            step=state.step._replace(damping=damping),
            radius=radius,
            trials=either(is_taken, 0, state.trials + 1),
            idle=either(is_taken | ~is_level, 0, state.idle + 1),
            steps=state.steps + tf.cast(is_taken, tf.int32),
        )
        here = either(is_taken, new._replace(linear=()), old._replace(linear=()))
        return self._search(here, state)._replace(accepted=is_taken)

    def why(self, state: State) -> tuple[str, str] | None:
        """Return the status and the sentence for a point that cannot be improved."""
        status = STATUSES.get(int(state.verdict))
        if status is None:
            return None
        return status, own_sentence(status, state.radius.dtype, float(state.least))

    def _search(self, here: Point, state: State) -> Move:
        linear, box = state.linear, Bounds.of(self._bounds, here.x)
        x, step = _trial(here.x, linear, state.radius, state.step.damping)
        if box is not None:
            x = _within(box, here, x, linear, state.radius, step.damping)
            step = _along(linear, x - here.x, step)
        state = state._replace(step=step)
        verdict = self._verdict(
            here,
            state,
            tf.linalg.matvec(linear.v, _newton(linear)) / linear.scale,
            tf.math.divide_no_nan(tf.norm(linear.c), tf.sqrt(2 * here.fun)),
            has_slope=tf.reduce_any(linear.s > 0),
            is_known=linear.is_known,
            stands=tf.reduce_all(x == here.x),
        )
        is_over = verdict != RUNS
        x = either(is_over, here.x, x)  # one trial is made, even of a start
        state = state._replace(verdict=verdict)
        # If the data do not determine all parameters, the model's fall says nothing.
        known, free = tf.reduce_sum(tf.cast(linear.s > 0, tf.int32)), tf.size(linear.s)
        expected = step.promised
        if box is not None:  # which cuts what a step promises, and so the radius
            free = tf.reduce_sum(tf.cast(box.free(here), tf.int32))
            expected = tf.reduce_sum(linear.c**2) / 2
        is_determined = (known > 0) & (known >= free)  # not gone flat
        expected = either(is_determined, expected, expected.dtype.max)
        return Move(x, state, failed=is_over, expected=expected)


def _trial(
    x: tf.Tensor, linear: Linear, radius: tf.Tensor, damping: tf.Tensor
) -> tuple[tf.Tensor, Step]:
    """Return where the model is least within the radius; `damping` is a guess."""
    z, step = _minimiser(linear, radius, damping)
    return x + tf.linalg.matvec(linear.v, z) / linear.scale, step


def _within(
    box: Bounds,
    here: Point,
    x: tf.Tensor,
    linear: Linear,
    radius: tf.Tensor,
    damping: tf.Tensor,
) -> tf.Tensor:
    """Return the trial x cut at the bounds, the others moved as suits what is cut.

    What would leave the box stops at its bound, and the model is minimised again in the
    rest, until nothing else would leave it (`MOST_CUTS`).
    """
    matrix = linear.s[:, None] * tf.transpose(linear.v)
    is_held = tf.logical_not(box.free(here))

    def leaves(i: Any, x: tf.Tensor, is_cut: Any) -> tf.Tensor:
        return (i < MOST_CUTS) & tf.reduce_any(box.clip(x) != x)

    def body(i: Any, x: tf.Tensor, is_cut: Any) -> Any:
        clipped = box.clip(x)
        is_cut |= clipped != x
        start = either(is_cut, clipped, here.x)
        side = linear.c + tf.linalg.matvec(matrix, linear.scale * (start - here.x))
        rest = _decomposed(matrix * tf.cast(~is_cut, x.dtype), side, *linear[3:])
        ahead, _ = _trial(start, rest, radius, damping)
        return i + 1, either(is_cut, clipped, ahead), is_cut

    x = either(is_held, here.x, x)  # which rounding may have moved
    _, x, _ = tf.while_loop(leaves, body, (0, x, is_held), parallel_iterations=1)
    return box.clip(x)


def _along(linear: Linear, step: tf.Tensor, whole: Step) -> Step:
    """Return what the model says of a step, all of which bounds may have cut short."""
    scaled = linear.scale * step
    change = linear.s * tf.linalg.matvec(linear.v, scaled, transpose_a=True)
    slope = tf.reduce_sum(linear.c * change)
    promised = -slope - tf.reduce_sum(change * change) / 2
    length = tf.norm(scaled)
    return Step(length, slope, promised, whole.damping, whole.length)


def _factorise(point: Point, scale: tf.Tensor, is_free: Any) -> Linear:
    """Return the model around a point, in parameters that are scaled at least so."""
    n: Any = point.x.shape[0]
    both, is_triangle = point.linear, n <= MOST_FOR_QR
    is_known = tf.reduce_all(tf.math.is_finite(both))
    both = either(is_known, both, tf.zeros_like(both))
    matrix, side = both[:, :n], both[:, n]
    if is_free is not None:
        free = tf.cast(is_free, matrix.dtype)
        matrix *= free
        if not is_triangle:
            matrix, side = matrix * free[:, None], side * free
    norms = tf.norm(matrix, axis=0)
    if not is_triangle:
        norms = tf.sqrt(tf.linalg.diag_part(matrix))
    scale = tf.maximum(scale, norms)
    scale = either(scale > 0, scale, tf.ones_like(scale))
    reach = tf.norm(norms * point.x)
    if is_triangle:
        return _decomposed(matrix / scale, side, scale, reach, is_known)
    # The eigenvalues know half of the digits.
    squares, v = tf.linalg.eigh(matrix / (scale[:, None] * scale))
    is_rounding = squares <= n * EPSILONS[squares.dtype] * tf.reduce_max(squares)
    s = tf.sqrt(either(is_rounding, tf.zeros_like(squares), squares))
    along = tf.linalg.matvec(v, side / scale, transpose_a=True)
    c = tf.math.divide_no_nan(along, s)
    s, v, c = _clean(s, v, c)
    return Linear(s, v, c, scale, reach, is_known)


def _decomposed(matrix: tf.Tensor, side: tf.Tensor, *rest: Any) -> Linear:
    """Return the model of a scaled matrix and a right side, with the other fields."""
    s, u, v = tf.linalg.svd(matrix)
    s, v, c = _clean(s, v, tf.linalg.matvec(u, side, transpose_a=True))
    return Linear(s, v, c, *rest)


def _clean(s: tf.Tensor, v: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Return them with zeros in place of singular values that are rounding."""
    n: Any = s.shape[0]
    is_rounding = s <= n * EPSILONS[s.dtype] * tf.reduce_max(s)
    zero = tf.zeros_like(s)
    return either(is_rounding, zero, s), v, either(is_rounding, zero, c)


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
        low = either(is_long, tf.maximum(low, damping), low)
        high = either(is_long, high, tf.minimum(high, damping))
        slope = -tf.reduce_sum(z**2 / (s**2 + damping)) / length
        damping -= (length / radius) * (length - radius) / slope
        is_within = (low < damping) & (damping < high)
        middle = tf.maximum(1e-3 * high, tf.sqrt(low * high))
        damping = either(is_within, damping, middle)
        return i + 1, damping, low, high, -sc / (s**2 + damping)

    zero, high = tf.zeros_like(radius), tf.norm(sc) / radius
    guess = either((guess > 0) & (guess < high), guess, 1e-3 * high)
    start = (0, guess, zero, high, -tf.math.divide_no_nan(sc, s**2 + guess))
    _, damping, *_, z = tf.while_loop(is_off, body, start, parallel_iterations=1)
    z, damping = either(fits, full, z), either(fits, zero, damping)
    length, bend = tf.norm(z), tf.reduce_sum((s * z) ** 2)
    damped = damping * length**2
    return z, Step(length, -(bend + damped), bend / 2 + damped, damping, length)


def _trust(
    ratio: tf.Tensor, new: Point, old: Point, state: State
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the new radius, and a guess of the damping for it (Moré, section 4)."""
    step, first = state.step, (state.steps == 0) & (state.trials == 0)
    radius = either(first, tf.minimum(state.radius, step.whole), state.radius)
    # The minimiser of the parabola through f and its slope here, and f at the trial.
    parabola = step.slope / (2 * (step.slope + old.fun - new.fun))
    hopeless = ~new.is_finite | (new.fun >= 100 * old.fun)
    least, most = (tf.constant(bound, radius.dtype) for bound in (0.1, 0.5))
    part = either(new.fun <= old.fun, most, parabola)
    part = tf.clip_by_value(either(hopeless, least, part), least, most)
    shrunk = part * tf.minimum(radius, 10 * step.length)
    grows = (ratio >= GOOD) | (step.damping == 0)
    grown = either(grows, 2 * step.whole, radius)
    eased = either(grows, step.damping / 2, step.damping)
    is_bad = ratio <= BAD
    return (
        either(is_bad, shrunk, grown),
        either(is_bad, step.damping / part, eased),
    )


def compare(
    new: Point, old: Point, promised: tf.Tensor, scale: tf.Tensor, reach: tf.Tensor
) -> tuple[Any, Any]:
    """Return whether rounding hides what the trial changed, and if it is flatter."""
    noise = rounding(old.fun, reach)
    is_level = (tf.abs(old.fun - new.fun) <= noise) & (promised <= noise)
    before, after = (
        lengths(tf.math.divide_no_nan(point.grad, scale)) for point in (old, new)
    )
    return is_level, after < before


def rounding(fun: tf.Tensor, reach: tf.Tensor) -> tf.Tensor:
    """Return the rounding of f: that of the terms that residuals are differences of."""
    size = tf.sqrt(2 * fun)
    return EPSILONS[size.dtype] * size * (size + reach)


def lengths(vectors: tf.Tensor) -> tf.Tensor:
    """Return the length of a vector, or of each row of a matrix."""
    return tf.sqrt(tf.reduce_sum(vectors * vectors, -1))


def tolerance(dtype: tf.DType) -> float:
    """Return what is small enough: half of the digits."""
    return float(EPSILONS[dtype]) ** 0.5
