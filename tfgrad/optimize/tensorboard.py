"""The hook that writes a minimisation for TensorBoard."""

from __future__ import annotations

import contextlib
import errno
import inspect
import math
import re
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError, RunError, TfgradError
from tfgrad.nested import Nest, named_leaves
from tfgrad.optimize.data import SIZE
from tfgrad.optimize.evaluator import SMALL
from tfgrad.optimize.history import Rows
from tfgrad.optimize.hooks import Hook
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.options import ENDLESS, STEPS
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.resume import UNFINISHED
from tfgrad.runs.directory import check
from tfgrad.runs.guard import Guard
from tfgrad.runs.run import Run

TAGS = {
    "fun": "loss",
    "expected": "loss/expected_fall",
    "grad_max": "gradient/max_norm",
    "step_length": "step/length",
    "step_size": "step/size",
}
"""What TensorBoard calls a column; others keep their name, with slashes for
brackets."""

EVERY_STEP = 100_000
"""Steps up to which each is written; from here on every second, from twice as many on
every fourth ... A million steps are 263,000 rows, some fifty megabytes."""

CHUNKS = 10
"""In how many chunks, at least, a run of many parameters is cut: the distribution of
the parameters is written so often, and at most twice that."""

QUEUE = 4
"""Chunks that may wait to be written: the first steps are all written, later ones not,
so that a loop faster than its log need not wait for it."""

Leaves = Sequence[Any]
"""Arrays or tensors, one for each variable."""


def check_log(log: Run | str | PathLike[str]) -> None:
    """Refuse a log that cannot be written, before anything is traced or written."""
    if isinstance(log, Run):
        log.check_open()
    else:
        check(log)


