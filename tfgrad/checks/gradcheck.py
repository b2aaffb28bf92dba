"""`check_grads`: is every derivative right, in every mode, and how sure is that?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfgrad import nested
from tfgrad.checks.checker import Checker
from tfgrad.checks.report import GradCheck
from tfgrad.checks.subject import Subject
from tfgrad.diagnosis.sources import Sources, restored, sources_of
from tfgrad.differences import require_finite
from tfgrad.errors import InvalidArgumentError

MODES = ("reverse", "forward", "compiled", "xla")


def check_grads(
    f: Callable[..., Any],
    *args: Any,
    wrt: Any = None,
    order: int = 2,
    modes: Sequence[str] = ("reverse", "forward", "compiled"),
    rtol: float | None = None,
    directions: int = 3,
    full: bool = False,
    seed: int = 0,
    raises: bool = True,
) -> GradCheck:
    """Check the derivatives of `f` at a point, and return or raise what was found.

    Use it for a `tf.custom_gradient`, a layer, a loss; one line makes a test of it.
    Each argument is moved along its gradient and along random directions, and the slope
    is compared with a finite difference that knows its own error. So the cost grows
    with the number of directions and arguments, not with the number of elements. Each
    verdict is "pass", "fail" or "inconclusive": where rounding hides the slope, or at a
    kink, the check says so instead of guessing.

    Args:
        f: Takes `args`, returns one float tensor of any shape. The same arguments must
            give the same answer.
        *args: The point. Float numbers and arrays, and nests of them, are checked; all
            else (labels, flags) is passed on.
        wrt: Variables that `f` reads, to check instead of the arguments: a variable, a
            nest of them, a `tf.Module` or a `keras.Model`. They are restored.
        order: Up to which order: 2 checks the gradient, and the gradient of that.
        modes: Which of "reverse" (against finite differences), "forward" (against
            reverse), "compiled" and "xla" (against eager).
        rtol: The relative disagreement that is allowed beyond three error estimates.
            None means 1e-6 for float64, 3e-4 for float32, 3e-2 for half precision.
        directions: Directions per argument and order: the gradient's own, then random.
        full: On failure look at every element, to count all that are wrong.
        seed: Of the random directions.
        raises: False returns the report even if a check failed.

    Returns:
        A `GradCheck`: true if all checks passed, printed as a table.

    Raises:
        GradientMismatchError: If a check failed: which argument, which element.
        NoGradientError: If a path from an argument to the output exists, but is cut.
        InvalidArgumentError: If `f` is random, not finite or no float tensor; if there
            is nothing to check; if an option is none of those allowed.

    Example:
        >>> check = check_grads(tf.sin, tf.constant([0.5, 2.0], tf.float64))
        >>> bool(check)
        True
        >>> @tf.custom_gradient
        ... def square(x):
        ...     return x**2, lambda dy: dy * x
        >>> report = check_grads(square, tf.constant(3.0), raises=False)
        >>> [check.verdict for check in report.checks if check.order == 1]
        ['pass', 'fail', 'fail']

    References:
        Press et al. (2007), Numerical Recipes, section 5.7 (steps and errors);
        Moré and Wild (2012), ACM TOMS 38 (rounding noise in differences).
    """
    _require_options(order, modes, directions, rtol)
    sources = sources_of(f, args, wrt)
    name = nested.name_of(f)
    _require_finite_sources(sources, name)
    subject = Subject(sources)
    subject.require_connected()
    checker = Checker(
        subject, modes, directions=directions, rtol=rtol, full=full, seed=seed
    )
    with restored(subject.variables):
        checks = tuple(checker.checks(order))
    result = GradCheck(name, checks, tuple(subject.notes))
    if raises:
        result.raise_on_failure()
    return result


def _require_options(
    order: int, modes: Sequence[str], directions: int, rtol: float | None
) -> None:
    if rtol is not None and not 0 <= rtol < 1:  # NaN, too, is not
        raise InvalidArgumentError(
            "`rtol` must be a number from 0 to 1, or None.",
            got=f"rtol={rtol!r}",
            hint="rtol=None, which goes by the dtype",
        )
    for value, name in ((order, "order"), (directions, "directions")):
        if type(value) is not int or value < 1:
            raise InvalidArgumentError(
                f"`{name}` must be a whole number of at least 1.",
                got=f"{name}={value!r}",
                hint=f"{name}=2",
            )
    if isinstance(modes, str) or not modes or set(modes) - set(MODES):
        raise InvalidArgumentError(
            f"`modes` must be some of {', '.join(MODES)}.",
            got=f"modes={modes!r}",
            hint='modes=("reverse", "compiled")',
        )


def _require_finite_sources(sources: Sources, name: str) -> None:
    """Refuse a call with nothing to check, or at a point that is not finite."""
    if not sources.names:
        integers = ", ".join(sources.integers)
        raise InvalidArgumentError(
            "There must be a float argument or a variable to check.",
            got=f"`{name}` with {integers or 'no float argument'}"
            + (" of an integer dtype" if integers else ""),
            hint="check_grads(f, x) at a float x, or wrt= the variables that f reads",
        )
    leaves = sources.tensors or map(tf.convert_to_tensor, sources.variables)
    for leaf, path in zip(leaves, sources.names, strict=True):
        require_finite(leaf, path)
