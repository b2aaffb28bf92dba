"""`minimize_many`: one function, thousands of problems, a row for each."""

from __future__ import annotations

import functools
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.optimize.blocks import Outcome, Plan, Task
from tfgrad.optimize.chain import pure_method
from tfgrad.optimize.driver import check_alone, check_unwatched
from tfgrad.optimize.history import Array, split
from tfgrad.optimize.many_saddles import solve_all
from tfgrad.optimize.many_uncertainty import OfRows
from tfgrad.optimize.methods import PURE
from tfgrad.optimize.methods.protocol import Bindable, Method
from tfgrad.optimize.options import Options, require_no
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.result import OptimizeResult
from tfgrad.optimize.rows import Starts, sides_of
from tfgrad.optimize.stopping import RUNNING, rule_of, sentence, status_of

XLA_ROWS = 32
"""Problems from which on a compilation with XLA is worth its second: L-BFGS takes some
hundred operations a step, tens of steps."""


@dataclass(frozen=True, repr=False, kw_only=True)
class ManyResult:
    """The outcome of `minimize_many`: arrays with a row for each problem.

    Attributes:
        x: The points found, structured like one start, each leaf `[count, ...]`.
        fun: The values there, shape `[count]`; NaN where a problem has not begun.
        grad: The gradients there, structured like `x`.
        nit: Steps taken.
        nfev: Evaluations of f with its gradient.
        success: Whether the point is a solution, by the rule that `status` names.
        status: Why each ended; those of `OptimizeResult`.
        seconds: How long all of them took, in seconds, tracing included.
    """

    x: Nest
    fun: Array
    grad: Nest
    nit: Array
    nfev: Array
    success: Array
    status: Array
    seconds: float
    _source: OfRows | None = field(default=None, compare=False)
    _facts: dict[str, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        """Return how many problems there were."""
        return len(self.fun)

    def __getitem__(self, index: int) -> OptimizeResult:
        """Return the result of one problem, as `minimize` returns it.

        Its history has one row, the end. `seconds` are those of all problems.
        """
        i = self._place(index)
        source = self._source and self._source.of(i)
        return self._one(i, OptimizeResult, source=source)

    def __iter__(self) -> Iterator[OptimizeResult]:
        """Return the results one by one."""
        return (self[i] for i in range(len(self)))

    @property
    def best(self) -> OptimizeResult:
        """The result with the lowest f."""
        return self[self.best_index]

    @property
    def best_index(self) -> int:
        """The row with the lowest f; 0 if no f is a number."""
        return int(np.argmin(np.where(np.isnan(self.fun), np.inf, self.fun)))

    @functools.cached_property
    def covariance(self) -> Array:
        """Of the parameters of each row, shape `[count, n, n]`; see `OptimizeResult`.

        The inverse Hessian of f, computed when it is first asked for, for all rows. NaN
        in the rows and columns of parameters at a bound, and all over where the Hessian
        is not positive: `result[i].covariance` says why.

        Raises:
            InvalidArgumentError: If f is not known any more, or has changed since.
        """
        if self._source is None:
            return self[0].covariance  # it says why there is none
        best = self.best_index
        self._source.of(best).problem_at(self[best])
        return self._source.covariance()

    @functools.cached_property
    def stderr(self) -> Nest:
        """The standard error of each parameter, structured like `x`."""
        with np.errstate(invalid="ignore"):
            errors = np.sqrt(np.diagonal(self.covariance, axis1=1, axis2=2))
        like = [leaf[0] for leaf in tf.nest.flatten(self.x)]
        return tf.nest.pack_sequence_as(self.x, split(errors, like))

    def _place(self, index: Any) -> int:
        """Return the number of a row, counted from the end if it is negative."""
        try:
            return range(len(self))[operator.index(index)]
        except TypeError:
            raise InvalidArgumentError(
                "The result of one problem has a whole number.",
                got=f"result[{index!r}]",
                hint="result[0]; or result.x[...], result.fun[...] of several",
            ) from None

    def _message(self, i: int) -> str:
        return sentence(str(self.status[i]), step=self.nit[i], **self._facts)

    def _one(self, i: int, kind: Callable[..., Any], **more: Any) -> Any:
        """Return the result of one row, of a kind that has some more fields."""

        def row(leaf: Array) -> tf.Tensor:
            return tf.constant(leaf[i])

        largest = [np.max(np.abs(g[i]), initial=0) for g in tf.nest.flatten(self.grad)]
        history = {
            "step": self.nit[i : i + 1],
            "fun": self.fun[i : i + 1],
            "grad_max": np.array([np.max(largest)]),
        }
        return kind(
            x=tf.nest.map_structure(row, self.x),
            fun=self.fun[i],
            grad=tf.nest.map_structure(row, self.grad),
            nit=int(self.nit[i]),
            nfev=int(self.nfev[i]),
            success=bool(self.success[i]),
            status=str(self.status[i]),
            message=self._message(i),
            history=history,
            seconds=self.seconds,
            **more,
        )

    def __repr__(self) -> str:
        """Return a summary."""
        counts = Counter(map(str, self.status)).most_common()
        slowest, best = int(np.argmax(self.nfev)), self.best_index
        most = f"{self.nit[slowest]}, {self.nfev[slowest]}"
        usual = f"{np.median(self.nit):g}, {np.median(self.nfev):g}"
        rows = {
            "problems": f"{len(self)}, {int(np.sum(self.success))} of them solved",
            "status": ", ".join(f"{n} {status}" for status, n in counts),
            "best": f"fun {self.fun[best]:.10g}, at [{best}]",
            "slowest": f"nit, nfev {most}, at [{slowest}]",
            "nit, nfev": f"{usual} (median)",
            "seconds": f"{self.seconds:.3g}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:>{width}}: {text}" for name, text in rows.items())


def minimize_many(
    f: Callable[..., Any],
    x0s: Nest,
    *args: Nest,
    method: Any = "lbfgs",
    steps: int | None = None,
    gtol: float | None = None,
    ftol: float | None = None,
    xtol: float | None = None,
    target: float | None = None,
    seconds: float | None = None,
    bounds: Any = None,
    jit: bool | str = "auto",
    verify: bool = True,
    **unknown: Any,
) -> ManyResult:
    """Minimise one function for many arguments, or from many starts, all at once.

    Give it the function of one problem. The starts and the arguments have one more axis
    in front, with a row for each problem; without arguments, it is a multi-start. The
    same methods and rules as in `minimize` are applied to each row, vectorised, in
    blocks of at most 1,024 rows, one for each core: memory does not grow with the
    number of rows, but for the arrays that come in and go out. A row's answer depends
    on no other row. A `tf.function` is compiled once for all calls of the same shapes;
    a plain function is traced at each call.

    Args:
        f: `f(x, *args)` of one problem returns one float number (shape `[]`).
        x0s: The starts: float arrays, or nests of them, `[count, ...]` each, of one
            dtype. With `args`, one start without that axis serves all rows: it is taken
            for that unless each of its leaves has `count` rows, and f takes the first.
        *args: What else `f` takes: arrays, or nests of them, `[count, ...]` each.
            NumPy's float arrays take the dtype of the starts.
        method: "lbfgs", "newton" (in the graph: XLA does not compile it), or a method
            of your own (`tfgrad.optimize.methods.protocol`).
        steps: How many steps each row takes at most; None means 1000. What ended at a
            maximum or a saddle goes on from beside it, as in `minimize`, and begins to
            count anew.
        gtol: As for `minimize`, as are `ftol`, `xtol` and `target`, for each row.
        ftol: See `gtol`.
        xtol: See `gtol`.
        target: See `gtol`.
        seconds: End all rows after this time, in seconds; what has not begun is then
            where it started.
        bounds: As for `minimize`, for one problem, so the same for all; or a pair of
            nests like `x0s`, with bounds for each row. Starts outside are moved in.
        jit: Compile with XLA: True, False, or "auto": once a program has had 32 rows in
            all its calls (a plain function: in this call), if `f` is a function that
            XLA is good at.
        verify: Compare the first gradient of the first row with a difference, as
            `minimize` does.
        **unknown: Refused with a TypeError that says what to write instead.

    Returns:
        A `ManyResult`: arrays with a row for each problem. `result[i]` is the result of
        one, `result.best` that of the lowest f. NaN in one row is the status of that
        row. Ctrl-C ends the run and keeps what is done.

    Raises:
        InvalidArgumentError: If an argument breaks its rule: numbers of rows that
            differ, no rows, no such method.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from x to the value exists, but is cut.

    Example:
        >>> import numpy as np
        >>> def distance(x, a):
        ...     return tf.reduce_sum((x - a) ** 2)
        >>> places = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> result = minimize_many(distance, np.zeros(2), places)
        >>> print(np.round(result.x, 2).tolist(), result.success)
        [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]] [ True  True  True]
        >>> def waves(x):
        ...     return tf.sin(5 * x) + 0.1 * x**2
        >>> result = minimize_many(waves, np.linspace(-3, 3, 20))
        >>> print(f"{result.best.fun:.4f}")
        -0.9902

    References:
        `tfgrad.optimize.methods.lbfgs`.
    """
    require_no(minimize_many, unknown)
    check_alone(f)
    options = Options(
        method=method, steps=steps, gtol=gtol, ftol=ftol, xtol=xtol, target=target,
        seconds=seconds, bounds=bounds, jit=jit, verify=verify,
    )  # fmt: skip
    rows = Starts(f, x0s, args)
    problem = Problem(f, rows.first, None, has_aux=False, verify=verify)
    method = _method(options)
    made, found, sides = run(ManyResult, problem, rows, method, options, XLA_ROWS)
    result: ManyResult = made(_source=OfRows(f, rows, sides, found.x))
    return result


def _method(options: Options) -> Method:
    """Return the method that was asked for, if many problems can share it."""
    method = pure_method(
        options.method,
        options.bounds,
        "Many problems are minimised by one method that is a pure function.",
        f"method={' or '.join(map(repr, PURE))}, or an object with `init` and "
        "`update`; all others in tfgrad.minimize for each row, in a loop",
    )
    if isinstance(method, Bindable) and options.jit is True:
        raise InvalidArgumentError(
            "XLA cannot compile rows whose inner loops differ in length.",
            got=f"method={options.method!r} with jit=True",
            hint='jit="auto"; or method="lbfgs"',
        )
    return method


def run(
    kind: Callable[..., Any],
    problem: Problem,
    rows: Starts,
    method: Method,
    options: Options,
    pays: int,
    is_doubtful: Callable[[Outcome], Array] | None = None,
) -> tuple[Callable[..., Any], Outcome, list[Array]]:
    """Solve all rows; return what makes the result, the outcome, the bounds.

    It makes one of `kind`, given the fields that only that kind has.
    """
    began = time.perf_counter()
    sides = sides_of(problem, rows, options.bounds)
    x = np.clip(rows.x, *sides) if sides else rows.x
    problem.evaluate(tf.nest.flatten(rows.first), rows.data)
    check_unwatched(problem)
    plan = Plan(problem, rows.data, method, options, pays)
    if plan.graph is None:
        raise InvalidArgumentError(
            "Many problems are solved in one compiled program.",
            got=f"`{problem.name}` leaves TensorFlow",
            hint="tfgrad.minimize for each row, in a loop",
        )
    task = Task(x, sides, rows.arrays)
    outcome, is_interrupted = solve_all(plan, task, is_doubtful)
    left = "interrupted" if is_interrupted else "seconds"
    codes = range(int(np.max(outcome.code)) + 1)
    names = np.array([status_of(code) or left for code in codes])
    solves = np.array(
        [c != RUNNING and rule_of(n).is_solution for c, n in enumerate(names)]
    )
    facts = {
        **options.tolerances._asdict(),
        "seconds": options.seconds,
        "nonfinite": "f or its gradient is not finite.",
    }
    made = functools.partial(
        kind,
        x=rows.unraveled(outcome.x),
        fun=outcome.fun,
        grad=rows.unraveled(outcome.grad),
        nit=outcome.nit,
        nfev=outcome.nfev,
        success=solves[outcome.code],
        status=names[outcome.code],
        seconds=time.perf_counter() - began,
        _facts=facts,
    )
    return made, outcome, sides
