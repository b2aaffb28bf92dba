"""L-BFGS with a strong Wolfe line search, as a flat state machine.

Line search and direction live in one loop body with one evaluation of the objective:
each `update` either accepts the trial point and turns to a new direction, or narrows
the bracket along the old one. There are no branches: what is not wanted is computed
and not taken, since a branch costs a compiled loop more than a few products of n.

References:
    Nocedal and Wright (2006), Numerical Optimization, 2nd edition: section 7.2
    (L-BFGS), algorithms 3.5 and 3.6 (the strong Wolfe search), equations 3.7, 3.59.
    Byrd, Nocedal and Schnabel (1994), Mathematical Programming 63: the compact form of
    the inverse Hessian, equation 3.1.
    Moré and Thuente (1994), ACM Transactions on Mathematical Software 20, section 4:
    where to try next between two points.
    Fletcher (1987), Practical Methods of Optimization, equation 2.6.2: how far ahead.
    Hager and Zhang (2005), SIAM Journal on Optimization 16: the approximate Wolfe test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import either
from tfgrad.optimize.methods import bounded, expectation
from tfgrad.optimize.methods.expectation import LEVEL, Progress, Size
from tfgrad.optimize.methods.protocol import Move, Point

MEMORY, MEMORY_OF_FEW, FEW = 10, 40, 64
"""Pairs of steps and gradient changes kept: 3 to 20 in Nocedal and Wright, 7.2; and 40
of up to 64 parameters, where they cost next to nothing and save a sixth of the
evaluations on the standard problems."""

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9
"""The two constants of the Wolfe conditions, Nocedal and Wright, section 3.1."""

EXPANSION = 9.0
"""How many times as far as the last trial came the next may go beyond it, while the
slope still points down: at most so often, at least once (Fletcher, 2.6.2)."""

SAFEGUARD = 0.1
"""How close, relatively, a trial may come to the ends of its bracket."""

MOST_TRIALS = 30
"""Trials along one direction; a bracket is then some 1e-9 of what it was."""

DULL = 6
"""How many trials one counts for whose value tells nothing."""

LONG = 2000
"""Numbers in a vector from which on XLA stacks vectors faster than products of them."""


class Trial(NamedTuple):
    """A point on the current direction: distance, value and slope, of shape `[]`."""

    t: tf.Tensor
    fun: tf.Tensor
    slope: tf.Tensor


class Search(NamedTuple):
    """Where the search along one direction is; all of shape `[]`.

    Attributes:
        start: The trial at distance 0.
        low: The best trial so far that decreases f sufficiently.
        high: The other end of the bracket; its value is the largest of the dtype where
            f has none.
        is_bracketed: Whether there is one.
        t: The distance that is being tried.
        trials: How many points were tried along this direction.
        is_last: Whether the trial is `low` again, to be accepted in any case.
        noise: The largest change of f among trials that only rounding tells from the
            start.
    """

    start: Trial
    low: Trial
    high: Trial
    is_bracketed: tf.Tensor
    t: tf.Tensor
    trials: tf.Tensor
    is_last: tf.Tensor
    noise: tf.Tensor


class Pair(NamedTuple):
    """A step s and the change y of the gradient, both times the same number.

    Attributes:
        s: The step, shape `[n]`.
        y: The change, shape `[n]`.
        unit: What they were multiplied by, so that no square overflows; this and all
            that follows of shape `[]`.
        sy: Inner product of s and y.
        yy: Of y and y.
        sg: Of s and the gradient at the end of the step.
        yg: Inner product of y and that gradient.
        is_curved: Whether the pair may be kept.
        slope: Inner product of the direction and that gradient.
        length: The Euclidean norm of that gradient.
    """

    s: tf.Tensor
    y: tf.Tensor
    unit: tf.Tensor
    sy: tf.Tensor
    yy: tf.Tensor
    sg: tf.Tensor
    yg: tf.Tensor
    is_curved: tf.Tensor
    slope: tf.Tensor
    length: tf.Tensor


class Memory(NamedTuple):
    """What the last m pairs say about the inverse Hessian, by slot of a ring.

    One of the m + 1 slots is free: the next pair is written there, kept or not.

    Attributes:
        pairs: Their s and y, shape `[m + 1, 2, n]`.
        products: Inner products of each s and y with the gradient, shape `[m + 1, 2]`.
        gram: Inner products of the y with each other, shape `[m + 1, m + 1]`.
        curvature: Inner products of each s with its y, shape `[m + 1, 1]`.
        inverse: The inverse of the triangular matrix of the inner products of each s
            with its own and later y, shape `[m + 1, m + 1]`; zero where no pair is.
        scale: The multiple of the identity that the pairs correct, shape `[]`.
        kept: How many pairs were since the last one was forgotten, shape `[]`.
    """

    pairs: tf.Tensor
    products: tf.Tensor
    gram: tf.Tensor
    curvature: tf.Tensor
    inverse: tf.Tensor
    scale: tf.Tensor
    kept: tf.Tensor


class State(NamedTuple):
    """What the method remembers.

    Attributes:
        direction: Of the current search, shape `[n]`.
        search: The state of that search.
        memory: What is known of the curvature.
        progress: How the last steps went.
    """

    direction: tf.Tensor
    search: Search
    memory: Memory
    progress: Progress


class LBFGS:
    """Limited-memory BFGS: for smooth functions of two to millions of parameters.

    The expected fall (`Move.expected`) is half of -g'd along the next direction d.
    Unless that is most of f, more is reported if the step before expected more, if the
    expected fall grows from step to step (as in a valley just entered), or if a step of
    the size of x promises more.

    Args:
        memory: How many pairs to keep; each takes two vectors of the size of x. None
            takes `MEMORY`, or `MEMORY_OF_FEW` of at most `FEW` parameters.
        bounds: The lower and the upper bounds of x, shape `[n]` each, infinite where
            there is none; None: no bounds at all. Every point is within them (see
            `methods.bounded`); the start has to be.

    Raises:
        InvalidArgumentError: If `memory` is no whole number from 1 up.
    """

    name = "lbfgs"
    is_one_kernel = True

    def __init__(self, memory: int | None = None, bounds: Any = None) -> None:
        if memory is not None and (not isinstance(memory, int) or memory < 1):
            raise InvalidArgumentError(
                "`memory` must be a whole number of at least 1.",
                got=f"memory={memory!r}",
                hint=f"memory={MEMORY}",
            )
        self._memory = memory
        self._bounds = bounds

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that `init` and `update` depend on besides their arguments."""
        return (self._memory, bounded.settings(self._bounds))

    def within(self, bounds: Any) -> LBFGS:
        """Return the method within bounds."""
        return LBFGS(self._memory, bounds)

    def of_any_size(self, like: Any) -> Any:
        """Return the specs of a state for any number of parameters, but as many pairs.

        The ops of `update` do not depend on that number.
        """
        pairs, vector = like.memory.pairs, tf.TensorSpec([None], like.direction.dtype)
        pairs = tf.TensorSpec([*pairs.shape[:2], None], pairs.dtype)
        memory = like.memory._replace(pairs=pairs)
        return like._replace(direction=vector, memory=memory)

    def init(self, start: Point) -> Move:
        """Return a step down the gradient, a tenth of x or of |f| / |g|."""
        n: Any = start.x.shape[0]
        is_few = n is not None and n <= FEW
        memory = self._memory or (MEMORY_OF_FEW if is_few else MEMORY)
        if n is None:  # traced for any n
            n = tf.size(start.x)
        bounds = bounded.Bounds.of(self._bounds, start.x)
        if bounds is not None:
            return bounded.init(start, bounds, memory)
        m = memory + 1
        dtype, zero = start.x.dtype, tf.zeros_like(start.fun)
        square = tf.zeros([m, m], dtype)
        # Zeros that depend on an input: constant ones would be stored in the graph.
        none = either(tf.math.is_finite(start.fun), zero, zero)
        empty = Memory(
            tf.broadcast_to(none, [m, 2, n]), tf.zeros([m, 2], dtype), square,
            tf.zeros([m, 1], dtype), square, zero, tf.constant(0),
        )  # fmt: skip
        progress, first = expectation.start_of(start)
        search = _search(start.fun, first.slope)
        state = State(first.step, search, empty, progress)
        return Move(start.x + first.step, state, expected=progress.expected)

    def update(self, new: Point, old: Point, state: Any) -> Move:
        """Accept the trial and search along a new direction, or narrow the bracket."""
        bounds = bounded.Bounds.of(self._bounds, new.x)
        if bounds is not None:
            return bounded.update(new, old, state, bounds)
        search, before = state.search, state.progress
        pair = _pair(new, old, state)
        trial = Trial(search.t, new.fun, pair.slope)
        # A gradient that is not finite makes a slope that is not.
        is_finite = tf.math.is_finite(new.fun) & tf.math.is_finite(pair.slope)
        narrowed, is_wolfe, is_over = _narrow(trial, search, is_finite)
        is_taken = is_finite & (search.is_last | is_wolfe)
        here: Point = either(is_taken, new, old)
        progress = expectation.after_step(new, old, before, pair.length, search.is_last)
        progress = either(is_taken, progress, before)

        memory, newton = _remember(state.memory, pair, new.grad, is_taken)
        newton_slope, knows = _dot(newton, new.grad), memory.kept > 0
        # In exact arithmetic the direction leads down; if rounding has spoilt that, the
        # pairs are dropped.
        leads = is_taken & knows & (newton_slope < 0)
        size = Size.of(here.fun, before.first_fun)
        sized = expectation.sized(here, size)
        # If no trial is accepted, search once down the gradient before failing: along
        # `sized` if that promises more than rounding. If the last direction promises no
        # more than rounding, two trials along it are enough.
        noise = 4 * EPSILONS[new.fun.dtype] * size.value
        is_promising: Any = sized.slope < -noise
        is_hidden: Any = (before.expected <= noise) & knows
        is_over |= is_hidden & (search.trials >= 2)
        idle = either(is_taken, progress.idle, 0)
        fails = either(is_taken, idle >= expectation.MOST_IDLE, is_over)
        retries = fails & knows & (is_promising | ~is_hidden)
        retries &= idle <= expectation.MOST_IDLE
        failed = fails & ~retries
        is_afresh = retries | (is_taken & ~leads)
        memory = _write(memory, state.memory.kept, pair, leads)
        memory = memory._replace(kept=either(is_afresh, 0 * memory.kept, memory.kept))

        # Along a Newton direction f falls by half of what its slope promises.
        # After a fresh start, the fall expected before is kept.
        expected = either(leads, newton_slope / -2, before.expected)
        expected = either(progress.length > 0, expected, tf.zeros_like(expected))
        progress = progress._replace(expected=expected)
        gain = sized.slope / -2
        told = expectation.told(
            progress, before.expected, size, gain, narrowed.noise, failed
        )

        steepest = either(
            retries & is_promising,
            sized,
            expectation.steepest(here.grad, progress.length, memory.scale),
        )
        direction = either(is_taken, newton, state.direction)
        along = expectation.Descent(direction, newton_slope)
        direction, slope = either(is_afresh, steepest, along)
        search = either(is_taken | retries, _search(here.fun, slope), narrowed)
        return Move(
            here.x + search.t * direction,
            State(direction, search, memory, progress),
            accepted=is_taken,
            failed=failed,
            expected=told,
        )


