"""Event files read back: the curves of a run, exactly, and what was lost of them."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import stat
import struct
import warnings
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from tfgrad.errors import InvalidArgumentError, RunError

LARGEST_RECORD = 2**28
"""Bytes. A longer one is damage: TensorBoard's pictures take a thousandth of it."""

_LENGTH = struct.Struct("<Q")  # a record begins with the length of its content ...
_FRAME = 16  # ... which all that is not its content adds to
_START = tf.compat.v1.SessionLog.START
_BLOCK = 2**22  # bytes that are read at a time, to find the records


@dataclass(slots=True)
class Curve:
    """The points of one tag: first as they come, then in the order of their steps.

    Attributes:
        steps: Whole numbers; once `settle` was called, they grow.
        wall_times: When each was written, in seconds since 1970.
        values: The numbers, as float64, which holds every float32 exactly.
    """

    steps: Any = field(default_factory=lambda: array("q"))
    wall_times: Any = field(default_factory=lambda: array("d"))
    values: Any = field(default_factory=lambda: array("d"))
    _starts: list[int] = field(default_factory=list)  # rows that are no points

    def start(self, step: int) -> None:
        """Begin a session, which supersedes the points at `step` and later ones."""
        self._starts.append(len(self.steps))
        self.steps.append(step)
        self.wall_times.append(0.0)
        self.values.append(0.0)

    def settle(self) -> None:
        """Drop what is superseded: points before one at their step or a lower one."""
        steps = np.asarray(self.steps)
        lowest_from = np.minimum.accumulate(steps[::-1])[::-1]
        kept = np.append(steps[:-1] < lowest_from[1:], True)[: len(steps)]
        kept[self._starts] = False
        self.steps = steps[kept]
        self.wall_times = np.asarray(self.wall_times)[kept]
        self.values = np.asarray(self.values)[kept]


@dataclass
class ReadRun:
    """What the event files of one directory hold.

    Attributes:
        curves: By tag, in the order in which tags came.
        hparams: Hyper-parameters by name.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    hparams: dict[str, bool | float | str] = field(default_factory=dict)

    def add(self, event: Any) -> None:
        """Take in one event."""
        step, wall_time, curves = event.step, event.wall_time, self.curves
        values = event.summary.value
        for value in values:
            number = value.simple_value
            if not number and not value.HasField("simple_value"):
                number = self._number_in_tensor(value)
                if number is None:
                    continue
            tag = value.tag
            curve = curves.get(tag)
            if curve is None:
                curve = curves[tag] = Curve()
            curve.steps.append(step)
            curve.wall_times.append(wall_time)
            curve.values.append(number)
        if not values and event.session_log.status == _START:
            for curve in curves.values():
                curve.start(step)

    def _number_in_tensor(self, value: Any) -> float | None:
        """Return the number in the tensor of `value`, if that is a point of a curve."""
        metadata = value.metadata.plugin_data
        if value.tag == "_hparams_/session_start_info":
            self.hparams |= _hparams(metadata.content)
        # Of a tag, the first event alone need say which plugin it is for.
        elif metadata.plugin_name == "scalars" or value.tag in self.curves:
            return _number(value.tensor) if value.HasField("tensor") else None
        return None


def read_run(directory: Path) -> ReadRun:
    """Return what the event files of `directory` hold, the oldest file first."""
    run = ReadRun()
    for path in event_files(directory):
        for event in _events(path):
            run.add(event)
    for curve in run.curves.values():
        curve.settle()
    return run


def event_files(directory: Path) -> list[Path]:
    """Return the event files of `directory` in the order of their names, and so of age.

    No pipes and devices, which never end.
    """
    files = (path for path in directory.iterdir() if "tfevents" in path.name)
    return sorted(path for path in files if _is_regular(path))


def run_directories(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the directories under `root` that hold event files, by TensorBoard's name.

    Links to directories are not followed: they may lead anywhere, also in a circle.

    Raises:
        InvalidArgumentError: If `root` is no path.
        RunError: If it is no directory, or there are none.
    """
    if not isinstance(root, str | os.PathLike):
        raise InvalidArgumentError(
            "Runs are read from a directory.",
            got=f"{root!r}",
            hint='the directory given to Run, or one above it, such as "logs"',
        )
    path = Path(os.fsdecode(root)).expanduser()
    walk = os.walk(path)
    places = (Path(place) for place, _, names in walk if "tfevents" in "".join(names))
    found = {p.relative_to(path).as_posix(): p for p in places if event_files(p)}
    if not found:
        what = "holds no event files" if path.is_dir() else "is no directory"
        raise RunError(
            "Runs are read from a directory that holds some.",
            got=f"{path}, which {what}",
            hint='the `.directory` of a run, or one above it, such as "logs"',
        )
    return dict(sorted(found.items()))


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:  # a link to nothing, or to itself
        return False


def _events(path: Path) -> Iterator[Any]:
    """Yield the events of a file up to the first that is damaged; warn if there is one.

    TensorFlow checks the sums and parses; a length is checked here, before that
    allocates whatever a damaged or a hostile file asks for.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = _record_ends(file, size)
    done = 0
    with contextlib.suppress(tf.errors.DataLossError, DecodeError), _quiet():
        records = tf.compat.v1.io.tf_record_iterator(os.fsencode(path))
        parse = tf.compat.v1.Event.FromString
        for event in map(parse, itertools.islice(records, len(ends))):
            yield event
            done += 1
    whole = ends[done - 1] if done else 0
    if whole < size:
        after = len(ends) - done - 1
        what = "a torn end" if after < 0 else f"a damaged record and {after} after it"
        warnings.warn(
            f"{path}: the last {size - whole} of {size} bytes cannot be read ({what}); "
            f"the {done} records before are kept.",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user that TensorFlow's iterator calls one that it calls old."""

    def is_ours(record: logging.LogRecord) -> bool:
        return "tf_record_iterator" not in record.getMessage()

    logger = tf.get_logger()
    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)


def _record_ends(file: BinaryIO, size: int) -> array[int]:
    """Return where each record ends, as far as their lengths are plausible."""
    ends, at, block, start = array("q"), 0, b"", 0
    while at + _FRAME <= size:
        if at + _LENGTH.size > start + len(block):
            file.seek(start := at)
            block = file.read(_BLOCK)
        (length,) = _LENGTH.unpack_from(block, at - start)
        at += _FRAME + length
        if length > LARGEST_RECORD or at > size:
            break
        ends.append(at)
    return ends


def _number(tensor: Any) -> float:
    """Return the number in a tensor of one element, of whatever dtype and shape.

    A shape is not believed: it may claim any size for a tensor that stores one number.
    """
    if tensor.dtype == tf.float32.as_datatype_enum and tensor.float_val:
        return float(tensor.float_val[0])
    one = type(tensor)()
    one.CopyFrom(tensor)
    one.tensor_shape.Clear()
    try:
        return float(tf.make_ndarray(one))
    except (TypeError, ValueError):  # strings, or several numbers
        return float(np.nan)


def _hparams(content: bytes) -> dict[str, bool | float | str]:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    try:
        pairs = HParamsPluginData.FromString(content).session_start_info.hparams.items()
    except DecodeError:
        return {}
    # A map of protocol buffers has no order of its own.
    return {
        n: getattr(v, v.WhichOneof("kind") or "", "")
        for n, v in sorted(pairs, key=lambda pair: pair[0])
    }
