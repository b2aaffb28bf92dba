"""Event files read back: the curves of a run, exactly, and what was lost of them."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, types_pb2
from tensorboard.util.tensor_util import make_ndarray

from tfgrad.errors import RunError
from tfgrad.runs.directory import event_files, local_path, walk_event_files
from tfgrad.runs.tfrecord import read_events

_START = event_pb2.SessionLog.START


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
        for event in read_events(path):
            run.add(event)
    for curve in run.curves.values():
        curve.settle()
    return run


def run_directories(root: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the directories under `root` that hold event files, by TensorBoard's name.

    Links to directories are not followed: they may lead anywhere, also in a circle.

    Raises:
        InvalidArgumentError: If `root` is no path.
        RunError: If it is no directory, or there are none.
    """
    path = local_path(root, "Runs are read from a directory of this machine.")
    found = {p.relative_to(path).as_posix(): p for p in walk_event_files(path)}
    if not found:
        what = "holds no event files" if path.is_dir() else "is no directory"
        raise RunError(
            "Runs are read from a directory that holds some.",
            got=f"{path}, which {what}",
            hint='the `.directory` of a run, or one above it, such as "logs"',
        )
    return dict(sorted(found.items()))


def _number(tensor: Any) -> float:
    """Return the number in a tensor of one element, of whatever dtype and shape.

    A shape is not believed: it may claim any size for a tensor that stores one number.
    """
    if tensor.dtype == types_pb2.DT_FLOAT and tensor.float_val:
        return float(tensor.float_val[0])
    if tensor.dtype == types_pb2.DT_BFLOAT16:  # the upper half of a float32
        content = np.frombuffer(tensor.tensor_content, "<u2")
        halves = np.array([*tensor.half_val, *content], "<u4")
        return float((halves << 16).view("<f4")[0]) if len(halves) == 1 else np.nan
    one = type(tensor)()
    one.CopyFrom(tensor)
    one.tensor_shape.Clear()
    try:
        return float(make_ndarray(one))
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