def _search(fun: tf.Tensor, slope: tf.Tensor) -> Search:
    """Return the start of a search: the first trial is all of the direction."""
    zero, one = tf.zeros_like(fun), tf.ones_like(fun)
    start, none = Trial(zero, fun, slope), Trial(zero, zero + fun.dtype.max, zero)
    no = tf.constant(False)
    return Search(start, start, none, no, one, tf.constant(0), no, zero)


def _narrow(
    trial: Trial, search: Search, is_finite: Any
) -> tuple[Search, tf.Tensor, tf.Tensor]:
    """Return the search with the next trial (algorithms 3.5 and 3.6).

    And whether the trial satisfies the strong Wolfe conditions, or would; and whether
    the search is over, without a trial that is worth taking.
    """
    start, low, high = search.start, search.low, search.high
    change, slope = tf.abs(trial.fun - start.fun), tf.abs(start.slope)
    rounding = LEVEL * EPSILONS[change.dtype] * tf.abs(start.fun)
    limit = start.fun + SUFFICIENT_DECREASE * trial.t * start.slope
    decreases: Any = trial.fun <= limit
    # Within rounding of the start, values cannot tell a decrease; slopes can (Hager and
    # Zhang, equation 27).
    flattens = tf.abs(trial.slope) <= CURVATURE * slope
    is_level = trial.fun <= start.fun + rounding
    approximately = trial.slope <= (2 * SUFFICIENT_DECREASE - 1) * start.slope
    is_wolfe = flattens & (decreases | (is_level & approximately))
    # The value is that of the start, but for rounding. Or the rounding is larger than
    # that: where the slopes at both ends are the same, f changes as they say.
    is_straight = tf.abs(trial.slope - start.slope) <= slope / 2
    is_dull = (change <= rounding) | (is_straight & (change > 4 * trial.t * slope))
    noise = either(is_dull, tf.maximum(change, search.noise), search.noise)

    ahead = _beyond(low, trial)
    is_worse = ~(is_finite & decreases) | (trial.fun >= low.fun) & (low.t > 0)
    unknown = tf.constant(change.dtype.max, change.dtype)
    trial = trial._replace(fun=either(is_finite, trial.fun, unknown))
    turns_back = trial.slope * (high.t - low.t) >= 0
    rises = either(search.is_bracketed, turns_back, trial.slope >= 0)
    # Either end of the bracket may be the one that the trial replaces.
    high = either(is_worse, trial, either(rises, low, high))
    low = either(is_worse, low, trial)
    is_bracketed = search.is_bracketed | is_worse | rises
    width = high.t - low.t
    t = either(is_bracketed, _between(low, high, width), ahead)
    trials = search.trials + either(is_dull, DULL, 1)
    closed = is_bracketed & (tf.abs(width) <= 2 * EPSILONS[t.dtype] * low.t)
    is_over = (trials >= MOST_TRIALS) | closed
    has_low = low.t > 0
    is_last = is_over & has_low
    t = either(is_last, low.t, t)
    narrowed = Search(start, low, high, is_bracketed, t, trials, is_last, noise)
    return narrowed, is_wolfe, is_over & ~has_low


