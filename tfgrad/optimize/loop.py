"""THE loop: update, evaluate, record, ask the stopping rules; compiled in chunks.

Steps run in chunks. The first is one step, so that errors surface at once; then the
loop is compiled, and chunks grow until one takes `CHUNK_SECONDS`. A chunk returns what
happened at each of its steps as arrays: every step is recorded, and none costs a call
from Python. Progress, logs, callbacks and interrupts live between chunks.

Which compiled form a step runs in depends on the function and on the number of steps
alone, never on the clock, so that a run repeats to the last bit. Only XLA rounds
otherwise than the rest: a pure method goes over to it at a step of a certain number, an
optimizer of Keras begins with it where enough steps are planned, and keeps to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.optimize.objective import Evaluation, Objective
from tfgrad.optimize.packing import Packing
from tfgrad.optimize.snapshot import Snapshot
from tfgrad.optimize.stopping import (
    GIVEN_UP,
    NONFINITE,
    PRECISION,
    RUNNING,
    STATIONARY,
    Step,
    Stopping,
    code_of_failure,
)
from tfgrad.optimize.turns import PureTurns, Turns

CHUNK_SECONDS = 0.075
"""What a chunk should take: short enough for Ctrl-C, long enough to hide a Python
call."""

GROWTH = 64
"""How much longer a chunk may be than the one before it, which was timed."""

ROW_BYTES = 2**20
"""Memory for the rows of one chunk; XLA sets it aside whatever the chunk's length."""

LOOP_STEPS = 100
"""Compiling the loop pays from about here, measured on functions of 30 to 140 ops."""

XLA_STEPS = 3000
"""Compiling it with XLA pays from about here, measured likewise, ..."""

XLA_STEPS_PER_OP = 20
"""... and for larger functions, which take longer to compile, from this many per op."""

PURE_XLA_FROM = 300
"""The step from which a pure method runs under XLA: most runs end long before."""

LEAST_LOOK, MOST_LOOK = 8, 60
"""Gradients that a look around a stationary point may cost, between these bounds."""

NEVER = -1

TURNS = 8
"""Evaluations that a chunk may take per step; a line search takes one to three."""

GTOL = {tf.float64: 1e-6, tf.float32: 1e-4}
"""Where a pure method stops unless told otherwise: about half of the dtype's digits."""

NOT_FOR_XLA = ("Random", "Multinomial", "PyFunc", "Conv", "Pool")
"""Parts of op names: what XLA draws otherwise, cannot compile, or runs slower on a
CPU."""


@dataclass(frozen=True)
class Rows:
    """What happened at consecutive steps: arrays with one row per step.

    Attributes:
        columns: By name, arrays of shape `[rows, ...]`; `step` and `seconds` among
            them.
    """

    columns: dict[str, np.ndarray[Any, Any]]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.columns["step"])

    def first(self, count: int) -> Rows:
        """Return the first `count` rows."""
        return Rows({name: column[:count] for name, column in self.columns.items()})


class Carried(NamedTuple):
    """What the compiled loop carries from turn to turn.

    Attributes:
        taken: Steps taken in this chunk.
        turns: Evaluations made in this chunk.
        code: What stopped it.
        before: The point before the last step, leaf by leaf.
        at: The evaluation of the current point.
        state: What the method needs.
    """

    taken: Any
    turns: Any
    code: Any
    before: list[tf.Tensor]
    at: Evaluation
    state: Any


class Since(NamedTuple):
    """What was done before a loop takes over.

    Attributes:
        step: How many steps were taken.
        evaluations: How often the objective was evaluated.
        seconds: How long that took.
    """

    step: int = 0
    evaluations: int = 0
    seconds: float = 0.0


NOTHING = Since()


