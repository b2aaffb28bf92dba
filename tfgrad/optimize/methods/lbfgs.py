"""L-BFGS with a strong Wolfe line search, as a flat state machine.

Line search and direction live in one loop body with one evaluation of the objective:
each `update` either accepts the trial point and turns to a new direction, or narrows
the bracket along the old one.

References:
    Nocedal and Wright (2006), Numerical Optimization, 2nd edition: algorithms 7.4 and
    7.5 (L-BFGS), 3.5 and 3.6 (the strong Wolfe search), equations 3.7 and 3.59.
    Hager and Zhang (2005), SIAM Journal on Optimization 16: the approximate Wolfe test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either
from tfgrad.optimize.methods.protocol import Move, Point

MEMORY = 10
"""Pairs of steps and gradient changes kept: 3 to 20 in Nocedal and Wright, 7.2."""

SUFFICIENT_DECREASE = 1e-4
CURVATURE = 0.9
"""The two constants of the Wolfe conditions, Nocedal and Wright, section 3.1."""

EXPANSION = 4.0
"""How much longer the next trial is while the slope still points down."""

SAFEGUARD = 0.1
"""How close, relatively, a trial may come to the ends of its bracket."""

MOST_TRIALS = 30
"""Trials along one direction; a bracket is then some 1e-9 of what it was."""

MOST_IDLE = 8
"""Steps in a row that change nothing before the search gives up: at a saddle in
float32, some drift along until they find the way down."""


FALLEN = 1e-2
"""What a gradient has to fall to, of the largest one, to speak of a minimum."""


class Trial(NamedTuple):
    """A point on the current direction: distance, value and slope, of shape `[]`."""

    t: tf.Tensor
    fun: tf.Tensor
    slope: tf.Tensor


class Memory(NamedTuple):
    """The last steps `s` and gradient changes `y`: ring buffers of shape `[m, n]`.

    Attributes:
        s: Steps.
        y: Changes of the gradient.
        curvature: Their inner products, shape `[m]`.
        pairs: How many were remembered in all, forgotten ones included.
    """

    s: Any
    y: Any
    curvature: Any
    pairs: Any


class Progress(NamedTuple):
    """Whether steps still change anything.

    Attributes:
        least_grad: The smallest max-norm of the gradient so far.
        idle: How many steps in a row changed nothing. A step is idle if it neither
            lowers f by more than rounding, nor halves the smallest gradient so far; or
            if the search had to end at a point that is not flatter.
        most_grad: The largest one.
        expected: The fall of f that the last direction promises; infinite if that is
            not to be trusted.
    """

    least_grad: tf.Tensor
    most_grad: tf.Tensor
    idle: tf.Tensor
    expected: tf.Tensor


class State(NamedTuple):
    """What the search remembers.

    Attributes:
        direction: Of the current search, shape `[n]`.
        start: The trial at distance 0.
        low: The best trial so far that decreases f sufficiently.
        high: The other end of the bracket; its value is infinite while there is none.
        t: The distance that is being tried.
        trials: How many were, along this direction.
        is_last: Whether the trial is `low` again, to be taken whatever it is.
        memory: What L-BFGS knows of the curvature.
        progress: How the last steps went.
    """

    direction: tf.Tensor
    start: Trial
    low: Trial
    high: Trial
    is_bracketed: tf.Tensor
    t: tf.Tensor
    trials: tf.Tensor
    is_last: tf.Tensor
    memory: Memory
    progress: Progress


class LBFGS:
    """Limited-memory BFGS: for smooth functions of two to millions of parameters.

    Args:
        memory: How many pairs to keep; each takes two vectors of the size of x.
    """

    name = "lbfgs"

    def __init__(self, memory: int = MEMORY) -> None:
        """Remember how much to remember."""
        self._memory = memory

    def init(self, start: Point) -> Move:
        """Return a step down the gradient, no longer than 1."""
        n, m, dtype = start.x.shape[0], self._memory, start.x.dtype
        memory = Memory(
            tf.zeros([m, n], dtype), tf.zeros([m, n], dtype), tf.ones([m], dtype),
            tf.constant(0),
        )  # fmt: skip
        norm, unknown = start.grad_norm, tf.constant(float("inf"), dtype)
        progress = Progress(norm, norm, tf.constant(0), unknown)
        return _search(start, _first_step(start), memory, progress)

    def update(self, new: Point, old: Point, state: State) -> Move:
        """Accept the trial and search along a new direction, or narrow the bracket."""
        trial = Trial(state.t, new.fun, _dot(new.grad, state.direction))
        is_taken = state.is_last | _is_wolfe(trial, state.start, new)
        is_taken &= new.is_finite
        memory = _remember(state.memory, new, old, is_taken)
        direction = -_times_inverse_hessian(memory, new.grad, is_taken)
        # A choice copies what it is made of, and the buffers of the memory are large.
        light = state._replace(memory=Memory((), (), (), memory.pairs))
        move: Move = tf.cond(
            is_taken,
            lambda: _turn(new, old, light, direction),
            lambda: _restart(old, _narrow(trial, old, light, new.is_finite)),
        )
        memory = memory._replace(pairs=move.state.memory.pairs)
        state = move.state._replace(memory=memory)
        return move._replace(state=state, accepted=is_taken)


def _turn(new: Point, old: Point, state: State, direction: tf.Tensor) -> Move:
    """Return the first move along a new direction from an accepted trial."""
    memory = state.memory
    points_down = _dot(direction, new.grad) < 0
    # It always does in exact arithmetic; if rounding has spoilt it, start afresh.
    memory = memory._replace(pairs=tf.where(points_down, memory.pairs, 0))
    knows = memory.pairs > 0
    direction = tf.where(knows, direction, _first_step(new))
    # Along a Newton direction f falls by half of what its slope promises.
    promised = -_dot(direction, new.grad) / 2
    progress = _progress(new, old, state)
    # At a kink they promise ever less, too, but there the gradient does not fall.
    has_fallen = new.grad_norm <= FALLEN * progress.most_grad
    expected = tf.where(knows & has_fallen, promised, float("inf"))
    progress = progress._replace(expected=expected)
    move = _search(new, direction, memory, progress)
    return move._replace(failed=progress.idle >= MOST_IDLE, expected=expected)


def _restart(old: Point, narrowed: Move) -> Move:
    """Return `narrowed`; if it failed, try once along the gradient before giving up."""
    memory = narrowed.state.memory
    retries = narrowed.failed & (memory.pairs > 0)
    empty = memory._replace(pairs=tf.zeros_like(memory.pairs))
    progress = narrowed.state.progress
    fresh = _search(old, _first_step(old), empty, progress)
    x, state = either(retries, (fresh.x, fresh.state), (narrowed.x, narrowed.state))
    failed = narrowed.failed & ~retries
    return Move(x, state, failed=failed, expected=progress.expected)


def _progress(new: Point, old: Point, state: State) -> Progress:
    norm, before = new.grad_norm, state.progress
    stands = old.fun - new.fun <= EPSILONS[new.fun.dtype] * tf.abs(old.fun)
    is_idle = stands & (norm > before.least_grad / 2) | state.is_last
    return Progress(
        tf.minimum(norm, before.least_grad),
        tf.maximum(norm, before.most_grad),
        tf.where(is_idle, before.idle + 1, 0),
        before.expected,
    )


def _search(
    point: Point, direction: tf.Tensor, memory: Memory, progress: Progress
) -> Move:
    """Return the first move along a direction: all of it."""
    zero, one = tf.zeros_like(point.fun), tf.ones_like(point.fun)
    slope = _dot(point.grad, direction)
    start = Trial(zero, point.fun, slope)
    none = Trial(zero, zero + float("inf"), zero)
    state = State(
        direction, start, start, none, tf.constant(False), one, tf.constant(0),
        tf.constant(False), memory, progress,
    )  # fmt: skip
    return Move(point.x + direction, state, failed=tf.constant(False))


def _is_wolfe(trial: Trial, start: Trial, new: Point) -> tf.Tensor:
    """Return whether the trial satisfies the strong Wolfe conditions, or would.

    Within rounding of the start, values cannot tell a decrease; slopes can (Hager and
    Zhang, equation 27).
    """
    decreases = trial.fun <= start.fun + SUFFICIENT_DECREASE * trial.t * start.slope
    flattens = tf.abs(trial.slope) <= CURVATURE * tf.abs(start.slope)
    noise = 2 * EPSILONS[trial.fun.dtype] * tf.abs(start.fun)
    is_level = trial.fun <= start.fun + noise
    approximately = trial.slope <= (2 * SUFFICIENT_DECREASE - 1) * start.slope
    return flattens & (decreases | (is_level & approximately))


def _narrow(trial: Trial, old: Point, state: State, is_finite: Any) -> Move:
    """Return the next trial along the same direction (algorithms 3.5 and 3.6)."""
    start, low, high = state.start, state.low, state.high
    limit = start.fun + SUFFICIENT_DECREASE * trial.t * start.slope
    is_worse = ~is_finite | (trial.fun > limit) | (trial.fun >= low.fun) & (low.t > 0)
    trial = trial._replace(fun=tf.where(is_finite, trial.fun, float("inf")))
    turns_back = trial.slope * (high.t - low.t) >= 0
    rises = tf.where(state.is_bracketed, turns_back, trial.slope >= 0)
    # Either end of the bracket may be the one that the trial replaces.
    new_high = either(is_worse, trial, either(rises, low, high))
    new_low = either(is_worse, low, trial)
    is_bracketed = state.is_bracketed | is_worse | rises
    t = tf.where(is_bracketed, _between(new_low, new_high), EXPANSION * trial.t)
    trials = state.trials + 1
    width = tf.abs(new_high.t - new_low.t)
    closed = is_bracketed & (width <= 2 * EPSILONS[t.dtype] * tf.abs(new_low.t))
    is_over = (trials >= MOST_TRIALS) | closed
    is_last = is_over & (new_low.t > 0)
    t = tf.where(is_last, new_low.t, t)
    narrowed = state._replace(
        low=new_low, high=new_high, is_bracketed=is_bracketed, t=t, trials=trials,
        is_last=is_last,
    )  # fmt: skip
    failed = is_over & ~is_last
    return Move(old.x + t * state.direction, narrowed, failed=failed)


def _between(low: Trial, high: Trial) -> tf.Tensor:
    """Return the minimiser of the cubic through both ends (3.59), between them."""
    width = high.t - low.t
    d1 = low.slope + high.slope - 3 * (low.fun - high.fun) / (low.t - high.t)
    d2 = tf.sign(width) * tf.sqrt(d1 * d1 - low.slope * high.slope)
    part = (high.slope + d2 - d1) / (high.slope - low.slope + 2 * d2)
    part = tf.clip_by_value(1 - part, SAFEGUARD, 1 - SAFEGUARD)
    unknown = ~tf.math.is_finite(part) | ~tf.math.is_finite(high.fun)
    return low.t + width * tf.where(unknown, tf.constant(0.25, part.dtype), part)


def _remember(memory: Memory, new: Point, old: Point, is_taken: tf.Tensor) -> Memory:
    """Return the memory with a new pair for the oldest, if it curves upwards."""
    s, y = new.x - old.x, new.grad - old.grad
    curvature = _dot(s, y)
    norm = _length(y)
    # Else 1 / curvature may overflow.
    is_kept = is_taken & (curvature / norm > EPSILONS[s.dtype] * norm)
    slot = memory.pairs % memory.s.shape[0]

    def put(rows: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        row = tf.where(is_kept, row, tf.gather(rows, slot))
        return tf.tensor_scatter_nd_update(rows, [[slot]], row[None])

    return Memory(
        put(memory.s, s),
        put(memory.y, y),
        put(memory.curvature, curvature),
        memory.pairs + tf.cast(is_kept, tf.int32),
    )


def _times_inverse_hessian(
    memory: Memory, gradient: tf.Tensor, is_needed: tf.Tensor
) -> tf.Tensor:
    """Return the two-loop recursion (algorithm 7.4), if it is needed."""
    size: Any = memory.s.shape[0]
    kept = tf.where(is_needed, tf.minimum(memory.pairs, size), 0)
    weights = tf.zeros_like(memory.curvature)

    def down(i: tf.Tensor, q: tf.Tensor, weights: tf.Tensor) -> Any:
        slot = (memory.pairs - 1 - i) % size
        weight = _dot(tf.gather(memory.s, slot), q) / tf.gather(memory.curvature, slot)
        weights = tf.where(tf.range(size) == slot, weight, weights)
        return i + 1, q - weight * tf.gather(memory.y, slot), weights

    def up(i: tf.Tensor, r: tf.Tensor) -> Any:
        slot = (memory.pairs - kept + i) % size
        weight = _dot(tf.gather(memory.y, slot), r) / tf.gather(memory.curvature, slot)
        return i + 1, r + (tf.gather(weights, slot) - weight) * tf.gather(
            memory.s, slot
        )

    _, q, weights = tf.while_loop(
        lambda i, *_: i < kept, down, (0, gradient, weights), parallel_iterations=1
    )
    newest = (memory.pairs - 1) % size
    y = tf.gather(memory.y, newest)
    norm = _length(y)
    scale = tf.gather(memory.curvature, newest) / norm / norm  # equation 7.20
    r = tf.where(kept > 0, scale, tf.ones_like(scale)) * q
    _, r = tf.while_loop(lambda i, _: i < kept, up, (0, r), parallel_iterations=1)
    return r


def _first_step(point: Point) -> tf.Tensor:
    """Return a step down the gradient, no longer than 1."""
    return -point.grad / tf.maximum(_length(point.grad), 1)


def _length(x: tf.Tensor) -> tf.Tensor:
    """Return the Euclidean norm; its square may be more than the dtype holds."""
    largest = tf.reduce_max(tf.abs(x))
    return largest * tf.norm(tf.math.divide_no_nan(x, largest))


def _dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(a * b)
