"""`Run`: one TensorBoard run, written from any loop."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs import hparams as hparams_tab
from tfgrad.runs.directory import claim
from tfgrad.runs.events import EventFile
from tfgrad.runs.graph import step_graph
from tfgrad.runs.record import Record
from tfgrad.runs.values import (
    check_mapping,
    check_tag,
    to_column,
    to_number,
    to_step,
    to_steps,
)

_ROWS_AT_ONCE = 10_000
"""Rows of a history that are Python numbers at a time: memory stays bounded."""

_Kind = Literal["scalar", "text", "graph"]


class Run:
    """One TensorBoard run: scalars, text and graphs, in a directory of its own.

    Use it as a context manager. A call is in the file when it returns, so that a
    process which is killed loses nothing that it logged. Calls may come from several
    threads. Numbers are kept as float32, which is what TensorBoard reads; NaN and
    infinities are kept as they are. `run.json` says what the run was: versions, start,
    result, status.

    Args:
        directory: Where to write. If it exists and holds something, the run goes to the
            first free one of `directory-002`, `directory-003`..., so that two
            experiments never share a curve; `Run.directory` is the one.
        hparams: Hyper-parameters by name, for TensorBoard's HParams tab: numbers,
            strings and booleans as they are, anything else as its `str`.
        resume_from: The step at which the run in exactly this directory goes on. What
            it holds of this step and later ones is superseded: no step shows twice.

    Attributes:
        directory: The `pathlib.Path` that is really written to.

    Raises:
        InvalidArgumentError: If an argument is not of its kind; nothing was written.
        RunError: If the directory is a file, cannot be written, does not exist
            (`resume_from`), or has another live writer (`resume_from`).

    Example:
        >>> import tempfile
        >>> logs = tempfile.mkdtemp()
        >>> with Run(f"{logs}/parabola") as run:
        ...     for step in range(3):
        ...         run.log(step, loss=0.64**step)
        >>> Run(f"{logs}/parabola").directory.name  # the first one is not touched
        'parabola-002'
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        hparams: Mapping[str, Any] | None = None,
        resume_from: int | None = None,
    ) -> None:
        """Claim the directory and write the head of the run."""
        is_resumed = resume_from is not None
        self._first_step = to_step(resume_from, "resume_from") if is_resumed else 0
        self._hparams = hparams_tab.checked(hparams or {})
        self._lock = threading.RLock()
        self._is_closed = False
        self._facts: dict[str, Any] = {}
        self._last_steps: dict[str, int] = {}
        self._last_write = self._started = time.time()
        with contextlib.ExitStack() as undo:
            self._claim = claim(directory, resume=is_resumed)
            undo.callback(self._claim.release)
            self.directory = self._claim.path
            self._record = Record(
                self.directory, resumed_from=resume_from, hparams=self._hparams
            )
            self._kinds = self._record.earlier_tags()
            self._events = EventFile(self.directory, self._first_step)
            if self._hparams:
                self._events.summary(
                    hparams_tab.start(self._hparams, str(self.directory))
                )
            undo.pop_all()

    def log(
        self, step: int, scalars: Mapping[str, Any] | None = None, /, **named: Any
    ) -> None:
        """Write one point of one or more curves, in less than 10 microseconds.

        Args:
            step: A whole number from 0 up. On one tag, steps grow.
            scalars: Numbers or arrays and tensors of shape `[]`, by tag. This is the
                way to write a tag that is no Python name: `run.log(0, {"a/b": 1.0})`.
            **named: The same, as in `run.log(0, loss=0.5)`.

        Raises:
            InvalidArgumentError: If a value is no number, a step does not grow, or a
                tag is one of text or a graph. Nothing of this call was written.
            RunError: If the run is closed, or the disk refuses.

        Example:
            >>> import tempfile
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.log(0, loss=np.float32(0.5))
            ...     run.log(1, {"loss": 0.25, "gradient/norm": float("nan")})
        """
        step = to_step(step, "step")
        if scalars is not None:
            check_mapping(scalars, "scalars")
            named = {**scalars, **named}
        numbers = [to_number(value, tag) for tag, value in named.items()]
        with self._lock:
            self._admit(named, "scalar", step, step)
            self._last_write = time.time()
            if named:
                columns = [[number] for number in numbers]
                self._events.scalars(tuple(named), [step], [self._last_write], columns)

    def log_history(
        self,
        history: Mapping[str, Any],
        steps: Sequence[int] | np.ndarray,
        wall_times: Any = None,
    ) -> None:
        """Write whole curves at once, at a fraction of a microsecond a point.

        This is how a compiled loop logs every step: it hands over arrays, now and then.

        Args:
            history: Arrays of shape `[n]` by tag.
            steps: Their `n` steps, which grow, also from call to call.
            wall_times: When each step was done, in seconds since 1970, shape `[n]`.
                None spreads the steps evenly over the time since the last call.

        Raises:
            InvalidArgumentError: As for `log`, and if lengths differ.
            RunError: If the run is closed, or the disk refuses.

        Example:
            >>> import tempfile
            >>> loss = 0.64 ** np.arange(1000)
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.log_history({"loss": loss, "error": np.sqrt(loss)}, range(1000))
        """
        check_mapping(history, "history")
        steps = to_steps(steps)
        count = len(steps)
        columns = [to_column(values, tag, count) for tag, values in history.items()]
        now = time.time()
        with self._lock:
            if wall_times is None:
                times = np.linspace(self._last_write, now, count + 1)[1:]
            else:
                times = to_column(wall_times, "wall_times", count)
            if not count or not columns:
                return
            self._admit(history, "scalar", int(steps[0]), int(steps[-1]))
            for start in range(0, count, _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                self._events.scalars(
                    tuple(history),
                    steps[part].tolist(),
                    times[part].tolist(),
                    [column[part].tolist() for column in columns],
                )
            self._last_write = now

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Write a card of Markdown for TensorBoard's Text tab.

        Args:
            tag: Its name.
            markdown: The text: tables, lists and code blocks are shown as such.
            step: When it was true; None means the step at which this session started.

        Raises:
            InvalidArgumentError: If `markdown` is no string, or `tag` is taken.
            RunError: If the run is closed, or the disk refuses.
        """
        if not isinstance(markdown, str):
            raise InvalidArgumentError(
                "`text` takes a string of Markdown.",
                got=f"markdown={nested.describe(markdown)}",
                hint='str(...), or "```\\n...\\n```" to show it as it is',
            )
        with self._lock:
            step = self._first_step if step is None else to_step(step, "step")
            self._admit([tag], "text", step, step)
            self._events.text(tag, markdown, step)

    def graph(self, f: Callable[..., Any], *args: Any, name: str | None = None) -> None:
        """Write the graph of `f` and of its gradient, for TensorBoard's Graphs tab.

        The operations stand under the user's own name scopes; nested `tf.function`s,
        branches and loops are written out. `f` is traced once more for this, not run.
        The first graph is the one that the tab opens; later ones are under its "Tag"
        menu.

        Args:
            f: A TensorFlow function. If it returns one float number, the graph has its
                gradient with respect to the float tensors in `args` and to the
                trainable variables that `f` reads.
            *args: What to trace it with: nests of tensors, arrays, numbers.
            name: Its name; None means that of `f`. A graph that an earlier session has
                written under this name is left as it is.

        Raises:
            InvalidArgumentError: If this session has a graph of this name already.
            RunError: If the run is closed, or the disk refuses.

        Example:
            >>> import tempfile
            >>> import tensorflow as tf
            >>> x = tf.Variable(3.0, name="x")
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.graph(lambda: x**2 + x - 1, name="parabola")
        """
        name = nested.name_of(f) if name is None else name
        tag = f"graph/{name}"
        check_tag(name)
        self._check_open()
        if tag in self._last_steps:
            raise InvalidArgumentError(
                "A run has one graph of a name.",
                got=f"{name!r}, which this run has already",
                hint="name=... to write it beside the first",
            )
        if self._kinds.get(tag) == "graph":
            return
        graph_def = step_graph(f, args, name)  # without the lock: others log meanwhile
        with self._lock:
            # A second graph of the whole run would replace the first in one loader.
            is_first = "graph" not in self._kinds.values()
            self._admit([tag], "graph", self._first_step, self._first_step)
            self._events.graph(graph_def, None if is_first else tag, self._first_step)
            self._record.update(tags=self._kinds)

    def describe(self, **facts: Any) -> None:
        """Add facts to `run.json`: the seed, the arguments, the problem.

        Args:
            **facts: Whatever JSON can hold, and arrays; float64 keeps all its bits, NaN
                and infinities become strings, and other objects their `repr`.

        Example:
            >>> import json, tempfile
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.describe(seed=7, arguments={"learning_rate": 0.1})
            >>> json.loads((run.directory / "run.json").read_text())["facts"]["seed"]
            7
        """
        with self._lock:
            self._check_open()
            self._facts |= facts
            self._record.update(facts=self._facts)

    def close(self, status: str = "success", **result: Any) -> None:
        """End the run: write status and result to `run.json`, let the directory go.

        Args:
            status: How it ended, in a word; "success" is the one that HParams shows as
                such.
            **result: What came out, for `run.json`.

        A second call does nothing.
        """
        with self._lock, contextlib.ExitStack() as ending:
            if self._is_closed:
                return
            self._is_closed = True
            ending.callback(self._claim.release)
            ending.callback(self._events.close)
            seconds = time.time() - self._started
            self._record.update(
                status=status, seconds=seconds, result=result, tags=self._kinds
            )
            if self._hparams:
                self._events.summary(hparams_tab.end(status == "success"))

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the run, with the status that the block's end has earned."""
        if error is None:
            self.close()
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failure"
        with contextlib.suppress(RunError):  # the block's own error is the one to see
            self.close(status, error=f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        """Return the call that made it."""
        return f"Run({str(self.directory)!r})"

    def _check_open(self) -> None:
        if self._is_closed:
            raise RunError(
                "A run that is closed takes no more.",
                got=f"{self.directory}, closed",
                hint="log inside the `with` block, or Run(..., resume_from=step)",
            )

    def _admit(self, tags: Iterable[str], kind: _Kind, first: int, last: int) -> None:
        """Check that `tags` may get data of `kind` at these steps, then remember it."""
        self._check_open()
        for tag in tags:
            if tag not in self._kinds:
                check_tag(tag)
            elif self._kinds[tag] != kind:
                # A tag belongs to one plugin per run: the other data would be hidden.
                raise InvalidArgumentError(
                    "A tag is for data of one kind.",
                    got=f"{tag!r}, a {kind} here and a {self._kinds[tag]} before",
                    hint=f'another tag, such as "{kind}/{tag}"',
                )
            if first <= self._last_steps.get(tag, self._first_step - 1):
                raise self._not_growing(tag, first)
        for tag in tags:
            self._kinds[tag] = kind
            self._last_steps[tag] = last

    def _not_growing(self, tag: str, step: int) -> InvalidArgumentError:
        # TensorBoard's loaders differ on a step that comes again: one drops what it has
        # from there on, the other shows both.
        if tag in self._last_steps:
            before = f"after step {self._last_steps[tag]}"
        else:
            before = f"in a run resumed from step {self._first_step}"
        return InvalidArgumentError(
            "On one tag, steps grow.",
            got=f"{tag!r} at step {step}, {before}",
            hint=f"Run(..., resume_from={step}) to go back, or another tag",
        )
