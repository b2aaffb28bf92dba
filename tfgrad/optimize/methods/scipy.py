"""SciPy's methods by name, and what each of them can be given.

References:
    SciPy's documentation of `scipy.optimize.minimize`, for each of the methods.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tfgrad.errors import InvalidArgumentError

PREFIX = "scipy:"

MANY = 10**7
"""Iterations, or evaluations, of SciPy; the loop's own count ends it long before."""

FINE = 1e-10
"""Where methods without a gradient stop by themselves, in x: the digits of float64 that
their comparisons of f can tell."""


@dataclass(frozen=True)
class SciPyMethod:
    """A method of `scipy.optimize.minimize`.

    It ends by its own tolerances, SciPy's defaults, but for those named here.

    Attributes:
        name: As SciPy writes it; users add "scipy:".
        gradient: Whether it takes one.
        second: "hessp" or "hess", if it takes one of them.
        bounds: Whether it takes them.
        constraints: Whether it takes them.
        patience: Iterations in which the least violation of the limits falls by a
            tenth, as long as none keeps to them; else nothing does. None: not known.
        options: Its tolerances, and how many iterations it may take.
    """

    name: str
    gradient: bool = True
    second: str = ""
    bounds: bool = False
    constraints: bool = False
    patience: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


_METHODS = (
    SciPyMethod(
        "nelder-mead", gradient=False, bounds=True,
        options={"xatol": FINE, "fatol": FINE, "maxiter": MANY, "maxfev": MANY},
    ),
    SciPyMethod(
        "powell", gradient=False, bounds=True,
        options={"xtol": FINE, "ftol": FINE, "maxiter": MANY, "maxfev": MANY},
    ),
    SciPyMethod("cg", options={"maxiter": MANY}),
    SciPyMethod("bfgs", options={"maxiter": MANY}),
    SciPyMethod("newton-cg", second="hessp", options={"maxiter": MANY}),
    SciPyMethod("l-bfgs-b", bounds=True, options={"maxiter": MANY, "maxfun": MANY}),
    SciPyMethod("tnc", bounds=True, options={"maxfun": MANY}),
    SciPyMethod(
        "cobyla", gradient=False, bounds=True, constraints=True,
        options={"tol": FINE, "maxiter": MANY},
    ),
    SciPyMethod(
        "cobyqa", gradient=False, bounds=True, constraints=True,
        options={"final_tr_radius": FINE, "maxiter": MANY, "maxfev": MANY},
    ),
    SciPyMethod(  # where limits contradict each other it strays to 1e30 and back
        "slsqp", bounds=True, constraints=True, patience=50,
        options={"maxiter": MANY},
    ),
    SciPyMethod(
        "trust-constr", second="hessp", bounds=True, constraints=True,
        options={"maxiter": MANY},
    ),
    SciPyMethod("dogleg", second="hess", options={"maxiter": MANY}),
    SciPyMethod("trust-ncg", second="hessp", options={"maxiter": MANY}),
    SciPyMethod("trust-krylov", second="hessp", options={"maxiter": MANY}),
    SciPyMethod("trust-exact", second="hess", options={"maxiter": MANY}),
)  # fmt: skip

SCIPY = {PREFIX + method.name: method for method in _METHODS}
"""SciPy's methods by the names that users write."""


def scipy_method(name: str) -> SciPyMethod | None:
    """Return the method that a name means; None if the name is not one of SciPy's.

    Raises:
        InvalidArgumentError: If SciPy has no such method, or is not installed.
    """
    name = name.lower()
    if not name.startswith(PREFIX):
        return None
    if name not in SCIPY:
        close = difflib.get_close_matches(name, SCIPY, n=3, cutoff=0.7)
        raise InvalidArgumentError(
            "`method` must be the name of one of SciPy's methods after `scipy:`.",
            got=f"method={name!r}",
            hint=" or ".join(map(repr, close or SCIPY)),
        )
    if importlib.util.find_spec("scipy") is None:
        raise InvalidArgumentError(
            f"`{name}` is one of SciPy's methods, and SciPy is not installed.",
            got=f"method={name!r}",
            hint="pip install 'tfgrad[scipy]', or method='lbfgs'",
        )
    return SCIPY[name]
