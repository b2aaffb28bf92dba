"""Whether a run has arrived, by rules that know no units of f or of x.

Both rules look at the fall of f that a method still expects (`Move.expected`), and at
nothing that is measured in units of x. They descend from Minuit's EDM, the estimated
vertical distance to the minimum. Minuit compares that with a number in units of f; here
the expected fall is compared with the fall of f so far, and with the rounding of f.

They are functions of tensors of shape `[]`, or of any one shape: for many problems at
once, element by element.

References:
    James and Roos (1975), Minuit: a system for function minimization and analysis of
    the parameter errors and correlations, Computer Physics Communications 10.
"""

from __future__ import annotations

import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import either

VANISHING = 1e-3
"""If the expected fall is at least this part of |f|, the minimum of f is taken to be 0.
Digits of f then mean nothing, and the fall of f so far alone sets the scale."""

NOTHING, LEAST = 1.8, 1e-18
"""An f whose minimum is 0 has converged where the expected fall is at most its fall so
far times epsilon to the first power (squares of rounding errors: 2), and at most times
the second number."""

LITTLE, DIGITS = 1e-16, 1e-10
"""Any other f has converged where the expected fall is at most the first number times
the fall so far, and the second times |f|. The model of L-BFGS may be wrong by the
condition number, so both leave 1e5 times more digits than are needed."""

RIGHT = 1.5
"""How many times the expected fall f may have fallen by, or the other way round, where
the model is taken to have been right."""

ROUNDINGS, LAST_ROUNDINGS = 4, 8
"""Rounding errors of f that hide a fall: in a step; in a search that failed."""


def converged(
    fun: tf.Tensor,
    expected: tf.Tensor,
    previous_expected: tf.Tensor,
    first_fun: tf.Tensor,
    previous_fun: tf.Tensor,
) -> tf.Tensor:
    """Return whether the falls expected here and one step before are negligible.

    The one before may be more if f then fell as expected. Called at every accepted
    step, and at the start, where `expected` comes from `Method.init` and is passed
    twice.

    Args:
        fun: The value of f at the current point, shape `[]` or of any one shape, as all
            arguments; in the unit of f, as all.
        expected: The fall that the method expects from there.
        previous_expected: What it expected at the accepted point before, the largest
            number of the dtype, or infinity, at the first step.
        first_fun: The value of f at the first point of the run.
        previous_fun: At the accepted point before.

    >>> one, none = tf.constant(1.0, tf.float64), tf.constant(1e-20, tf.float64)
    >>> bool(converged(one, none, none, 5 * one, one))
    True
    >>> bool(converged(one, none, 1e-6 * one, 5 * one, one))
    False
    >>> bool(converged(one, none, 1e-6 * one, 5 * one, one + 1e-6))
    True
    """
    epsilon, size, fall = EPSILONS[fun.dtype], tf.abs(fun), first_fun - fun
    digits = tf.minimum(LITTLE * fall, DIGITS * size)
    digits = tf.maximum(digits, min(ROUNDINGS * epsilon, DIGITS) * size)
    large, nothing = VANISHING * size, min(epsilon**NOTHING, LEAST) * fall
    is_little, was_little = (
        each <= either(each >= large, nothing, digits)
        for each in (expected, previous_expected)
    )
    was = either(previous_expected < large, previous_expected, tf.zeros_like(fun))
    fell = previous_fun - fun
    was_right = (fell > 0) & (fell <= RIGHT * was) & (was <= RIGHT * fell)
    return (is_little & (was_little | was_right)) | (expected == 0)


def at_precision(
    fun: tf.Tensor, expected: tf.Tensor, first_fun: tf.Tensor
) -> tf.Tensor:
    """Return whether the point at which a method failed is a solution.

    It is one if rounding hides the fall that is still expected, or if f is 0 but for
    rounding. At a kink, on a plateau and at a saddle, a larger fall is expected.
    Arguments and shapes are those of `converged`; `expected` is that of the `Move` that
    `failed`.

    >>> one = tf.constant(1.0, tf.float64)
    >>> bool(at_precision(one, 1e-12 * one, 5 * one))
    True
    >>> bool(at_precision(one, 0.1 * one, 5 * one))
    False
    """
    epsilon, size, fall = EPSILONS[fun.dtype], tf.abs(fun), first_fun - fun
    part = max(DIGITS, LAST_ROUNDINGS * epsilon)
    has_vanished = expected >= VANISHING * size
    has_vanished &= expected <= epsilon**0.75 * fall
    has_vanished |= tf.maximum(expected, size) <= epsilon**1.5 * fall
    return (expected <= part * size) | has_vanished
