"""Many problems, none of which ends where it could have gone on.

Rows with which the method has failed begin once more, if it has another state to begin
from: the same program serves them.
Of those that a rule of stopping has ended, a look at the curvature tells the minima
from maxima and saddles, all rows together. The rest goes on from lower points beside
them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.graphs import draws, operations_of
from tfgrad.differences import EPSILONS
from tfgrad.optimize.blocks import Outcome, Plan, Program, Task, program_of, solve
from tfgrad.optimize.history import Array
from tfgrad.optimize.hooks import Interrupts
from tfgrad.optimize.saddle import (
    PRODUCTS,
    by_differences,
    curvatures,
    lower_inwards,
    lower_points,
    scale_of,
)
from tfgrad.optimize.stopping import code_of, is_stationary, rule_of, status_of


def solve_all(
    plan: Plan,
    task: Task,
    is_doubtful: Callable[[Outcome], Array] | None,
) -> tuple[Outcome, bool]:
    """Solve all problems, and again those that failed, or ended where f bends down.

    Returns the outcome, and whether Ctrl-C ended it. `is_doubtful` tells of an outcome
    which rows a look may pay for; None: all.
    """
    began, seconds = time.perf_counter(), plan.options.seconds
    program = program_of(plan, task)
    with Interrupts() as interrupts:

        def goes_on() -> bool:
            return left() != 0 and not interrupts.heed()

        def left() -> float | None:
            return seconds and max(0.0, seconds - (time.perf_counter() - began))

        outcome = solve(program, task, seconds, interrupts)
        again = getattr(plan.method, "again", None)
        fails = ["trustregion"] if plan.options.steps else ["trustregion", "steps"]
        failed = np.flatnonzero(np.isin(outcome.code, [*map(code_of, fails)]))
        if again is not None and len(failed) and goes_on():
            memory = program.blank.memory
            memory = memory._replace(method=again(memory.method))
            second = program._replace(blank=program.blank._replace(memory=memory))
            retried = solve(second, task.of(failed), left(), interrupts)
            _merge_better(outcome, failed, retried)
        rows = np.arange(len(task.x))
        if draws(operations_of(plan.graph)):
            rows = rows[:0]
        while len(rows) and goes_on():
            codes = np.unique(outcome.code[rows])
            stationary = [code for code in codes if is_stationary(int(code))]
            looks = np.isin(outcome.code[rows], stationary)
            if is_doubtful is not None:
                looks &= is_doubtful(outcome)[rows]
            rows, starts = _left(program, task, outcome, rows[looks])
            if len(rows):
                below = task.of(rows)._replace(x=starts)
                _merge(outcome, rows, solve(program, below, left(), interrupts))
        return outcome, interrupts.heed()


def _left(
    program: Program, task: Task, outcome: Outcome, rows: Array
) -> tuple[Array, Array]:
    """Return which of these rows are at no minimum, and lower points beside them."""
    blocks = range(0, len(rows), program.width)
    parts = [rows[first : first + program.width] for first in blocks]
    found = [_left_of_block(program, task, outcome, some) for some in parts]
    found.append((rows[:0], outcome.x[:0]))
    left, starts = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return left, starts


def _left_of_block(
    program: Program, task: Task, outcome: Outcome, rows: Array
) -> tuple[Array, Array]:
    # A block is always full: it is compiled once.
    block = np.resize(rows, program.width)
    data = [tf.constant(array[block]) for array in task.data]
    x, dtype = outcome.x[block].astype(np.float64), outcome.x.dtype
    scale = scale_of(x, task.x[block].astype(np.float64))
    epsilon = EPSILONS[tf.as_dtype(dtype)]

    def at(points: Array) -> tuple[Array, Array]:
        pair = program.evaluate([tf.constant(points, dtype), *data])
        value, gradient = (tensor.numpy().astype(np.float64) for tensor in pair)
        return value, gradient

    sides = [side[block].astype(np.float64) for side in task.sides]
    low, high = sides or (-np.inf, np.inf)
    room = np.minimum(x - low, high - x)
    # What cannot move by a step of the differences in both ways is not looked at.
    free = (room > epsilon ** (1 / 3) * scale[:, None]).astype(np.float64)
    fun, grad = outcome.fun[block].astype(np.float64), outcome.grad[block]

    def value(points: Array) -> Array:
        return at(np.clip(points, low, high))[0]

    product = by_differences(lambda points: at(points)[1] * free, x, scale, epsilon)
    found = curvatures(product, x.shape, epsilon, PRODUCTS, free)
    lower, is_lower = lower_points(x, fun, grad * free, scale, found, value, epsilon)
    if sides:
        inside, is_inside = lower_inwards(
            x, fun, grad, scale, (low, high), value, epsilon
        )
        lower = np.where(is_lower[:, None], np.clip(lower, low, high), inside)
        is_lower = is_lower | is_inside
    left = np.flatnonzero(is_lower[: len(rows)])
    return rows[left], lower[left].astype(dtype)


def _merge_better(outcome: Outcome, rows: Array, again: Outcome) -> None:
    """Write down what became of rows from the same starts where that is better.

    That is a lower point, or a solution where the one before is as low.
    """
    epsilon = np.finfo(outcome.x.dtype).eps
    is_solution = [rule_of(status_of(c) or "steps").is_solution for c in again.code]
    most = outcome.fun[rows]
    most = most + np.where(is_solution, epsilon**0.5 * np.abs(most), 0)
    # A value that is not finite is above all others.
    is_better = (again.fun < most) | (np.isfinite(again.fun) & ~np.isfinite(most))
    for name in ("x", "fun", "grad", "linear", "code", "nit"):
        getattr(outcome, name)[rows[is_better]] = getattr(again, name)[is_better]
    outcome.nfev[rows] += again.nfev


def _merge(outcome: Outcome, rows: Array, again: Outcome) -> None:
    """Write down how rows went on; those that did not begin stay where they were."""
    outcome.code[rows] = again.code
    has_begun = again.nfev > 0
    rows = rows[has_begun]
    for name in ("x", "fun", "grad", "linear"):
        getattr(outcome, name)[rows] = getattr(again, name)[has_begun]
    for name in ("nit", "nfev"):
        getattr(outcome, name)[rows] += getattr(again, name)[has_begun]
