"""What each tag of a run is for, and the last step that it has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.record import Record
from tfgrad.runs.values import check_tag

Kind = Literal["scalar", "text", "graph", "histogram", "image", "layout"]
"""What a tag is for: TensorBoard shows the data of a tag in one tab only."""

_WHOLE_RUN = ("graph", "layout")  # of the whole run: a session that resumes keeps them


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
