"""A run put away after some steps: what it was, where it is, what came out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.optimize.methods.levenberg_marquardt import LevenbergMarquardt
from tfgrad.optimize.objective import Objective
from tfgrad.optimize.options import Options
from tfgrad.optimize.result import History, OptimizeResult
from tfgrad.optimize.snapshot import Snapshot
from tfgrad.optimize.stopping import SOLUTIONS

BEGUN_WITH = "A run goes on with the function that it began with."
ELSEWHERE = "minimize(f, result.x), or another directory for `checkpoint`"

UNFINISHED = frozenset({None, "interrupted", "stopped"})
"""The statuses of a run that has not come to its end."""


class Outcome(NamedTuple):
    """What came out: the value, the leaves of x, and those of the gradient."""

    fun: tf.Tensor
    x: Sequence[tf.Tensor]
    grad: Sequence[tf.Tensor]


@dataclass(frozen=True)
class Saved:
    """A run after some steps.

    Attributes:
        facts: What JSON can hold: the problem, the stage, the status.
        loop: Where the loop is.
        history: The rows until there.
        epochs: Those of the epochs that are over.
        outcome: What came out; None while the run goes on.
        options: How the run was called; None if its method does not tell its state, or
            if that was in another process.
    """

    facts: Mapping[str, Any]
    loop: Snapshot
    history: History
    epochs: History
    outcome: Outcome | None = None
    options: Options | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the run came to an end of its own."""
        return self.facts["status"] not in UNFINISHED


def result_of(
    saved: Saved, objective: Objective, directory: Path | None
) -> OptimizeResult:
    """Return the result of a run that has ended."""
    facts, outcome = saved.facts, saved.outcome
    assert outcome is not None
    fun: Any = outcome.fun.numpy()
    return OptimizeResult(
        x=objective.pack(outcome.x),
        fun=fun,
        grad=objective.pack(outcome.grad),
        nit=facts["nit"],
        nfev=facts["nfev"],
        success=facts["status"] in SOLUTIONS,
        status=facts["status"],
        message=facts["message"],
        history=saved.history,
        epochs=saved.epochs,
        seconds=facts["seconds"],
        directory=directory,
        state=saved if saved.options is not None else None,
    )


def going_on(result: OptimizeResult, options: Options) -> tuple[Nest, Options]:
    """Return the start and the options with which to go on from a result.

    What the call leaves out is as it was in the call that the result is of.

    Raises:
        InvalidArgumentError: If the result does not hold what that needs, or is a fit
            and the call is not.
    """
    if result.state is None:
        raise InvalidArgumentError(
            "A result goes on if its method tells what it keeps from step to step.",
            got="a result without `state`",
            hint="minimize(f, result.x), which starts anew from there",
        )
    before = result.state.options
    if options.method is None and isinstance(before.method, LevenbergMarquardt):
        raise InvalidArgumentError(
            "A fit goes on with its residuals, as it began.",
            got="a result of `least_squares` for `minimize`, without `method`",
            hint='least_squares(residuals, result), or method="lbfgs" from there',
        )
    rate = options.learning_rate
    if options.method is None and rate is None:
        rate = before.learning_rate
    is_silent = options.method is None and options.bounds is None
    merged = replace(
        options,
        wrt=before.wrt if options.wrt is None else options.wrt,
        method=before.method if options.method is None else options.method,
        learning_rate=rate,
        bounds=before.bounds if is_silent else options.bounds,
        has_aux=options.has_aux or before.has_aux,
    )
    return result.x if before.wrt is None else None, merged


def check_same(there: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with another problem, naming what differs.

    Args:
        there: The facts of the problem before.
        here: Those of the problem now. What either leaves empty is not compared.
        what: What the former are of.

    Raises:
        InvalidArgumentError: If something differs.
    """
    for name, ours in here.items():
        theirs = there[name]
        if ours == theirs or None in (ours, theirs) or [] in (ours, theirs):
            continue
        if name == "start":
            ours, theirs = "of other values", "of some values"
        if isinstance(ours, list):
            theirs, ours = _first_difference(theirs, ours)
        raise InvalidArgumentError(
            f"{what} goes on with the problem that it is of.",
            got=f"{name}: {theirs} before, {ours} now",
            hint="the call as it was, or another directory to start anew",
        )


def check_began(now: list[float], before: list[float], dtype: tf.DType) -> None:
    """Refuse another function: one whose value or slope where it began is another.

    Args:
        now: Value and max-norm of the gradient there; none if it is not known.
        before: The same of the run that was put away.
        dtype: What the function is computed in.

    Raises:
        InvalidArgumentError: If they differ by more than rounding.
    """
    tolerance = EPSILONS[dtype] ** 0.5
    if np.allclose(now, before, rtol=tolerance, atol=EPSILONS[dtype], equal_nan=True):
        return
    (f, slope), (f_before, slope_before) = now, before
    raise InvalidArgumentError(
        BEGUN_WITH,
        got=f"f = {f:.8g}, max |grad| = {slope:.3g} at its start, where they were "
        f"{f_before:.8g} and {slope_before:.3g}",
        hint=ELSEWHERE,
    )


def check_continues(
    history: History, row: Mapping[str, Any], now: Any, before: Any
) -> None:
    """Refuse to go on with another function: one of other values, or of other rows.

    Args:
        history: The rows before.
        row: A row now.
        now: The value of the function at the point where the run goes on.
        before: What it was.

    Raises:
        InvalidArgumentError: If they do not belong together.
    """
    if not history:  # of data, before the first step
        return
    if {*row, "step", "seconds"} != set(history):
        got = f"{', '.join(sorted(row))} in a step, before {', '.join(sorted(history))}"
    elif not _is_close(now, before, history["fun"]):
        got = f"f = {float(now):.8g} at the point where it was {float(before):.8g}"
    else:
        return
    raise InvalidArgumentError(BEGUN_WITH, got=got, hint=ELSEWHERE)


def _first_difference(a: list[str], b: list[str]) -> tuple[str, str]:
    for one, other in zip(a, b, strict=False):
        if one != other:
            return one, other
    return f"{len(a)} leaves", f"{len(b)} leaves"


def _is_close(a: Any, b: Any, values: np.ndarray[Any, Any]) -> bool:
    """Return whether two values are one but for rounding, in a run of such `values`."""
    size = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
    a, b = float(a), float(b)
    return a == b or abs(a - b) <= EPSILONS[tf.as_dtype(values.dtype)] ** 0.5 * size
