"""`Run`: one TensorBoard run, written from any loop."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs import media
from tfgrad.runs.directory import claim
from tfgrad.runs.events import EventFile
from tfgrad.runs.graph import (
    LAYERS,
    conceptual_graph,
    is_model,
    model_inputs,
    step_graph,
)
from tfgrad.runs.keras_callback import RunCallback
from tfgrad.runs.record import (
    Kind,
    Record,
    Tags,
    checked_hparams,
    hparams_end,
    hparams_start,
)
from tfgrad.runs.tensorboard import require
from tfgrad.runs.values import (
    check_mapping,
    check_tag,
    to_column,
    to_number,
    to_step,
    to_steps,
    to_text,
)

_NUMBERS_AT_ONCE = 100_000
"""Numbers of a history that are made records of at a time, to save memory."""


class Run(contextlib.AbstractContextManager["Run"]):
    """One TensorBoard run: curves, texts, pictures, graphs, in a directory of its own.

    Use a run as a context manager. When a call returns, its data is in the file: a
    process that is killed loses nothing that it logged. Several threads may log.
    Numbers are kept as float32, which is what TensorBoard reads; NaN and infinities are
    kept as they are. `run.json` has the versions, the start, the result, the status.

    Args:
        directory: Where to write. If it exists and holds something, the run goes to the
            first free one of `directory-002`, `directory-003`..., so two experiments
            never share a curve; `Run.directory` says which.
        hparams: Hyper-parameters by name, for TensorBoard's HParams tab: numbers,
            strings and booleans as they are, anything else as its `str`.
        resume_from: The step from which the run in exactly this directory is continued.
            Its data at this step and at later ones is replaced: no step shows twice.

    Attributes:
        directory: The `pathlib.Path` of the run, with its number if it has one.
        first_step: The step at which this session starts.

    Raises:
        InvalidArgumentError: If an argument is not of its kind; nothing was written.
        RunError: If the directory is a file, cannot be written, does not exist
            (`resume_from`), or has another live writer (`resume_from`). From every
            method that writes: if the run is closed, or its file cannot be written.

    Example:
        >>> import tempfile
        >>> logs = tempfile.mkdtemp()
        >>> with Run(f"{logs}/parabola") as run:
        ...     for step in range(3):
        ...         run.log(step, loss=0.64**step)
        >>> with Run(f"{logs}/parabola") as second:  # the first one is not touched
        ...     second.directory.name
        'parabola-002'
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        hparams: Mapping[str, Any] | None = None,
        resume_from: int | None = None,
    ) -> None:
        is_resumed = resume_from is not None
        self.first_step = to_step(resume_from, "resume_from") if is_resumed else 0
        self._hparams = checked_hparams(hparams or {})
        require("version")  # without TensorBoard, no directory is made
        self._lock = threading.RLock()
        self._is_closed = False
        self._last_write = time.time()
        with contextlib.ExitStack() as undo:
            self._claim = claim(directory, resume=is_resumed)
            undo.callback(self._claim.release)
            self.directory = self._claim.path
            self._record = Record(
                self.directory, resumed_from=resume_from, hparams=self._hparams
            )
            self._tags = Tags(self._record, self.first_step)
            superseded = self._tags.superseded()
            self._events = EventFile(self.directory, self.first_step, superseded)
            if self._hparams:
                place = self.directory.absolute()
                self._events.summary(hparams_start(self._hparams, place))
            undo.pop_all()

    def log(
        self, step: int, scalars: Mapping[str, Any] | None = None, /, **named: Any
    ) -> None:
        """Write one point of one or more curves, in about ten microseconds.

        Args:
            step: A whole number, 0 or more, larger than the last one of the same tag.
            scalars: Numbers or arrays and tensors of shape `[]`, by tag. This is the
                way to write a tag that is no Python name: `run.log(0, {"a/b": 1.0})`.
            **named: More of them, as in `run.log(0, loss=0.5)`.

        Raises:
            InvalidArgumentError: If a value is no number, a step does not grow, or a
                tag is one of text or a graph. Nothing of this call was written.

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
            self.check_open()
            self._tags.admit(named, "scalar", step, step)
            self._last_write = time.time()
            if named:
                self._events.row(tuple(named), step, self._last_write, numbers)

    def log_history(
        self,
        history: Mapping[str, Any],
        steps: Sequence[int] | np.ndarray,
        wall_times: Any = None,
    ) -> None:
        """Write whole curves at once, at a fraction of a microsecond a point.

        A compiled loop logs every step this way: it collects some thousand of them in
        arrays, then writes these.

        Args:
            history: Arrays of shape `[n]` by tag.
            steps: Their `n` steps, which grow, also from call to call.
            wall_times: When each step was done, in seconds since 1970, shape `[n]`.
                None spreads the steps evenly over the time since the last call.

        Raises:
            InvalidArgumentError: As for `log`, and if lengths differ.

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
            self.check_open()
            self._tags.admit(history, "scalar", int(steps[0]), int(steps[-1]))
            at_once = max(1, _NUMBERS_AT_ONCE // len(columns))
            for start in range(0, count, at_once):
                part = slice(start, start + at_once)
                some = [column[part] for column in columns]
                self._events.scalars(tuple(history), steps[part], times[part], some)
            self._last_write = now

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Write a text in Markdown for TensorBoard's Text tab.

        Args:
            tag: Its name.
            markdown: The text: tables, lists and code blocks are shown as such.
            step: The step it belongs to; None means the first one of this session.

        Raises:
            InvalidArgumentError: If `markdown` is no string, or `tag` is taken.
        """
        if not isinstance(markdown, str):
            raise InvalidArgumentError(
                "`text` takes a string of Markdown.",
                got=f"markdown={nested.describe(markdown)}",
                hint='str(...), or "```\\n...\\n```" to show it as it is',
            )
        self._write(tag, "text", step, to_text(markdown), "text")

    def histogram(self, tag: str, values: Any, step: int) -> None:
        """Write the distribution of `values`, for the Histograms tab.

        Args:
            tag: Its name.
            values: Real numbers in any shape. Those that are not finite are left out.
            step: The step they belong to. On one tag, steps grow.

        Raises:
            InvalidArgumentError: If an argument is not of its kind, or `tag` is taken.

        Example:
            >>> import tempfile
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.histogram("weights", np.linspace(-1, 1, 1000), step=0)
        """
        step, buckets = to_step(step, "step"), media.to_buckets(values, tag)
        self._write(tag, "histogram", step, buckets, "histograms")

    def image(self, tag: str, image: Any, step: int | None = None) -> None:
        """Write a picture, or several of one size, for the Images tab.

        Args:
            tag: Its name.
            image: A matplotlib figure, or pixels: an array of shape `[height, width]`,
                `[height, width, 1, 3 or 4]` or `[images, height, width, 1, 3 or 4]`, of
                floats in 0..1 or of uint8.
            step: The step it belongs to; None means the first one of this session.

        Raises:
            InvalidArgumentError: If an argument is not of its kind, or `tag` is taken.

        Example:
            >>> import tempfile
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.image("ramp", np.linspace(0, 1, 64).reshape(8, 8))
        """
        self._write(tag, "image", step, media.to_pngs(image, tag), "images")

    def layout(self, charts: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Draw several curves in one chart, in the Custom Scalars tab.

        Args:
            charts: The tags of each chart's curves, by category and title, whether they
                were logged already or will be.

        Raises:
            InvalidArgumentError: If `charts` is not of that form, or a second layout.

        Example:
            >>> import tempfile
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.layout({"fit": {"loss": ["training/loss", "validation/loss"]}})
        """
        content = media.to_layout(charts)
        with self._lock:
            if media.LAYOUT in self._tags:
                raise InvalidArgumentError(
                    "A run has one layout.",
                    got="a second call",
                    hint="all charts in one call: {category: {chart: [tags]}}",
                )
            self._write(media.LAYOUT, "layout", None, content, "custom_scalars")

    def graph(self, f: Callable[..., Any], *args: Any, name: str | None = None) -> None:
        """Write the graph of `f` and of its gradient, for TensorBoard's Graphs tab.

        The operations stand under the user's own name scopes; nested `tf.function`s,
        branches and loops are written out. `f` is traced once more for this, not run.
        The first graph is the one that the tab opens; later ones are under its "Tag"
        menu. A Keras model has the graph of its layers there, too.

        Args:
            f: A TensorFlow function or a Keras model. If it returns one float number,
                the graph has its gradient with respect to the float tensors in `args`
                and to the trainable variables that `f` reads.
            *args: What to trace it with: nests of tensors, arrays, numbers, or
                `tf.TensorSpec`s of them. A model that was built needs none.
            name: The name of the graph; None means that of `f`. If an earlier session
                has written a graph of this name, that one is kept.

        Raises:
            InvalidArgumentError: If this session has a graph of this name already, or
                `f` cannot be traced.

        Example:
            >>> import tempfile
            >>> import tensorflow as tf
            >>> x = tf.Variable(3.0, name="x")
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.graph(lambda: x**2 + x - 1, name="parabola")
        """
        is_keras = is_model(f)
        if name is None:
            name = str(getattr(f, "name", "")) if is_keras else nested.name_of(f)
        tag = f"graph/{name}"
        check_tag(name)
        self.check_open()
        if tag in self._tags:
            raise InvalidArgumentError(
                "A run has one graph of a name.",
                got=f"{name!r}, which this run has already",
                hint="name=... to write it beside the first",
            )
        if self._tags.kinds.get(tag) == "graph":
            return
        # Tracing may take seconds, in which other threads can log.
        graph_def = step_graph(f, args or model_inputs(f) if is_keras else args, name)
        with self._lock:
            # One of TensorBoard's loaders replaces the first graph by a second one.
            is_first = "graph" not in self._tags.kinds.values()
            self.check_open()
            self._tags.admit([tag], "graph", self.first_step, self.first_step)
            self._events.graph(graph_def, None if is_first else tag)
            if is_keras and (layers := conceptual_graph(f)):
                tag = f"layers/{name}"
                self._tags.admit([tag], "graph", self.first_step, self.first_step)
                self._events.tensor(tag, layers, 0, LAYERS, b"1")

    def keras_callback(
        self, *, batches: int | None = None, histograms: int | None = None
    ) -> RunCallback:
        """Return a callback for `Model.fit` that writes to this run.

        Its curves are `epoch/loss`, `epoch/val_loss`... and the learning rate; its
        graph, that of the model. A step is an epoch or, with `batches`, a batch. A
        second `fit` continues after the last step of the first. If the file cannot be
        written, a warning says so, and the training goes on without its log.

        Args:
            batches: Write `batch/loss`... after every so many batches; None, never.
            histograms: Write the weights after every so many epochs; None, never.

        Raises:
            InvalidArgumentError: If a number is not a whole one above 0.

        Example:
            >>> import keras, tempfile
            >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
            >>> model.compile("sgd", "mse")
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     callback = run.keras_callback(histograms=1)
            ...     x, y = np.ones([8, 2]), np.ones([8, 1])
            ...     history = model.fit(x, y, verbose=0, callbacks=[callback])
        """
        return RunCallback(self, self._tags.next_step, batches, histograms)

    def describe(self, **facts: Any) -> None:
        """Add facts to `run.json`: the seed, the arguments, the problem.

        Args:
            **facts: Whatever JSON can hold, and arrays; float64 keeps all its bits, NaN
                and infinities become strings, and other objects their `repr`.

        Example:
            >>> import json, tempfile
            >>> from tfgrad import Run
            >>> with Run(tempfile.mkdtemp()) as run:
            ...     run.describe(seed=7, arguments={"learning_rate": 0.1})
            >>> json.loads((run.directory / "run.json").read_text())["facts"]["seed"]
            7
        """
        with self._lock:
            self.check_open()
            self._record.describe(facts)

    def close(self, status: str = "success", **result: Any) -> None:
        """End the run: write status and result to `run.json`, release the directory.

        Args:
            status: How the run ended, in a word. The HParams tab shows "failure",
                "interrupted" and "nonfinite" as failures, all others as successes.
            **result: The result, for `run.json`.

        A second call does nothing.
        """
        with self._lock, contextlib.ExitStack() as ending:
            if self._is_closed:
                return
            self._is_closed = True
            ending.callback(self._claim.release)
            ending.callback(self._events.close)
            self._record.end(status, result, self._tags.kinds)
            if self._hparams:
                self._events.summary(hparams_end(status))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failure"
        with contextlib.suppress(RunError):  # the user's own error is raised
            self.close(status, error=f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    def _write(
        self, tag: str, kind: Kind, step: int | None, value: Any, plugin: str
    ) -> None:
        step = self.first_step if step is None else to_step(step, "step")
        with self._lock:
            self.check_open()
            self._tags.admit([tag], kind, step, step)
            self._events.tensor(tag, value, step, plugin)

    def check_open(self) -> None:
        """Raise a RunError if the run is closed."""
        if self._is_closed:
            raise RunError(
                "A run that is closed takes no more.",
                got=f"{self.directory}, closed",
                hint="log inside the `with` block, or Run(..., resume_from=step)",
            )
