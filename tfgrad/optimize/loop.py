"""The loop: takes a solver's steps, one by one or in compiled chunks; returns rows.

The loop depends on no method, no data and no log. A step evaluates, lets the solver
accept, asks the rules and lets the solver move; what happened comes back as rows, one
for each accepted point. In the form "calls", a step is two calls: of the function, and
of the rest, which is compiled once for all functions where it does not depend on them.
In the forms "graph" and "xla" a chunk of many steps is one call.

Which form a step runs in depends on counts alone, never on the clock, so that a run
repeats to the last bit. Only XLA rounds otherwise than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.optimize.chunks import (
    CHUNK_SECONDS,
    Chunks,
    Pace,
    Packing,
    array,
    held,
    holds_large,
    in_place,
    released,
)
from tfgrad.optimize.compiled import (
    OfVariables,
    compiled,
    kept,
    shapes_of,
    spec_of,
)
from tfgrad.optimize.evaluator import Evaluation, measured
from tfgrad.optimize.history import Rows
from tfgrad.optimize.solvers import Form, Ruled, Solver, State, Visit
from tfgrad.optimize.stopping import RUNNING, Tolerances, code_of


class Loop:
    """A solver's steps, from chunk to chunk.

    Args:
        solver: What takes a step.
        tolerances: The rules that were asked for.
        planned: How many steps there will be in all, at most.
        jit: As for `minimize`.
        clock: Returns the seconds since the run began.
        in_step: Whether other processes have to take chunks of the same lengths, which
            `pace` then tells.

    Attributes:
        pace: How long a chunk may be.
        bad: A row that is not finite, where that ended the run.
        blame: Which op and line made it so, if that was found.
        succeeded: Whether the method says so, whatever the rules say.
    """

    succeeded = False

    def __init__(
        self,
        solver: Solver,
        tolerances: Tolerances,
        *,
        planned: int,
        jit: bool | str,
        clock: Callable[[], float] = time.perf_counter,
        in_step: bool = False,
    ) -> None:
        self.solver = solver
        self.pace, self._in_step = Pace(), in_step
        self.bad: Rows | None = None
        self.blame = ""
        self._ruled = Ruled(solver.stepper, tolerances)
        self._chunks = Chunks(solver, self._ruled, jit, self.pace, in_step=in_step)
        self._planned, self._jit, self._clock = planned, jit, clock

    def start(self) -> tuple[State, Rows]:
        """Return where the run begins, and its row if it was evaluated."""
        state, evaluation = self.solver.init()
        state = held(state)
        if evaluation is None:
            return state, Rows({})
        return self._judged(state, evaluation)

    def _judged(self, state: State, evaluation: Evaluation) -> tuple[State, Rows]:
        """Return a state just begun, with the code of the rules, and its row."""
        if int(state.code) == RUNNING:
            asked = (
                state.evaluation.value,
                state.evaluation.grad_max,
                state.expected,
                state.first,
            )
            key = "rules", self._ruled.key, shapes_of(asked)
            rules = kept(None, key, lambda: compiled(self._ruled.first, *asked))
            state = state._replace(code=rules(*asked))
        row = self.row(state, evaluation)
        if int(state.code) == code_of("nonfinite"):
            self.bad = row
            state, self.blame = self.solver.recover(state)
        return state, row

    def row(self, state: State, evaluation: Evaluation) -> Rows:
        """Return the one row of the current point."""
        x = state.x if isinstance(state.x, tf.Tensor) else None
        stepper = self.solver.stepper
        row = stepper.row(x, evaluation)
        if stepper.lookahead:
            row["expected"] = state.expected
        columns = {name: array([value]) for name, value in row.items()}
        columns = self.solver.named(columns)
        now = self._clock()
        return Rows({"step": np.array([int(state.step)]), **columns}).timed(now, now)

    def advance(
        self, state: State, limit: int, visit: Visit | None = None
    ) -> tuple[State, Rows]:
        """Take up to `limit` steps, at least one unless the run ends.

        Args:
            state: Where the run is.
            limit: As above.
            visit: For a loop that goes on after `limit` steps, as SciPy's does.

        Returns:
            Where it is then, and the rows of the points that were accepted.
        """
        began, first = self._clock(), int(state.step) + self.solver.stepper.lookahead
        state = self.solver.prepare(state)
        if not self.solver.stepper.has_next(state):
            return state, Rows({})
        state, columns = self._take(state, limit)
        columns = self.solver.named(columns)
        rows = Rows(columns)
        if len(rows):
            steps = {"step": np.arange(first, first + len(rows))}
            rows = Rows({**steps, **columns}).timed(began, self._clock())
        self.solver.settle(state)
        if int(state.code) == code_of("nonfinite"):
            self.bad = rows.part(slice(-1, None))
            is_start = first == 0 and len(rows) == 1
            state, self.blame = self.solver.recover(state)
            rows = rows if is_start else rows.part(slice(-1))
        return state, rows

    def escape(self, state: State) -> tuple[State, Rows]:
        """Leave a maximum or a saddle; return the row of the point beside it."""
        state, evaluation = self.solver.escape(state)
        if evaluation is None:
            return state, Rows({})
        return self._judged(state, evaluation)

    def finish(self, state: State) -> tuple[State, Rows]:
        """Let the solver finish; return also the row that is still to be kept."""
        state, evaluation = self.solver.finish(state)
        return state, Rows({}) if evaluation is None else self.row(state, evaluation)

    def why(self, state: State) -> tuple[str, str] | None:
        """Return the method's own status and sentence, if it gave up and has some."""
        return self.solver.why(state)

    def close(self) -> None:
        """Do nothing: only SciPy's methods hold something."""

    def _take(self, state: State, limit: int) -> tuple[State, dict[str, Any]]:
        """Take steps in the form that pays."""
        while True:
            form = self.solver.forms.form(state, self._planned, self._jit)
            if form.name == "calls":
                return self._call(form, state, limit)
            taken = self._chunks.take(form, state, limit)
            if taken is not None:
                return taken

    # --- by single calls ---

    def _call(
        self, form: Form, state: State, limit: int
    ) -> tuple[State, dict[str, Any]]:
        """Take steps one by one, for as long as a chunk may take."""
        stepper = self.solver.stepper
        if stepper.is_eager:
            return self._take_eagerly(state)
        began, taken = time.perf_counter(), 0
        if self._in_step:
            limit = min(limit, self.pace.length)
        rows: list[dict[str, Any]] = []
        state = released(state)
        if holds_large(state):
            limit = 1  # if f raises, what a step wrote in place does no harm
        query, evaluations = stepper.query(state), int(state.evaluations)
        turn: Any = None
        while True:
            evaluation = stepper.evaluate(query)
            if turn is None:
                packing, turn = self._turn(state, evaluation)
                packed = packing.pack(state)
            known = evaluation._replace(aux={})
            known = tf.nest.flatten(known, expand_composites=True)
            place = stepper.place(query)
            flags, query, row, told, packed = turn(*packed, *known)
            code, accepted = flags.numpy()
            evaluations += 1
            if accepted:
                taken += 1
                rows.append({**row, **place, **evaluation.aux, **told})
            elapsed = time.perf_counter() - began
            is_late = elapsed > CHUNK_SECONDS and not self._in_step
            if code or taken >= limit or evaluations >= form.evaluations or is_late:
                break
        if self._in_step:
            self.pace.took(taken, elapsed)
        names = rows[0] if rows else ()
        columns = {name: array([each[name] for each in rows]) for name in names}
        return packing.unpack(packed), columns

    def _take_eagerly(self, state: State) -> tuple[State, dict[str, Any]]:
        """Take one step that no trace can hold."""
        stepper = self.solver.stepper
        evaluation = measured(stepper.evaluate(stepper.query(state)))
        row = stepper.row(None, evaluation)
        columns = {name: array([value]) for name, value in row.items()}
        return self._ruled.step(state, evaluation, *stepper.inputs(state, 1)), columns

    def _turn(
        self, state: State, evaluation: Evaluation
    ) -> tuple[Packing, Callable[..., Any]]:
        """Return the compiled rest of a step, a new one if none is kept.

        And how the state is packed for it.
        """
        stepper = self.solver.stepper
        nests: Any = (state, evaluation._replace(aux={}))
        like, known = tf.nest.map_structure(spec_of, nests)
        if not holds_large(state):  # what is known to be large is written in place
            like, known = stepper.of_any_size(like, known)

        def make() -> tuple[Packing, OfVariables]:
            packing = Packing(like, group=len(tf.nest.flatten(like)))

            def run(packed: list[Any], known: Evaluation) -> Any:
                known, here = measured(known), packing.unpack(packed)
                row = stepper.row(None, known)  # before an optimizer moves variables
                after = self._ruled.step(here, known)
                told = {"expected": after.expected} if stepper.lookahead else {}
                flags = tf.stack([after.code, tf.cast(after.accepted, tf.int32)])
                query, carried = stepper.query(after), packing.pack(after)
                return in_place(packed, (flags, query, row, told, carried))

            return packing, OfVariables.traced(
                run, (packing.specs, known), variables, in_sequence=place is None
            )

        place, key = self.solver.forms.kept()
        variables = self.solver.forms.variables()
        shapes = (*((v.shape, v.dtype) for v in variables), *shapes_of((like, known)))
        packing, made = kept(place, ("turn", key, self._ruled.key, shapes), make)
        turn = made.of(variables)
        if turn is None:
            packing, made = make()
            turn = made.of(variables)
        return packing, turn
