"""THE loop: update, evaluate, record, ask the stopping rules; compiled in chunks.

Steps run in chunks. The first is one step, so that errors surface at once; then the
loop is compiled, and chunks grow until one takes `CHUNK_SECONDS`. A chunk returns what
happened at each of its steps as arrays: every step is recorded, and none costs a call
from Python. Progress, logs, callbacks and interrupts live between chunks.

Which steps run in which compiled form depends on the function and on the number of
steps alone, never on the clock, so that a run repeats to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.optimize.methods.keras_optimizer import KerasMethod
from tfgrad.optimize.objective import Evaluation, Objective
from tfgrad.optimize.stopping import NONFINITE, RUNNING, Step, Stopping

CHUNK_SECONDS = 0.075
"""What a chunk should take: short enough for Ctrl-C, long enough to hide a Python
call."""

GROWTH = 16
"""How much longer a chunk may be than the one before it, which was timed."""

ROW_BYTES = 2**20
"""Memory for the rows of one chunk; XLA sets it aside whatever the chunk's length."""

LOOP_STEPS = 100
"""Compiling the loop pays from about here, measured on functions of 30 to 140 ops."""

XLA_STEPS = 3000
"""Compiling it with XLA pays from about here, measured likewise, ..."""

XLA_STEPS_PER_OP = 20
"""... and for larger functions, which take longer to compile, from this many per op."""

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