class Writer:
    """Writes in a thread, in order, while the next chunk runs.

    The first failure ends the writing, with a warning (`guard`).
    """

    def __init__(self) -> None:
        self.guard = Guard("The optimisation")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tfgrad-log")
        self._pending: list[Future[None]] = []

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Have something written after what was submitted before."""
        while len(self._pending) >= QUEUE:
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self.guard, write, *args))

    def flush(self) -> None:
        """Wait until all is written."""
        while self._pending:
            self._pending.pop(0).result()

    def close(self) -> None:
        """Wait, and take nothing more."""
        self.flush()
        self._thread.shutdown()


class Curves:
    """The rows of a run as curves: of each `every`-th step, and thinned out later on.

    Attributes:
        last: The last row, written or not; None before the first one.
    """

    def __init__(self, run: Run, every: int) -> None:
        self._run, self._every = run, every
        self.last: Rows | None = None

    def remember(self, rows: Rows) -> None:
        """Take note of rows that are in the run already."""
        self.last = rows.part(slice(-1, None))

    def take(self, rows: Rows) -> None:
        """Write those of the rows that are to be kept."""
        if self.last is not None:
            rows = rows.part(rows.columns["step"] > self.last.columns["step"][-1])
        if not len(rows):
            return
        points = _points(rows)
        if points.size and self.last is not None:
            way = np.diff(np.concatenate([_points(self.last), points]), axis=0)
            rows.columns["step_length"] = np.linalg.norm(way, axis=1)
        self.last = rows.part(slice(-1, None))
        self._write(rows.part(self._is_kept(rows)))

    def write_last(self) -> None:
        """Write the last row, if it was left out."""
        if self.last is not None and not self._is_kept(self.last)[0]:
            self._write(self.last)

    def _write(self, rows: Rows) -> None:
        columns = rows.columns
        scalars = dict(_scalars(rows))
        self._run.log_history(scalars, columns["step"], columns["time"])

    def _is_kept(self, rows: Rows) -> np.ndarray[Any, Any]:
        """Return whether each row is written; its step alone decides."""
        points = rows.columns["step"] / self._every
        doublings = np.ceil(np.log2(np.maximum(points / EVERY_STEP, 1.0)))
        return np.asarray(points % 2 ** doublings.astype(np.int64) == 0)


class Distributions:
    """The distributions of many parameters and of their gradients, now and then.

    The steps do not depend on the clock, so a resumed run writes its histograms at
    the same steps again. Without `names`, there are none.
    """

    def __init__(self, run: Run, names: Sequence[str], steps: int) -> None:
        self._run, self._names, self._steps = run, names, steps
        self._last = -1

    def limit(self, step: int) -> int:
        """Return how many steps there are to the next ones."""
        gap = self._gap(step)
        return gap - step % gap if self._names else ENDLESS

    def is_due(self, step: int) -> bool:
        """Return whether a step has some, which is said once."""
        is_due = bool(self._names) and step % self._gap(step) == 0 and step > self._last
        self._last = step if is_due else self._last
        return is_due

    def write(self, step: int, point: Leaves, gradient: Leaves) -> None:
        """Write those of a point and of the gradient there."""
        for name, x in zip(self._names, point, strict=True):
            self._run.histogram(f"parameters/{name}", x, step)
        for name, slope in zip(self._names, gradient, strict=False):
            self._run.histogram(f"gradients/{name}", slope, step)

    def _gap(self, step: int) -> int:
        """Return the steps from one to the next, more of them beyond the plan."""
        doublings = math.ceil(math.log2(max(step / self._steps, 1)))
        return max(1, self._steps // CHUNKS) * 2**doublings


class TensorBoard(Hook):
    """Writes a run: below a directory, or to an open run, which stays open.

    If a write fails, the log ends with a warning, and the minimisation goes on.
    """

    _curves: Curves
    _distributions: Distributions

    def __init__(self, log: Run | str | PathLike[str]) -> None:
        self._log = log
        self._run: Run | None = None
        self._is_resumed = False
        self._writer = Writer()

    def limit(self, run: Minimisation) -> int:
        """Return how many steps there are to the next distributions of parameters."""
        return ENDLESS if self._run is None else self._distributions.limit(run.step)

    def begin(self, run: Minimisation) -> None:
        """Open the run; write the problem and the rows that it lacks."""
        self._open(run)
        if self._run is None:
            return
        run.record.directory = self._run.directory
        problem = run.problem
        count = sum(leaf.shape.num_elements() for leaf in problem.x.leaves)
        names = _leaf_names(problem) if count > SMALL else []
        steps = STEPS if run.planned is None else run.planned
        self._curves = Curves(self._run, int(run.options.every))
        self._distributions = Distributions(self._run, names, steps)
        first = self._run.first_step
        if not self._is_resumed or first == 0:
            self._write_problem(run)
        rows = Rows(run.record.rows.columns())
        if len(rows):
            rows = _timed(rows)
            count = int(np.searchsorted(rows.columns["step"], first))
            if count:
                self._writer.submit(self._curves.remember, rows.part(slice(count)))
            # The first row has no step that led to it, and so a column less.
            for part in (slice(count, count + 1), slice(count + 1, None)):
                self._writer.submit(self._curves.take, rows.part(part))
        epochs = run.record.epochs.columns()
        for values in zip(*epochs.values(), strict=True):
            row = dict(zip(epochs, values, strict=True))
            if row["step"] >= first:
                self.epoch(run, row)
        self._writer.submit(self._write, Rows({}), self._found(run))

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Write rows in the background, after the ones before."""
        if self._run is not None and len(rows):
            # In one piece, after the look: the writer takes turns with what runs here.
            found = self._found(run)
            self._writer.submit(self._write, _timed(rows), found)

    def epoch(self, run: Minimisation, row: Mapping[str, Any]) -> None:
        """Write the row of an epoch, at the step that ended it."""
        if self._run is None:
            return
        columns = {name: np.asarray(v)[None] for name, v in row.items()}
        step = int(columns.pop("step")[0])
        del columns["epoch"]
        scalars = dict(_curves(columns))
        tagged = {f"epoch/{tag}": column[0] for tag, column in scalars.items()}
        self._writer.submit(self._run.log, step, tagged)

    def flush(self) -> None:
        """Wait until all rows are in the file: a resumed run then has no gap."""
        self._writer.flush()

    def end(self, run: Minimisation, error: BaseException | None) -> None:
        """Write what is left, and close the run if it is not the user's."""
        history = Rows(run.record.rows.columns())
        if self._run is not None and len(history):  # the row of the last point
            last = history.part(slice(-1, None))
            self._writer.submit(self._curves.take, _timed(last))
        self._writer.close()
        if self._run is None:
            return
        guard, is_own = self._writer.guard, not isinstance(self._log, Run)
        is_to_be_resumed = run.options.checkpoint is not None
        if error is not None or (is_to_be_resumed and run.status in UNFINISHED):
            write = self._run.close if is_own else self._run.describe
            guard(write, status=run.status if error is None else "failure")
            return
        result = _result(run)
        if self._curves.last is not None:
            guard(self._curves.write_last)
            guard(self._write_result, run.status or "", result, history)
        if guard.is_lost and is_own:
            with contextlib.suppress(TfgradError, OSError):  # the log is lost already
                self._run.close("failure")
        elif is_own:
            guard(self._run.close, run.status, **result)
        else:
            guard(self._run.describe, status=run.status, result=result)

    def _open(self, run: Minimisation) -> None:
        """Open the run, the one of a checkpoint again; without room, warn."""
        try:
            if isinstance(self._log, Run):
                self._run = self._log
            elif (resumed := self._resumed(run)) is not None:
                self._is_resumed = True
                self._run = Run(resumed, _given(run), resume_from=run.step)
            else:
                self._run = Run(Path(self._log) / run.chain.name, _given(run))
        except RunError as error:
            number = getattr(error.__cause__, "errno", None)
            if number not in (errno.ENOSPC, errno.EDQUOT):
                raise
            warnings.warn(
                f"The optimisation goes on without its log. {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _resumed(self, run: Minimisation) -> Path | None:
        """Return the directory in which a checkpoint's run was logged, if it is there.

        Only its name is saved, so that logs may be moved.
        """
        saved = run.saved
        is_from_disk = saved is not None and saved.options is None
        if saved is None or not is_from_disk or saved.directory is None:
            return None
        path = Path(str(self._log)) / saved.directory
        return path if path.is_dir() and not saved.has_ended else None

    def _write_problem(self, run: Minimisation) -> None:
        assert self._run is not None
        problem, point = run.problem, run.loop.solver.point(run.state)
        facts = {**_given(run), "start": point_text(problem.x.pack(point))}
        guard = self._writer.guard
        guard(self._run.describe, **facts)
        versions = f"tfgrad {tfgrad.__version__}, TensorFlow {tf.__version__}"
        versions += f", Keras {keras.__version__}"
        code = f"```python\n{_source(problem.f)}\n```\n\n"
        card = code + _table({**facts, "versions": versions})
        guard(self._run.text, "problem", card)
        guard(self._write_graph, problem, point)

    def _write_graph(self, problem: Problem, x: Leaves) -> None:
        assert self._run is not None
        arguments = problem.x.arguments(list(x), problem.example)
        with contextlib.suppress(InvalidArgumentError):  # f cannot be traced
            self._run.graph(problem.f, *arguments)

    def _write(self, rows: Rows, found: Sequence[Any]) -> None:
        if len(rows):
            self._curves.take(rows)
        if found:
            self._distributions.write(*found)

    def _found(self, run: Minimisation) -> Sequence[Any]:
        """Return the step, the point and the gradient there if they are to be kept."""
        if not self._distributions.is_due(run.step):
            return ()
        solver = run.loop.solver
        leaves: list[Leaves] = [solver.point(run.state), []]
        # Of several workers, the chief alone writes, and cannot evaluate f alone.
        if not run.problem.replicas.is_clustered:
            leaves[1] = solver.gradient(solver.look(run.state))
        return run.step, *([np.asarray(x) for x in part] for part in leaves)

    def _write_result(
        self, status: str, result: Mapping[str, Any], history: Rows
    ) -> None:
        assert self._run is not None
        step, seconds = result["nit"], float(history.columns["seconds"][-1])
        counts = {"result/evaluations": result["nfev"], "result/seconds": seconds}
        self._run.log(step, counts)
        shown = {**result, "x": point_text(result["x"]), "seconds": seconds}
        self._run.text("result", _table({"status": status, **shown}), step)


def _result(run: Minimisation) -> dict[str, Any]:
    """Return what the log says about the outcome."""
    evaluation = run.state.evaluation
    return {
        "x": run.problem.x.pack(run.loop.solver.point(run.state)),
        "fun": float(evaluation.value),
        "grad_max": float(evaluation.grad_max),
        "nit": run.step,
        "nfev": int(run.state.evaluations),
        "message": run.message(),
    }


def _given(run: Minimisation) -> dict[str, Any]:
    """Return what the log says about how a function is minimised."""
    options = run.options
    facts = {
        "problem": run.problem.name,
        "learning_rate": options.learning_rate,
        "steps": None if run.chain.total >= ENDLESS else run.chain.total,
        **({} if run.training is None else run.training.facts()),
        **options.tolerances._asdict(),
        "jit": options.jit,
    }
    given = {name: value for name, value in facts.items() if value is not None}
    return {**given, "method": run.chain.name}


def _leaf_names(problem: Problem) -> list[str]:
    """Return a name for the histograms of each variable."""
    if problem.x.takes_values:
        return [_as_tag(path) for path, _ in named_leaves(problem.x.template, "x")]
    unique: Any = tf.Graph().unique_name  # numbers those that are taken
    names = (getattr(v, "path", v.name.removesuffix(":0")) for v in problem.x.owners)
    return [unique(name) for name in names]


def _as_tag(name: str) -> str:
    """Return the name of a leaf as a tag.

    >>> _as_tag("x['w'][0]")
    'x/w/0'
    """
    return re.sub(r"[\[\].']+", "/", name).strip("/")


def _points(rows: Rows) -> np.ndarray[Any, Any]:
    """Return the points of the rows, shape `[rows, parameters that they hold]`."""
    columns = [c for name, c in rows.columns.items() if re.match(r"x\b", name)]
    empty = np.empty([len(rows), 0])
    return np.concatenate([empty, *(c.reshape(len(c), -1) for c in columns)], axis=1)


def _scalars(rows: Rows) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield (tag, array of shape [rows]) for each number that a row holds."""
    skipped = ("step", "seconds", "time", SIZE)
    columns = {n: c for n, c in rows.columns.items() if n not in skipped}
    if (fall := columns.get("expected")) is not None:
        unknown = fall == np.finfo(fall.dtype).max  # a method's way to say "no idea"
        columns["expected"] = np.where(unknown, np.nan, fall)
    yield from _curves(columns)
    with np.errstate(divide="ignore"):  # of a gradient that is zero, it is -inf
        yield "gradient/log10_max_norm", np.log10(columns["grad_max"])


def _curves(
    columns: Mapping[str, np.ndarray[Any, Any]],
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    for name, column in columns.items():
        tag = TAGS.get(name) or _as_tag(name)
        if column.ndim == 1:
            yield tag, column
            continue
        for index in np.ndindex(column.shape[1:]):
            yield f"{tag}/{'_'.join(map(str, index))}", column[:, *index]


def _timed(rows: Rows) -> Rows:
    """Return the rows with the `time` of each, in seconds since 1970."""
    seconds = rows.columns["seconds"]
    return Rows({**rows.columns, "time": time.time() - (seconds[-1:] - seconds)})


def point_text(x: Nest) -> str:
    """Return a point in one line: its numbers while they are few, else how many.

    >>> point_text({"w": np.array([1.0, 2.0]), "b": 0.5})
    "x['b'] = 0.5, x['w'] = [1. 2.]"
    """
    leaves = [(name, np.asarray(leaf)) for name, leaf in named_leaves(x, "x")]
    count = sum(leaf.size for _, leaf in leaves)
    if count > SMALL:
        arrays = "one array" if len(leaves) == 1 else f"{len(leaves)} arrays"
        return f"{count} numbers in {arrays}"
    texts = (f"{name} = {np.array2string(leaf, precision=8)}" for name, leaf in leaves)
    return ", ".join(texts).replace("\n", "")


def _source(f: Callable[..., Any]) -> str:
    try:
        lines = inspect.getsource(getattr(f, "python_function", f))
    except (OSError, TypeError):  # typed at a prompt, or no Python function
        return repr(f)
    return textwrap.dedent(lines).rstrip()


def _table(facts: Mapping[str, Any]) -> str:
    cells = {name: str(value).replace("|", "\\|") for name, value in facts.items()}
    rows = "\n".join(f"| {name} | {text} |" for name, text in cells.items())
    return f"| | |\n|---|---|\n{rows}\n"
