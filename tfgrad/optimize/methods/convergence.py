"""Whether a run has arrived, by rules that know no units of f or of x.

Both rules look at the fall of f that a method still expects (`Move.expected`), and at
nothing that is measured in units of x. Minuit's EDM, the estimated vertical distance to
the minimum, is their ancestor; it is compared with a number in units of f there. Here
it is compared with what f has fallen by so far, and with the rounding of f.

They are functions of tensors of shape `[]`, or of any one shape: for many problems at
once, element by element.

References:
    James and Roos (1975), Minuit: a system for function minimization and analysis of
    the parameter errors and correlations, Computer Physics Communications 10.
"""

from __future__ import annotations

import tensorflow as tf

from tfgrad.differences import EPSILONS

VANISHING = 1e-3
"""The part of |f| from which on an expected fall says that f itself is to vanish. Then
f has no digits to get right, and the model as many as it needs."""

NOTHING, LEAST = 1.8, 1e-18
"""A vanishing f has vanished at this power of the dtype's epsilon times its fall so far
(squares of rounding are at the power of 2), but not above that part of it."""

LITTLE, DIGITS = 1e-16, 1e-10
"""The parts of its fall so far and of |f| that may still be expected of another f, the
smaller one: the model of L-BFGS is wrong by up to the condition number, in vain where
it has 1e5 times as many digits as anybody needs."""

ROUNDINGS, LAST_ROUNDINGS = 4, 8
"""Rounding errors of f that hide a fall: of a step, and of a search that failed."""


def converged(
    fun: tf.Tensor,
    expected: tf.Tensor,
    previous_expected: tf.Tensor,
    first_fun: tf.Tensor,
) -> tf.Tensor:
    """Return whether nothing more is to be expected, of this step and the one before.

    Ask it at every accepted step, and at the start, of which `expected` comes from
    `Method.init`: hand it over twice there.

    Args:
        fun: The value of f at the current point, shape `[]` or of any one shape, as all
            arguments; in the unit of f, as all.
        expected: The fall that the method expects from there.
        previous_expected: What it expected at the accepted point before, the largest
            number of the dtype, or infinity, at the first step.
        first_fun: The value of f at the first point of the run.

    >>> one, none = tf.constant(1.0, tf.float64), tf.constant(1e-20, tf.float64)
    >>> bool(converged(one, none, none, 5 * one))
    True
    >>> bool(converged(one, none, one, 5 * one))
    False
    """
    is_little = _is_little(fun, expected, first_fun)
    was_little = _is_little(fun, previous_expected, first_fun)
    return (is_little & was_little) | (expected == 0)


def at_precision(
    fun: tf.Tensor, expected: tf.Tensor, first_fun: tf.Tensor
) -> tf.Tensor:
    """Return whether a point from which a method failed to go on is a solution.

    It is one if what the method expected yet is hidden by rounding, or if f has
    vanished. At a kink, and on a plateau or a saddle that a search got stuck on, more
    is expected. Arguments and shapes are those of `converged`; `expected` is that of
    the `Move` that `failed`.

    >>> one = tf.constant(1.0, tf.float64)
    >>> bool(at_precision(one, 1e-12 * one, 5 * one))
    True
    >>> bool(at_precision(one, 0.1 * one, 5 * one))
    False
    """
    epsilon, size, fall = EPSILONS[fun.dtype], tf.abs(fun), first_fun - fun
    part = max(DIGITS, LAST_ROUNDINGS * epsilon)
    has_vanished = _vanishes(fun, expected) & (expected <= epsilon**0.75 * fall)
    has_vanished |= tf.maximum(expected, size) <= epsilon**1.5 * fall
    return (expected <= part * size) | has_vanished


def _is_little(fun: tf.Tensor, expected: tf.Tensor, first_fun: tf.Tensor) -> tf.Tensor:
    epsilon, size, fall = EPSILONS[fun.dtype], tf.abs(fun), first_fun - fun
    digits = tf.minimum(LITTLE * fall, DIGITS * size)
    digits = tf.maximum(digits, min(ROUNDINGS * epsilon, DIGITS) * size)
    nothing = min(epsilon**NOTHING, LEAST) * fall
    return expected <= tf.where(_vanishes(fun, expected), nothing, digits)


def _vanishes(fun: tf.Tensor, expected: tf.Tensor) -> tf.Tensor:
    return expected >= VANISHING * tf.abs(fun)
