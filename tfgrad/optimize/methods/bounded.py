"""L-BFGS within bounds: projected steps along the variables that are free to move.

A variable at a bound is held there while its gradient points beyond it; in the others,
the *free* ones, the step is that of L-BFGS with the parts of the pairs in these
variables. It is followed along its projection onto the box, so no point is ever outside
of it, and many variables may reach their bounds in one step. If the projection leads
uphill, the step ends at the first bound. A step is taken where f falls by a part of
what the slope promises (Bertsekas's rule).

References:
    Bertsekas (1982), Projected Newton methods for optimization problems with simple
    constraints, SIAM Journal on Control and Optimization 20: the projected search.
    Byrd, Lu, Nocedal and Zhu (1995), A limited memory algorithm for bound constrained
    optimization, SIAM Journal on Scientific Computing 16: the free variables' subspace.
    Byrd, Nocedal and Schnabel (1994), Mathematical Programming 63, equation 3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either
from tfgrad.optimize.methods import expectation
from tfgrad.optimize.methods.expectation import LEVEL, Progress, Size
from tfgrad.optimize.methods.protocol import Move, Point

SUFFICIENT_DECREASE = 1e-4
"""The part of the promised fall for which a trial is taken (Bertsekas)."""

LEAST, MOST = 0.1, 0.5
"""How far a search goes back from a trial, at least and at most."""

MOST_TRIALS, DULL = 30, 6
"""The most trials along one direction; a trial hidden by rounding counts so often."""

EXPANSION = 10.0
"""How many times as long the next step is if f does not curve."""

FEW, SHORT = 10, 2000
"""The most pairs, and the most numbers in each, whose products are taken one by one."""


class Bounds(NamedTuple):
    """The box, of shape `[n]` each; infinite, or the largest, where there is none."""

    lower: tf.Tensor
    upper: tf.Tensor

    @classmethod
    def of(cls, pair: Any, like: tf.Tensor) -> Bounds | None:
        """Return a pair of arrays as bounds of the dtype of x; None of None."""
        if pair is None:
            return None
        if not tf.is_tensor(pair[0]):  # tf.debugging.enable_check_numerics sees it
            pair = np.clip(pair, -like.dtype.max, like.dtype.max)
        return cls(*(tf.cast(b, like.dtype) for b in pair))

    def clip(self, x: tf.Tensor) -> tf.Tensor:
        """Return the nearest point in the box."""
        return tf.minimum(tf.maximum(x, self.lower), self.upper)

    def free(self, point: Point) -> tf.Tensor:
        """Return what may move to lower f, shape `[n]`."""
        below: Any = (point.x <= self.lower) & (point.grad >= 0)
        above = (point.x >= self.upper) & (point.grad <= 0)
        return ~(below | above)

    def holds_all(self, point: Point) -> tf.Tensor:
        """Return whether f falls beyond a bound by every variable, shape `[]`."""
        has_slope: Any = point.grad != 0
        return tf.reduce_all(has_slope) & ~tf.reduce_any(self.free(point))

    def settled(self, point: Point) -> Point:
        """Return the point without slopes that are infinite where they hold it.

        As that of a root at zero.
        """
        is_free: Any = self.free(point)
        holds = tf.math.is_inf(point.grad) & ~is_free
        zero = tf.zeros_like(point.grad)
        return point._replace(grad=either(holds, zero, point.grad))

    def reduced(self, point: Point) -> Point:
        """Return the point with the gradient of the free variables, zero elsewhere."""
        zero = tf.zeros_like(point.grad)
        return point._replace(grad=either(self.free(point), point.grad, zero))


def settings(bounds: Any) -> Any:
    """Return a key for the bounds: None, or the bytes of both sides."""
    return None if bounds is None else tuple(np.asarray(b).tobytes() for b in bounds)


class BoundedState(NamedTuple):
    """What the method remembers; but for the first two of shape `[]`.

    Attributes:
        direction: Of the search, shape `[n]`: its path is the projection.
        pairs: The last steps and changes of the gradient, shape `[m, 2, n]`.
        kept: How many pairs were since the last one was forgotten.
        t: How far along the direction the trial is.
        trials: How many points were tried along this direction.
        noise: The largest change of f among trials that only rounding tells from the
            start.
        progress: How the last steps went, by the gradient of the free variables.
        is_last: Whether the direction is that of a retry: none is left after it.
    """

    direction: tf.Tensor
    pairs: tf.Tensor
    kept: tf.Tensor
    t: tf.Tensor
    trials: tf.Tensor
    noise: tf.Tensor
    progress: Progress
    is_last: tf.Tensor


def init(start: Point, bounds: Bounds, memory: int) -> Move:
    """Return the first move, from a start in the box."""
    n: Any = start.x.shape[0]
    start = bounds.reduced(start)
    progress, first = expectation.start_of(start)
    zero, one = tf.zeros_like(start.fun), tf.ones_like(start.fun)
    pairs, none = tf.zeros([memory, 2, n], start.x.dtype), tf.constant(0)
    state = BoundedState(
        first.step, pairs, none, one, none, zero, progress, tf.constant(False)
    )
    x = bounds.clip(start.x + first.step)
    return Move(x, state, expected=progress.expected)


def update(new: Point, old: Point, state: BoundedState, bounds: Bounds) -> Move:
    """Take the trial and search along a new direction, or go back along the old one."""
    before, epsilon = state.progress, EPSILONS[new.fun.dtype]
    new, old = bounds.settled(new), bounds.settled(old)
    s, y = new.x - old.x, new.grad - old.grad
    slope, end_slope = _dot(old.grad, s), _dot(new.grad, s)
    steepness = tf.abs(end_slope)
    is_finite = tf.math.is_finite(new.fun) & tf.math.is_finite(end_slope)
    unknown = tf.constant(slope.dtype.max / 4, slope.dtype)
    change, one = either(is_finite, new.fun - old.fun, unknown), tf.ones_like(slope)
    size_of_change = tf.abs(change)
    is_level = is_finite & (size_of_change <= LEVEL * epsilon * tf.abs(old.fun))
    decreases = change <= SUFFICIENT_DECREASE * slope
    flattens = steepness <= (SUFFICIENT_DECREASE - 1) * slope
    is_taken = is_finite & (slope < 0) & (decreases | (is_level & flattens))

    # With the gradients of the free variables, the formulas are those without bounds.
    here = either(is_taken, new, old)
    is_free = bounds.free(here)
    here = here._replace(grad=either(is_free, here.grad, tf.zeros_like(here.grad)))
    progress = expectation.after_step(
        here, old, before, expectation.length_of(here.grad), tf.constant(False)
    )
    progress = either(is_taken, progress, before)
    sy = _dot(s, y)
    keeps = is_taken & (sy > epsilon * tf.maximum(-slope, steepness))
    pairs, kept = _keep(state, s, y, keeps)
    whole, is_known = _direction(pairs, kept, here.grad, is_free)
    newton = _leading(here, whole, bounds)
    path = bounds.clip(here.x + newton) - here.x
    is_model = is_taken & is_known
    leads = is_model & (_dot(here.grad, path) < 0)
    # A path that rounding leaves no length is no reason to expect more.
    is_model &= leads | (tf.reduce_max(tf.abs(path)) == 0)
    expected = either(is_model, _dot(here.grad, whole) / -2, before.expected)
    expected = either(progress.length > 0, expected, tf.zeros_like(expected))
    progress = progress._replace(expected=expected)

    size = Size.of(here.fun, before.first_fun)
    sized = expectation.sized(here, size)
    trials = state.trials + either(is_level, DULL, 1)
    fails = either(
        is_taken, progress.idle >= expectation.MOST_IDLE, trials >= MOST_TRIALS
    )
    is_promising = sized.slope < -LEVEL * epsilon * size.value
    is_last: Any = state.is_last
    retries = fails & ~is_last & ((kept > 0) | is_promising)
    retries &= progress.idle <= expectation.MOST_IDLE
    failed = fails & ~retries
    is_afresh = retries | (is_taken & ~leads)
    noise = either(is_level, tf.maximum(size_of_change, state.noise), state.noise)
    least = tf.minimum(before.expected, expected)
    gain = sized.slope / -2
    told = expectation.told(progress, least, size, gain, noise, failed)

    # At the edge of where f has values, half of a step is often inside.
    of_edge = either(
        tf.equal(state.trials, 0), *(tf.constant(p, slope.dtype) for p in (MOST, LEAST))
    )
    back = either(is_finite, _part(change, slope, end_slope), of_edge)

    # Without curvature, a longer step comes next, unless this one had to go back.
    known = tf.math.divide_no_nan(sy, _dot(y, y))
    longer = either(tf.equal(state.trials, 0), EXPANSION * one, one)
    grown = longer * tf.math.divide_no_nan(tf.sqrt(_dot(s, s)), before.length)
    scale = either(keeps, known, grown)
    steepest = either(
        retries & is_promising,
        sized,
        expectation.steepest(here.grad, progress.length, scale),
    )
    direction = either(is_taken, newton, state.direction)
    turns, none = is_taken | retries, tf.constant(0)
    # The pairs know nothing of where f does not curve up: the way gets longer there.
    goes_on = is_taken & leads & ~keeps & ~is_level & (state.t * longer > 1)
    state = BoundedState(
        either(is_afresh, steepest.step, direction),
        pairs,
        either(is_afresh, none, kept),
        either(turns, either(goes_on, state.t * longer, one), state.t * back),
        either(turns, none, trials),
        either(turns, tf.zeros_like(noise), noise),
        progress,
        either(turns, retries, is_last),
    )
    x = bounds.clip(here.x + state.t * state.direction)
    return Move(x, state, accepted=is_taken, failed=failed, expected=told)


def _leading(here: Point, newton: tf.Tensor, bounds: Bounds) -> tf.Tensor:
    """Return the direction, cut at the first bound if its projection leads uphill.

    Where many variables are cut at once, the others move as suits none of that. A step
    of which less than the part `LEAST` is left is not cut.
    """
    is_uphill: Any = _dot(here.grad, bounds.clip(here.x + newton) - here.x) >= 0
    size = tf.abs(newton)
    room = either(newton > 0, bounds.upper - here.x, here.x - bounds.lower)
    parts = tf.math.divide_no_nan(tf.minimum(room, size), size)
    part = tf.reduce_min(either(size > 0, parts, tf.ones_like(size)))
    return either(is_uphill & (part > LEAST), part, tf.ones_like(part)) * newton


def _part(change: tf.Tensor, slope: tf.Tensor, end_slope: tf.Tensor) -> tf.Tensor:
    """Return how far back the minimum of the cubic through a trial lies.

    Nocedal and Wright, equation 3.59, of a step from 0 to 1; of the parabola without
    the slope at the end where the cubic has no minimum.
    """
    parabola = tf.math.divide_no_nan(slope, 2 * (slope - change))
    middle = slope + end_slope - 3 * change
    square = middle * middle - slope * end_slope
    root = tf.sqrt(tf.maximum(square, 0))
    below = end_slope - slope + 2 * root
    cubic = 1 - tf.math.divide_no_nan(end_slope + root - middle, below)
    is_cubic = (square >= 0) & (below > 0) & tf.math.is_finite(cubic)
    return tf.clip_by_value(either(is_cubic, cubic, parabola), LEAST, MOST)


def _keep(
    state: BoundedState, s: tf.Tensor, y: tf.Tensor, keeps: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the pairs with a new one in place of the oldest."""
    m: Any = state.pairs.shape[0]
    slot = state.kept % m
    pair = either(keeps, tf.stack([s, y]), tf.gather(state.pairs, slot))
    places = tf.reshape(slot, [1, 1])
    pairs = tf.tensor_scatter_nd_update(state.pairs, places, tf.expand_dims(pair, 0))
    return pairs, state.kept + tf.cast(keeps, tf.int32)