def _beyond(low: Trial, trial: Trial) -> tf.Tensor:
    """Return where the slope vanishes beyond both, if it changes as between them."""
    step = trial.t - low.t
    farthest = EXPANSION * step
    root = tf.math.divide_no_nan(step * trial.slope, low.slope - trial.slope)
    # The slope does not rise from one to the other, or is not finite.
    root = either(root > 0, root, farthest)
    return trial.t + tf.clip_by_value(root, step, farthest)


def _between(low: Trial, high: Trial, width: tf.Tensor) -> tf.Tensor:
    """Return the minimiser of the cubic through both ends (3.59), between them.

    If the higher end lies well above the lower one, the parabola through its value is
    nearer the truth farther out: then half-way between the two minimisers.
    """
    divide, zero = tf.math.divide_no_nan, tf.zeros_like(width)
    is_known = high.fun < high.fun.dtype.max
    rise = either(is_known, high.fun - low.fun, zero)
    secant = divide(rise, width)
    d1 = low.slope + high.slope - 3 * secant
    square = d1 * d1 - low.slope * high.slope
    d2 = tf.sign(width) * tf.sqrt(tf.maximum(square, 0))
    below = high.slope - low.slope + 2 * d2
    is_known &= (square >= 0) & (below != 0)
    cubic = 1 - divide(high.slope + d2 - d1, below)
    parabola = divide(low.slope, low.slope - secant) / 2
    is_nearer = tf.abs(cubic) < tf.abs(parabola)
    mixed = either(is_nearer, cubic, (cubic + parabola) / 2)
    part = either(rise > 0, mixed, cubic)
    part = tf.clip_by_value(part, SAFEGUARD, 1 - SAFEGUARD)
    is_known &= tf.math.is_finite(part)
    return low.t + width * either(is_known, part, zero + 0.25)


