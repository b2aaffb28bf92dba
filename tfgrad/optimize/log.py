"""From the loop to a run: what a minimiser wants to see, without asking for it."""

from __future__ import annotations

import contextlib
import errno
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tfgrad.errors import InvalidArgumentError, RunError, TfgradError
from tfgrad.nested import named_leaves
from tfgrad.optimize.cards import point_text, problem_card, result_card
from tfgrad.optimize.loop import Rows
from tfgrad.optimize.objective import SMALL, Objective
from tfgrad.runs.curves import read_run
from tfgrad.runs.directory import check
from tfgrad.runs.guard import Guard
from tfgrad.runs.inline import UniqueNames
from tfgrad.runs.writer import Run

TAGS = {
    "fun": "loss",
    "grad_norm": "gradient/max_norm",
    "step_length": "step/length",
    "step_size": "step/size",
}
"""What TensorBoard calls a column; others keep their name, with slashes for
brackets."""

GAP = "loss/log10_gap"

EVERY_STEP = 100_000
"""Steps up to which each is written; from here on every second, from twice as many on
every fourth ... A million steps are 263,000 rows, some fifty megabytes."""

CHUNKS = 20
"""In how many chunks, at least, a run of many parameters is cut: the distribution of
the parameters is written so often, and at most twice that."""

QUEUE = 4
"""Chunks that may wait to be written: the first steps are all written, later ones not,
so that a loop faster than its log need not wait for it."""

PICTURE_SECONDS = 1.0
"""What the picture of the path may cost: f is evaluated at some thousand points."""

Leaves = Sequence[Any]
"""Arrays or tensors, one for each variable."""


def check_log(log: Run | str | PathLike[str] | None) -> None:
    """Refuse a log that cannot be written, before anything is traced or written."""
    if log is not None and not isinstance(log, Run):
        check(log)


