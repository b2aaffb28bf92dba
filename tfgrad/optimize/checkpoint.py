"""Checkpoints on disk: TensorFlow's own files, written whole between two chunks.

What `tf.train.CheckpointManager` writes is complete when its list names it, and only
then: a process may be killed at any moment.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import RunError, TfgradError
from tfgrad.optimize import resume
from tfgrad.optimize.chain import Chain
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.history import Rows
from tfgrad.optimize.hooks import Hook
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.resume import Identity, Outcome, Saved
from tfgrad.optimize.solvers import State
from tfgrad.runs.directory import Claim, check, claim

KEPT = 3
"""Checkpoints kept: if the newest cannot be read, there are others."""

LEAST_SECONDS = 1.0
"""The shortest time from one checkpoint to the next, ..."""

LEAST_RATIO = 20
"""... which is also at least so many times what the last one took to write."""

NAME = "tfgrad"
FORMAT = 2


class Checkpoints(Hook):
    """The checkpoints of one run, in a directory of their own, made with the first one.

    The hooks have to have written all before a checkpoint is.

    Raises:
        InvalidArgumentError: If `directory` is no path.
        RunError: If it is a file, or cannot be written.
    """

    def __init__(self, directory: Any, hooks: Sequence[Hook]) -> None:
        with _about_checkpoints():
            check(directory)
        self.path, self._hooks = Path(directory).expanduser(), hooks
        self._claim: Claim | None = None
        self._due = 0.0
        self._has_warned = self._is_made = False

    def newest(self) -> Saved | None:
        """Return the newest checkpoint that can be read; None if there is none.

        Raises:
            RunError: If there are some and none can be read.
        """
        failures = []
        for number in reversed(self._numbers()):
            prefix = str(self.path / f"{NAME}-{number}")
            try:
                saved = _read(prefix)
            except Exception as error:  # of many kinds, for a damaged file
                failures.append(f"{prefix}: {str(error).splitlines()[0]}")
                continue
            for failure in failures:
                words = f"The checkpoint before is used. {failure}"
                warnings.warn(words, RuntimeWarning, stacklevel=2)
            return saved
        if failures:
            raise RunError(
                "A run goes on from a checkpoint that can be read.",
                got="; ".join(failures),
                hint="delete the directory to start anew, or name another",
            )
        return None

    def begin(self, run: Minimisation) -> None:
        """Save where the run begins: from now on the checkpoint knows of the log."""
        self._save(resume.snapshot(run))

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Save where the run is, if it is time."""
        if time.monotonic() >= self._due and run.status is None:
            for hook in self._hooks:
                hook.flush()
            self._save(resume.snapshot(run))

    def end(self, run: Minimisation, error: BaseException | None) -> None:
        """Save the end; let other writers in."""
        try:
            if self._claim is not None and run.saved is not None:
                self._save(run.saved)
        finally:
            if self._release() and self._is_made and error is not None:
                with contextlib.suppress(OSError):  # it is not empty: all is well
                    self.path.rmdir()

    def _release(self) -> bool:
        """Let other writers in, if they were kept out."""
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()
        return claim is not None

    def open(self, run: Minimisation) -> None:
        """Make the directory, keep other writers out, and sweep what a crash left."""
        self._is_made = not self.path.exists()
        with _about_checkpoints():
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim = claim(self.path, resume=True)
        numbers = self._numbers()
        if (self.path / "checkpoint").exists() and not numbers:
            self._release()
            raise RunError(
                "A directory of checkpoints is for one run.",
                got=f"{self.path}, which holds checkpoints of something else",
                hint="another directory",
            )
        complete = {f"{NAME}-{number}" for number in numbers}
        for path in self.path.glob(f"{NAME}-*"):
            if path.name.split(".")[0] not in complete:
                _delete(path)

    def _save(self, saved: Saved) -> None:
        """Write a checkpoint; if that fails, warn once, and let the run go on."""
        began = time.monotonic()
        number = max(self._numbers(), default=0) + 1
        try:
            self._write(saved, number)
        except (tf.errors.OpError, OSError) as error:
            for path in self.path.glob(f"{NAME}-{number}*"):
                _delete(path)
            if not self._has_warned:
                self._has_warned = True
                what = f"Its last checkpoint could not be written. {error}"
                words = f"The optimisation goes on. {what}"
                warnings.warn(words, RuntimeWarning, stacklevel=3)
        now = time.monotonic()
        self._due = now + max(LEAST_SECONDS, LEAST_RATIO * (now - began))

    def _write(self, saved: Saved, number: int) -> None:
        outcome = saved.outcome
        flat = [] if outcome is None else [outcome.fun, *outcome.x, *outcome.grad]
        parts: dict[str, Sequence[Any]] = {
            "facts": [_facts(saved)],
            "variables": saved.variables,
            "state": tf.nest.flatten(saved.state),
            "history": list(saved.history.values()),
            "epochs": list(saved.epochs.values()),
            "outcome": flat,
        }
        checkpoint = tf.train.Checkpoint(
            **{name: [tf.Variable(x) for x in part] for name, part in parts.items()}
        )
        if self._listed() is None:  # the manager would fail at a damaged list
            (self.path / "checkpoint").unlink(missing_ok=True)
        manager = tf.train.CheckpointManager(
            checkpoint, str(self.path), max_to_keep=KEPT, checkpoint_name=NAME
        )
        manager.save(checkpoint_number=number)

    def _numbers(self) -> list[int]:
        """Return the numbers of the complete checkpoints, the newest last."""
        listed = self._listed()
        if listed is not None:
            names = [Path(path).name for path in listed.all_model_checkpoint_paths]
        else:
            names = [path.stem for path in self.path.glob(f"{NAME}-*.index")]
        numbers = [name.rpartition("-")[2] for name in names if name.startswith(NAME)]
        return sorted(int(number) for number in numbers if number.isdigit())

    def _listed(self) -> Any:
        """Return TensorFlow's list of checkpoints; None if it is damaged or gone."""
        try:
            return tf.train.get_checkpoint_state(str(self.path))
        except ValueError:  # it is no text, or is empty
            return None


