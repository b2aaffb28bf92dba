"""The end of each epoch: its means, its validation, and whether it is the last."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe
from tfgrad.optimize.data import SIZE, Source, can_take, source_of
from tfgrad.optimize.history import Rows
from tfgrad.optimize.options import ENDLESS, STEPS, Options
from tfgrad.optimize.problem import Problem

NOT_AVERAGED = ("step", "seconds", "grad_max", "learning_rate", SIZE)
"""Columns of which an epoch has no mean."""


@dataclass(frozen=True)
class Training:
    """Batches, and for how long they are gone through.

    Attributes:
        source: The batches.
        epochs: How often to go through them; None for as long as other budgets last.
        validation: Called at the end of each epoch, with the point if the loss is a
            function of values; returns a number, or a dict of numbers.
    """

    source: Source
    epochs: int | None
    validation: Callable[..., Any] | None

    @property
    def is_endless(self) -> bool:
        """Whether no epoch ends."""
        return bool(getattr(self.source, "is_endless", False))

    def planned(self, steps: int) -> int | None:
        """Return how many steps there will be at most; None if nobody knows."""
        if self.epochs is not None and self.source.batches is not None:
            steps = min(steps, self.epochs * self.source.batches)
        return None if steps == ENDLESS else steps

    def check_repeats(self) -> None:
        """Refuse data that cannot be gone through again, up to where a run was.

        Raises:
            InvalidArgumentError: If it is an iterator.
        """
        if not self.source.is_repeatable:
            raise InvalidArgumentError(
                "With `checkpoint`, the data must be such that it can be repeated.",
                got=str(self.source) + " from an iterator, which is used up",
                hint="data=make, where make() returns the iterator, or a data set",
            )

    def facts(self) -> dict[str, Any]:
        """Return what the log says about it."""
        return {"data": str(self.source), "epochs": self.epochs}

    def means(self, rows: Rows) -> dict[str, Any]:
        """Return the means over an epoch, weighted by the sizes of its batches."""
        weights = rows.columns[SIZE].astype(np.float64)
        kept = (n for n in rows.columns if n not in NOT_AVERAGED and not is_point(n))
        return {
            name: np.tensordot(weights, rows.columns[name].astype(np.float64), 1)
            / np.sum(weights)
            for name in kept
        }

    def validated(self, point: tuple[Nest, ...]) -> dict[str, float]:
        """Return what the validation says at the end of an epoch."""
        return {} if self.validation is None else _named(self.validation(*point))

    def status(self, row: Mapping[str, Any], target: float | None) -> str | None:
        """Return why the run is over after an epoch, if it is."""
        if target is not None and row["fun"] <= target:
            return "target"
        if self.epochs is not None and row["epoch"] >= self.epochs:
            return "epochs"
        return None if self.source.is_repeatable else "data"


def training(
    options: Options, problem: Problem, *, is_by_batch: bool
) -> tuple[Training | None, int]:
    """Return what to train on, and for how many steps.

    Without a budget, the data is gone through once.

    Args:
        options: As for `minimize`.
        problem: What is minimised.
        is_by_batch: Whether a step takes a batch. Otherwise each evaluation of the
            problem goes through all of the data from now on.

    Raises:
        InvalidArgumentError: If endless data is to have epochs; or as `source_of` and
            `Problem.go_through` do.
    """
    epochs, steps, seconds = options.epochs, options.steps, options.seconds
    if not is_by_batch:
        _require_no_epochs(options)
        source = source_of(options.data, options.batch_size, problem.x.dtype)
        problem.go_through(source)
        return None, STEPS if steps is None else int(steps)
    if options.validation is not None:
        _check_validation(options.validation, problem.x.takes_values)
    source = source_of(options.data, options.batch_size, problem.x.dtype)
    trained = Training(source, epochs, options.validation)
    if trained.is_endless and options.validation is not None:
        raise InvalidArgumentError(
            "Data without end has no epochs, at whose ends `validation` is called.",
            got="validation with a data set of infinite cardinality",
            hint="data=lambda: dataset.take(100), which ends an epoch after 100 "
            "batches",
        )
    if trained.is_endless and epochs is not None:
        raise InvalidArgumentError(
            "Data without end has no epochs.",
            got=f"epochs={epochs} with a data set of infinite cardinality",
            hint="steps=1000, or a data set without .repeat()",
        )
    if epochs is None and steps is None and seconds is None:
        epochs, steps = (None, STEPS) if trained.is_endless else (1, None)
    budget = ENDLESS if steps is None else int(steps)
    return replace(trained, epochs=epochs), budget


def is_point(name: str) -> bool:
    """Return whether a column of the rows holds a part of the point."""
    return re.match(r"x\b", name) is not None


def _require_no_epochs(options: Options) -> None:
    for name, instead in (("epochs", "steps=100"), ("validation", "callback=")):
        value = getattr(options, name)
        if value is not None:
            raise InvalidArgumentError(
                f"`{name}` goes with a method that takes a batch in each step; all "
                "others go through all of the data at each evaluation.",
                got=f"{name}={describe(value)} with method={options.method!r}",
                hint=f'{instead}, or method="adam"',
            )


def _check_validation(validation: Any, takes_values: bool) -> None:
    count = int(takes_values)
    if not callable(validation) or not can_take(validation, count):
        raise InvalidArgumentError(
            "`validation` is a function of the values that are minimised over."
            if takes_values
            else "`validation` is a function without arguments.",
            got=f"validation={describe(validation)}",
            hint=f"validation=lambda{' params' * count}: {{'accuracy': ...}}",
        )


def _named(returned: Any) -> dict[str, float]:
    """Return what a validation returned as columns."""
    if not isinstance(returned, Mapping):
        return {"validation": _number(returned)}
    return {f"validation_{key}": _number(value) for key, value in returned.items()}


def _number(value: Any) -> float:
    array = np.asarray(value)
    if array.size == 1 and array.dtype.kind in "fiub":
        return float(array.reshape(()))
    if isinstance(value, numbers.Real) or array.dtype.kind == "V":  # bfloat16
        return float(value)
    raise InvalidArgumentError(
        "`validation` must return a number, or a dict of numbers.",
        got=describe(value),
        hint="return {'loss': float(loss), 'accuracy': float(accuracy)}",
    )
