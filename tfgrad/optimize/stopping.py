"""When a run stops, and what that is called: one table of rules.

A rule with a condition is evaluated after every step, inside the compiled loop. The
others name what ends a run from outside, or how a method failed. To add a rule, add an
entry to `RULES`: its name is the status, its message the sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.nested import either
from tfgrad.optimize.methods.convergence import converged

RUNNING = 0
"""The code of a run that goes on."""

UNBOUNDED = -1e16
"""Below this value, f is taken to have no minimum; float64 cannot tell 1 beside it."""


class Tolerances(NamedTuple):
    """The rules that a user asked for, as for `minimize`; None leaves a rule out."""

    gtol: float | None = None
    ftol: float | None = None
    xtol: float | None = None
    target: float | None = None


class Step(NamedTuple):
    """What a rule may look at: a point and the one before it, both evaluated.

    Attributes:
        fun: The value of f at the point, shape `[]`.
        grad_max: The largest |element| of the gradient there.
        x: The leaves of the point; empty where no rule asks for them.
        expected: By how much the method expects f to fall yet; the dtype's largest
            number if the method does not say; None if no rule is to ask.
        first: The value of f at the first point of the run.
        before_fun: The value at the point before.
        before_x: The leaves of the point before.
        before_expected: What the method expected there.
        is_start: Whether there is no point before.
        tolerances: What the user asked for.
    """

    fun: tf.Tensor
    grad_max: tf.Tensor
    x: list[tf.Tensor]
    expected: tf.Tensor | None
    first: tf.Tensor
    before_fun: tf.Tensor
    before_x: list[tf.Tensor]
    before_expected: tf.Tensor
    is_start: Any
    tolerances: Tolerances


class Rule(NamedTuple):
    """One way for a run to end.

    Attributes:
        name: The status of a run that ends so.
        message: The sentence, a format string; see `sentence` for its fields.
        holds: Returns whether the rule holds after a step, shape `[]`, or None if it is
            not asked; None for what no step decides.
        is_solution: Whether the point is a solution, and `success` true.
        is_stationary: Whether the point may also be a maximum or a saddle, so that a
            pure method looks around it first.
        hands_over: Whether the next method of a chain goes on from there.
    """

    name: str
    message: str
    holds: Callable[[Step], Any] | None = None
    is_solution: bool = False
    is_stationary: bool = False
    hands_over: bool = False


def _is_bad(step: Step) -> Any:
    return ~(tf.math.is_finite(step.fun) & tf.math.is_finite(step.grad_max))


def _is_unbounded(step: Step) -> Any:
    is_held = float(step.fun.dtype.max) > -UNBOUNDED
    return step.fun <= UNBOUNDED if is_held else None


def _is_on_target(step: Step) -> Any:
    target = step.tolerances.target
    return None if target is None else step.fun <= target


def _is_flat(step: Step) -> Any:
    gtol = step.tolerances.gtol
    return None if gtol is None else step.grad_max <= gtol


def _stands_still(step: Step) -> Any:
    if (ftol := step.tolerances.ftol) is None:
        return None
    size = tf.maximum(tf.abs(step.fun), 1)
    return ~step.is_start & (tf.abs(step.fun - step.before_fun) <= ftol * size)


def _hardly_moves(step: Step) -> Any:
    if (xtol := step.tolerances.xtol) is None:
        return None
    moved = [a - b for a, b in zip(step.x, step.before_x, strict=True)]
    dtype = step.fun.dtype
    length = tf.maximum(_length(step.x, dtype), 1)
    return ~step.is_start & (_length(moved, dtype) <= xtol * length)


def _is_converged(step: Step) -> Any:
    if step.expected is None or step.tolerances[:3] != (None, None, None):
        return None
    before = step.before_expected, step.first, step.before_fun
    return converged(step.fun, step.expected, *before)


NO_SOLUTION = "no rule says this is a solution"

RULES: tuple[Rule, ...] = (
    Rule("nonfinite", "{nonfinite}", _is_bad),
    Rule(
        "unbounded",
        f"f fell below {UNBOUNDED:g}: it seems to have no minimum.",
        _is_unbounded,
    ),
    Rule("target", "f has reached the target {target}.", _is_on_target, True),
    Rule(
        "gtol", "No element of the gradient is larger than {gtol}.",
        _is_flat, is_solution=True, is_stationary=True,
    ),
    Rule(
        "ftol", "The last step changed f by less than {ftol}, relatively.",
        _stands_still, is_solution=True, is_stationary=True,
    ),
    Rule(
        "xtol", "The last step was shorter than {xtol}, relatively.",
        _hardly_moves, is_solution=True, is_stationary=True,
    ),
    Rule(
        "converged",
        "Converged: the fall of f that is still expected is negligible beside the "
        "fall so far, or beside the rounding of f.",
        _is_converged, is_solution=True, is_stationary=True, hands_over=True,
    ),
    Rule(
        "linesearch",
        "No step downhill was found: f may have a kink here, or rounding errors "
        "larger than its size suggests.",
        is_stationary=True, hands_over=True,
    ),
    Rule(
        "trustregion", "No step, however short, goes downhill; f may have a kink.",
        is_stationary=True, hands_over=True,
    ),
    Rule(
        "scipy", "SciPy's method ended by itself.",
        is_stationary=True, hands_over=True,
    ),
    Rule("infeasible", "No point was found that keeps to the limits.", hands_over=True),
    Rule("steps", f"All {{step}} steps were taken; {NO_SOLUTION}.", hands_over=True),
    Rule("epochs", f"All epochs are over, after {{step}} steps; {NO_SOLUTION}."),
    Rule("data", "The data ended after {step} steps, and cannot be repeated."),
    Rule("seconds", "The {seconds} seconds were over after {step} steps."),
    Rule("callback", "The callback asked to stop after step {step}."),
    Rule("interrupted", "Interrupted after step {step}; all until there is kept."),
    Rule("stopped", "Left after step {step}."),
)  # fmt: skip
"""The rules, in the order in which they are asked, and the other statuses."""


def rule_of(status: str) -> Rule:
    """Return the rule of that name."""
    return next(rule for rule in RULES if rule.name == status)


def code_of(status: str) -> int:
    """Return the number that stands for a status inside the compiled loop."""
    return 1 + [rule.name for rule in RULES].index(status)


def status_of(code: int) -> str | None:
    """Return the status that a number stands for; None for a run that goes on."""
    return RULES[code - 1].name if code else None


def is_stationary(code: int) -> bool:
    """Return whether a point with that code may be a maximum or a saddle."""
    return bool(code) and RULES[code - 1].is_stationary


def judge(step: Step) -> tf.Tensor:
    """Return the code of the first rule that holds, `[]`; RUNNING if none does."""
    code = tf.constant(RUNNING)
    for position, rule in reversed(list(enumerate(RULES, start=1))):
        holds = None if rule.holds is None else rule.holds(step)
        if holds is not None:
            code = either(holds, position, code)
    return code


def sentence(status: str, **facts: Any) -> str:
    """Return the sentence for a status.

    The facts are `step` (how many were taken), `seconds` (the budget), `nonfinite` (the
    sentence about what is not finite), and the `Tolerances` by name.
    """
    return rule_of(status).message.format(**facts)


def _length(leaves: list[tf.Tensor], dtype: tf.DType) -> tf.Tensor:
    squares = [tf.cast(tf.reduce_sum(tf.square(leaf)), dtype) for leaf in leaves]
    return tf.sqrt(tf.add_n(squares))
