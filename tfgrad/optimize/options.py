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
from tfgrad.nested import Nest, describe, require_bool
from tfgrad.optimize.stopping import Tolerances
from tfgrad.runs.run import Run

ENDLESS = 2**62
"""Steps of a run that something else ends."""

STEPS = 1000
"""Steps where nothing is said, for functions without data and for endless data."""


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
        for name in ("steps", "epochs", "batch_size", "every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        for name in ("gtol", "ftol", "xtol", "seconds", "target"):
            _check_number(name, getattr(self, name), may_be_negative=name == "target")
        if self.jit not in (True, False, "auto"):
            raise InvalidArgumentError(
                '`jit` must be True, False or "auto".',
                got=f"jit={self.jit!r}",
                hint='jit="auto"',
            )
        require_bool(has_aux=self.has_aux, verify=self.verify)
        for name in ("batch_size", "epochs", "validation"):
            value = getattr(self, name)
            if self.data is None and value is not None:
                raise InvalidArgumentError(
                    f"`{name}` goes with `data`.",
                    got=f"{name}={describe(value)} without data",
                    hint="minimize(loss, wrt=model, data=(x, y), epochs=10)",
                )

    @property
    def are_limited(self) -> bool:
        """Whether bounds or constraints are given."""
        return self.bounds is not None or bool(self.constraints)

    @property
    def tolerances(self) -> Tolerances:
        """The rules that end a run at a solution."""
        rules = (self.gtol, self.ftol, self.xtol, self.target)
        return Tolerances(*(None if rule is None else float(rule) for rule in rules))


FOREIGN = {
    "wrt=": "varlist variables trainablevariables weights model params",
    "wrt= for variables, or x0 for values": "initparams parameters",
    "x0": "x",
    "the second argument, where to start": "p0 init initial initialguess guess start "
    "initialposition",
    "the function, as the first argument": "fun func function objective lossfn",
    "method=": "optimizer optimiser solver algorithm algo",
    "method=, an optimizer that has it, as keras.optimizers.SGD(0.01, momentum=0.9)": (
        "momentum nesterov weightdecay decay beta1 beta2 rho epsilon clipnorm clipvalue"
    ),
    "learning_rate=": "lr rate eta alpha stepsize",
    "steps=": "maxiter iterations iters niter numiterations nit maxsteps niterations "
    "nsteps numsteps maxiterations maxfun maxfev maxnfev nfev",
    "epochs=": "nbepoch numepochs",
    "data=": "dataset dataloader traindata",
    "validation=, a function that returns a number": "validationdata validationsplit",
    "gtol=, ftol= or xtol=; without them a run ends where it has converged": "tol "
    "tolerance rtol atol",
    "seconds=": "timeout timelimit maxtime",
    "bounds=, a pair (lower, upper)": "lower upper lb ub",
    "steps=, gtol= and so on, as arguments of their own": "options",
    "log=": "logdir tensorboard",
    "callback=": "callbacks",
    "jit=": "jitcompile compile xla",
    "method=tfgrad.optimize.methods.lbfgs.LBFGS(memory=10)": "memory maxcor history",
    "residuals divided by it": "sigma",
    "nothing: the parameters are scaled by themselves": "xscale",
    "nothing: f is differentiated": "jac grad grads gradient valueandgrad",
    'nothing: method="newton" differentiates f twice': "hess hessp",
    "log= or callback=; a progress bar shows itself": "verbose disp progress "
    "progressbar",
    "nothing: result.history has every step": "fulloutput retall returnall",
    "nothing: data are shuffled the same in every run": "seed randomstate shuffle",
    "a function that closes over them: lambda x: f(x, a)": "args kwargs",
}
"""What to write, by what people of SciPy, Keras, JAX and PyTorch type: without case and
underscores."""


def require_no(
    function: Callable[..., Any], unknown: dict[str, Any], also: Iterable[str] = ()
) -> None:
    """Raise for arguments that a function does not have; name the ones meant.

    Args:
        function: What was called.
        unknown: The arguments that it was called with besides its own.
        also: Arguments that it has besides those of its signature.

    Raises:
        TypeError: If there is one.
    """
    if not unknown:
        return
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD] + [*also]
    for option in unknown:
        raise TypeError(
            f"{function.__name__}() got an unexpected keyword argument {option!r}\n"
            f"  try: {_meant(option, known, function.__name__)}"
        )


def _meant(option: str, known: list[str], function: str) -> str:
    """Return what to write in place of an argument, as far as that is known."""
    plain, has = option.replace("_", "").lower(), ", ".join(known)
    if option in known:  # those of a function, which follow its start
        return f"{function}({', '.join(known[:2])}, a, b): one after the other"
    for hint, names in FOREIGN.items():
        argument = hint.partition("=")[0]
        if plain in names.split():
            if argument in known or not argument.isidentifier():
                return hint
            return f"tfgrad.minimize, which has {hint}; {function} has {has}"
    close = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
    if not close:  # as close to another library's
        words = " ".join(FOREIGN.values()).split()
        other = difflib.get_close_matches(plain, words, n=1, cutoff=0.85)
        if other and other[0] != plain:
            return _meant(other[0], known, function)
    return f"{close[0]}=" if close else has


def options_of(function: Callable[..., Any], given: dict[str, Any]) -> Options:
    """Return the options that a function was called with.

    Raises:
        TypeError: If there is no such option.
    """
    known = [field.name for field in fields(Options)]
    rest = {name: value for name, value in given.items() if name not in known}
    require_no(function, rest, known)
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


def _check_number(name: str, value: Any, *, may_be_negative: bool) -> None:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if value is not None and (not is_number or math.isnan(value)):
        raise InvalidArgumentError(
            f"`{name}` must be a number, or None to leave it out.",
            got=f"{name}={value!r}",
            hint=f"{name}=1e-6",
        )
    if value is not None and value < 0 and not may_be_negative:
        raise InvalidArgumentError(
            f"`{name}` must not be negative.",
            got=f"{name}={value!r}",
            hint=f"{name}=1e-6",
        )
