"""One event file in TensorBoard's format, complete after every flush.

A record costs about a microsecond, because one protocol buffer is filled again and
again and `tf.io.TFRecordWriter` frames it; `tf.summary.scalar` builds an op for each
point.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from tfgrad.errors import RunError

_COUNTER = itertools.count()

_CHECK_SECONDS = 0.5
"""How often to look whether the file is still there: a look costs as much as a row."""


def _run_error(failure: BaseException) -> RunError:
    """Return a failure of the file system as an error with a rule and a hint."""
    if isinstance(failure, FileNotFoundError):
        return RunError(
            "The event file was deleted while its run was alive.",
            got=f"{failure.filename}, which is no longer there",
            hint="a new Run(...); what this one held is gone with the file",
        )
    return RunError(
        "The event file could not be written; what it held before is safe.",
        got=str(failure),
        hint="make room on the disk, then Run(..., resume_from=the next step)",
    )


class EventFile:
    """A new event file in `directory`; earlier files there are left alone.

    Its second record says that a session starts at `first_step`, which tells both of
    TensorBoard's loaders to drop what earlier files hold from that step on. The Python
    loader ignores the first such record that it meets: hence one in *every* file.
    """

    def __init__(
        self, directory: Path, first_step: int, superseded: Iterable[str] = ()
    ) -> None:
        """Create the file and write its head.

        Of the tags in `superseded`, earlier files may have this step or later ones.
        """
        self.path = directory / _file_name()
        self._failure: BaseException | None = None
        self._next_check = time.monotonic() + _CHECK_SECONDS
        self._event = tf.compat.v1.Event()
        self._tags: tuple[str, ...] = ()
        self._values: list[Any] = []
        with self._writing():
            path: Any = os.fsencode(self.path)  # a name need not be UTF-8
            self._writer = tf.io.TFRecordWriter(path)
            self._write(file_version="brain.Event:2")
            start = tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
            self._write(step=first_step, session_log=start)
            # TensorBoard's data server drops old points of a tag only when the tag
            # gets a new value. So each tag gets one of an obsolete kind, which
            # neither of TensorBoard's loaders shows.
            summary = tf.compat.v1.Summary()
            for tag in superseded:
                summary.value.add(tag=tag, obsolete_old_style_histogram=b"")
            if summary.value:
                self._write(step=first_step, summary=summary)

    def scalars(
        self,
        tags: Sequence[str],
        steps: Sequence[int],
        wall_times: Sequence[float],
        columns: Sequence[Sequence[float]],
    ) -> None:
        """Write one event per step, and flush once; a column is the numbers of a tag.

        They are kept as float32; one out of its range becomes an infinity.
        """
        if tuple(tags) != self._tags:
            self._tags = ()
            self._event.Clear()
            self._values = [self._event.summary.value.add(tag=tag) for tag in tags]
            self._tags = tuple(tags)  # last: Ctrl-C may come between these lines
        event, values = self._event, self._values
        with self._writing():
            serialize, write = event.SerializeToString, self._writer.write
            rows = zip(steps, wall_times, zip(*columns, strict=True), strict=True)
            for step, wall_time, numbers in rows:
                event.step = step
                event.wall_time = wall_time
                for value, number in zip(values, numbers):  # noqa: B905 - strict: +20 %
                    value.simple_value = number
                write(serialize())

    def tensor(
        self, tag: str, value: Any, step: int, plugin: str, content: bytes = b""
    ) -> None:
        """Write data for the tab of a `plugin`, with the plugin's own metadata.

        No `data_class` is written: the loaders know it for their own plugins, and with
        it the Graphs plugin of the Python loader answers with an error.
        """
        summary = tf.compat.v1.Summary()
        entry = summary.value.add(tag=tag, tensor=tf.make_tensor_proto(value))
        entry.metadata.plugin_data.plugin_name = plugin
        entry.metadata.plugin_data.content = content
        with self._writing():
            self._write(step=step, summary=summary)

    def graph(self, graph_def: tf.compat.v1.GraphDef, tag: str | None) -> None:
        """Write a graph: the run's own (`tag` None, once in a run) or a named one.

        It is written at step 0: a session that resumes from a later step keeps it.
        """
        if tag is None:
            with self._writing():
                self._write(graph_def=graph_def.SerializeToString())
            return
        metadata = tf.compat.v1.RunMetadata()
        metadata.function_graphs.add().pre_optimization_graph.CopyFrom(graph_def)
        content = metadata.SerializeToString()
        self.tensor(tag, content, 0, "graph_run_metadata_graph", b"1")

    def summary(self, serialized: bytes) -> None:
        """Write a `Summary` that a TensorBoard plugin has built, at step 0."""
        with self._writing():
            self._write(summary=tf.compat.v1.Summary.FromString(serialized))

    def close(self) -> None:
        """Close the file. What was written before a failure stays readable."""
        with contextlib.suppress(tf.errors.OpError):  # a failed write has raised before
            self._writer.close()

    def _write(self, **content: Any) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), **content)
        self._writer.write(event.SerializeToString())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Write what the block writes, then flush; a failure becomes a RunError.

        A failed write may have left half a record, at which every reader stops. So
        nothing more is written to this file: the first failure is raised again.
        """
        if self._failure is not None:
            raise _run_error(self._failure) from self._failure
        try:
            yield
            self._writer.flush()
            now = time.monotonic()
            if now > self._next_check:
                self._next_check = now + _CHECK_SECONDS
                self.path.stat()  # if the file was deleted, a write does not fail
        except (tf.errors.OpError, OSError) as error:
            self._failure = error
            raise _run_error(error) from error


def _file_name() -> str:
    """Return a name that sorts after those of earlier files: loaders read them so."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = f"{seconds:010d}.{nanoseconds // 1000:06d}"
    host = socket.gethostname()
    return f"events.out.tfevents.{stamp}.{host}.{os.getpid()}.{next(_COUNTER)}"