class Loop:
    """A run of a method on an objective, from chunk to chunk.

    Args:
        objective: What to minimise.
        make_method: Returns the method for the variables of the objective.
        stopping: The rules to ask after every step.
        steps: How many steps are planned.
        jit: True compiles with XLA, False does not, "auto" where it pays and agrees.

    Attributes:
        evaluation: The objective where the variables are now.
        step: How many steps were taken to get there.
        evaluations: How often the objective was evaluated.
        code: What stopped the loop: a position in `STATUSES`; RUNNING if nothing did.
        nonfinite: With code NONFINITE, rows of which the last is not finite.
    """

    def __init__(
        self,
        objective: Objective,
        make_method: Callable[[list[Any]], KerasMethod],
        stopping: Stopping,
        *,
        steps: int,
        jit: bool | str,
    ) -> None:
        """Evaluate the start, which is row 0."""
        self._objective = objective
        self._stopping = stopping
        self._began = time.perf_counter()
        self.evaluations = 0
        if not objective.variables:  # this first evaluation is what finds them
            objective.evaluate()
            self.evaluations += 1
        self.method = make_method(objective.owners)
        self.step = 0
        self.evaluation = self._evaluate()
        start = self.here()
        self.code = RUNNING if _is_finite(start) else NONFINITE
        self.nonfinite = start
        self._form = self._choose_form(steps, jit)
        self._is_fallible = jit == "auto"
        self._chunk: Callable[..., Any] | None = None
        self._length = 1
        self._capacity = ROW_BYTES // sum(c.nbytes for c in start.columns.values())

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.perf_counter() - self._began

    def here(self) -> Rows:
        """Return the one row of the current point."""
        row = {
            name: np.asarray(value)[None] for name, value in self.evaluation.row.items()
        }
        return self._rows(row, self.seconds)

    def advance(self, most: int) -> Rows:
        """Take between one and `most` steps; return their rows."""
        began = self.seconds
        if self.step == 0 or self._form == "single" or not self.method.is_compiled:
            return self._take_one()
        if self._chunk is None:
            return self._take_first_chunk()
        length = min(most, self._length, self._capacity)
        rows = self._take_chunk(length)
        growth = CHUNK_SECONDS / (self.seconds - began)
        self._length = max(1, int(length * min(GROWTH, growth)))
        return rows

    def gradient(self) -> list[tf.Tensor]:
        """Return the gradient where the variables are, without the method's scale."""
        scale = self.method.scale()
        leaves = self.evaluation.gradient
        return (
            leaves if scale is None else [g / tf.cast(scale, g.dtype) for g in leaves]
        )

    def evaluate(self) -> None:
        """Evaluate the objective again: its variables have been moved."""
        self.evaluation = self._evaluate()

    def _evaluate(self) -> Evaluation:
        self.evaluations += 1
        return self._objective.evaluate(self.method.scale())

    def _take_one(self) -> Rows:
        before, x = self.evaluation, self._objective.read()
        self.method.update(before.gradient)
        self.evaluation = self._evaluate()
        self.step += 1
        rows = self.here()
        if self._stopping.is_empty:
            self.code = RUNNING if _is_finite(rows) else NONFINITE
        else:
            self.code = int(
                self._stopping.code(self._between(x, before, self.evaluation))
            )
        return self._without_last(rows, x) if self.code == NONFINITE else rows

    def _take_chunk(self, length: int) -> Rows:
        began = self.seconds
        assert self._chunk is not None
        taken, code, before, self.evaluation, columns = self._chunk(
            tf.constant(length), self.evaluation
        )
        count = int(taken)
        self.step += count
        self.evaluations += count
        self.code = int(code)
        kept = {name: column.numpy()[:count] for name, column in columns.items()}
        rows = self._rows(kept, began)
        return self._without_last(rows, before) if self.code == NONFINITE else rows

    def _take_first_chunk(self) -> Rows:
        """Compile the loop and take one step; under "auto", XLA has to agree."""
        self._chunk = self._compile()
        if self._form == "graph" or not self._is_fallible:
            return self._take_chunk(1)
        try:
            rows = self._take_chunk(1)
        except tf.errors.OpError:
            # XLA has no kernel for something in it, and nothing was run.
            self._form = "graph"
            return self._take_first_chunk()
        claimed, self.evaluation = self.evaluation, self._evaluate()
        if self.code != NONFINITE and not _agree(claimed, self.evaluation):
            self._form, self.code = "graph", RUNNING
            self._chunk = self._compile()
            return self.here()
        return rows

    def _between(self, x: list[tf.Tensor], before: Evaluation, at: Evaluation) -> Step:
        """Return the step from `x` to where the variables are now."""
        fun, norm, previous = at.row["fun"], at.row["grad_norm"], before.row["fun"]
        now = [] if self._stopping.xtol is None else self._objective.read()
        return Step(fun, norm, now, previous, x)

    def _without_last(self, rows: Rows, x: list[tf.Tensor]) -> Rows:
        """Go back from a point that is not finite to the one before it."""
        self.nonfinite = rows
        self.step -= 1
        for variable, value in zip(self._objective.variables, x, strict=True):
            variable.assign(value)
        self.evaluate()
        return Rows({name: column[:-1] for name, column in rows.columns.items()})

    def _rows(self, columns: dict[str, Any], began: float) -> Rows:
        """Return rows that end at the current step; their time is spread evenly."""
        count = len(columns["fun"])
        steps = np.arange(self.step - count + 1, self.step + 1)
        seconds = np.linspace(began, self.seconds, count + 1)[1:]
        return Rows({"step": steps, **columns, "seconds": seconds})

    def _compile(self) -> Callable[..., Any]:
        """Return the function that takes up to `limit` steps."""
        is_xla = self._form == "xla"

        def chunk(limit: tf.Tensor, start: Evaluation) -> Any:
            size = self._capacity if is_xla else limit  # XLA needs to know it
            arrays = {
                name: tf.TensorArray(value.dtype, size, element_shape=value.shape)
                for name, value in start.row.items()
            }

            def goes_on(taken: Any, code: Any, *_: Any) -> tf.Tensor:
                on: tf.Tensor = (taken < limit) & (code == RUNNING)
                return on

            def body(taken: Any, _: Any, __: Any, at: Evaluation, arrays: Any) -> Any:
                x = self._objective.read()
                self.method.update(at.gradient)
                after = self._objective.evaluate(self.method.scale())
                written = {
                    name: array.write(taken, after.row[name])
                    for name, array in arrays.items()
                }
                code = self._stopping.code(self._between(x, at, after))
                return taken + 1, code, x, after, written

            carry = (0, RUNNING, self._objective.read(), start, arrays)
            *rest, arrays = tf.while_loop(goes_on, body, carry, parallel_iterations=1)
            return *rest, {name: array.stack() for name, array in arrays.items()}

        compiled: Callable[..., Any] = tf.function(
            chunk, autograph=False, jit_compile=is_xla or None
        )
        return compiled

    def _choose_form(self, steps: int, jit: bool | str) -> str:
        """Return "single", "graph" or "xla": how all steps but the first are run."""
        operations = self._objective.operations(self.method.scale())
        if not operations:  # it runs eagerly
            return "single"
        if jit is True:
            return "xla"
        if steps < LOOP_STEPS:
            return "single"
        if jit is False or steps < max(XLA_STEPS, XLA_STEPS_PER_OP * len(operations)):
            return "graph"
        unfit = any(part in op for op in operations for part in NOT_FOR_XLA)
        return "graph" if unfit else "xla"


def _is_finite(rows: Rows) -> bool:
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
