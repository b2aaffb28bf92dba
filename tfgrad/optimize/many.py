"""`minimize_many`: one function, thousands of problems, a row for each."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    is_variable,
    map_leaves,
    name_of,
    named_leaves,
    to_tensors,
    weak_dtype,
)
from tfgrad.optimize.blocks import Outcome, Plan, Task
from tfgrad.optimize.chain import make_stages
from tfgrad.optimize.constraints import Limits, require_support
from tfgrad.optimize.many_saddles import solve_all
from tfgrad.optimize.methods.protocol import Bindable, Method
from tfgrad.optimize.options import Options, require_no
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.result import OptimizeResult
from tfgrad.optimize.stopping import RUNNING, rule_of, sentence, status_of
from tfgrad.optimize.uncertainty import OfFunction

Array = np.ndarray[Any, Any]

XLA_ROWS = 32
"""Problems from which on a compilation with XLA is worth its second: L-BFGS takes some
hundred operations a step, tens of steps."""

CLOSED = "a closure over what is the same in all rows: lambda x, y: f(x, y, a)"


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
    _source: Callable[[int], Any] | None = field(default=None, compare=False)
    _facts: dict[str, Any] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        """Return how many problems there were."""
        return len(self.fun)

    def __getitem__(self, index: int) -> OptimizeResult:
        """Return the result of one problem, as `minimize` returns it.

        Its history has one row, the end. `seconds` are those of all problems.
        """
        i = range(len(self))[index]
        source = self._source and self._source(i)
        return OptimizeResult(**self._one(i), source=source)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle no function: few can be. Without it, there are no errors."""
        return {**vars(self), "_source": None}

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

    def _one(self, index: int) -> dict[str, Any]:
        """Return the fields of one result."""
        i = range(len(self))[index]  # negative ones, too, and an IndexError
        x, grad = (
            tf.nest.map_structure(lambda leaf: tf.constant(leaf[i]), nest)
            for nest in (self.x, self.grad)
        )
        largest = [np.max(np.abs(g[i]), initial=0) for g in tf.nest.flatten(self.grad)]
        facts = {**self._facts, "step": self.nit[i]}
        return {
            "x": x,
            "fun": self.fun[i],
            "grad": grad,
            "nit": int(self.nit[i]),
            "nfev": int(self.nfev[i]),
            "success": bool(self.success[i]),
            "status": str(self.status[i]),
            "message": sentence(str(self.status[i]), **facts),
            "history": {
                "step": self.nit[i : i + 1],
                "fun": self.fun[i : i + 1],
                "grad_max": np.array([np.max(largest)]),
            },
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        """Return a summary."""
        rows = self._summary()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:>{width}}: {text}" for name, text in rows)

    def _summary(self) -> list[tuple[str, str]]:
        counts = Counter(map(str, self.status)).most_common()
        slowest, best = int(np.argmax(self.nfev)), self.best_index
        return [
            ("problems", f"{len(self)}, {int(np.sum(self.success))} of them solved"),
            ("status", ", ".join(f"{n} {status}" for status, n in counts)),
            ("best", f"fun {self.fun[best]:.10g}, at [{best}]"),
            (
                "slowest",
                f"nit, nfev {self.nit[slowest]}, {self.nfev[slowest]}, at [{slowest}]",
            ),
            (
                "nit, nfev",
                f"{np.median(self.nit):g}, {np.median(self.nfev):g} (median)",
            ),
            ("seconds", f"{self.seconds:.3g}"),
        ]


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
        method: "lbfgs", or a method of your own (`tfgrad.optimize.methods.protocol`)
            that asks for no more than gradients.
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
    options = Options(
        method=method,
        steps=steps,
        gtol=gtol,
        ftol=ftol,
        xtol=xtol,
        target=target,
        seconds=seconds,
        bounds=bounds,
        jit=jit,
        verify=verify,
    )
    rows = Rows(f, x0s, args)
    problem = Problem(f, rows.first, None, has_aux=False, verify=verify)
    fields, _, sides = run(problem, rows, pure_method(options), options, XLA_ROWS)
    source = functools.partial(_source, f, rows, sides)
    return ManyResult(**fields, _source=source)


def pure_method(options: Options) -> Method:
    """Return the method that was asked for, if many problems can share it."""
    stages = make_stages(options.method, None)
    method = stages[0].method
    require_support(stages[0].name, method, options.bounds, ())
    if (
        len(stages) > 1
        or not isinstance(method, Method)
        or isinstance(method, Bindable)
    ):
        raise InvalidArgumentError(
            "Many problems are minimised by a method that asks for gradients alone.",
            got=f"method={options.method!r}",
            hint='method="lbfgs"; or tfgrad.minimize for each row, in a loop',
        )
    return method