@contextlib.contextmanager
def _about_checkpoints() -> Iterator[None]:
    """Raise errors about runs as errors about checkpoints."""
    rule = "`checkpoint` takes a directory that this run alone writes to."
    hint = 'a directory of its own, such as "checkpoints/rosenbrock"'
    try:
        yield
    except TfgradError as error:
        raise type(error)(rule, got=error.got, hint=hint) from None
    except OSError as error:
        raise RunError(rule, got=str(error), hint=hint) from error


def _facts(saved: Saved) -> str:
    """Return what JSON can hold of a run."""
    chain = saved.chain
    progress = [chain.index, chain.first, chain.used, chain.taken]
    columns = [list(saved.history), list(saved.epochs)]
    is_vector = tf.is_tensor(saved.state.x)
    names = "identity limits position seconds status message success nit nfev directory"
    facts = {name: getattr(saved, name) for name in names.split()}
    facts |= {"chain": progress, "columns": columns, "is_vector": is_vector}
    return json.dumps({**facts, "format": FORMAT})


def _read(prefix: str) -> Saved:
    """Return what a checkpoint holds; TensorFlow compares the sums of its contents."""
    reader = tf.train.load_checkpoint(prefix)
    (text,) = _part(reader, "facts")
    facts = json.loads(text.item())
    if facts.pop("format") != FORMAT:
        raise ValueError("it was written by another version")
    columns = facts.pop("columns")
    history, epochs = (
        dict(zip(names, _part(reader, part), strict=True))
        for names, part in zip(columns, ("history", "epochs"), strict=True)
    )
    state, variables, outcome = (
        [*map(tf.constant, _part(reader, name))]
        for name in ("state", "variables", "outcome")
    )
    index, first, used, taken = facts.pop("chain")
    x, has_aux, methods, *bounds = facts.pop("identity")
    is_vector = facts.pop("is_vector")
    return Saved(
        identity=Identity(tuple(x), has_aux, tuple(methods), *bounds),
        state=_state(state, is_vector),
        variables=variables,
        chain=Chain([], 0, index, first, used, [(n, c) for n, c in taken]),
        history=history,
        epochs=epochs,
        outcome=_outcome(outcome),
        **{**facts, "position": tuple(facts["position"])},
    )


def _state(leaves: list[tf.Tensor], is_vector: bool) -> State:
    """Return the state of its leaves; what the solver remembers stays flat."""
    count = 1 if is_vector else 0
    x, rest = (leaves[0] if is_vector else ()), leaves[count:]
    gradient = rest[1] if is_vector else ()
    evaluation = Evaluation(rest[0], gradient, rest[1 + count], {})
    memory, tail = rest[2 + count : -6], rest[-6:]
    return State(x, evaluation, memory, *tail)


def _outcome(flat: list[tf.Tensor]) -> Outcome | None:
    half = (len(flat) + 1) // 2
    return Outcome(flat[0], flat[1:half], flat[half:]) if flat else None


def _part(reader: Any, name: str) -> Iterator[np.ndarray[Any, Any]]:
    number = 0
    while reader.has_tensor(key := f"{name}/{number}/.ATTRIBUTES/VARIABLE_VALUE"):
        yield np.asarray(reader.get_tensor(key))
        number += 1


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
