"""One event file in TensorBoard's format, complete after every flush.

A record costs little: many are framed at once (`scalars`); `tf.summary.scalar` builds
an op for each point.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import RunError
from tfgrad.runs.scalars import Records, widths
from tfgrad.runs.tfrecord import framed

_COUNTER = itertools.count()

_CHECK_SECONDS = 0.5
"""How often to look whether the file is still there: a look costs as much as a row."""

_MOST_FORMS = 256
"""Forms of records that are kept: to make one takes the time of a hundred rows."""


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
        self._records: dict[Any, Records] = {}
        with self._writing():
            self._file = self.path.open("xb", buffering=0)
            weakref.finalize(self, self._file.close)
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
        self, tags: Sequence[str], steps: Any, wall_times: Any, columns: Sequence[Any]
    ) -> None:
        """Write one event per step; a column is the numbers of a tag.

        The steps grow, from 0 or more. Numbers are kept as float32; one out of its
        range becomes an infinity.
        """
        with self._writing():
            steps = np.asarray(steps, np.int64)
            for part, width in widths(steps):
                given = steps[part], wall_times[part], [c[part] for c in columns]
                self._put(self._of(tags, width).rows(*given))

    def row(
        self,
        tags: Sequence[str],
        step: int,
        wall_time: float,
        numbers: Sequence[float],
    ) -> None:
        """Write the event of one step, with a number for each tag."""
        with self._writing():
            width = max(1, -(-step.bit_length() // 7))
            self._put(self._of(tags, width).row(step, wall_time, numbers))

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
        self._file.close()

    def _of(self, tags: Sequence[str], width: int) -> Records:
        """Return the form of the records of these tags, with steps of so many bytes."""
        key = (*tags, width)
        if key not in self._records:
            if len(self._records) >= _MOST_FORMS:
                self._records.clear()
            self._records[key] = Records(tags, width)
        return self._records[key]

    def _write(self, **content: Any) -> None:
        event = tf.compat.v1.Event(wall_time=time.time(), **content)
        self._put(framed(event.SerializeToString()))

    def _put(self, records: bytes) -> None:
        count = self._file.write(records)
        if count < len(records):  # the disk is full, which the next call says
            self._put(records[count:])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Write what the block writes; a failure becomes a RunError.

        A failed write may have left half a record, at which every reader stops. So
        nothing more is written to this file: the first failure is raised again.
        """
        if self._failure is not None:
            raise _run_error(self._failure) from self._failure
        try:
            yield
            now = time.monotonic()
            if now > self._next_check:
                self._next_check = now + _CHECK_SECONDS
                self.path.stat()  # if the file was deleted, a write does not fail
        except OSError as error:
            self._failure = error
            raise _run_error(error) from error


def _file_name() -> str:
    """Return a name that sorts after those of earlier files: loaders read them so."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = f"{seconds:010d}.{nanoseconds // 1000:06d}"
    host = socket.gethostname()
    return f"events.out.tfevents.{stamp}.{host}.{os.getpid()}.{next(_COUNTER)}"