class Rows:
    """The starts and the arguments of many problems, checked.

    Args:
        f: As for `minimize_many`.
        x0s: Likewise.
        args: Likewise.

    Attributes:
        count: How many there are.
        first: The start of the first.
        data: The arguments of the first, tensors.
        arrays: The leaves of all arguments, with a row for each problem.
        x: The starts as vectors, shape `[count, n]`.

    Raises:
        InvalidArgumentError: If the numbers of rows differ, or there are none.
    """

    def __init__(self, f: Any, x0s: Nest, args: tuple[Nest, ...]) -> None:
        """Check them; only starts are copied."""
        for path, leaf in named_leaves(x0s, "x0s"):
            if is_variable(leaf):
                raise InvalidArgumentError(
                    "`x0s` holds values, with a row for each problem.",
                    got=f"`{path}` is {describe(leaf)}",
                    hint="variable.numpy() as the start",
                )
        starts = to_tensors(x0s, "x0s", weak_dtype(x0s, *args))
        leaves = [leaf.numpy() for leaf in tf.nest.flatten(starts)]
        dtypes = sorted({leaf.dtype.name for leaf in leaves})
        if len(dtypes) != 1:
            raise InvalidArgumentError(
                "The starts must be of one dtype.",
                got=f"leaves of {' and '.join(dtypes) or 'nothing'}",
                hint="np.float64 for all of them",
            )
        dtype = leaves[0].dtype

        def as_array(leaf: Any, path: str) -> Array:
            return _array(leaf, path, dtype)

        nests = [map_leaves(as_array, a, f"args[{i}]") for i, a in enumerate(args)]
        self.arrays = tf.nest.flatten(nests)
        named = [
            pair for i, a in enumerate(nests) for pair in named_leaves(a, f"args[{i}]")
        ]
        shared = False
        if named:
            self.count = _count(named)
            shared = any(leaf.shape[:1] != (self.count,) for leaf in leaves)
        else:
            self.count = _count(
                named_leaves(tf.nest.pack_sequence_as(starts, leaves), "x0s")
            )
        self.data = tuple(
            tf.nest.map_structure(lambda a: tf.constant(a[0]), nest) for nest in nests
        )
        if named and not shared and all(leaf.ndim == 1 for leaf in leaves):
            # As many numbers as there are rows: one for each, or all for each.
            row = tf.nest.pack_sequence_as(starts, [tf.constant(a[0]) for a in leaves])
            shared = not _takes(f, row, self.data) and _takes(f, starts, self.data)
        first = [tf.constant(leaf if shared else leaf[0]) for leaf in leaves]
        self.first = tf.nest.pack_sequence_as(starts, first)
        if sum(leaf.shape.num_elements() for leaf in first) == 0:
            raise InvalidArgumentError(
                "A start must hold at least one number.",
                got=f"x0s={describe(x0s)}",
                hint="an array with a row for each problem",
            )
        self.x = self.vectors(leaves, shared=shared)

    def arguments(self, index: int) -> tuple[Nest, ...]:
        """Return what f takes besides x in one row: nests of tensors."""
        leaves = [tf.constant(array[index]) for array in self.arrays]
        packed: tuple[Nest, ...] = tf.nest.pack_sequence_as(self.data, leaves)
        return packed

    def vectors(self, leaves: list[Array], *, shared: bool) -> Array:
        """Return leaves as vectors, `[count, n]`: a view of one row if it is shared."""
        if shared:
            row = np.concatenate([np.ravel(leaf) for leaf in leaves])
            return np.broadcast_to(row, (self.count, row.size))
        parts = [np.reshape(leaf, (self.count, -1)) for leaf in leaves]
        return np.concatenate(parts, axis=1)

    def unraveled(self, vectors: Array) -> Nest:
        """Return vectors `[count, n]` in the structure of the starts."""
        shapes = [tuple(leaf.shape) for leaf in tf.nest.flatten(self.first)]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(vectors, ends, axis=1)
        pairs = zip(parts, shapes, strict=True)
        leaves = [part.reshape(len(part), *shape) for part, shape in pairs]
        return tf.nest.pack_sequence_as(self.first, leaves)


def run(
    problem: Problem,
    rows: Rows,
    method: Method,
    options: Options,
    pays: int,
    is_doubtful: Callable[[Outcome], Array] | None = None,
) -> tuple[dict[str, Any], Outcome, list[Array]]:
    """Solve all rows; return the fields of the result, the outcome, the bounds."""
    began = time.perf_counter()
    sides = _sides(problem, rows, options.bounds)
    x = np.clip(rows.x, *sides) if sides else rows.x
    problem.evaluate(tf.nest.flatten(rows.first), rows.data)
    steps = 1000 if options.steps is None else int(options.steps)
    plan = Plan(
        problem, rows.data, method, options.tolerances, steps, options.jit, pays
    )
    if plan.graph is None:
        raise InvalidArgumentError(
            "Many problems are solved in one compiled program.",
            got=f"`{problem.name}` leaves TensorFlow",
            hint="tfgrad.minimize for each row, in a loop",
        )
    task = Task(x, sides, rows.arrays)
    outcome, is_interrupted = solve_all(plan, task, options.seconds, is_doubtful)
    left = "interrupted" if is_interrupted else "seconds"
    names = np.array([status_of(c) or left for c in range(_most(outcome.code) + 1)])
    solves = np.array(
        [c != RUNNING and rule_of(n).is_solution for c, n in enumerate(names)]
    )
    fields = {
        "x": rows.unraveled(outcome.x),
        "fun": outcome.fun,
        "grad": rows.unraveled(outcome.grad),
        "nit": outcome.nit,
        "nfev": outcome.nfev,
        "success": solves[outcome.code],
        "status": names[outcome.code],
        "seconds": time.perf_counter() - began,
        "_facts": {
            **options.tolerances._asdict(),
            "seconds": options.seconds,
            "nonfinite": "f or its gradient is not finite.",
        },
    }
    return fields, outcome, sides


