"""A loop of thirty lines that knows nothing but a method: what tests drive them by.

Two compiled functions a turn: the objective with its gradient, and the method's update,
which is traced once for each method, size and dtype where the method asks for no more.
"""

import functools
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.optimize.methods.convergence import at_precision, converged
from tfgrad.optimize.methods.protocol import Point


class Run(NamedTuple):
    x: np.ndarray
    fun: float
    status: str  # "converged", "failed", "nonfinite" or "steps"
    steps: int
    evaluations: int
    rows: np.ndarray  # one for each accepted step: f, expected, largest |gradient|

    @property
    def success(self):
        return self.status == "converged"


class Objective:
    """A function of one vector in units of f and of x, which come as tensors."""

    def __init__(self, function, n, dtype=tf.float64):
        self.function, self.dtype = function, dtype
        self.units = tf.Variable(tf.ones([2], dtype))
        vector = tf.TensorSpec([n], dtype)
        self.evaluate = tf.function(self._evaluate, autograph=False)
        self.evaluate = self.evaluate.get_concrete_function(vector)
        self.bound = {}

    def __call__(self, x):
        of_f, of_x = tf.unstack(self.units)
        return of_f * self.function(x / of_x)

    def _evaluate(self, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = self(x)
        return value, tape.gradient(value, x, unconnected_gradients="zero")

    def hvp(self, x, v):
        with tf.GradientTape() as tape:
            tape.watch(x)
            _, gradient = self._evaluate(x)
            slope = tf.reduce_sum(gradient * v)
        return tape.gradient(slope, x, unconnected_gradients="zero")


class Compiled:
    """A method's `init` and `update` for one n and dtype, with the rules."""

    def __init__(self, method, n, dtype):
        vector, number = tf.TensorSpec([n], dtype), tf.TensorSpec([], dtype)
        point = Point(vector, number, vector)
        self.init = tf.function(method.init, autograph=False)
        self.init = self.init.get_concrete_function(point)
        like = self.init.structured_outputs.state
        state = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), like)

        def update(new, old, state, before, first):
            move = method.update(new, old, state)
            here = tf.nest.map_structure(
                lambda a, b: tf.where(move.accepted, a, b), new, old
            )
            expected = tf.cast(move.expected, dtype)
            is_solution = converged(here.fun, expected, before, first, old.fun)
            is_precise = at_precision(here.fun, expected, first)
            flags = [move.accepted, move.failed, is_solution, is_precise]
            row = [here.fun, expected, here.grad_max]
            flags = [tf.cast(flag, dtype) for flag in flags]
            return move.x, here, move.state, tf.stack(flags + row)

        self.update = tf.function(update, autograph=False)
        self.update = self.update.get_concrete_function(
            point, point, state, number, number
        )


@functools.cache
def _compiled(method, n, dtype):
    return Compiled(method, n, dtype)


def run(method, objective, x0, *, units=(1, 1), most=5000, stops=True):
    """Return the `Run` of a method from a start that is given in units of 1."""
    dtype = objective.dtype
    objective.units.assign(units)
    x = tf.constant(np.asarray(x0, float) * units[1], dtype)
    if hasattr(method, "bind"):
        if method not in objective.bound:
            bound = method.bind(objective)
            objective.bound[method] = Compiled(bound, x.shape[0], dtype)
        compiled = objective.bound[method]
    else:
        compiled = _compiled(method, x.shape[0], dtype)
    here = Point(x, *objective.evaluate(x))
    first, before = here.fun, tf.constant(dtype.max, dtype)
    rows = [(float(first), float(before), float(here.grad_max))]
    flat = compiled.init(*here[:3])
    return _go_on(compiled, objective, here, flat, first, before, rows, most, stops)


def _go_on(compiled, objective, here, move, first, before, rows, most, stops):
    trial, state = move.x, move.state
    status, evaluations = "steps", 1
    if rows[0][2] == 0:
        return Run(here.x.numpy(), float(here.fun), "converged", 0, 1, np.array(rows))
    while evaluations < most:
        new = Point(trial, *objective.evaluate(trial))
        evaluations += 1
        trial, here, state, told = compiled.update(new, here, state, before, first)
        accepted, failed, is_solution, is_precise, *row = told.numpy()
        if accepted:
            rows.append(row)
            before = tf.constant(row[1], objective.dtype)
        if accepted and is_solution and stops:
            status = "converged"
            break
        if failed:
            status = "converged" if is_precise else "failed"
            break
    return Run(
        here.x.numpy(), float(here.fun), status, len(rows) - 1, evaluations,
        np.array(rows),
    )  # fmt: skip
