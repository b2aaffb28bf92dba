"""`load_run` and `load_runs`: what was logged, as pandas frames."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.curves import ReadRun, read_run, run_directories

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]  # its stubs are a package apart

_RESERVED = ("run", "step")


def load_run(directory: str | os.PathLike[str], wide: bool = False) -> pd.DataFrame:
    """Return the curves of one run, exactly as they were written.

    It reads what `Run`, `tf.summary`, torch and tensorboardX write, about 300,000
    points a second, and all of them: nothing is sampled. Where sessions overlap, the
    newer one replaces the older from its first step on, as in TensorBoard. What comes
    after a damaged record cannot be read; a `RuntimeWarning` says how much that is.

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
    pandas = _pandas()
    columns, counts = _wide(runs) if wide else _long(runs)
    which = np.repeat(np.arange(len(runs)), counts)
    run = pandas.Categorical.from_codes(which, list(runs))
    hparams = pandas.DataFrame([read.hparams for read in runs.values()])
    hparams = hparams.add_prefix("hparams/").iloc[which].reset_index(drop=True)
    if not wide:
        tags = list(dict.fromkeys(tag for read in runs.values() for tag in read.curves))
        columns["tag"] = pandas.Categorical.from_codes(columns["tag"], tags)
    frame = pandas.DataFrame({"run": run, **columns})
    return pandas.concat([frame, hparams], axis=1)


def _long(runs: Mapping[str, ReadRun]) -> tuple[dict[str, Any], list[int]]:
    """Return the columns of a row per point, and how many rows each run has."""
    tags: dict[str, int] = {}
    pairs = [
        (tags.setdefault(tag, len(tags)), curve)
        for read in runs.values()
        for tag, curve in read.curves.items()
    ]
    codes = [np.full(len(curve.steps), code) for code, curve in pairs]
    counts = [sum(len(c.steps) for c in r.curves.values()) for r in runs.values()]
    columns = {
        "tag": _joined(codes, np.int64),
        "step": _joined([curve.steps for _, curve in pairs], np.int64),
        "wall_time": _joined([curve.wall_times for _, curve in pairs], np.float64),
        "value": _joined([curve.values for _, curve in pairs], np.float64),
    }
    return columns, counts


def _wide(runs: Mapping[str, ReadRun]) -> tuple[dict[str, Any], list[int]]:
    """Return the columns of a row per step, and how many rows each run has."""
    tags = list(dict.fromkeys(tag for read in runs.values() for tag in read.curves))
    for tag in tags:
        if tag in _RESERVED:
            raise InvalidArgumentError(
                "A wide frame has columns of its own that are called run and step.",
                got=f"the tag {tag!r}",
                hint="wide=False",
            )
    steps = [
        np.unique(_joined([c.steps for c in read.curves.values()], np.int64))
        for read in runs.values()
    ]
    counts = [len(its_steps) for its_steps in steps]
    columns = {tag: np.full(sum(counts), np.nan) for tag in tags}
    first = 0
    for read, its_steps in zip(runs.values(), steps, strict=True):
        for tag, curve in read.curves.items():
            rows = first + np.searchsorted(its_steps, curve.steps)
            columns[tag][rows] = curve.values
        first += len(its_steps)
    return {"step": _joined(steps, np.int64), **columns}, counts


def _joined(arrays: list[Any], dtype: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise RunError(
            "Runs are loaded as pandas frames.",
            got="no pandas in this Python",
            hint='pip install "tfgrad[pandas]"',
        ) from error
    return pandas