def _source(f: Any, rows: Rows, sides: list[Array], index: int) -> OfFunction:
    """Return what the result of one row asks for its errors."""

    def of_row(x: Nest) -> Any:
        return f(x, *rows.arguments(index))

    of_row.__name__ = name_of(f)
    bounds = tuple(rows.unraveled(s[index : index + 1]) for s in sides) or None
    if bounds is not None:
        bounds = tuple(tf.nest.map_structure(lambda b: b[0], side) for side in bounds)
    return OfFunction(of_row, None, Problem, has_aux=False, bounds=bounds)


def _most(code: Array) -> int:
    return int(np.max(code))


def _takes(f: Any, x: Nest, data: tuple[Nest, ...]) -> bool:
    """Return whether f can be called so."""
    python = getattr(f, "python_function", f)  # a tf.function would be traced for it
    try:
        python(x, *data)
    except Exception:  # a user's function may raise anything
        return False
    return True


def _array(leaf: Any, path: str, dtype: Any) -> Array:
    """Return an argument as an array; NumPy's floats and numbers in `dtype`."""
    if is_variable(leaf) or isinstance(leaf, tf.Tensor):
        return np.asarray(tf.convert_to_tensor(leaf))
    array = np.asarray(leaf)
    if array.dtype.kind not in "fiub":
        raise InvalidArgumentError(
            f"`{path}` must be an array of numbers, with a row for each problem.",
            got=f"`{path}` is {describe(leaf)}",
            hint=CLOSED,
        )
    return array.astype(dtype, copy=False) if array.dtype.kind == "f" else array


def _count(named: list[tuple[str, Array]]) -> int:
    """Return the number of rows that all leaves have."""
    for path, leaf in named:
        if leaf.ndim == 0:
            raise InvalidArgumentError(
                f"`{path}` must have an axis in front, with a row for each problem.",
                got=f"`{path}` has shape ()",
                hint=CLOSED,
            )
    counts = {path: len(leaf) for path, leaf in named}
    if len(set(counts.values())) > 1:
        some = ", ".join(f"`{path}` has {count}" for path, count in counts.items())
        raise InvalidArgumentError(
            "All arguments must have the same number of rows, one for each problem.",
            got=some,
            hint=CLOSED,
        )
    count = next(iter(counts.values()))
    if count == 0:
        raise InvalidArgumentError(
            "There must be at least one row.",
            got=f"`{named[0][0]}` has shape {named[0][1].shape}",
            hint="arrays with a row for each problem",
        )
    return count


def _sides(problem: Problem, rows: Rows, bounds: Any) -> list[Array]:
    """Return lower and upper bounds, `[count, n]` each; nothing if there are none."""
    if bounds is None:
        return []
    own: list[Any] = [None, None]
    if isinstance(bounds, tuple) and len(bounds) == 2:
        own = [_with_rows(rows, side) for side in bounds]
        pairs = zip(own, bounds, strict=True)
        bounds = tuple(None if found is not None else side for found, side in pairs)
    shared = Limits(problem, bounds, ()).sides
    pairs = zip(own, shared, strict=True)
    sides = [np.asarray(b if a is None else a, rows.x.dtype) for a, b in pairs]
    lower, upper = (np.broadcast_to(side, rows.x.shape) for side in sides)
    is_wrong = np.any(~(lower <= upper), axis=1)
    if np.any(is_wrong):
        row = int(np.argmax(is_wrong))
        raise InvalidArgumentError(
            "No lower bound may be above its upper bound, and none may be NaN.",
            got=f"row {row}: lower {lower[row]}, upper {upper[row]}",
            hint="bounds=(lower, upper), in this order",
        )
    return [lower, upper]


def _with_rows(rows: Rows, side: Any) -> Array | None:
    """Return a side of the bounds that has a row for each problem, as vectors."""
    given = named_leaves(side, "x")
    like = named_leaves(rows.first, "x")
    if [path for path, _ in given] != [path for path, _ in like]:
        return None
    leaves = [np.asarray(leaf) for _, leaf in given]
    shapes = [(rows.count, *leaf.shape) for _, leaf in like]
    if [leaf.shape for leaf in leaves] != shapes or any(
        leaf.dtype.kind not in "fiu" for leaf in leaves
    ):
        return None
    return rows.vectors(leaves, shared=False)