class Loop:
    """A run of a method on an objective, from chunk to chunk.

    Args:
        objective: What to minimise.
        make_turns: Returns the method at work on the objective.
        stopping: The rules to ask after every step.
        steps: How many steps are planned.
        jit: True compiles with XLA, False does not, "auto" where it pays and agrees.
        since: What was done before, by another method.

    Attributes:
        stopping: The rules that are asked.
        step: How many steps were taken to get there.
        evaluations: How often the objective was evaluated.
        code: What stopped the loop: a position in `STATUSES`; RUNNING if nothing did.
        turns: The method at work.
        nonfinite: With code NONFINITE, rows of which the last is not finite.
        blame: With code NONFINITE, which op and line made it so, if that was found.
    """

    def __init__(
        self,
        objective: Objective,
        make_turns: Callable[[Objective], Turns],
        stopping: Stopping,
        *,
        steps: int,
        jit: bool | str,
        since: Since = NOTHING,
    ) -> None:
        """Evaluate the start, which is row 0."""
        self._objective = objective
        self._began = time.perf_counter() - since.seconds
        self.evaluations = since.evaluations
        self._packed: list[tf.Tensor] = []
        self._unpacked: tuple[Evaluation, Any] | None = None
        if not objective.variables:  # this first evaluation is what finds them
            objective.evaluate()
            self.evaluations += 1
        self.turns = make_turns(objective)
        self.step = since.step
        self.evaluate()
        self.stopping = self._rules(stopping)
        start = self.here()
        self.code = self._code_of_start() if is_finite(start) else NONFINITE
        self.nonfinite = start
        self.blame = objective.blame() if self.code == NONFINITE else ""
        self._planned = self._form, self._xla_from = self._plan(steps, jit)
        self._is_fallible = jit == "auto"
        self._chunk: Callable[..., Any] | None = None
        self._length = 1
        self._capacity = ROW_BYTES // sum(c.nbytes for c in start.columns.values())
        self._lower: list[tf.Tensor] | None = None
        self._look_around()

    @property
    def at(self) -> Evaluation:
        """The evaluation of the current point."""
        return self._place()[0]

    @property
    def _state(self) -> Any:
        """What the method needs for the next turn."""
        return self._place()[1]

    def _place(self) -> tuple[Evaluation, Any]:
        """Return both; what a chunk returned is unpacked when somebody asks."""
        if self._unpacked is None:
            self._unpacked = self._packing.unpack(self._packed)
        place: tuple[Evaluation, Any] = self._unpacked
        return place

    def _go_to(self, at: Evaluation, state: Any) -> None:
        """Be there; the variables are."""
        self._unpacked, self._packed = (at, state), []

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.perf_counter() - self._began

    def so_far(self) -> Since:
        """Return what was done until now, for a loop that takes over."""
        return Since(self.step, self.evaluations, self.seconds)

    def why(self) -> tuple[str, str] | None:
        """Return the method's own status and sentence, if it gave up and has one."""
        has_failed = self.code in (PRECISION, GIVEN_UP)
        return self.turns.why(self._state) if has_failed else None

    def snapshot(self) -> Snapshot:
        """Return all that a loop of the same kind needs to go on from here."""
        facts = {
            **self.so_far()._asdict(),
            "code": self.code,
            "rules": dict(vars(self.stopping)),
            "planned": list(self._planned),
            "form": [self._form, self._xla_from, self._is_fallible],
            "has_others": bool(self._objective.others()),
        }
        values = [variable.value() for variable in self._variables()]
        memory = tf.nest.flatten((self.at, self._state))
        memory = [tf.convert_to_tensor(leaf) for leaf in memory]
        return Snapshot(facts, values, memory, self._lower or [])

    def restore(self, snapshot: Snapshot) -> None:
        """Go to where a loop of the same kind was, to the last bit.

        Steps then run in the compiled form in which that loop would have run them.

        Raises:
            InvalidArgumentError: If it was of another kind; nothing was changed.
        """
        here, facts = self.snapshot(), snapshot.facts
        snapshot.check_like(here)
        is_underway = facts["step"] > self.step
        for variable, value in zip(self._variables(), snapshot.variables, strict=True):
            variable.assign(value)
        memory = tf.nest.pack_sequence_as((self.at, self._state), snapshot.memory)
        self._go_to(*memory)
        self.step, self.evaluations = facts["step"], facts["evaluations"]
        self._began = time.perf_counter() - facts["seconds"]
        was_xla = facts["form"][0] == "xla" and self._is_fallible
        if was_xla or facts["planned"] == here.facts["planned"]:
            self._form, self._xla_from, self._is_fallible = facts["form"]
        self._lower = list(snapshot.lower) or None
        self._chunk, self.code = None, RUNNING
        if self._lower is None:
            self.code = self._code_of_start() or self._standing_code(facts)
        if is_underway:
            self.turns.prepare(self.at)

    @property
    def repeats(self) -> bool:
        """Whether f is known to have one value at one point: no seeds, no averages."""
        operations = self.turns.operations()
        is_drawn = any("Random" in operation for operation in operations)
        return bool(operations) and not is_drawn and not self._objective.others()

    def _variables(self) -> list[tf.Variable]:
        """Return the variables whose values are part of where the loop is."""
        moved, others = self._objective.variables, self._objective.others()
        return [*moved, *others, *self.turns.variables()]

    def here(self) -> Rows:
        """Return the one row of the current point."""
        return rows_to(self.step, row_of(self.at), self.seconds, self.seconds)

    def point(self) -> list[tf.Tensor]:
        """Return the current point, leaf by leaf."""
        return self.turns.point(self._state)

    def advance(self, most: int) -> Rows:
        """Take up to `most` steps, at least one unless the method gives up."""
        rows = self._leave() if self._lower else self._advance(most)
        self._look_around()
        return rows

    def _advance(self, most: int) -> Rows:
        began = self.seconds
        if self._form == "single" or not self.turns.is_compiled:
            return self._take_one()
        if self.step == self._xla_from:
            self._form, self._chunk = "xla", None
        if self._chunk is None:
            return self._take_first_chunk()
        if self.step < self._xla_from:
            most = min(most, self._xla_from - self.step)
        length = min(most, self._length, self._capacity)
        rows = self._take_chunk(length)
        growth = CHUNK_SECONDS / (self.seconds - began)
        self._length = max(1, int(length * min(GROWTH, growth)))
        return rows

    def start(self) -> Rows:
        """Return the first row."""
        return self.here()

    def finish(self) -> Rows:
        """Let the method finish; return the rows that are still to be kept: none."""
        if self.turns.finish():
            self.evaluate()
        return self.here().first(0)

    def evaluate(self) -> None:
        """Evaluate the objective again: its variables have been moved."""
        at = self._evaluate()
        self._go_to(at, self.turns.start(at))

    def _look_around(self) -> None:
        """Do not stop at a maximum or a saddle, if it can be told from a minimum.

        Steps that keep to a ridge end at one. To tell costs products with the Hessian.
        Where a method had no need of them, gradients make up for them, as many as come
        to a quarter of what the run has cost.
        """
        turns = self.turns
        if not isinstance(turns, PureTurns) or self.code not in STATIONARY:
            return
        gradients = None
        if self.step and not turns.knows_curvature:
            gradients = min(max(self.evaluations // 4, LEAST_LOOK), MOST_LOOK)
        self._lower = turns.lower_point(self.at, self._state, self._evaluate, gradients)
        self.code = self.code if self._lower is None else RUNNING

    def _leave(self) -> Rows:
        """Step to the lower point that was found, and let the method start afresh."""
        assert self._lower is not None
        self._objective.assign(self._lower)
        self._lower = None
        self.evaluate()
        self.step += 1
        return self.here()

    def _evaluate(self) -> Evaluation:
        self.evaluations += 1
        return self.turns.evaluate()

    def _take_one(self) -> Rows:
        before, x = self.at, self.point()
        accepted = failed = False
        while not accepted and not failed:
            turn = self.turns.turn(self.at, self._state)
            at, state, accepted, failed, expected = turn
            self._go_to(at, state)
            self.evaluations += 1
        self.turns.settle(self._state)
        self.step += int(accepted)
        rows = self.here() if accepted else self.here().first(0)
        if accepted and self.stopping.is_empty:
            self.code = RUNNING if is_finite(rows) else NONFINITE
        elif accepted:
            step = self._between(x, before, self._state, self.at)
            self.code = int(self.stopping.code(step))
        if failed and self.code == RUNNING:
            self.code = int(self._code_of_failure(self.at, expected))
        return self._without_last(rows, x) if self.code == NONFINITE else rows

    def _take_chunk(self, length: int) -> Rows:
        assert self._chunk is not None
        began = self.seconds
        packed = self._packed or self._packing.pack(self._place())
        counts, before, self._packed, columns = self._chunk(length, packed)
        self._unpacked = None
        count, turns, self.code = counts.numpy().tolist()
        self.step += count
        self.evaluations += turns
        kept = {name: column.numpy()[:count] for name, column in columns.items()}
        rows = rows_to(self.step, kept, began, self.seconds)
        if self.code == NONFINITE:
            return self._without_last(rows, before)
        return rows

    def _take_first_chunk(self) -> Rows:
        """Compile the loop and take one step; under "auto", XLA has to agree."""
        self._packing = Packing(self._place())
        self._chunk = self._compile()
        if self._form == "graph" or not self._is_fallible:
            return self._take_chunk(1)
        try:
            rows = self._take_chunk(1)
        except tf.errors.OpError:
            # XLA has no kernel for something in it, and nothing was run.
            return self._without_xla()._take_first_chunk()
        if self.code == NONFINITE or _agree(self.at, again := self._evaluate()):
            self._is_fallible = False
            return rows
        self._go_to(again, self._state)
        self.code = RUNNING
        self._without_xla()._chunk = self._compile()
        return self.here()

    def _without_xla(self) -> Self:
        self._form, self._xla_from = "graph", -1
        return self

    def _between(
        self, x: list[tf.Tensor], before: Evaluation, state: Any, at: Evaluation
    ) -> Step:
        """Return the step from `x` to where `state` is."""
        fun, norm, previous = at.row["fun"], at.row["grad_norm"], before.row["fun"]
        now = [] if self.stopping.xtol is None else self.turns.point(state)
        return Step(fun, norm, now, previous, x)

    def _without_last(self, rows: Rows, x: list[tf.Tensor]) -> Rows:
        """Go back from a point that is not finite to the one before it."""
        self.nonfinite = rows
        self.blame = self._objective.blame()  # the variables are still there
        self.step -= 1
        self._objective.assign(x)
        self.evaluate()
        return rows.first(len(rows) - 1)

    def _compile(self) -> Callable[..., Any]:
        """Return the function that takes up to `limit` steps."""
        is_xla = self._form == "xla"

        carried = Packing(Carried(0, 0, RUNNING, self.point(), self.at, self._state))

        def chunk(limit: tf.Tensor, *packed: tf.Tensor) -> Any:
            at, state = self._packing.unpack(packed)
            size = self._capacity if is_xla else limit  # XLA needs to know it
            arrays = {
                name: tf.TensorArray(value.dtype, size, element_shape=value.shape)
                for name, value in at.row.items()
            }

            def goes_on(tensors: list[tf.Tensor], _: Any) -> tf.Tensor:
                here: Carried = carried.unpack(tensors)
                # A chunk of steps that are never accepted must end, too.
                is_within = (here.taken < limit) & (here.turns < TURNS * limit)
                on: tf.Tensor = is_within & (here.code == RUNNING)
                return on

            def body(tensors: list[tf.Tensor], arrays: Any) -> Any:
                here: Carried = carried.unpack(tensors)
                after = self._turn(here)
                # A row of a point that was not accepted is written over by the next.
                written = {
                    name: array.write(here.taken, after.at.row[name])
                    for name, array in arrays.items()
                }
                return carried.pack(after), written

            start = Carried(0, 0, RUNNING, self.turns.point(state), at, state)
            tensors, arrays = tf.while_loop(
                goes_on, body, (carried.pack(start), arrays), parallel_iterations=1
            )
            last: Carried = carried.unpack(tensors)
            self.turns.settle(last.state)
            counts = tf.stack([last.taken, last.turns, last.code])
            place = self._packing.pack((last.at, last.state))
            columns = {name: array.stack() for name, array in arrays.items()}
            return counts, last.before, place, columns

        # A concrete function takes half the time to be called.
        compiled = tf.function(chunk, autograph=False, jit_compile=is_xla or None)
        specs = map(tf.TensorSpec.from_tensor, self._packing.pack(self._place()))
        concrete = compiled.get_concrete_function(tf.TensorSpec([], tf.int32), *specs)
        return lambda length, packed: concrete(tf.constant(length), *packed)

    def _turn(self, carried: Carried) -> Carried:
        """Take one turn and judge it, inside the compiled loop."""
        x = self.turns.point(carried.state)
        turn = self.turns.turn(carried.at, carried.state)
        at, state, accepted, failed, expected = turn
        code = self.stopping.code(self._between(x, carried.at, state, at))
        taken, before = carried.taken + 1, x
        if accepted is not True:
            code = tf.where(accepted, code, RUNNING)
            taken = carried.taken + tf.cast(accepted, tf.int32)
            pairs = zip(x, carried.before, strict=True)
            before = [tf.where(accepted, new, old) for new, old in pairs]
        if failed is not False:
            why = self._code_of_failure(at, expected)
            code = tf.where(failed & (code == RUNNING), why, code)
        return Carried(taken, carried.turns + 1, code, before, at, state)

    def _code_of_failure(self, at: Evaluation, expected: Any) -> tf.Tensor:
        return code_of_failure(at.row["fun"], at.row["grad_norm"], expected)

    def _code_of_start(self) -> int:
        """Return the code of the rules that need no step."""
        if self.stopping.is_empty:
            return RUNNING
        row, rules = self.at.row, replace(self.stopping, ftol=None, xtol=None)
        return int(rules.code(Step(row["fun"], row["grad_norm"], [], row["fun"], [])))

    def _standing_code(self, facts: Mapping[str, Any]) -> int:
        """Return what ended that loop, if it ends this one, too, where it begins."""
        code = int(facts["code"])
        is_asked = facts["rules"] == vars(self.stopping) and code in STATIONARY
        return code if is_asked or code in (PRECISION, GIVEN_UP) else RUNNING

    def _rules(self, asked: Stopping) -> Stopping:
        """Return the rules that were asked for; a pure method stops at a solution."""
        if asked.gtol is not None or not isinstance(self.turns, PureTurns):
            return asked
        if self.turns.knows_solutions:
            return asked
        return replace(asked, gtol=GTOL.get(self.at.row["fun"].dtype, 0.1))

    def _plan(self, steps: int, jit: bool | str) -> tuple[str, int]:
        """Return "single", "graph" or "xla", and from which step on it is XLA."""
        operations = self.turns.operations()
        if not operations:  # it runs eagerly
            return "single", NEVER
        if jit is True:
            return "xla", NEVER
        is_pure = isinstance(self.turns, PureTurns)
        if steps < LOOP_STEPS and not is_pure:
            return "single", NEVER
        if jit is False or any(part in op for op in operations for part in NOT_FOR_XLA):
            return "graph", NEVER
        if is_pure:  # which may end long before `steps`
            return "graph", self.step + PURE_XLA_FROM
        is_long = steps >= max(XLA_STEPS, XLA_STEPS_PER_OP * len(operations))
        return "xla" if is_long else "graph", NEVER


def row_of(at: Evaluation) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of the one row of an evaluation."""
    # NumPy does not know the dtype of a single bfloat16 by itself.
    return {
        name: np.array(value.numpy(), value.dtype.as_numpy_dtype)[None]
        for name, value in at.row.items()
    }


def rows_to(last: int, columns: dict[str, Any], began: float, ended: float) -> Rows:
    """Return rows of which the last is that of step `last`.

    Args:
        last: A step.
        columns: What is known of each step.
        began: The seconds before the first of them; their time is spread evenly.
        ended: The seconds after the last one.
    """
    count = len(columns["fun"])
    steps = np.arange(last - count + 1, last + 1)
    seconds = np.linspace(began, ended, count + 1)[1:]
    return Rows({"step": steps, **columns, "seconds": seconds})


def is_finite(rows: Rows) -> bool:
    """Return whether the last row is."""
    last = [rows.columns[name][-1] for name in ("fun", "grad_norm")]
    return bool(np.all(np.isfinite(last)))


def _agree(a: Evaluation, b: Evaluation) -> bool:
    """Return whether two evaluations of one point agree but for rounding.

    Half the digits: sums taken in another order differ by more than a few last ones.
    """
    groups = ([a.row["fun"]], [b.row["fun"]]), (a.gradient, b.gradient)
    for ours, theirs in groups:
        size = max((_largest(y) for y in theirs), default=0.0)
        for x, y in zip(ours, theirs, strict=True):
            if not _largest(x - y) <= EPSILONS[y.dtype] ** 0.5 * size:
                return False
    return True


def _largest(tensor: tf.Tensor) -> float:
    return float(np.max(np.abs(tensor), initial=0.0))