def _direction(
    pairs: tf.Tensor, kept: tf.Tensor, grad: tf.Tensor, is_free: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return minus the inverse Hessian of the free variables times their gradient g.

    And whether any pair is known there. With S and Y what is left of the pairs in them,
    R the upper triangle of S'Y, D its diagonal and c the scale, it is (equation 3.1)

        H g = c g + S a - c Y b,  b = R^-1 S'g,  a = R^-T (D b + c (Y'Y b - Y'g)).

    Vectors of m numbers are columns.
    """
    m: Any = pairs.shape[0]
    places = np.arange(m, dtype=np.int32)
    order = (kept + places) % m  # from the oldest on
    mask, rows = tf.cast(is_free, grad.dtype), tf.reshape(pairs, [2 * m, -1])
    s, y = tf.unstack(pairs, axis=1)
    ss = tf.gather(tf.reduce_sum(s * s * mask, 1), order)
    both = tf.reshape(_products(rows, tf.gather(y, order) * mask), [m, 2 * m])
    sy, yy = tf.split(tf.gather(both, order), 2, axis=1)
    with_grad = tf.matmul(rows, tf.expand_dims(grad, 1))  # zero where not free
    with_grad = tf.gather(tf.reshape(with_grad, [m, 2]), order)
    sg, yg = tf.split(with_grad, 2, axis=1)
    curvature, squares = tf.linalg.diag_part(sy), tf.linalg.diag_part(yy)
    # Some pairs see no curvature in the free variables alone.
    least = EPSILONS[grad.dtype] * tf.sqrt(ss) * tf.sqrt(squares)
    is_good = (curvature > least) & (order < kept)
    newest = tf.reduce_max(either(is_good, places, np.zeros_like(places)))
    scale = tf.math.divide_no_nan(*(tf.gather(a, newest) for a in (curvature, squares)))

    # TensorFlow solves in no dtype of 16 bits.
    wide = tf.float64 if grad.dtype == tf.float64 else tf.float32
    unit, column = tf.eye(m, dtype=wide), tf.expand_dims(is_good, 1)
    is_upper = column & is_good & np.triu(np.ones([m, m], bool))
    triangle = either(is_upper, tf.cast(sy, wide), unit)
    none = tf.zeros([m, 1], grad.dtype)

    def solved(right: tf.Tensor, *, adjoint: bool) -> tf.Tensor:
        right = tf.cast(either(column, right, none), wide)
        # Of one column each, XLA solves them far faster than it inverts the triangle.
        solution = tf.linalg.triangular_solve(triangle, right, False, adjoint)
        return tf.cast(solution, grad.dtype)

    b = solved(sg, adjoint=False)
    rest = tf.expand_dims(curvature, 1) * b + scale * (tf.matmul(yy, b) - yg)
    a = solved(rest, adjoint=True)
    weights = tf.gather(tf.concat([a, -scale * b], 1), (places - kept) % m)
    step = tf.matmul(rows, tf.reshape(weights, [2 * m, 1]), transpose_a=True)
    return -(scale * grad + tf.squeeze(step, 1) * mask), tf.reduce_any(is_good)


def _products(rows: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Return the inner products of the rows with each y, shape `[2m, m]`.

    One by one where they are short: in a loop that XLA makes one kernel of, a small
    matrix product is eight times slower.
    """
    shape: Any = y.shape
    if shape[0] <= FEW and (shape[1] or SHORT + 1) <= SHORT:
        return tf.stack([tf.linalg.matvec(rows, row) for row in tf.unstack(y)], 1)
    return tf.matmul(rows, y, transpose_b=True)


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(a * b)
