"""The loop over batches: draw, evaluate, judge, update; compiled in chunks.

It differs from `Loop`, whose steps share one function, in the order of a step. The loss
is another one with each batch, so a step evaluates the batch that it has drawn, and
then moves; nothing is evaluated twice, and what the loss itself writes (moving
averages, states of random generators) is written once for each step.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.graphs import written_variables
from tfgrad.errors import TfgradError
from tfgrad.nested import Nest
from tfgrad.optimize.data import (
    Source,
    names_of_parts,
    require_batch,
    size_of,
    spreads,
)
from tfgrad.optimize.loop import (
    CHUNK_SECONDS,
    GROWTH,
    ROW_BYTES,
    Rows,
    is_finite,
    row_of,
    rows_to,
)
from tfgrad.optimize.objective import Evaluation, Objective
from tfgrad.optimize.snapshot import Snapshot
from tfgrad.optimize.stopping import NONFINITE, RUNNING, Step, Stopping
from tfgrad.optimize.turns import KerasTurns

SIZE = "size of the batch"
"""A column of the rows in a chunk: the weight of a batch in the mean of its epoch."""


class Carried(NamedTuple):
    """What the compiled loop carries from step to step.

    Attributes:
        rows: Evaluations made in this chunk: one more than steps if a rule held.
        code: What stopped it.
        ahead: The batch that comes next, if there is one: a `tf.experimental.Optional`.
        drawn: The batch before it.
        at: The last evaluation, of the point before the last step.
        last: The evaluation before that.
        fun: The value of `at`; NaN before the first.
        x: The point that `at` belongs to, leaf by leaf.
    """

    rows: Any
    code: Any
    ahead: Any
    drawn: Any
    at: Evaluation
    last: Evaluation
    fun: Any
    x: list[tf.Tensor]


class DataLoop:
    """A run of an optimizer over batches, from chunk to chunk.

    Args:
        objective: The loss.
        make_turns: Returns the optimizer at work on the objective.
        stopping: The rules to ask in every step, about its batch; the target is a
            matter of whole epochs.
        source: The batches.
        position: In which epoch it begins, and how many batches of it to leave out.

    Attributes:
        stopping: The rules.
        step: How many steps were taken.
        evaluations: How often the loss was evaluated.
        code: What stopped the loop: a position in `STATUSES`; RUNNING if nothing did.
        turns: The optimizer at work.
        nonfinite: With code NONFINITE, rows of which the last is not finite.
        epoch: Whole epochs that were gone through.
        batch: Steps taken in the epoch since.
        sums: Over the epoch so far, weighted by the sizes of batches: each column, and
            the weights under `SIZE`.
    """

    repeats = False  # a batch has a value of its own
    _ahead: Any

    def __init__(
        self,
        objective: Objective,
        make_turns: Callable[[Objective], KerasTurns],
        stopping: Stopping,
        *,
        source: Source,
        position: tuple[int, int] = (0, 0),
    ) -> None:
        """Draw the first batch and evaluate the start."""
        self._began = time.perf_counter()
        self._objective = objective
        self._source = source
        self.stopping = stopping
        self.step = self.evaluations = 0
        self.epoch, self.batch = position
        self.batch = max(0, self.batch - 1)  # the batch before is part of where it is
        self._iterator: Any = None
        self._open()
        require_batch(not self.is_over)
        drawn = self._ahead.get_value()
        batch = source.batch(drawn)
        before = int(objective.takes_values)
        self._spreads = spreads(objective.f, before, batch)
        objective.example = self._arguments(batch)
        if not objective.variables:  # this first evaluation is what finds them
            self._compile_evaluation(lambda batch: objective.evaluate(None, batch))
            self._look(drawn)
            self.evaluations += 1
        self.turns = make_turns(objective)
        self._compile_evaluation(self.turns.evaluate)
        at = self._look(drawn)
        self.evaluations += 1
        self._at: Evaluation | None = at
        fun = tf.constant(np.nan, at.row["fun"].dtype)
        self._carried = Carried(
            tf.constant(0), tf.constant(RUNNING), self._ahead, self._ahead, at, at, fun,
            objective.read(),
        )  # fmt: skip
        start = self.here()
        self.code = RUNNING if self._is_finite(start) else NONFINITE
        self.nonfinite = start
        self.sums: dict[str, Any] = {}
        self._chunk: Callable[..., Any] = self._steps
        self._is_compiled = self._has_row = False
        self._length = 1
        self._capacity = ROW_BYTES // sum(c.nbytes for c in start.columns.values())

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.perf_counter() - self._began

    @property
    def at(self) -> Evaluation:
        """The evaluation of the current point, on the batch that the next step takes.

        At the end of the data, on the last batch again. Where the loop has not come to
        it yet, the loss is evaluated, and what that writes is undone.
        """
        if self._at is None:
            optional = self._carried.drawn if self.is_over else self._ahead
            self._at = self._look(optional.get_value())
        return self._at

    @property
    def position(self) -> tuple[int, int]:
        """Whole epochs gone through, and steps in the epoch since.

        A source that is opened there goes on with the batch that the next step takes.
        """
        return self.epoch, self.batch

    @property
    def is_over(self) -> bool:
        """Whether no batch of the epoch is left."""
        return not bool(self._ahead.has_value())

    def snapshot(self) -> Snapshot:
        """Return all that a loop of the same kind needs to go on from here."""
        facts = {
            "step": self.step,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "position": list(self.position),
            "has_row": self._has_row,
            "has_others": bool(self._objective.others() or self._written),
            "sums": {
                name: np.asarray(total).tolist() for name, total in self.sums.items()
            },
        }
        carried = self._carried
        memory = tf.nest.flatten((carried.at, carried.last, carried.fun, carried.x))
        return Snapshot(facts, [v.read_value() for v in self._variables()], memory, [])

    def restore(self, snapshot: Snapshot) -> None:
        """Go to where a loop of the same kind was, begun at its position.

        Raises:
            InvalidArgumentError: If it was of another kind; nothing was changed.
        """
        facts, carried = snapshot.facts, self._carried
        snapshot.check_like(self.snapshot())
        for variable, value in zip(self._variables(), snapshot.variables, strict=True):
            variable.assign(value)
        drawn = self._ahead
        self.epoch, self.batch = facts["position"]
        if self.batch:
            self._ahead = self._iterator.get_next_as_optional()
        like = (carried.at, carried.last, carried.fun, carried.x)
        at, last, fun, x = tf.nest.pack_sequence_as(like, snapshot.memory)
        self._carried = Carried(
            tf.constant(0), tf.constant(RUNNING), self._ahead, drawn, at, last, fun, x
        )
        self.step, self.evaluations = facts["step"], facts["evaluations"]
        self._began = time.perf_counter() - facts["seconds"]
        self.sums = {name: np.asarray(total) for name, total in facts["sums"].items()}
        self._at, self._has_row, self.code = None, facts["has_row"], RUNNING
        if self.step:
            self.turns.prepare(at)

    def _variables(self) -> list[tf.Variable]:
        """Return the variables whose values are part of where the loop is."""
        parts = (
            self._objective.variables,
            self._objective.others(),
            self._written,
            self.turns.variables(),
        )
        return list({id(v): v for part in parts for v in part}.values())

    def start(self) -> Rows:
        """Return no row: the first step makes the first one."""
        return self.here().first(0)

    def here(self) -> Rows:
        """Return the one row of the current point."""
        return rows_to(self.step, row_of(self.at), self.seconds, self.seconds)

    def point(self) -> list[tf.Tensor]:
        """Return the current point, leaf by leaf."""
        return self._objective.read()

    def advance(self, most: int) -> Rows:
        """Take up to `most` steps, not beyond the end of the epoch."""
        began = self.seconds
        if self.is_over:
            self._open()
            if self.is_over:
                return self.start()
        if not self._is_compiled and self.turns.is_compiled and self._is_traced:
            # A function of its own: TensorFlow counts the traces of a method.
            steps = functools.partial(self._steps)
            self._chunk = tf.function(steps, autograph=False)
            self._is_compiled, self._length = True, 1
        length = min(most, self._length, self._capacity)
        rows = self._take_chunk(length)
        growth = CHUNK_SECONDS / (self.seconds - began)
        self._length = max(1, int(len(rows) * min(GROWTH, growth)))
        return rows

    def next_epoch(self) -> dict[str, float]:
        """Go to the next epoch; return the means over the one that is over."""
        sums, self.sums = self.sums, {}
        weight = sums.pop(SIZE)
        self.epoch, self.batch = self.epoch + 1, 0
        return {name: total / weight for name, total in sums.items()}

    def require_no_error(self) -> None:
        """Raise what the user's code raised instead of yielding a batch."""
        if self.is_over and self._source.error is not None:
            raise self._source.error

    def finish(self) -> Rows:
        """Let the optimizer finish; return the row of the last point, if it lacks."""
        if self.turns.finish():
            self._at = None
        if self._has_row:
            return self.start()
        self._has_row = True
        row = self.here()
        if self._is_finite(row) or self.code == NONFINITE or self.step == 0:
            return row
        self.code, self.nonfinite = NONFINITE, row
        self._go_back()
        return self.start()

    @property
    def blame(self) -> str:
        """What is not finite in the batch at hand, or with it, and where; or ""."""
        drawn = self._carried.drawn.get_value()
        arguments = self._arguments(self._source.batch(drawn))
        before = int(self._objective.takes_values)
        names = names_of_parts(self._objective.f, before, arguments)
        for name, leaf in zip(names, tf.nest.flatten(arguments), strict=True):
            if not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
                continue
            bad = np.argwhere(~np.isfinite(leaf.numpy().astype(np.float64)))
            if len(bad):
                row = f", {self._source.row(drawn, bad[0][0])}" if bad.size else ""
                value = leaf.numpy()[tuple(bad[0])]
                where = f"batch {self.batch} of epoch {self.epoch}"
                return f"{where} (counted from 0) holds {value} in `{name}`{row}"
        return self._objective.blame(*arguments)

    # --- the parts of a step ---

    def _open(self) -> None:
        if self._iterator is not None:
            # To close one is to wait for its threads, as long as a short epoch takes.
            threading.Thread(target=_drop, args=[self._iterator]).start()
        self._iterator = self._source.open(self.epoch, self.batch)
        self._ahead = self._iterator.get_next_as_optional()

    def _arguments(self, batch: Nest) -> tuple[Nest, ...]:
        """Return what the loss takes of a batch."""
        return tuple(batch) if self._spreads else (batch,)

    def _compile_evaluation(self, evaluate: Callable[..., Evaluation]) -> None:
        """Compile the evaluation of a batch, for batches of all sizes at once."""

        def evaluated(drawn: Nest) -> Any:
            batch = self._source.batch(drawn)
            arguments = self._arguments(batch)
            at = evaluate(arguments)
            if not tf.executing_eagerly() and not self._objective.is_compiled:
                raise NotImplementedError
            return at, size_of(batch)

        function = tf.function(evaluated, autograph=False)
        self._written: list[tf.Variable] = []
        self._is_traced = False
        self._evaluate: Callable[..., Any] = evaluated
        try:
            concrete = function.get_concrete_function(self._source.spec)
        except TfgradError:
            raise
        except Exception:  # eagerly, it runs or raises the user's own error
            return
        self._evaluate, self._is_traced = concrete, True
        owned = {id(variable) for variable in self._objective.variables}
        self._written = [
            variable
            for variable in written_variables(concrete)
            if id(variable) not in owned
        ]

    def _look(self, drawn: Nest) -> Evaluation:
        """Evaluate a batch where the variables are, and undo what that writes."""
        before = [variable.read_value() for variable in self._written]
        at, _ = self._evaluate(drawn)
        self._restore(before)
        return at

    def _restore(self, values: list[tf.Tensor]) -> None:
        for variable, value in zip(self._written, values, strict=True):
            variable.assign(value)

    def _steps(self, iterator: Any, limit: tf.Tensor, start: Carried) -> Any:
        """Take up to `limit` steps; part of a trace, or in Python."""
        arrays = {
            name: tf.TensorArray(value.dtype, limit, element_shape=value.shape)
            for name, value in start.at.row.items()
        }
        arrays[SIZE] = tf.TensorArray(tf.int32, limit, element_shape=[])

        def goes_on(carried: Carried, _: Any) -> tf.Tensor:
            is_within = (carried.rows < limit) & carried.ahead.has_value()
            on: tf.Tensor = is_within & (carried.code == RUNNING)
            return on

        def body(carried: Carried, arrays: Any) -> Any:
            after, size = self._step(carried)
            row = {**after.at.row, SIZE: size}
            arrays = {
                name: array.write(carried.rows, row[name])
                for name, array in arrays.items()
            }
            return after._replace(ahead=iterator.get_next_as_optional()), arrays

        last, arrays = tf.while_loop(
            goes_on, body, (start, arrays), parallel_iterations=1
        )
        # Of many more places than an epoch has steps, stacking all would take long.
        written = tf.range(last.rows)
        return last, {name: array.gather(written) for name, array in arrays.items()}

    def _step(self, carried: Carried) -> tuple[Carried, tf.Tensor]:
        """Evaluate the batch ahead, and move, unless a rule says to stop."""
        written = [tf.identity(variable) for variable in self._written]
        x = self._objective.read()
        at, size = self._evaluate(carried.ahead.get_value())
        code = self._judge(at, carried, x)

        def stay() -> None:
            self._restore(written)
            is_bad = code == NONFINITE
            pairs = zip(carried.x, x, strict=True)
            self._objective.assign([tf.where(is_bad, old, now) for old, now in pairs])

        tf.cond(code == RUNNING, lambda: self.turns.update(at), stay)
        rows, drawn, fun = carried.rows + 1, carried.ahead, at.row["fun"]
        return Carried(rows, code, drawn, drawn, at, carried.at, fun, x), size

    def _judge(self, at: Evaluation, carried: Carried, x: list[tf.Tensor]) -> tf.Tensor:
        rules, norm = replace(self.stopping, target=None), at.row["grad_norm"]
        if self.turns.scales:
            # An overflow is the optimizer's own affair: it takes a smaller scale.
            norm = tf.where(tf.math.is_finite(norm), norm, norm.dtype.max)
        step = Step(at.row["fun"], norm, x, carried.fun, carried.x)
        code = rules.code(step)
        if rules.xtol is None:
            return code
        first = replace(rules, xtol=None).code(step)  # nothing has moved yet
        return tf.where(tf.math.is_nan(carried.fun), first, code)

    # --- between chunks ---

    def _take_chunk(self, length: int) -> Rows:
        began = self.seconds
        start = self._carried._replace(rows=tf.constant(0), ahead=self._ahead)
        carried, columns = self._chunk(self._iterator, tf.constant(length), start)
        count, self.code = int(carried.rows), int(carried.code)
        self._carried, self._ahead = carried, carried.ahead
        self.evaluations += count
        taken = count - int(self.code != RUNNING)
        self.step, self.batch = self.step + taken, self.batch + taken
        kept = {name: column.numpy() for name, column in columns.items()}
        sizes = kept.pop(SIZE)
        last = self.step - int(self.code == RUNNING)
        rows = rows_to(last, kept, began, self.seconds)
        self._at, self._has_row = None, self.code != RUNNING
        if self.code == NONFINITE:
            self.nonfinite, rows = rows, rows.first(count - 1)
            self._at, self._has_row = carried.last, self.step > 0
            self.step -= int(self.step > 0)  # where the point was put back to
        elif self.code != RUNNING:
            self._at = carried.at
        self._add(rows, sizes[: len(rows)])
        return rows

    def _is_finite(self, rows: Rows) -> bool:
        """Return whether the last row is; scaled gradients may overflow."""
        if self.turns.scales:
            return bool(np.isfinite(rows.columns["fun"][-1]))
        return is_finite(rows)

    def _go_back(self) -> None:
        """Go back from a point that is not finite to the one before it."""
        self._objective.assign(self._carried.x)
        self._at = self._carried.at
        self.step -= 1

    def _add(self, rows: Rows, sizes: np.ndarray[Any, Any]) -> None:
        """Add rows to the sums, one after the other, so that chunks do not matter."""
        columns = {SIZE: np.ones(len(rows)), **rows.columns}
        for name, column in columns.items():
            if name in ("step", "seconds", "grad_norm") or re.match(r"x\b", name):
                continue
            weighted = sizes.reshape([-1] + [1] * (column.ndim - 1)) * column
            start = np.expand_dims(self.sums.get(name, np.zeros(column.shape[1:])), 0)
            terms = np.concatenate([start, weighted.astype(np.float64)])
            self.sums[name] = np.add.accumulate(terms)[-1]


def _drop(iterator: Any) -> None:
    """Do nothing: the last reference goes with the call."""
