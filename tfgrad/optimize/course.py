"""The course of a run: its stages one after the other, each a loop of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tfgrad.optimize.data_loop import DataLoop
from tfgrad.optimize.epochs import Training
from tfgrad.optimize.loop import NOTHING, Loop, Rows, Since
from tfgrad.optimize.objective import Objective
from tfgrad.optimize.options import Options
from tfgrad.optimize.scipy_loop import SciPyLoop
from tfgrad.optimize.sentences import sentence
from tfgrad.optimize.snapshot import Snapshot
from tfgrad.optimize.stages import HANDS_OVER, Stage
from tfgrad.optimize.stopping import GIVEN_UP, RUNNING, STATUSES


class Course:
    """Which method is at work, how long it may, and why the run ended.

    Args:
        objective: What to minimise.
        stages: The methods.
        options: The rules, the seconds, `jit`.
        training: The data, if there is any.
        steps: How many steps the stages without a number of their own may take.

    Attributes:
        loop: The loop of the stage that is at work.
        status: Why the run ended; None while it goes on.
    """

    loop: Loop | DataLoop

    def __init__(
        self,
        objective: Objective,
        stages: Sequence[Stage],
        options: Options,
        training: Training | None,
        steps: int,
    ) -> None:
        """Begin nothing yet."""
        self._objective = objective
        self._stages = list(stages)
        self._options = options
        self._training = training
        self._steps = steps
        self._used = 0
        self._seconds = options.seconds
        self._since = NOTHING
        self._index = self._first = self._last = 0
        self._taken: list[list[Any]] = []
        self.status: str | None = None

    @property
    def total(self) -> int:
        """How many steps it may take in all."""
        shared = self._steps if any(s.steps is None for s in self._stages) else 0
        return self._since.step + shared + sum(s.steps or 0 for s in self._stages)

    @property
    def limits(self) -> dict[str, Any]:
        """How far it may go, in JSON."""
        steps = [self._steps, self._since.step, *(s.steps for s in self._stages)]
        rules = vars(self._options.stopping)
        return {"steps": steps, "seconds": self._seconds, **rules}

    def count_from(self, facts: Mapping[str, Any], since: Since, alike: bool) -> None:
        """Count steps and seconds from where another run ended.

        Args:
            facts: What that run's `facts` returned.
            since: What it did.
            alike: Whether it goes on with its method, in its stage; else the first
                stage begins there.
        """
        if self._seconds is not None:
            self._seconds += since.seconds
        if not alike:
            self._since = since
            return
        self._since = self._since._replace(step=facts["before"])
        taken = since.step - facts["first"]
        stage = self._stages[facts["stage"]]
        if stage.steps is None:
            self._steps += taken
        elif facts["stage"] + 1 == len(self._stages):
            self._stages[-1] = replace(stage, steps=taken + self._steps)

    def begin(self) -> None:
        """Start the first stage where the variables are."""
        self._start(0, self._since)

    def go_on(self, facts: Mapping[str, Any], snapshot: Snapshot) -> None:
        """Go to where a course of the same stages was, and on from there."""
        self._used, self._taken = facts["used"], list(facts["taken"])
        epoch, batch = snapshot.facts.get("position", (0, 0))
        self._start(facts["stage"], Since(facts["first"]), (epoch, batch))
        self.loop.restore(snapshot)

    def advance(self, most: int) -> Rows:
        """Take one chunk of at most `most` steps."""
        return self.loop.advance(min(most, self._last - self.loop.step))

    def judge(self) -> None:
        """Say why it ended, if it did; a stage that is over hands over to the next."""
        self.status = self._verdict()
        while self._hands_over():
            self._hand_over()
            self.status = self._verdict()

    def close(self) -> None:
        """Leave what the loop has begun outside of Python's own frames."""
        if isinstance(self.loop, SciPyLoop):
            self.loop.close()

    def end(self, status: str) -> None:
        """End it from outside, unless it has ended already."""
        if self.status is None:
            self.status = status

    def facts(self) -> dict[str, Any]:
        """Return what `go_on` needs besides a snapshot of the loop, in JSON."""
        return {
            "before": self._since.step,
            "stage": self._index,
            "first": self._first,
            "used": self._used,
            "taken": self._taken,
            "status": self.status,
            "message": self.message() if self.status else None,
        }

    def message(self) -> str:
        """Return why it ended as a sentence, and how many steps each stage took."""
        loop, status = self.loop, self.status or ""
        why = loop.blame if status == "nonfinite" else ""
        rules, seconds = loop.stopping, self._seconds
        said = sentence(status, loop.step, rules, seconds, loop.nonfinite, why)
        if isinstance(loop, SciPyLoop):
            said = loop.says.get(status, said)
        own = self._own_words()
        if own and own[0] == status:
            said = own[1]
        if not self._taken:
            return said
        name = self._stages[self._index].name
        taken = [*self._taken, [name, loop.step - self._first]]
        return f"{said} Steps: {', '.join(f'{n} {count}' for n, count in taken)}."

    def _start(
        self, index: int, since: Since, position: tuple[int, int] = (0, 0)
    ) -> None:
        stage = self._stages[index]
        share = self._steps - self._used if stage.steps is None else stage.steps
        what: Any = self._objective, stage.make_turns, self._options.stopping
        if self._training is not None:
            source = self._training.source
            self.loop = DataLoop(*what, source=source, position=position)
        elif stage.scipy is not None:
            self.loop = SciPyLoop(
                *what,
                method=stage.scipy,
                bounds=self._options.bounds,
                constraints=self._options.constraints,
                steps=share,
                since=since,
            )
        else:
            jit = self._options.jit
            self.loop = Loop(*what, steps=share, jit=jit, since=since)
        self._index, self._first, self._last = index, since.step, since.step + share

    def _verdict(self) -> str | None:
        loop = self.loop
        if own := self._own_words():
            return own[0]
        if loop.code == GIVEN_UP:
            return loop.turns.failure
        if loop.code != RUNNING:
            return STATUSES[loop.code]
        if self._seconds is not None and loop.seconds >= self._seconds:
            return "seconds"
        return "steps" if loop.step >= self._last else None

    def _own_words(self) -> tuple[str, str] | None:
        """Return the status and the sentence of a method that gave up and says why."""
        return self.loop.why() if isinstance(self.loop, Loop) else None

    def _hands_over(self) -> bool:
        """Return whether the stage is over, the run is not, and another is left.

        The `gtol` that a pure method has of itself ends its stage, the user's the run.
        """
        is_own_rule = self.status == "gtol" and self._options.gtol is None
        if self.status not in HANDS_OVER and not is_own_rule:
            return False
        return self._index + 1 < len(self._stages)

    def _hand_over(self) -> None:
        loop, stage = self.loop, self._stages[self._index]
        taken = loop.step - self._first
        self._taken.append([stage.name, taken])
        if stage.steps is None:
            self._used += taken
        assert isinstance(loop, Loop)  # there are no chains over data
        self.close()
        loop.turns.finish()
        self._start(self._index + 1, loop.so_far())
