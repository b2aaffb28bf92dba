"""When to stop, with the same meaning for every method, and what to call it.

A rule is asked after every step, inside the compiled loop. The outcome is a `status`
and a sentence, never a bare flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from tfgrad.differences import EPSILONS

STATUSES = (
    "running", "nonfinite", "unbounded", "target", "gtol", "ftol", "xtol", "precision",
    "gave up",
)  # fmt: skip
"""What a compiled rule says; the code of a status is its position here."""

RUNNING, NONFINITE, PRECISION, GIVEN_UP = 0, 1, 7, 8

STATIONARY = frozenset({4, 5, 6, 7, 8})
"""The codes that maxima and saddles may be mistaken under: of gtol and what follows."""

UNBOUNDED = -1e16
"""A value below which f is taken to have no minimum; 1 changes nothing beside it."""

ROUNDINGS = 1000
"""Roundings of f that hide a fall of it: a sum of some hundred terms may have them."""

SOLUTIONS = frozenset({"target", "gtol", "ftol", "xtol"})
"""The statuses that say: the point is a solution, by the rule of that name."""


@dataclass(frozen=True)
class Stopping:
    """The rules that end a run at a solution; None leaves a rule out.

    Attributes:
        gtol: Largest |element| of the gradient, in units of f per unit of x.
        ftol: Change of f in one step, relative to max(1, |f|).
        xtol: Euclidean length of one step, relative to max(1, ||x||).
        target: The value of f to reach.

    References:
        Gill, Murray and Wright (1981), Practical Optimization, section 8.2.3.
    """

    gtol: float | None = None
    ftol: float | None = None
    xtol: float | None = None
    target: float | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no rule but that numbers are finite."""
        rules = (self.gtol, self.ftol, self.xtol, self.target)
        return all(rule is None for rule in rules)

    def code(self, step: Step) -> tf.Tensor:
        """Return the position in `STATUSES` of the first rule that holds."""
        rules = [
            ~(tf.math.is_finite(step.fun) & tf.math.is_finite(step.grad_norm)),
            step.fun <= UNBOUNDED if float(step.fun.dtype.max) > -UNBOUNDED else None,
            None if self.target is None else step.fun <= self.target,
            None if self.gtol is None else step.grad_norm <= self.gtol,
            None if self.ftol is None else _stands_still(step, self.ftol),
            None if self.xtol is None else _hardly_moves(step, self.xtol),
        ]
        code = tf.constant(RUNNING)
        for position, holds in reversed(list(enumerate(rules, start=1))):
            if holds is not None:
                code = tf.where(holds, position, code)
        return code


def code_of_failure(fun: Any, grad_norm: Any, expected: Any) -> tf.Tensor:
    """Return why a method cannot go on: rounding hides what it would change, or not.

    Args:
        fun: The value of f where it failed, shape `[]`.
        grad_norm: Largest |element| of the gradient there.
        expected: By how much the method had expected f to fall; infinite if it does not
            say, so that the size of the gradient has to tell.
    """
    epsilon, size = EPSILONS[fun.dtype], tf.abs(fun)
    expected = tf.cast(expected, fun.dtype)
    is_hidden = expected <= ROUNDINGS * epsilon * size
    # Close to zero, f is made of terms that round off more than f shows.
    small = epsilon**0.5 * tf.maximum(size, 1)
    is_unknown = tf.math.is_inf(expected)
    is_flat = (grad_norm <= small) & (is_unknown | (expected <= small))
    return tf.where(is_hidden | is_flat, PRECISION, GIVEN_UP)


@dataclass(frozen=True)
class Step:
    """What a rule may look at: one step, from one evaluated point to the next."""

    fun: tf.Tensor
    grad_norm: tf.Tensor
    x: list[tf.Tensor]
    previous_fun: tf.Tensor
    previous_x: list[tf.Tensor]


def _stands_still(step: Step, ftol: float) -> tf.Tensor:
    size = tf.maximum(tf.abs(step.fun), 1)
    return tf.abs(step.fun - step.previous_fun) <= ftol * size


def _hardly_moves(step: Step, xtol: float) -> tf.Tensor:
    moved = [a - b for a, b in zip(step.x, step.previous_x, strict=True)]
    dtype = step.fun.dtype
    return _length(moved, dtype) <= xtol * tf.maximum(_length(step.x, dtype), 1)


def _length(leaves: list[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    squares = [tf.cast(tf.reduce_sum(tf.square(leaf)), dtype) for leaf in leaves]
    return tf.sqrt(tf.add_n(squares))
