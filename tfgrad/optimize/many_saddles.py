"""Many problems, none of which ends at a maximum or a saddle that it can leave.

Of the rows that a rule of stopping has ended, a look at the curvature tells the minima
from the rest, all rows together. The rest goes on from lower points beside them.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.optimize.blocks import Outcome, Plan, Program, Task, program_of, solve
from tfgrad.optimize.evaluator import operations_of
from tfgrad.optimize.saddle import PRODUCTS, lower_points, scale_of
from tfgrad.optimize.stopping import is_stationary

Array = np.ndarray[Any, Any]


def solve_all(
    plan: Plan,
    task: Task,
    seconds: float | None,
    is_doubtful: Callable[[Outcome], Array] | None,
) -> tuple[Outcome, bool]:
    """Solve all problems, and again those that ended where f bends down.

    Args:
        plan: How.
        task: Which.
        seconds: How long it may take; None: as long as it takes.
        is_doubtful: Of an outcome, the rows that a look may pay for; None: all.

    Returns:
        The outcome, and whether Ctrl-C ended it.
    """
    began = time.perf_counter()
    program = program_of(plan, task)
    outcome, is_interrupted = solve(program, task, seconds)
    operations = operations_of(plan.graph)
    if task.sides or any("Random" in operation for operation in operations):
        return outcome, is_interrupted  # beside a bound, a point may be forbidden
    rows, left = np.arange(len(task.x)), seconds
    while not is_interrupted:
        codes = np.unique(outcome.code[rows])
        stationary = [code for code in codes if is_stationary(int(code))]
        looks = np.isin(outcome.code[rows], stationary)
        if is_doubtful is not None:
            looks &= is_doubtful(outcome)[rows]
        if seconds is not None:
            left = seconds - (time.perf_counter() - began)
        if not np.any(looks) or (left is not None and left <= 0):
            break
        rows, starts = _left(program, task, outcome, rows[looks])
        if not len(rows):
            break
        data = [array[rows] for array in task.data]
        again, is_interrupted = solve(program, Task(starts, [], data), left)
        _merge(outcome, rows, again)
    return outcome, is_interrupted


def _left(
    program: Program, task: Task, outcome: Outcome, rows: Array
) -> tuple[Array, Array]:
    """Return which of these rows are at no minimum, and lower points beside them."""
    width, kept, starts = program.width, [rows[:0]], [outcome.x[:0]]
    for first in range(0, len(rows), width):
        some = rows[first : first + width]
        # A block is always full: it is compiled once.
        block = np.resize(some, width)
        data = [tf.constant(array[block]) for array in task.data]
        x, dtype = outcome.x[block].astype(np.float64), outcome.x.dtype

        def at(points: Array, data: Any = data, dtype: Any = dtype) -> Any:
            value, gradient = program.evaluate([tf.constant(points, dtype), *data])
            return value.numpy().astype(np.float64), gradient.numpy()

        epsilon = EPSILONS[tf.as_dtype(dtype)]
        # The step that balances rounding and curvature of the gradient.
        scale = scale_of(x, task.x[block].astype(np.float64))
        size = epsilon ** (1 / 3) * scale

        def product(
            directions: Array, x: Array = x, size: Array = size, at: Any = at
        ) -> Array:
            step = size[:, None] * directions
            ahead, behind = (at(p)[1].astype(np.float64) for p in (x + step, x - step))
            change: Array = (ahead - behind) / (2 * size[:, None])
            return change

        lower, is_lower = lower_points(
            x,
            outcome.fun[block].astype(np.float64),
            outcome.grad[block],
            scale,
            product=product,
            value=functools.partial(_first, at),
            epsilon=epsilon,
            products=PRODUCTS,
        )
        found = np.flatnonzero(is_lower[: len(some)])
        kept.append(some[found])
        starts.append(lower[found].astype(dtype))
    return np.concatenate(kept), np.concatenate(starts)


def _first(function: Callable[[Array], Any], points: Array) -> Array:
    value: Array = function(points)[0]
    return value


def _merge(outcome: Outcome, rows: Array, again: Outcome) -> None:
    """Write down how rows went on; those that did not begin stay where they were."""
    outcome.code[rows] = again.code
    has_begun = again.nfev > 0
    rows = rows[has_begun]
    for name in ("x", "fun", "grad", "linear"):
        getattr(outcome, name)[rows] = getattr(again, name)[has_begun]
    for name in ("nit", "nfev"):
        getattr(outcome, name)[rows] += getattr(again, name)[has_begun]
