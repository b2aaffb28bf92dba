"""What a run was: `run.json`, its tags, its hyper-parameters in the HParams tab."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad import nested
from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.tensorboard import require
from tfgrad.runs.values import as_array, check_mapping, check_tag, is_array, to_text

FILE_NAME = "run.json"
FAILURES = ("failure", "interrupted", "nonfinite")
"""Statuses of runs that failed; the HParams tab knows failures and successes only."""

_LARGEST_ARRAY = 1000
"""Elements of the largest array that is written whole; of others, shape and dtype."""

_LARGEST_INTEGER = 2**53
"""Beyond it the HParams tab, which has only float64, would show another number."""

Kind = Literal["scalar", "text", "graph", "histogram", "image", "layout"]
"""What a tag is for: TensorBoard shows the data of a tag in one tab only."""

_WHOLE_RUN = ("graph", "layout")  # of the whole run: a session that resumes keeps them


class Record:
    """The facts of one run, in memory and in `run.json`, which is replaced as a whole.

    A reader sees the old file or the new one, never half of one. When a run is resumed,
    the records of its earlier sessions are kept in `earlier`, the oldest first.
    """

    def __init__(self, directory: Path, **facts: Any) -> None:
        self._path = directory / FILE_NAME
        self.earlier = _read(self._path)
        self._facts = {
            "status": "running",
            "started": datetime.now(UTC).isoformat(),
            "process": os.getpid(),
            "versions": _versions(),
            **facts,
        }
        self._started = time.time()
        self._next_count = 0  # of tags, at which they are written
        self.update()

    def earlier_tags(self) -> dict[str, Any]:
        """Return the kinds of the tags that earlier sessions have recorded."""
        kinds: dict[str, Any] = {}
        for session in self.earlier:
            kinds |= session.get("tags", {})
        return kinds

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add what the user wants to know of the run, and write the file."""
        self.update(facts={**self._facts.get("facts", {}), **facts})

    def note(self, kinds: Mapping[str, str]) -> None:
        """Write the kinds of the tags by name, if there are some more than before.

        The session that resumes a killed run reads them. To rewrite the file for each
        of a thousand tags would take a second.
        """
        if len(kinds) >= self._next_count:
            self._next_count = len(kinds) + max(1, len(kinds) // 50)
            self.update(tags=kinds)

    def end(self, status: str, result: Any, kinds: Mapping[str, str]) -> None:
        """Write how the run ended."""
        seconds = time.time() - self._started
        self.update(status=status, seconds=seconds, result=result, tags=kinds)

    def update(self, **facts: Any) -> None:
        """Add `facts` (or replace them) and write the file."""
        self._facts |= facts
        content = to_json({**self._facts, "earlier": self.earlier})
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
        draft = self._path.with_name(f".{FILE_NAME}.{os.getpid()}")
        try:
            draft.write_text(text + "\n", encoding="utf-8")
            draft.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise RunError(
                f"{FILE_NAME} could not be written; its last version is safe.",
                got=f"{self._path}: {error.strerror}",
                hint="room on the disk, and a directory that still exists",
            ) from error


class Tags:
    """The tags of a run: each has one kind, and steps that grow.

    Args:
        record: Where the kinds of the tags are written, those of earlier sessions, too.
        first_step: The step at which this session starts.

    Attributes:
        kinds: By tag, of all sessions.
    """

    def __init__(self, record: Record, first_step: int) -> None:
        self._record, self.kinds = record, record.earlier_tags()
        if first_step == 0:  # graphs are at step 0, and are replaced, too
            self.kinds = {t: k for t, k in self.kinds.items() if k != "graph"}
        self._first_step = first_step
        self._last_steps: dict[str, int] = {}

    def __contains__(self, tag: str) -> bool:
        return tag in self._last_steps

    def superseded(self) -> list[str]:
        """Return the tags of earlier sessions that end where this session starts."""
        return [tag for tag, kind in self.kinds.items() if kind not in _WHOLE_RUN]

    def admit(self, tags: Iterable[str], kind: Kind, first: int, last: int) -> None:
        """Check that `tags` may get data of `kind` at these steps, then remember it."""
        for tag in tags:
            if tag not in self.kinds:
                check_tag(tag)
            elif self.kinds[tag] != kind:
                raise InvalidArgumentError(
                    "A tag is for data of one kind: other data would not be shown.",
                    got=f"{tag!r}, a {kind} here and a {self.kinds[tag]} before",
                    hint=f'another tag, such as "{kind}/{tag}"',
                )
            if first <= self._last_steps.get(tag, self._first_step - 1):
                raise self._not_growing(tag, first)
        for tag in tags:
            self.kinds[tag] = kind
            self._last_steps[tag] = last
        self._record.note(self.kinds)

    def next_step(self, prefixes: tuple[str, ...]) -> int:
        """Return the first step that is free for all tags that begin with a prefix."""
        last = list(self._last_steps.items())  # other threads may add some meanwhile
        steps = (step for tag, step in last if tag.startswith(prefixes))
        return max(steps, default=self._first_step - 1) + 1

    def _not_growing(self, tag: str, step: int) -> InvalidArgumentError:
        # If a step is repeated, one of TensorBoard's loaders drops the points from that
        # step on, and the other one shows both points.
        if tag in self._last_steps:
            before = f"after step {self._last_steps[tag]}"
        else:
            before = f"in a run resumed from step {self._first_step}"
        return InvalidArgumentError(
            "On one tag, steps grow.",
            got=f"{tag!r} at step {step}, {before}",
            hint=f"Run(..., resume_from={step}) to go back, or another tag",
        )


def to_json(value: Any) -> Any:
    """Return `value` in JSON's own types, with all 64 bits of every float.

    JSON has no NaN and no infinities: they become the strings "NaN", "Infinity" and
    "-Infinity", as in the JSON form of protocol buffers. What JSON cannot hold at all
    becomes its `repr`, and an array of more than 1,000 elements its shape and dtype.

    >>> to_json({"x": (1, 2.5), "loss": float("nan"), "path": Path("a/b")})
    {'x': [1, 2.5], 'loss': 'NaN', 'path': 'a/b'}
    """
    if isinstance(value, str):
        return to_text(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {to_text(str(key)): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json(item) for item in value]
    if is_array(value):
        array = as_array(value)
        if array.size > _LARGEST_ARRAY:
            return f"array of {nested.describe(array)}"
        return to_json(array.tolist())
    if isinstance(value, os.PathLike):
        return to_text(os.fsdecode(value))
    return nested.name_of(value) if callable(value) else nested.describe(value)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "tfgrad": tfgrad.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "tensorboard": require("version").VERSION,
        "numpy": np.__version__,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the records of the sessions before this one, the oldest first."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        sessions = [*last.pop("earlier", []), last]
        for session in sessions:
            dict(session.get("tags", {}))
        return sessions
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise RunError(
            f"A run to resume has a {FILE_NAME} that can be read.",
            got=f"{path}: {error}",
            hint="mend the file, or move it away to go on without it",
        ) from error


# --- TensorBoard's HParams tab --------------------------------------------------------


def checked_hparams(hparams: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """Return `hparams` as the tab can hold them: what is no number is its `str`."""
    check_mapping(hparams, "hparams")
    for name in hparams:
        check_tag(name)
    return {name: _plain(value) for name, value in hparams.items()}


def hparams_start(hparams: Mapping[str, bool | float | str], directory: Path) -> bytes:
    """Return the serialized `Summary` that opens the run in `directory`."""
    # The tab shows some fourteen letters of a trial's name: so the run's own name
    # comes first, and a long one is cut in its middle, since its end has the number.
    name = directory.name
    short = name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}"
    trial = f"{short} in {directory.parent.name}, {directory}"
    api = require("plugins.hparams.api")
    summary = api.hparams_pb(dict(hparams), trial_id=to_text(trial))
    return bytes(summary.SerializeToString())


def hparams_end(status: str) -> bytes:
    """Return the serialized `Summary` that ends the session."""
    statuses = require("plugins.hparams.api_pb2")
    failed = status in FAILURES
    shown = statuses.STATUS_FAILURE if failed else statuses.STATUS_SUCCESS
    summary = require("plugins.hparams.summary")
    return bytes(summary.session_end_pb(shown).SerializeToString())


def _plain(value: Any) -> bool | float | str:
    if is_array(value):
        array = as_array(value)
        value = array.item() if array.ndim == 0 else value
    is_exact = not isinstance(value, int) or abs(value) <= _LARGEST_INTEGER
    if isinstance(value, bool | int | float) and is_exact:
        return value
    return to_text(str(value))
