"""What a writer has open of a run: its directory, its record, its event file."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tfgrad.errors import RunError
from tfgrad.runs.directory import claim
from tfgrad.runs.events import EventFile
from tfgrad.runs.graph import LAYERS
from tfgrad.runs.record import Record, hparams_end, hparams_start
from tfgrad.runs.tags import Kind, Tags

_ROWS_AT_ONCE = 10_000
"""Rows of a history that are converted to Python numbers at a time, to save memory."""


class Session:
    """A run that is written to, by one process at a time and any of its threads.

    Args:
        directory: As for `Run`.
        hparams: As for `Run`, checked.
        resume_from: As for `Run`, checked.

    Attributes:
        directory: The `pathlib.Path` of the run.
        first_step: The step at which the session starts.
        lock: Held while something is written.
        tags: What has been written.

    Raises:
        RunError: If the directory cannot be had.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        hparams: Mapping[str, Any],
        resume_from: int | None,
    ) -> None:
        """Claim the directory and write the head of the run."""
        self.first_step = resume_from or 0
        self.lock = threading.RLock()
        self._is_closed, self._last_write = False, time.time()
        with contextlib.ExitStack() as undo:
            self._claim = claim(directory, resume=resume_from is not None)
            undo.callback(self._claim.release)
            self.directory = self._claim.path
            self._record = Record(
                self.directory, resumed_from=resume_from, hparams=hparams
            )
            self.tags = Tags(self._record.earlier_tags(), self.first_step)
            superseded = self.tags.superseded()
            self._events = EventFile(self.directory, self.first_step, superseded)
            self._has_hparams = bool(hparams)
            if hparams:
                place = self.directory.absolute()
                self._events.summary(hparams_start(hparams, place))
            undo.pop_all()

    def check_open(self) -> None:
        """Raise a RunError if the run is closed."""
        if self._is_closed:
            raise RunError(
                "A run that is closed takes no more.",
                got=f"{self.directory}, closed",
                hint="log inside the `with` block, or Run(..., resume_from=step)",
            )

    def row(self, tags: Iterable[str], step: int, numbers: list[float]) -> None:
        """Write one point of each curve."""
        tags = tuple(tags)
        with self.lock:
            self._admit(tags, "scalar", step, step)
            self._last_write = time.time()
            if tags:
                columns = [[number] for number in numbers]
                self._events.scalars(tags, [step], [self._last_write], columns)

    def rows(
        self,
        tags: Iterable[str],
        steps: np.ndarray[Any, Any],
        columns: list[np.ndarray[Any, Any]],
        times: np.ndarray[Any, Any] | None,
    ) -> None:
        """Write whole curves; without `times`, spread over that since the last ones."""
        tags, now, count = tuple(tags), time.time(), len(steps)
        if not count or not columns:
            return
        with self.lock:
            if times is None:
                times = np.linspace(self._last_write, now, count + 1)[1:]
            self._admit(tags, "scalar", int(steps[0]), int(steps[-1]))
            for start in range(0, count, _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                self._events.scalars(
                    tags,
                    steps[part].tolist(),
                    times[part].tolist(),
                    [column[part].tolist() for column in columns],
                )
            self._last_write = now

    def tensor(self, tag: str, kind: Kind, step: int, value: Any, plugin: str) -> None:
        """Write what a plugin of TensorBoard shows."""
        with self.lock:
            self._admit([tag], kind, step, step)
            self._events.tensor(tag, value, step, plugin)

    def graph(self, name: str, graph: Any, layers: Any = None) -> None:
        """Write a graph, and that of the layers of a Keras model."""
        tag, first = f"graph/{name}", self.first_step
        with self.lock:
            # One of TensorBoard's loaders replaces the first graph by a second one.
            is_first = "graph" not in self.tags.kinds.values()
            self._admit([tag], "graph", first, first)
            self._events.graph(graph, None if is_first else tag)
            if layers:
                tag = f"layers/{name}"
                self._admit([tag], "graph", first, first)
                self._events.tensor(tag, layers, 0, LAYERS, b"1")

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add facts to `run.json`."""
        with self.lock:
            self.check_open()
            self._record.describe(facts)

    def close(self, status: str, result: Mapping[str, Any]) -> None:
        """End the run, once: write status and result, release the directory."""
        with self.lock, contextlib.ExitStack() as ending:
            if self._is_closed:
                return
            self._is_closed = True
            ending.callback(self._claim.release)
            ending.callback(self._events.close)
            self._record.end(status, result, self.tags.kinds)
            if self._has_hparams:
                self._events.summary(hparams_end(status))

    def next_step(self, prefixes: tuple[str, ...]) -> int:
        """Return the first step free on all tags that begin with one of `prefixes`."""
        with self.lock:
            return self.tags.next_step(prefixes)

    def _admit(self, tags: Iterable[str], kind: Kind, first: int, last: int) -> None:
        """Check that `tags` may get data of `kind` at these steps, then remember it."""
        self.check_open()
        self.tags.admit(tags, kind, first, last)
        self._record.note(self.tags.kinds)