def _pair(new: Point, old: Point, state: State) -> Pair:
    """Return what the step from `old` to `new` says."""
    t, norm, dtype = state.search.t, state.progress.grad_max, new.grad.dtype
    unit = 1 / either(norm > 4 / dtype.max, norm, tf.ones_like(norm))
    g, y = unit * new.grad, unit * (new.grad - old.grad)
    if (g.shape[0] or LONG) >= LONG:
        rows = tf.stack([y, g, state.direction])
        yy, (yg, gg, slope) = _dot(y, y), tf.unstack(tf.linalg.matvec(rows, g))
    else:  # one sum of many is faster than many
        terms = tf.stack([y * y, y * g, g * g, state.direction * g])
        yy, yg, gg, slope = tf.unstack(tf.reduce_sum(terms, 1))
    slope /= unit
    t *= unit
    bend, root = slope - state.search.start.slope, tf.sqrt(gg)
    sy = t * (unit * bend)
    # The pair is dropped if its curvature is not positive, or is lost in the rounding
    # of the slopes whose difference it is, whatever the units of f and x; if 1 / sy may
    # overflow; or if rounding leaves nothing of the new gradient in y.
    epsilon = EPSILONS[dtype]
    is_curved = (bend > epsilon * tf.abs(slope)) & (sy > 4 / dtype.max)
    is_curved &= root > epsilon
    s = t * state.direction
    return Pair(s, y, unit, sy, yy, t * slope, yg / unit, is_curved, slope, root / unit)


