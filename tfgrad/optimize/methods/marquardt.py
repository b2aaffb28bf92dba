"""Levenberg-Marquardt for many small fits: all of it sums and products that vectorise.

The steps and the rules are about those of `methods.levenberg_marquardt`. Its singular
values and its search for a damping are loops whose length depends on the fit, so that
thousands of fits in step would all wait for the slowest. Here the damping is adapted
from one trial to the next, and a damped step costs one more QR, of n rows.

References:
    Nielsen (1999), Damping parameter in Marquardt's method, IMM report 1999-05: how
    fast the damping grows when trial after trial fails.
    Moré (1978), The Levenberg-Marquardt algorithm: the scaling (section 6).
    Björck (1996), Numerical Methods for Least Squares Problems, section 2.4: modified
    Gram-Schmidt, applied to the right side, too, solves as accurately as Householder's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either
from tfgrad.optimize.methods.bounded import Bounds
from tfgrad.optimize.methods.levenberg_marquardt import (
    ACCEPTABLE,
    BAD,
    GOOD,
    RUNS,
    Damped,
    compare,
    lengths,
    rounding,
)
from tfgrad.optimize.methods.protocol import Move, Point

FIRST_DAMPING, LEAST_DAMPING = 1e-2, 1e-20
"""Of squares of singular values in scaled parameters, which are about 1. Fits that do
not arrive from the first begin once more with the second: a start so far away that the
Jacobian there says nothing of that at the solution needs a long first step."""

EASED = 0.1
"""What the damping is multiplied by where the model has been good."""


class State(NamedTuple):
    """What the method remembers; all but `linear` and `scale` of shape `[]`.

    Attributes:
        linear: R and Q'r beside it, at the current point, shape `[n, n + 1]`.
        scale: The largest norm that each column of the Jacobian has had, shape `[n]`.
        promised: How much f falls at the trial by the model.
        cuts: Whether the trial is the first, and so no longer than x.
        damping: Of the trial.
        growth: What the damping is multiplied by if the trial fails.
        trials: How many were tried from the current point.
        idle: How many of them were at the level of rounding and changed nothing.
        least: A sum of squares that counts as none.
        verdict: On the current point; see `methods.levenberg_marquardt`.
    """

    linear: tf.Tensor
    scale: tf.Tensor
    promised: tf.Tensor
    cuts: tf.Tensor
    damping: tf.Tensor
    growth: tf.Tensor
    trials: tf.Tensor
    idle: tf.Tensor
    least: tf.Tensor
    verdict: tf.Tensor


class Marquardt(Damped):
    """Damped Gauss-Newton steps, without a loop or a branch."""

    last = 4

    def why(self, state: State) -> None:
        """Return nothing: the verdict is read of many states at once."""

    def blank(self, like: tf.Tensor) -> State:
        """Return a state whose `update` takes any point: where a fit begins."""
        n: Any = like.shape[0]
        dtype, none = like.dtype, tf.constant(0)
        zero, one = tf.zeros([], dtype), tf.ones([], dtype)
        return State(
            linear=tf.zeros([n, n + 1], dtype),
            scale=tf.zeros([n], dtype),
            promised=one,
            cuts=tf.constant(False),
            damping=FIRST_DAMPING * one,
            growth=2 * one,
            trials=tf.constant(-1),
            idle=none,
            least=zero,
            verdict=none,
        )

    def again(self, blank: State) -> State:
        """Return a blank state for a fit that did not arrive from the first one."""
        return blank._replace(damping=LEAST_DAMPING * tf.ones_like(blank.damping))

    def init(self, start: Point) -> Move:
        """Return the first trial."""
        return self.update(start, start, self.blank(start.x))

    def update(self, new: Point, old: Point, state: State) -> Move:
        """Take the trial if f fell as promised; damp the next step less, or more."""
        is_first = state.trials < 0
        ends, box = (new, old), Bounds.of(self._bounds, new.x)
        if box is not None:  # what a bound holds is not to become flat
            ends = box.reduced(new), box.reduced(old)
        reach = _reach(old, state.linear)
        is_level, is_flatter = compare(*ends, state.promised, state.scale, reach)
        no = -tf.ones_like(new.fun)
        ratio = tf.math.divide_no_nan(old.fun - new.fun, state.promised)
        # Where rounding hides the change of f, the gradient decides; the damping stays.
        ratio = tf.where(is_level, tf.cast(is_flatter, ratio.dtype) / 2, ratio)
        ratio = tf.where(new.is_finite & (state.promised > 0), ratio, no)
        ratio = tf.where(is_first, -no / 2, ratio)
        is_taken = ratio > ACCEPTABLE
        grown = tf.where(ratio < BAD, state.damping * state.growth, state.damping)
        eased = tf.maximum(state.damping * EASED, LEAST_DAMPING)
        least = EPSILONS[new.fun.dtype] ** 2 * tf.minimum(new.fun, 1)
        state = state._replace(
            linear=tf.where(is_taken, new.linear, state.linear),
            cuts=is_first,
            damping=tf.where(ratio >= GOOD, eased, grown),
            growth=tf.where(is_taken, -no, state.growth) * 2,
            trials=tf.where(is_taken, 0, state.trials + 1),
            idle=tf.where(is_taken | ~is_level, 0, state.idle + 1),
            least=tf.where(is_first, least, state.least),
        )
        here = either(is_taken, new._replace(linear=()), old._replace(linear=()))
        return self._search(here, state)._replace(accepted=is_taken)

    def _search(self, here: Point, state: State) -> Move:
        n: Any = here.x.shape[0]
        box = Bounds.of(self._bounds, here.x)
        is_known = tf.reduce_all(tf.math.is_finite(state.linear))
        linear = tf.where(is_known, state.linear, tf.zeros_like(state.linear))
        norms = _norms(linear)
        scale = tf.maximum(state.scale, norms)
        sizes = tf.where(scale > 0, scale, tf.ones_like(scale))
        # Where all were outliers, the scale was next to nothing, and the damping huge.
        part = tf.math.divide_no_nan(lengths(state.scale), lengths(scale))
        is_new = (part > 0) & (part < EPSILONS[part.dtype] ** 0.25)
        damping = tf.where(is_new, state.damping * part * part, state.damping)
        model, free = linear, tf.ones_like(here.x)
        if box is not None:  # what a bound holds has no column
            free = tf.cast(box.free(here), here.x.dtype)
            mask = tf.concat([free, tf.ones_like(free[:1])], 0)
            model = triangle(tf.transpose(linear * mask))
        newton = solved(model)
        # The first step is no longer than x, or than the residuals where x is zero.
        most = lengths(sizes * here.x)
        most = tf.where(most > 0, most, tf.sqrt(2 * here.fun))
        # If need be, by Moré's bound of the damping, but not where a fit begins again.
        enough = lengths(free * here.grad / sizes) / most
        is_long = state.cuts & (damping > LEAST_DAMPING)
        is_long &= lengths(sizes * newton) > most
        damping = tf.where(is_long, tf.maximum(enough, damping), damping)
        state = state._replace(damping=tf.maximum(damping, LEAST_DAMPING))
        damped = _damped(model, tf.sqrt(state.damping) * sizes)
        step = -solved(damped)
        part = tf.math.divide_no_nan(most, lengths(sizes * step))
        step *= tf.where(state.cuts, tf.minimum(part, 1), tf.ones_like(part))
        x = here.x + step
        if box is not None:
            x = box.clip(x)
            step = x - here.x
        matrix, side = tf.split(model, [n, 1], axis=1)
        side = side[:, 0]
        change = tf.reduce_sum(matrix * step, 1)
        promised = -tf.reduce_sum(change * (side + change / 2))
        state = state._replace(scale=scale, promised=promised)
        # Beside the others, and beside what it has been, a small one is rounding.
        pivots = tf.linalg.diag_part(matrix) / sizes
        least = n * EPSILONS[pivots.dtype] * tf.reduce_max(pivots)
        part = tf.math.divide_no_nan(lengths(side), tf.sqrt(2 * here.fun))
        has_slope = tf.reduce_any(pivots > least)
        verdict = self._verdict(
            here, state, newton, part,
            has_slope=has_slope, is_known=is_known, stands=tf.reduce_all(x == here.x),
        )  # fmt: skip
        is_over: Any = verdict != RUNS
        x = tf.where(is_over, here.x, x)
        is_determined = tf.reduce_all((pivots > least) | (free == 0))
        is_determined &= has_slope  # not gone flat
        # The fall of the undamped step: a damped one may promise little because it is
        # short.
        expected = tf.reduce_sum(side * side) / 2
        # Where there is no way on, it is believed only if rounding hides it: a narrow
        # valley seems flat, too.
        noise = rounding(here.fun, _reach(here, state.linear))
        is_known = is_determined & (~is_over | (expected <= noise))
        expected = tf.where(is_known, expected, promised.dtype.max)
        state = state._replace(verdict=verdict)
        return Move(x, state, failed=is_over, expected=expected)


def triangle(vectors: tf.Tensor) -> tf.Tensor:
    """Return R and Q'r of the columns of J, and r: `[n, n + 1]`.

    A column that is nothing but rounding beside what it was becomes zero.

    Args:
        vectors: The columns and r as rows, so that each is one piece of memory, shape
            `[n + 1, m]`.
    """
    n: Any = vectors.shape[0] - 1  # type: ignore[operator]
    least = n * EPSILONS[vectors.dtype] * lengths(vectors)
    rows, rest = [], vectors
    for j, enough in enumerate(tf.split(least, n + 1)[:n]):
        column, rest = tf.split(rest, [1, n - j])
        length = lengths(column)
        length = tf.where(length > enough, length, tf.zeros_like(length))
        unit = tf.math.divide_no_nan(column, length)
        row = tf.reduce_sum(unit * rest, 1)
        rest -= unit * row[:, None]
        rows.append(tf.concat([tf.zeros([j], row.dtype), length, row], 0))
    return tf.stack(rows)


def solved(rows: tf.Tensor) -> tf.Tensor:
    """Return R^-1 c of R and c beside it; zero where R has no pivot."""
    n: Any = rows.shape[0]
    of = [tf.unstack(row) for row in tf.unstack(rows)]
    x: dict[int, tf.Tensor] = {}
    for i in reversed(range(n)):
        right = of[i][n]
        for j in x:
            right -= of[i][j] * x[j]
        x[i] = tf.math.divide_no_nan(right, of[i][i])
    return tf.stack([x[i] for i in range(n)])


def _damped(model: tf.Tensor, damping: tf.Tensor) -> tf.Tensor:
    """Return R and Q'r of the model with a diagonal beneath it."""
    beneath = tf.pad(tf.linalg.diag(damping), [[0, 1], [0, 0]])
    return triangle(tf.concat([tf.transpose(model), beneath], 1))


def _reach(point: Point, linear: tf.Tensor) -> tf.Tensor:
    """Return how large the parts of the linear model are, |J||x|."""
    return lengths(_norms(linear) * point.x)


def _norms(linear: tf.Tensor) -> tf.Tensor:
    """Return the lengths of the columns of J, given R and Q'r beside it."""
    return tf.sqrt(tf.reduce_sum(linear * linear, 0))[:-1]
