"""The life of a run: its directory, its record, its tags, its end."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs import hparams as hparams_tab
from tfgrad.runs.directory import claim
from tfgrad.runs.events import EventFile
from tfgrad.runs.record import Record
from tfgrad.runs.values import check_tag, to_step

Kind = Literal["scalar", "text", "graph", "histogram", "image", "layout"]
"""What a tag is for: TensorBoard shows a tag's data in one tab only."""

_WHOLE_RUN = ("graph", "layout")  # kinds that a session which resumes leaves alone


class Session:
    """What `Run` is, apart from what it writes: see there."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        hparams: Mapping[str, Any] | None = None,
        resume_from: int | None = None,
    ) -> None:
        """Claim the directory and write the head of the run."""
        is_resumed = resume_from is not None
        self.first_step = to_step(resume_from, "resume_from") if is_resumed else 0
        self._hparams = hparams_tab.checked(hparams or {})
        self._lock = threading.RLock()
        self._is_closed = False
        self._facts: dict[str, Any] = {}
        self._last_steps: dict[str, int] = {}
        self._last_write = self._started = time.time()
        with contextlib.ExitStack() as undo:
            self._claim = claim(directory, resume=is_resumed)
            undo.callback(self._claim.release)
            self.directory = self._claim.path
            self._record = Record(
                self.directory, resumed_from=resume_from, hparams=self._hparams
            )
            self._kinds = self._record.earlier_tags()
            if self.first_step == 0:  # nothing is left of earlier graphs either
                self._kinds = {t: k for t, k in self._kinds.items() if k != "graph"}
            self._recorded_at = len(self._kinds) + 1
            superseded = (t for t, k in self._kinds.items() if k not in _WHOLE_RUN)
            self._events = EventFile(self.directory, self.first_step, superseded)
            if self._hparams:
                self._events.summary(
                    hparams_tab.start(self._hparams, self.directory.absolute())
                )
            undo.pop_all()

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
            self._check_open()
            self._facts |= facts
            self._record.update(facts=self._facts)

    def rewind(self, tag: str, step: int) -> None:
        """Let a tag go on after `step`, though the run goes on from a later one.

        For a curve that is written at the end alone, of which earlier sessions have
        nothing after that step.
        """
        with self._lock:
            self._last_steps[tag] = step

    def close(self, status: str = "success", **result: Any) -> None:
        """End the run: write status and result to `run.json`, let the directory go.

        Args:
            status: How it ended, in a word. The HParams tab shows "failure",
                "interrupted" and "nonfinite" as failures, all others as successes.
            **result: What came out, for `run.json`.

        A second call does nothing.
        """
        with self._lock, contextlib.ExitStack() as ending:
            if self._is_closed:
                return
            self._is_closed = True
            ending.callback(self._claim.release)
            ending.callback(self._events.close)
            seconds = time.time() - self._started
            self._record.update(
                status=status, seconds=seconds, result=result, tags=self._kinds
            )
            if self._hparams:
                self._events.summary(hparams_tab.end(status))

    def next_step(self, prefixes: tuple[str, ...] = ("",)) -> int:
        """Return the first step that tags of these beginnings may get: all, or some."""
        with self._lock:
            steps = (s for t, s in self._last_steps.items() if t.startswith(prefixes))
            return max(steps, default=self.first_step - 1) + 1

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the run, with the status that the block's end has earned."""
        if error is None:
            self.close()
            return
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failure"
        with contextlib.suppress(RunError):  # the block's own error is the one to see
            self.close(status, error=f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        """Return the call that made it."""
        return f"Run({str(self.directory)!r})"

    def _check_open(self) -> None:
        if self._is_closed:
            raise RunError(
                "A run that is closed takes no more.",
                got=f"{self.directory}, closed",
                hint="log inside the `with` block, or Run(..., resume_from=step)",
            )

    def _admit(self, tags: Iterable[str], kind: Kind, first: int, last: int) -> None:
        """Check that `tags` may get data of `kind` at these steps, then remember it."""
        self._check_open()
        for tag in tags:
            if tag not in self._kinds:
                check_tag(tag)
            elif self._kinds[tag] != kind:
                # A tag belongs to one plugin per run: the other data would be hidden.
                raise InvalidArgumentError(
                    "A tag is for data of one kind.",
                    got=f"{tag!r}, a {kind} here and a {self._kinds[tag]} before",
                    hint=f'another tag, such as "{kind}/{tag}"',
                )
            if first <= self._last_steps.get(tag, self.first_step - 1):
                raise self._not_growing(tag, first)
        for tag in tags:
            self._kinds[tag] = kind
            self._last_steps[tag] = last
        if len(self._kinds) >= self._recorded_at:
            # A process that is killed leaves them to the session that resumes it. Of
            # very many tags, each alone would be a file the longer the more there are.
            self._recorded_at = len(self._kinds) + max(1, len(self._kinds) // 50)
            self._record.update(tags=self._kinds)

    def _not_growing(self, tag: str, step: int) -> InvalidArgumentError:
        # TensorBoard's loaders differ on a step that comes again: one drops what it has
        # from there on, the other shows both.
        if tag in self._last_steps:
            before = f"after step {self._last_steps[tag]}"
        else:
            before = f"in a run resumed from step {self.first_step}"
        return InvalidArgumentError(
            "On one tag, steps grow.",
            got=f"{tag!r} at step {step}, {before}",
            hint=f"Run(..., resume_from={step}) to go back, or another tag",
        )
