"""From the loop to a run: every step's numbers, the graph, a card of the problem."""

from __future__ import annotations

import contextlib
import inspect
import re
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.optimize.loop import Rows
from tfgrad.runs.directory import check
from tfgrad.runs.writer import Run

TAGS = {"fun": "loss", "grad_norm": "gradient/max_norm"}
"""What TensorBoard calls a column; others keep their name, with slashes for
brackets."""


def check_log(log: Run | str | PathLike[str] | None) -> None:
    """Refuse a log that cannot be written, before anything is traced or written."""
    if log is not None and not isinstance(log, Run):
        check(log)


class Log:
    """Where a minimisation is written: a run of its own, or one that the user opened.

    A chunk is written by a thread of its own while the next one runs.

    Args:
        log: A directory, in which the run gets one named after the method, or an open
            run, which stays open.
        method: The name of the method.
    """

    def __init__(self, log: Run | str | PathLike[str], method: str) -> None:
        """Open the run."""
        self._is_own = not isinstance(log, Run)
        self._run = log if isinstance(log, Run) else Run(Path(log) / method)
        self.directory = self._run.directory
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="tfgrad-log"
        )
        self._pending: Future[None] | None = None
        self._is_lost = False

    def problem(
        self, f: Callable[..., Any], args: tuple[Any, ...], facts: Mapping[str, Any]
    ) -> None:
        """Write what is minimised and how: a card, `run.json`, and the graph."""
        card = problem_card(f, facts)
        self._guarded(self._run.describe, **facts)
        self._guarded(self._run.text, "problem", card)
        with contextlib.suppress(InvalidArgumentError):  # it runs eagerly: no graph
            self._guarded(self._run.graph, f, *args)

    def rows(self, rows: Rows) -> None:
        """Write rows in the background, after the ones before."""
        now = time.time()
        seconds = rows.columns["seconds"]
        wall_times = now - (seconds[-1:] - seconds)
        self._wait()
        self._pending = self._thread.submit(
            self._guarded,
            self._run.log_history,
            dict(_scalars(rows)),
            rows.columns["step"],
            wall_times,
        )

    def close(self, status: str, **result: Any) -> None:
        """Write what is left, and close the run if it is not the user's."""
        self._wait()
        self._thread.shutdown()
        if self._is_own:
            self._guarded(self._run.close, status, **result)
        else:
            self._guarded(self._run.describe, status=status, result=result)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _guarded(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Write; a disk that refuses ends the log, not the optimisation."""
        if self._is_lost:
            return
        try:
            write(*args, **kwargs)
        except RunError as error:
            self._is_lost = True
            warnings.warn(
                f"The optimisation goes on without its log. {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def problem_card(f: Callable[..., Any], facts: Mapping[str, Any]) -> str:
    """Return the Markdown of a problem: the source of the function, and the facts."""
    source = getattr(f, "python_function", f)
    try:
        code = textwrap.dedent(inspect.getsource(source)).rstrip()
    except (OSError, TypeError):  # typed at a prompt, or no Python function
        code = repr(f)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"```python\n{code}\n```\n\n| | |\n|---|---|\n{rows}\n"


def _scalars(rows: Rows) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield (tag, array of shape [rows]) for each number that a row holds."""
    for name, column in rows.columns.items():
        if name in ("step", "seconds"):
            continue
        tag = TAGS.get(name) or re.sub(r"[\[\].']+", "/", name).strip("/")
        if column.ndim == 1:
            yield tag, column
            continue
        for index in np.ndindex(column.shape[1:]):
            yield f"{tag}/{'_'.join(map(str, index))}", column[:, *index]