def open_log(*args: Any) -> Log | None:
    """Return `Log(*args)`; None, with a warning, if the disk has no room for it."""
    try:
        return Log(*args)
    except RunError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        warnings.warn(
            f"The optimisation goes on without its log. {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class Log:
    """Where a minimisation is written: a run of its own, or one that the user opened.

    A chunk is written by a thread of its own while the next one runs. A disk that
    refuses ends the log with a warning, not the minimisation.

    Args:
        log: A directory, in which the run gets one named after the method, or an open
            run, which stays open.
        method: The name of the method.
        objective: What is minimised, where it starts.
        facts: How it is minimised, for the card, `run.json` and the HParams tab.
        steps: How many steps are planned.
        every: How many steps there are from one point to the next.
        resumed: The directory of the run to go on with; None begins a new one.
        step: Where it goes on.
    """

    def __init__(
        self,
        log: Run | str | PathLike[str],
        method: str,
        objective: Objective,
        facts: Mapping[str, Any],
        steps: int,
        every: int = 1,
        resumed: Path | None = None,
        step: int = 0,
    ) -> None:
        """Open the run."""
        given = {name: value for name, value in facts.items() if value is not None}
        facts = {**given, "method": method}
        self._is_own = not isinstance(log, Run)
        self._is_resumed = self._is_own and resumed is not None
        if isinstance(log, Run):
            self._run = log
        elif resumed is not None:
            self._run = Run(resumed, facts, resume_from=step)
        else:
            self._run = Run(Path(log) / method, facts)
        self.directory = self._run.directory
        self._objective = objective
        self._guard = Guard("The optimisation")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tfgrad-log")
        self._pending: list[Future[None]] = []
        self._kept: list[Rows] = []
        self._last: Rows | None = None
        self._lowest = np.inf
        self._last_histogram = -1
        count = sum(v.shape.num_elements() for v in objective.variables)
        self._names = _leaf_names(objective) if count > SMALL else []
        self._steps = steps
        self._every = every
        self._facts = facts

    def begin(
        self,
        rows: Rows,
        epochs: Mapping[str, np.ndarray[Any, Any]],
        step: int,
        leaves: Callable[[], tuple[Leaves, Leaves]],
    ) -> None:
        """Write the problem and the rows until now, as far as the run lacks them.

        Args:
            rows: All until now.
            epochs: Those of the epochs, by column.
            step: As for `rows`.
            leaves: As for `rows`.
        """
        first = self._run.first_step
        if not self._is_resumed or first == 0:
            self._write_problem(self._facts, self._steps)
        if len(rows):
            rows = Rows({**rows.columns, "time": _wall_times(rows)})
            count = int(np.searchsorted(rows.columns["step"], first))
            if count:
                self._submit(self._remember, _selected(rows, slice(count)))
            # The first row has no step that led to it, and so a column less.
            for part in (slice(count, count + 1), slice(count + 1, None)):
                self._submit(self._take, _selected(rows, part))
        for row in zip(*epochs.values(), strict=True):
            named = dict(zip(epochs, row, strict=True))
            if named["step"] >= first:
                self.epoch(named)
        self._submit_histograms(step, leaves)

    def rows(
        self, rows: Rows, step: int, leaves: Callable[[], tuple[Leaves, Leaves]]
    ) -> None:
        """Write rows in the background, after the ones before.

        Args:
            rows: What the loop has returned.
            step: Where it is.
            leaves: Returns the point and the gradient there; called
                when it is time for histograms of many parameters.
        """
        self._submit(self._take, Rows({**rows.columns, "time": _wall_times(rows)}))
        self._submit_histograms(step, leaves)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Write the row of an epoch, at the step that ended it."""
        columns = {name: np.asarray(v)[None] for name, v in row.items()}
        step = int(columns.pop("step")[0])
        del columns["epoch"]
        scalars = dict(_curves(columns))
        tagged = {f"epoch/{tag}": column[0] for tag, column in scalars.items()}
        self._submit(self._run.log, step, tagged)

    def longest_chunk(self, step: int) -> int:
        """Return how many steps to take at most before the next call of `rows`.

        Distributions are at steps that the clock has no part in, so that a run which is
        resumed writes those again that it supersedes.
        """
        gap = self._gap(step)
        return gap - step % gap if self._names else max(self._steps, step)

    def flush(self) -> None:
        """Wait until all rows are in the file: do so before a checkpoint is saved.

        Else a run that is killed then, and resumed there, has a gap in its curves.
        """
        while self._pending:
            self._pending.pop(0).result()

    def close(self, status: str, **result: Any) -> None:
        """Write what is left, and close the run if it is not the user's.

        Args:
            status: Why the minimisation ended.
            **result: What came out: `x` and `nfev` among it.
        """
        self.flush()
        self._thread.shutdown()
        if self._last is not None and not self._is_kept(self._last)[0]:
            self._guard(self._write_rows, self._last)
        if self._kept:
            self._guard(self._write_gap)
            self._guard(self._write_result, status, result)
        if self._guard.is_lost and self._is_own:
            with contextlib.suppress(TfgradError, OSError):  # the first one was told
                self._run.close("failure")
        elif self._is_own:
            self._guard(self._run.close, status, **result)
        else:
            self._guard(self._run.describe, status=status, result=result)

    def suspend(self, status: str) -> None:
        """Stop writing, without a word on the result: the run is to be resumed."""
        self.flush()
        self._thread.shutdown()
        write = self._run.close if self._is_own else self._run.describe
        self._guard(write, status=status)

    # --- what is written ---

    def _write_problem(self, facts: Mapping[str, Any], steps: int) -> None:
        start = self._objective.pack(self._objective.read())
        facts = {**facts, "start": point_text(start)}
        if curves := _thinning(steps, self._every):
            facts["curves"] = curves
        self._guard(self._run.describe, **facts)
        card = problem_card(self._objective.f, facts)
        self._guard(self._run.text, "problem", card)
        self._guard(self._write_graph)

    def _write_graph(self) -> None:
        with contextlib.suppress(InvalidArgumentError):  # it runs eagerly: no graph
            self._run.graph(self._objective.f, *self._objective.arguments())

    def _remember(self, rows: Rows) -> None:
        """Take note of rows that are in the run already."""
        self._lowest = min(self._lowest, _lowest(rows.columns["fun"]))
        self._last = _selected(rows, slice(-1, None))
        self._kept.append(_selected(rows, self._is_kept(rows)))

    def _take(self, rows: Rows) -> None:
        """Write those of the rows that are to be kept."""
        if not len(rows):
            return
        self._lowest = min(self._lowest, _lowest(rows.columns["fun"]))
        points = _points(rows)
        if points.size and self._last is not None:
            way = np.diff(np.concatenate([_points(self._last), points]), axis=0)
            rows.columns["step_length"] = np.linalg.norm(way, axis=1)
        self._last = _selected(rows, slice(-1, None))
        self._write_rows(_selected(rows, self._is_kept(rows)))

    def _write_rows(self, rows: Rows) -> None:
        if len(rows):
            self._kept.append(rows)
            columns = rows.columns
            scalars = dict(_scalars(rows))
            self._run.log_history(scalars, columns["step"], columns["time"])

    def _is_kept(self, rows: Rows) -> np.ndarray[Any, Any]:
        """Return whether each row is written; its step alone decides."""
        points = rows.columns["step"] / self._every
        doublings = np.ceil(np.log2(np.maximum(points / EVERY_STEP, 1.0)))
        return np.asarray(points % 2 ** doublings.astype(np.int64) == 0)

    def _gap(self, step: int) -> int:
        """Return the steps between distributions, more of them beyond the plan."""
        doublings = math.ceil(math.log2(max(step / self._steps, 1)))
        return max(1, self._steps // CHUNKS) * 2**doublings

    def _submit_histograms(
        self, step: int, leaves: Callable[[], tuple[Leaves, Leaves]]
    ) -> None:
        is_due = self._names and step % self._gap(step) == 0
        if is_due and step > self._last_histogram:
            self._last_histogram = step
            point, gradient = ([np.asarray(x) for x in part] for part in leaves())
            self._submit(self._write_histograms, step, point, gradient)

    def _write_histograms(self, step: int, point: Leaves, gradient: Leaves) -> None:
        for name, x, slope in zip(self._names, point, gradient, strict=True):
            self._run.histogram(f"parameters/{name}", x, step)
            self._run.histogram(f"gradients/{name}", slope, step)

    def _write_gap(self) -> None:
        """Write log10 of what the loss still had to fall; only the end knows how far.

        The lowest point itself, whose logarithm is none, is left out.
        """
        step, fun, times = (self._column(name) for name in ("step", "fun", "time"))
        gap = fun.astype(np.float64) - self._lowest
        above = gap > 0
        if self._is_resumed:
            # It may have been killed while it wrote this very curve.
            last = _last_step(self.directory, GAP)
            self._run.rewind(GAP, last)
            above &= step > last
        gaps = {GAP: np.log10(gap[above])}
        self._run.log_history(gaps, step[above], times[above])

    def _write_result(self, status: str, result: Mapping[str, Any]) -> None:
        last = self._kept[-1].columns
        step, seconds = int(last["step"][-1]), float(last["seconds"][-1])
        counts = {"result/evaluations": result["nfev"], "result/seconds": seconds}
        self._run.log(step, counts)
        shown = {**result, "x": point_text(result["x"]), "seconds": seconds}
        self._run.text("result", result_card(status, shown), step)
        self._write_picture(result["x"], step)

    def _write_picture(self, x: Any, step: int) -> None:
        """Write the contour and the path, or the graph of f if it has one parameter."""
        if self._objective.example:  # each batch has a contour of its own
            return
        path = np.concatenate([_points(rows) for rows in self._kept])
        if not np.isfinite(path).all(axis=1).any():  # a start that is NaN
            return
        resolution = self._affordable_resolution()
        if path.shape[1] not in (1, 2) or resolution < 10:
            return
        from tfgrad.runs.pictures import draw_path  # it imports matplotlib: 0.3 s

        objective = self._objective
        picture = draw_path(
            lambda: objective.evaluate().row["fun"],  # traced already
            x,
            path,
            self._column("fun"),
            name=objective.name,
            variables=objective.variables,
            resolution=min(resolution, 100),
        )
        self._run.image("path", picture, step)

    def _affordable_resolution(self) -> int:
        """Return how many points a side of the picture can have in its time."""
        seconds = PICTURE_SECONDS
        for _ in range(3):  # others may have the processor for a while
            began = time.perf_counter()
            self._objective.evaluate()
            seconds = min(seconds, time.perf_counter() - began)
        return int((PICTURE_SECONDS / max(seconds, 1e-6)) ** 0.5)

    # --- the thread ---

    def _submit(self, write: Callable[..., None], *args: Any) -> None:
        while len(self._pending) >= QUEUE:
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(self._guard, write, *args))

    def _column(self, name: str) -> np.ndarray[Any, Any]:
        return np.concatenate([rows.columns[name] for rows in self._kept])


def _thinning(steps: int, every: int) -> str:
    """Return which of the planned steps are written; "" if all are.

    >>> _thinning(1000, 1), _thinning(1000, 10)
    ('', 'every 10 steps; the history of the result has all')
    """
    most = EVERY_STEP * every
    if every == 1 and steps <= most:
        return ""
    text = "every step" if every == 1 else f"every {every} steps"
    if steps > most:
        text += f" up to {most:,}, then half as often, from {2 * most:,} on a quarter"
        text += " as often, and so on"
    return f"{text}; the history of the result has all"


def _last_step(directory: Path, tag: str) -> int:
    """Return the last step of a curve that is in the run; -1 if there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the torn end of what was killed
        curve = read_run(directory).curves.get(tag)
    return int(curve.steps[-1]) if curve and len(curve.steps) else -1


def _leaf_names(objective: Objective) -> list[str]:
    """Return a name for the histograms of each variable."""
    unique = UniqueNames()
    if point := objective.point_argument():  # of values
        paths = [path for path, _ in named_leaves(point[0], "x")]
        return [unique.take(_as_tag(path)) for path in paths]
    names = (getattr(v, "path", v.name.removesuffix(":0")) for v in objective.owners)
    return [unique.take(name) for name in names]


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
    skipped = ("step", "seconds", "time")
    columns = {n: c for n, c in rows.columns.items() if n not in skipped}
    yield from _curves(columns)
    with np.errstate(divide="ignore"):  # of a gradient that is zero, it is -inf
        yield "gradient/log10_max_norm", np.log10(columns["grad_norm"])


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


def _selected(rows: Rows, which: Any) -> Rows:
    return Rows({name: column[which] for name, column in rows.columns.items()})


def _lowest(values: np.ndarray[Any, Any]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.min(finite, initial=np.inf))


def _wall_times(rows: Rows) -> np.ndarray[Any, Any]:
    seconds = rows.columns["seconds"]
    return np.asarray(time.time() - (seconds[-1:] - seconds))
