"""What `minimize` and `descend` have in common: their options, checked in one place."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.optimize.stopping import Stopping
from tfgrad.runs.writer import Run

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keyword arguments of `minimize`, which documents them.

    Raises:
        InvalidArgumentError: If one of them breaks its rule.
    """

    wrt: Nest | None = None
    method: Any = None
    learning_rate: Any = None
    data: Any = None
    batch_size: int | None = None
    epochs: int | None = None
    validation: Callable[..., Any] | None = None
    steps: int | None = None
    every: int = 1
    gtol: float | None = None
    ftol: float | None = None
    xtol: float | None = None
    target: float | None = None
    seconds: float | None = None
    bounds: Any = None
    constraints: Any = ()
    has_aux: bool = False
    jit: bool | str = "auto"
    log: Run | str | PathLike[str] | None = None
    checkpoint: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check what needs no function."""
        for name in ("steps", "epochs", "batch_size", "every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("gtol", "ftol", "xtol", "seconds"):
            _check_tolerance(name, getattr(self, name))
        _check_number("target", self.target)
        _check_jit(self.jit)

    @property
    def stopping(self) -> Stopping:
        """The rules that end a run at a solution."""
        rules = (self.gtol, self.ftol, self.xtol, self.target)
        return Stopping(*(None if rule is None else float(rule) for rule in rules))


def takes_options(function: F) -> F:
    """Show the options one by one in the signature of a function of `**options`.

    And hold calls to it, so that a TypeError names the function that was called.
    """
    *own, _ = inspect.signature(function).parameters.values()
    options = inspect.signature(Options).parameters.values()
    signature = inspect.Signature(
        [*own, *options], return_annotation=function.__annotations__["return"]
    )

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        return function(*args, **kwargs)

    called.__signature__ = signature  # type: ignore[attr-defined]  # PEP 362
    return called  # type: ignore[return-value]  # of the same signature


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1 up."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < 1:
        raise InvalidArgumentError(
            f"`{name}` must be a whole number of at least 1.",
            got=f"{name}={value!r}",
            hint=f"{name}=100",
        )


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and (not is_number or math.isnan(value)):
        raise InvalidArgumentError(
            f"`{name}` must be a number, or None to leave it out.",
            got=f"{name}={value!r}",
            hint=f"{name}=1e-6",
        )


def _check_tolerance(name: str, value: Any) -> None:
    _check_number(name, value)
    if value is not None and value < 0:
        raise InvalidArgumentError(
            f"`{name}` must not be negative.",
            got=f"{name}={value!r}",
            hint=f"{name}=1e-6",
        )


def _check_jit(jit: Any) -> None:
    if jit not in (True, False) and jit != "auto":
        raise InvalidArgumentError(
            '`jit` must be True, False or "auto".',
            got=f"jit={jit!r}",
            hint='jit="auto"',
        )
