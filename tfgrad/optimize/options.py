"""What `minimize` and `descend` have in common: their options, checked in one place."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.optimize.stopping import Tolerances
from tfgrad.runs.run import Run

ENDLESS = 2**62
"""Steps of a run that something else ends."""


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
    verify: bool = True
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
        for name in ("has_aux", "verify"):
            check_flag(name, getattr(self, name))

    @property
    def tolerances(self) -> Tolerances:
        """The rules that end a run at a solution."""
        rules = (self.gtol, self.ftol, self.xtol, self.target)
        return Tolerances(*(None if rule is None else float(rule) for rule in rules))


FOREIGN = {
    "lr": "learning_rate=",
    "tol": "gtol=, ftol= or xtol=; without them a run ends where it has converged",
    "maxiter": "steps=",
    "max_iter": "steps=",
    "iterations": "steps=",
    "num_iterations": "steps=",
    "nb_epoch": "epochs=",
    "jac": "nothing: f is differentiated",
    "grad": "nothing: f is differentiated",
    "hess": 'nothing: method="newton" differentiates f twice',
    "hessp": 'nothing: method="newton" differentiates f twice',
    "options": "steps=, gtol= and so on, as arguments of their own",
    "optimizer": "method=",
    "optimiser": "method=",
    "logdir": "log=",
    "log_dir": "log=",
    "callbacks": "callback=",
    "verbose": "nothing: a progress bar shows itself; log= or callback= for more",
    "disp": "nothing: a progress bar shows itself; log= or callback= for more",
    "jit_compile": "jit=",
    "args": "a function that closes over them: lambda x: f(x, a)",
    "var_list": "wrt=",
    "variables": "wrt=",
    "params": "wrt= for variables, or x0 for values",
    "dataset": "data=",
    "validation_data": "validation=, a function that returns a number",
    "x": "x0",
}
"""What people of SciPy, Keras, JAX and PyTorch type, and what to write here."""


def require_no(
    name: str,
    unknown: dict[str, Any],
    also: Iterable[str] = (),
    *,
    function: Callable[..., Any] | None = None,
) -> None:
    """Refuse arguments that a function does not have, naming what they may mean.

    Args:
        name: What to call the function.
        unknown: The arguments that it was called with besides its own.
        also: Arguments that it has besides the options.
        function: The function, if it has but some of the options.

    Raises:
        TypeError: If there is one.
    """
    for option in unknown:
        known = [field.name for field in fields(Options)] + [*also]
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
        close = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        hint = FOREIGN.get(option) or (f"{close[0]}=" if close else ", ".join(known))
        raise TypeError(
            f"{name}() got an unexpected keyword argument {option!r}\n  try: {hint}"
        )


def options_of(name: str, given: dict[str, Any]) -> Options:
    """Return the options that a function of that name was called with.

    Raises:
        TypeError: If there is no such option.
    """
    known = {field.name for field in fields(Options)}
    require_no(name, {n: value for n, value in given.items() if n not in known})
    return Options(**given)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number from 1 up."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or int(value) < 1:
        raise InvalidArgumentError(
            f"`{name}` must be a whole number of at least 1.",
            got=f"{name}={value!r}",
            hint=f"{name}=100",
        )


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise InvalidArgumentError(
            f"`{name}` must be True or False.",
            got=f"{name}={value!r}",
            hint=f"{name}=True",
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