def _remember(
    memory: Memory, pair: Pair, gradient: tf.Tensor, is_taken: tf.Tensor
) -> tuple[Memory, tf.Tensor]:
    """Return the memory with the pair, if it is to be kept, but for the pair itself.

    And the next direction, minus the inverse Hessian times the gradient g. With R the
    triangular matrix, D the diagonal of the curvatures and c the scale, equation 3.1 is

        H g = c g + S a - c Y b,  b = R^-1 S'g,  a = R^-T (D b + c (Y'Y b - Y'g)).

    Vectors of m + 1 numbers are columns. Where no pair is, rows and columns of the
    inverse are zero, and the other numbers do not count.
    """
    m: Any = memory.pairs.shape[0]
    slot, places = memory.kept % m, np.arange(m, dtype=np.int32)
    is_row, is_new = (tf.equal(each, slot) for each in (places, places[:, None]))
    is_rest = tf.not_equal((places[:, None] - 1) % m, slot)
    none, ratio = tf.zeros([], gradient.dtype), tf.math.divide_no_nan(pair.sy, pair.yy)
    is_kept: Any = pair.is_curved & is_taken & (ratio > 0)
    is_written = is_new & is_kept

    rows = tf.reshape(memory.pairs, [2 * m, -1])
    products = tf.matmul(rows, tf.expand_dims(gradient, 1))
    products = tf.reshape(products, [m, 2])
    # Products with y are the changes of the products with the gradient.
    with_pair = pair.unit * (products - memory.products)
    with_s, with_y = tf.split(with_pair, 2, axis=1)
    # The oldest pair makes room, or all do if there was a fresh start. Its column has
    # nothing outside of its row.
    is_known = (memory.kept > 0) & (is_rest | ~is_kept)
    inverse = tf.where(is_known, memory.inverse, none)
    column = tf.where(is_new, none - 1, tf.matmul(inverse, with_s))
    column = tf.math.divide_no_nan(column, -either(is_kept, pair.sy, none))
    inverse = tf.where(is_row, column, inverse)
    with_y = tf.where(is_new, pair.yy, with_y)
    gram = tf.where(is_written, tf.reshape(with_y, [1, m]), memory.gram)
    gram = tf.where(is_row & is_kept, with_y, gram)
    own = either(is_kept, tf.stack([pair.sg, pair.yg]), tf.zeros([2], none.dtype))
    products = tf.where(is_new, own, products)
    curvature = tf.where(is_written, pair.sy, memory.curvature)
    scale = either(is_kept, ratio, memory.scale)

    sg, yg = tf.split(products, 2, axis=1)
    on_y = tf.matmul(inverse, sg)
    rest = curvature * on_y + scale * (tf.matmul(gram, on_y) - yg)
    on_s = tf.matmul(inverse, rest, transpose_a=True)
    weights = tf.concat([on_s, -scale * on_y], 1)
    own_s, own_y = tf.unstack(tf.gather(weights, slot))
    weights = tf.reshape(tf.where(is_new, none, weights), [1, 2 * m])
    direction = -(
        scale * gradient
        + own_s * pair.s
        + own_y * pair.y
        + tf.squeeze(tf.matmul(weights, rows), 0)
    )
    products = either(is_taken, products, memory.products)
    kept = memory.kept + tf.cast(is_kept, tf.int32)
    return (
        Memory(memory.pairs, products, gram, curvature, inverse, scale, kept),
        direction,
    )


def _write(memory: Memory, kept: tf.Tensor, pair: Pair, leads: tf.Tensor) -> Memory:
    """Return the memory with the pair in its slot, or with zeros unless `leads`.

    The pairs are read only to compute `leads`, so XLA can update the buffer in place.
    """
    m: Any = memory.pairs.shape[0]
    row = tf.where(leads, tf.stack([pair.s, pair.y]), tf.zeros([], pair.s.dtype))
    slot = tf.reshape(kept % m, [1, 1])
    pairs = tf.tensor_scatter_nd_update(memory.pairs, slot, tf.expand_dims(row, 0))
    return memory._replace(pairs=pairs)


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(a * b)
