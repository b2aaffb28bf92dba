"""SciPy's methods by name, run in a thread that is asked for one iteration at a time.

SciPy calls back; the loop wants to call. So SciPy runs in a thread of its own, which
does nothing but SciPy's work: whatever it asks for (a value, a product with the
Hessian, a constraint) is answered in the caller's thread, where errors and Ctrl-C
belong. What it keeps from iteration to iteration is out of reach: to go on with it,
`optimize.transcript` tells it again what it was told.

>>> import numpy as np
>>> import tfgrad
>>> result = tfgrad.minimize(
...     lambda x: (x[0] - 3) ** 2 + (x[1] - 2) ** 2, np.zeros(2), method="scipy:slsqp",
...     bounds=(0.0, None),
...     constraints={"type": "ineq", "fun": lambda x: 4 - x[0] - x[1]},  # is >= 0
... )
>>> print(result.status, result.x.numpy().round(6))
gtol [2.5 1.5]

References:
    SciPy's documentation of `scipy.optimize.minimize`, for each of the methods.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.methods.protocol import Move, Point

PREFIX = "scipy:"

MANY = 10**7
"""Iterations, or evaluations, of SciPy; the loop's own count ends it long before."""

FINE = 1e-10
"""Where methods without a gradient stop by themselves, in x: the digits of float64 that
their comparisons of f can tell."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class SciPyMethod:
    """A method of `scipy.optimize.minimize`, as a method of the loop.

    SciPy's own tolerances are set out of the way: the rules of the loop are asked after
    each iteration.

    Attributes:
        name: As users write it.
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
    failure: ClassVar[str] = "scipy"

    def init(self, start: Point) -> Move:
        """Return the start: SciPy says where to look next."""
        return Move(start.x)

    def update(self, new: Point, old: Point, state: Any) -> Move:
        """Refuse: the loop has SciPy iterate, and asks for no updates."""
        raise NotImplementedError

    @property
    def own_name(self) -> str:
        """What SciPy calls it."""
        return self.name.removeprefix(PREFIX)


def _table(*methods: SciPyMethod) -> dict[str, SciPyMethod]:
    named = [replace(method, name=PREFIX + method.name) for method in methods]
    return {method.name: method for method in named}


SCIPY = _table(
    SciPyMethod(
        "nelder-mead", gradient=False, bounds=True,
        options={"xatol": FINE, "fatol": 0.0, "maxiter": MANY, "maxfev": MANY},
    ),
    SciPyMethod(
        "powell", gradient=False, bounds=True,
        options={"xtol": FINE, "ftol": 0.0, "maxiter": MANY, "maxfev": MANY},
    ),
    SciPyMethod("cg", options={"gtol": 0.0, "maxiter": MANY}),
    SciPyMethod("bfgs", options={"gtol": 0.0, "maxiter": MANY}),
    SciPyMethod(
        "newton-cg", second="hessp", options={"xtol": 0.0, "maxiter": MANY}
    ),
    SciPyMethod(
        "l-bfgs-b", bounds=True,
        options={"gtol": 0.0, "ftol": 0.0, "maxiter": MANY, "maxfun": MANY},
    ),
    SciPyMethod(
        "tnc", bounds=True,
        options={"gtol": 0.0, "ftol": 0.0, "xtol": 0.0, "maxfun": MANY},
    ),
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
        options={"ftol": 1e-15, "maxiter": MANY},
    ),
    SciPyMethod(
        "trust-constr", second="hessp", bounds=True, constraints=True,
        options={"gtol": 0.0, "xtol": 1e-14, "barrier_tol": FINE, "maxiter": MANY},
    ),
    SciPyMethod("dogleg", second="hess", options={"gtol": 0.0, "maxiter": MANY}),
    SciPyMethod("trust-ncg", second="hessp", options={"gtol": 0.0, "maxiter": MANY}),
    SciPyMethod(
        "trust-krylov", second="hessp", options={"gtol": 0.0, "maxiter": MANY}
    ),
    SciPyMethod("trust-exact", second="hess", options={"gtol": 0.0, "maxiter": MANY}),
)  # fmt: skip
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


class _LeftError(Exception):
    """Raised within SciPy where nobody wants its answer any more."""


class Session:
    """A run of SciPy in a thread, from iteration to iteration.

    Args:
        method: Which.
        start: Where from, shape `[n]`.
        bounds: As SciPy takes them; None if there are none.
        constraints: Returns SciPy's constraints, given a function to ask with.

    Attributes:
        x: Where SciPy is: after the last iteration, at last its answer.
        message: Its last words; empty while it runs.
        has_ended: Whether it runs no more.
    """

    def __init__(
        self,
        method: SciPyMethod,
        start: Array,
        *,
        bounds: Any,
        constraints: Callable[[Callable[..., Any]], list[Any]],
    ) -> None:
        """Start nothing yet."""
        self.x = start
        self.message = ""
        self.has_ended = False
        self._method = method
        self._bounds = bounds
        self._constraints = constraints(self._ask)
        self._asked: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def iterate(self, answers: Mapping[str, Callable[..., Any]]) -> bool:
        """Let SciPy go on; return whether it completed an iteration, or ended.

        Args:
            answers: What SciPy may ask for, by name: "fun" (with the gradient, if the
                method takes one), "hessp", "hess", "constraint".

        Raises:
            Exception: What an answer raised.
        """
        with _quiet():
            if self.has_ended:
                return False
            if self._thread.ident is None:
                self._thread.start()
            else:
                self._answered.put(None)
            while True:
                what, given = self._asked.get()
                if what in ("iteration", "end"):
                    self.has_ended = what == "end"
                    return not self.has_ended
                try:
                    self._answered.put(answers[what](*given))
                except BaseException:
                    self.close()
                    raise

    def close(self) -> None:
        """Leave SciPy where it is."""
        if self._thread.is_alive():
            self._answered.put(_LeftError())

    def _ask(self, what: str, *given: Any) -> Any:
        self._asked.put((what, given))
        answer = self._answered.get()
        if isinstance(answer, _LeftError):
            raise answer
        return answer

    def _run(self) -> None:
        from scipy.optimize import minimize

        method, second = self._method, self._method.second

        def ask(what: str) -> Callable[..., Any]:
            return lambda x, *v: self._ask(what, np.array(x), *v)

        def iteration(x: Array, *_: Any) -> None:
            self.x = np.array(x)
            self._ask("iteration")

        try:
            found = minimize(
                ask("fun"),
                self.x,
                method=method.own_name,
                jac=True if method.gradient else None,
                bounds=self._bounds,
                constraints=self._constraints,
                callback=iteration,
                options=dict(method.options),
                **({second: ask(second)} if second else {}),
            )
        except _LeftError:
            return
        except Exception as error:  # what SciPy cannot go on from, it may raise
            self.message = str(error)
        else:
            self.x, self.message = np.array(found.x), str(found.message)
        self._asked.put(("end", ()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep SciPy's warnings out of the way: the status of the run says it all."""
    with warnings.catch_warnings():
        for module in (r"scipy\.", r"tfgrad\.optimize\.methods\.scipy", "threading"):
            warnings.filterwarnings("ignore", module=module)
        yield
