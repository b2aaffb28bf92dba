"""Checkpoints on disk: TensorFlow's own files, written whole between two chunks.

What `tf.train.CheckpointManager` writes is complete when its list names it, and only
then: a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import RunError, TfgradError
from tfgrad.optimize.saved import Outcome, Saved
from tfgrad.optimize.snapshot import Snapshot
from tfgrad.runs.directory import Claim, check, claim

KEPT = 3
"""Checkpoints kept: if the newest cannot be read, there are others."""

LEAST_SECONDS = 1.0
"""The shortest time from one checkpoint to the next, ..."""

LEAST_RATIO = 20
"""... which is also at least so many times what the last one took to write."""

NAME = "tfgrad"
TENSORS = ("variables", "memory", "lower", "told", "outcome")
FORMAT = 1


class Checkpoints:
    """The checkpoints of one run, in a directory of their own.

    Args:
        directory: Where they are; made when the first one is written.

    Raises:
        InvalidArgumentError: If `directory` is no path.
        RunError: If it is a file, or cannot be written.
    """

    def __init__(self, directory: Any) -> None:
        """Check the directory; nothing is written."""
        with _about_checkpoints():
            check(directory)
        self.path = Path(directory).expanduser()
        self._claim: Claim | None = None
        self._due = 0.0
        self._has_warned = False

    def newest(self) -> Saved | None:
        """Return the newest checkpoint that can be read; None if there is none.

        Raises:
            RunError: If there are some and none can be read.
        """
        prefixes = [self._prefix(number) for number in reversed(self._numbers())]
        failures = []
        for prefix in prefixes:
            try:
                saved = _read(prefix)
            except (
                Exception
            ) as error:  # TensorFlow raises many kinds for a damaged file
                failures.append(f"{prefix}: {str(error).splitlines()[0]}")
                continue
            for failure in failures:
                warnings.warn(
                    f"The checkpoint before is used. {failure}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return saved
        if failures:
            raise RunError(
                "A run goes on from a checkpoint that can be read.",
                got="; ".join(failures),
                hint="delete the directory to start anew, or name another",
            )
        return None

    def open(self) -> None:
        """Make the directory, keep other writers out, and sweep what a crash left.

        Raises:
            RunError: If that is not possible.
        """
        with _about_checkpoints():
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = claim(self.path, resume=True)
        numbers = self._numbers()
        if (self.path / "checkpoint").exists() and not numbers:
            self.close()
            raise RunError(
                "A directory of checkpoints is for one run.",
                got=f"{self.path}, which holds checkpoints of something else",
                hint="another directory",
            )
        complete = {f"{NAME}-{number}" for number in numbers}
        for path in self.path.glob(f"{NAME}-*"):
            if path.name.split(".")[0] not in complete:
                _delete(path)

    def close(self) -> None:
        """Let other writers in."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() >= self._due

    def save(self, saved: Saved) -> None:
        """Write a checkpoint; a disk that refuses is told once, and the run goes on."""
        if not saved.loop.is_whole:
            self._warn("The last checkpoint stays: the next would be too large.")
            self._due = float("inf")
            return
        began = time.monotonic()
        number = max(self._numbers(), default=0) + 1
        try:
            self._write(saved, number)
        except (tf.errors.OpError, OSError) as error:
            for path in self.path.glob(f"{NAME}-{number}*"):
                _delete(path)
            self._warn(f"Its last checkpoint could not be written. {error}")
        now = time.monotonic()
        self._due = now + max(LEAST_SECONDS, LEAST_RATIO * (now - began))

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"The optimisation goes on. {what}", RuntimeWarning, stacklevel=4
            )

    def _write(self, saved: Saved, number: int) -> None:
        facts = {
            **saved.facts,
            "format": FORMAT,
            "loop": dict(saved.loop.facts),
            "columns": [list(saved.history), list(saved.epochs)],
        }
        parts: dict[str, Sequence[Any]] = {
            "facts": [json.dumps(facts)],
            "variables": saved.loop.variables,
            "memory": saved.loop.memory,
            "lower": saved.loop.lower,
            "told": saved.loop.told,
            "history": list(saved.history.values()),
            "epochs": list(saved.epochs.values()),
            "outcome": _flat(saved.outcome),
        }
        checkpoint = tf.train.Checkpoint(
            **{name: [tf.Variable(x) for x in part] for name, part in parts.items()}
        )
        manager = tf.train.CheckpointManager(
            checkpoint, str(self.path), max_to_keep=KEPT, checkpoint_name=NAME
        )
        manager.save(checkpoint_number=number)

    def _numbers(self) -> list[int]:
        """Return the numbers of the complete checkpoints, the newest last."""
        listed = tf.train.get_checkpoint_state(str(self.path))
        if listed is not None:
            names = [Path(path).name for path in listed.all_model_checkpoint_paths]
        else:  # the list itself is damaged, or was deleted
            names = [path.stem for path in self.path.glob(f"{NAME}-*.index")]
        numbers = [name.rpartition("-")[2] for name in names if name.startswith(NAME)]
        return sorted(int(number) for number in numbers if number.isdigit())

    def _prefix(self, number: int) -> str:
        return str(self.path / f"{NAME}-{number}")


@contextlib.contextmanager
def _about_checkpoints() -> Iterator[None]:
    """Say of checkpoints what the block says of runs."""
    rule = "`checkpoint` takes a directory that this run alone writes to."
    hint = 'a directory of its own, such as "checkpoints/rosenbrock"'
    try:
        yield
    except TfgradError as error:
        raise type(error)(rule, got=error.got, hint=hint) from None
    except OSError as error:
        raise RunError(rule, got=str(error), hint=hint) from error


def _read(prefix: str) -> Saved:
    """Return what a checkpoint holds; TensorFlow compares the sums of its contents."""
    reader = tf.train.load_checkpoint(prefix)
    (text,) = _part(reader, "facts")
    facts = json.loads(text.item())
    columns = facts.pop("columns")
    loop = facts.pop("loop")
    history, epochs = (
        dict(zip(names, _part(reader, part), strict=True))
        for names, part in zip(columns, ("history", "epochs"), strict=True)
    )
    parts = ([*map(tf.constant, _part(reader, name))] for name in TENSORS)
    variables, memory, lower, told, outcome = parts
    snapshot = Snapshot(loop, variables, memory, lower, told)
    return Saved(facts, snapshot, history, epochs, _outcome(outcome))


def _flat(outcome: Outcome | None) -> list[tf.Tensor]:
    return [] if outcome is None else [outcome.fun, *outcome.x, *outcome.grad]


def _outcome(flat: list[tf.Tensor]) -> Outcome | None:
    if not flat:
        return None
    fun, *leaves = flat
    count = len(leaves) // 2
    return Outcome(fun, leaves[:count], leaves[count:])


def _part(reader: Any, name: str) -> Iterator[np.ndarray[Any, Any]]:
    number = 0
    while reader.has_tensor(key := f"{name}/{number}/.ATTRIBUTES/VARIABLE_VALUE"):
        yield np.asarray(reader.get_tensor(key))
        number += 1


def _delete(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _delete(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
