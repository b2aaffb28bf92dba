"""`load_run` and `load_runs`: what was logged, as pandas frames."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.directory import event_files, local_path, walk_event_files
from tfgrad.runs.tensorboard import require
from tfgrad.runs.tfrecord import read_events

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # its stubs are a package apart

_START = 1
"""The status in a `SessionLog` of an event that begins a session."""


def load_run(directory: str | os.PathLike[str], wide: bool = False) -> pd.DataFrame:
    """Return the curves of one run, exactly as they were written.

    Files of `Run`, `tf.summary`, torch and tensorboardX are read, without TensorFlow,
    about 300,000 points a second, and no point is left out. Where sessions overlap, the
    newer one replaces the older from its first step on, as in TensorBoard. Of a damaged
    file, the records before the damage are read; a `RuntimeWarning` says how much is
    lost.

    Args:
        directory: The directory that holds the event files.
        wide: True for a row per step and a column per tag (NaN where a tag has no such
            step); False for a row per point.

    Returns:
        A `pandas.DataFrame`. Long: the columns `tag`, `step`, `wall_time` (in seconds
        since 1970) and `value`. Wide: `step` and the tags. Then one column for each
        hyper-parameter, as `hparams/rate`. Values are float64, which holds every
        float32 exactly.

    Raises:
        InvalidArgumentError: If `directory` is no path, or a tag is called "step" in a
            wide frame.
        RunError: If there are no event files in it, or pandas is not installed.

    Example:
        >>> import tempfile
        >>> from tfgrad import Run
        >>> with Run(tempfile.mkdtemp(), {"rate": 0.1}) as run:
        ...     run.log_history({"f": [11.0, 6.59], "x": [3.0, 2.3]}, range(2))
        >>> load_run(run.directory, wide=True).round(4)
           step      f    x  hparams/rate
        0     0  11.00  3.0           0.1
        1     1   6.59  2.3           0.1
    """
    directories = run_directories(directory)
    if "." not in directories:
        raise RunError(
            "`load_run` reads one run.",
            got=f"{os.fspath(directory)}, which holds runs: {', '.join(directories)}",
            hint="load_runs(...) for all of them, or the directory of one",
        )
    frame = _frame({".": read_run(directories["."])}, wide)
    return frame.drop(columns="run")


def load_runs(root: str | os.PathLike[str], wide: bool = False) -> pd.DataFrame:
    """Return the curves of all runs under `root`, to compare and to plot them.

    Args:
        root: A directory. Each directory in it that holds event files is a run, named
            by its path from `root`, as in TensorBoard. Links are not followed.
        wide: As for `load_run`.

    Returns:
        A `pandas.DataFrame` as from `load_run`, with the column `run` before the
        others. A hyper-parameter that some run lacks is missing (NaN) there.

    Raises:
        InvalidArgumentError: If `root` is no path, or a tag is called "run" or "step"
            in a wide frame.
        RunError: If there are no event files under it, or pandas is not installed.

    Example:
        >>> import tempfile
        >>> from tfgrad import Run
        >>> logs = tempfile.mkdtemp()
        >>> for rate in (0.1, 0.2):
        ...     with Run(f"{logs}/{rate}", {"rate": rate}) as run:
        ...         run.log_history({"f": (1 - 2 * rate) ** np.arange(3)}, range(3))
        >>> frame = load_runs(logs)
        >>> frame.groupby("hparams/rate")["value"].last().round(4).to_dict()
        {0.1: 0.64, 0.2: 0.36}
    """
    directories = run_directories(root)
    return _frame({name: read_run(path) for name, path in directories.items()}, wide)


def _frame(runs: Mapping[str, ReadRun], wide: bool) -> pd.DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise RunError(
            "Runs are loaded as pandas frames.",
            got="no pandas in this Python",
            hint='pip install "tfgrad[pandas]"',
        ) from error
    tags = list(dict.fromkeys(tag for read in runs.values() for tag in read.curves))
    if wide and (taken := {"run", "step"}.intersection(tags)):
        raise InvalidArgumentError(
            "A wide frame has columns of its own that are called run and step.",
            got=f"the tag {min(taken)!r}",
            hint="wide=False",
        )
    dtypes = {"run": str, "tag": str, "step": "int64"}
    dtypes |= {"wall_time": "float64", "value": "float64"}
    frames = [pandas.DataFrame(columns=list(dtypes)).astype(dtypes)]  # without a point
    frames += [
        pandas.DataFrame(
            {"run": run, "tag": tag, "step": c.steps, "wall_time": c.wall_times}
            | {"value": c.values}
        )
        for run, read in runs.items()
        for tag, c in read.curves.items()
    ]
    frame = pandas.concat(frames, ignore_index=True)
    frame["run"] = pandas.Categorical(frame["run"], list(runs))
    frame["tag"] = pandas.Categorical(frame["tag"], tags)
    if wide:
        frame = frame.pivot(index=["run", "step"], columns="tag", values="value")
        frame = frame.reindex(columns=tags).rename_axis(columns=None).reset_index()
    hparams = pandas.DataFrame([read.hparams for read in runs.values()])
    hparams = hparams.add_prefix("hparams/").iloc[frame["run"].cat.codes]
    return pandas.concat([frame, hparams.reset_index(drop=True)], axis=1)


# --- event files ----------------------------------------------------------------------


@dataclass(slots=True)
class Curve:
    """The points of one tag: in the order of the file, then of their steps.

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
        """Drop each point that is followed by one at the same step or a lower one."""
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
        # Only the first event of a tag has to name its plugin.
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
    """Return the number in a tensor of one element, of any dtype and shape.

    The shape is ignored: a hostile one claims any size for a tensor of one number.
    """
    types = require("compat.proto.types_pb2")
    if tensor.dtype == types.DT_FLOAT and tensor.float_val:
        return float(tensor.float_val[0])
    if tensor.dtype == types.DT_BFLOAT16:  # the upper half of a float32
        content = np.frombuffer(tensor.tensor_content, "<u2")
        halves = np.array([*tensor.half_val, *content], "<u4")
        return float((halves << 16).view("<f4")[0]) if len(halves) == 1 else np.nan
    one = type(tensor)()
    one.CopyFrom(tensor)
    one.tensor_shape.Clear()
    try:
        return float(require("util.tensor_util").make_ndarray(one))
    except (TypeError, ValueError):  # strings, or several numbers
        return float(np.nan)


def _hparams(content: bytes) -> dict[str, bool | float | str]:
    data = require("plugins.hparams.plugin_data_pb2").HParamsPluginData
    try:
        pairs = data.FromString(content).session_start_info.hparams.items()
    except DecodeError:
        return {}
    # A map of protocol buffers has no order of its own.
    return {
        n: getattr(v, v.WhichOneof("kind") or "", "")
        for n, v in sorted(pairs, key=lambda pair: pair[0])
    }
