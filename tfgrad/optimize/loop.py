"""THE loop: a solver's steps, by single calls or compiled in chunks; rows out.

The loop knows no method, no data and no log. A step evaluates, lets the solver accept,
asks the rules and lets the solver move; what happened comes back as rows, one for each
accepted point. In the form "calls", a step is two calls: of the function, and of the
rest, which is compiled once for all functions where it does not depend on them. In the
forms "graph" and "xla" a chunk of many steps is one call.

Which form a step runs in depends on counts alone, never on the clock, so that a run
repeats to the last bit. Only XLA rounds otherwise than the rest.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import Nest
from tfgrad.optimize import stopping
from tfgrad.optimize.history import Rows
from tfgrad.optimize.problem import Evaluation
from tfgrad.optimize.solvers import NO_XLA, Form, Solver, State
from tfgrad.optimize.stopping import RUNNING, Step, Tolerances, code_of, judge

CHUNK_SECONDS = 0.075
"""What a chunk should take: short enough for Ctrl-C, long enough to hide a Python
call."""

GROWTH = 64
"""How much longer a chunk may be than the one before it, which was timed."""

ROW_BYTES = 2**20
"""Memory for the rows of one chunk; XLA sets it aside whatever the chunk's length."""

TURNS = 8
"""Evaluations that a compiled chunk may take per step; a line search takes one to
three."""

GROUP = 8
"""Scalars in one vector: of more operands, XLA makes a kernel each (measured with
TensorFlow 2.21)."""

SMALL_TENSOR = 4096
"""Elements up to which a tensor is copied rather than handed over by itself."""

MOST_KEPT = 64
"""Compiled steps that are kept; the least recently used goes first."""

KEPT: OrderedDict[Any, Any] = OrderedDict()
"""The steps that know nothing of the function, compiled once for all of them."""


class Packing:
    """A nest as few tensors: what a compiled loop carries from turn to turn.

    A scalar costs a loop as much as a small vector: a buffer to carry, and a kernel to
    compute it. So the scalars of a nest travel together. A call from Python costs some
    microseconds for each tensor; there all that is small travels together.

    Args:
        like: A nest of the structure, shapes and dtypes.
        is_for_calls: Whether it is handed to a function from Python at each step.

    >>> packing = Packing({"a": tf.constant(1.0), "b": [tf.constant(2.0), tf.ones(3)]})
    >>> packed = packing.pack({"a": 1.0, "b": [2.0, tf.ones(3)]})
    >>> [tensor.numpy().tolist() for tensor in packed]
    [[1.0, 2.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, like: Nest, *, is_for_calls: bool = False) -> None:
        """Group what is small by dtype."""
        leaves = [_spec(leaf) for leaf in tf.nest.flatten(like)]
        self._structure = tf.nest.pack_sequence_as(like, leaves)
        most = SMALL_TENSOR if is_for_calls else 1
        small: dict[tf.DType, list[int]] = {}
        for i, leaf in enumerate(leaves):
            is_tensor = isinstance(leaf, tf.TensorSpec)
            if is_tensor and (is_for_calls or leaf.shape.rank == 0):
                count = leaf.shape.num_elements()
                if count is not None and count <= most:
                    small.setdefault(leaf.dtype, []).append(i)
        size = len(leaves) if is_for_calls else GROUP
        self._groups = [
            [(i, leaves[i].shape) for i in indices[k : k + size]]
            for indices in small.values()
            for k in range(0, len(indices), size)
        ]
        grouped = {i for group in self._groups for i, _ in group}
        self._others = [i for i in range(len(leaves)) if i not in grouped]

    def pack(self, nest: Nest) -> list[Any]:
        """Return the tensors that hold the leaves of a nest."""
        leaves = tf.nest.flatten(nest)
        vectors = [
            tf.concat([tf.reshape(leaves[i], [-1]) for i, _ in group], 0)
            if any(shape.rank for _, shape in group)
            else tf.stack([leaves[i] for i, _ in group])
            for group in self._groups
        ]
        return vectors + [leaves[i] for i in self._others]

    def unpack(self, tensors: Sequence[Any]) -> Any:
        """Return the nest whose leaves they hold: the inverse of `pack`."""
        leaves = dict(zip(self._others, tensors[len(self._groups) :], strict=True))
        for group, vector in zip(self._groups, tensors, strict=False):
            if any(shape.rank for _, shape in group):
                parts = tf.split(vector, [shape.num_elements() for _, shape in group])
                pairs = zip(group, parts, strict=True)
                leaves |= {i: tf.reshape(part, shape) for (i, shape), part in pairs}
            else:
                pairs = zip(group, tf.unstack(vector), strict=True)
                leaves |= {i: scalar for (i, _), scalar in pairs}
        ordered = [leaf for _, leaf in sorted(leaves.items())]
        return tf.nest.pack_sequence_as(self._structure, ordered)


class Turn(NamedTuple):
    """A compiled step after its evaluation.

    Attributes:
        packing: Of the state.
        run: Takes the packed state and the leaves of an evaluation without aux values;
            returns `[code, accepted, step]`, the expected fall, the leaves of the next
            query, and the packed state.
    """

    packing: Packing
    run: Callable[..., Any]


class Chunk(NamedTuple):
    """A compiled loop of steps.

    Attributes:
        packing: Of the state.
        capacity: How many steps it can take at most.
        run: Takes the limit and the packed state; returns how many rows there are, the
            packed state and the columns.
        evaluate: Takes the packed state; returns the next evaluation.
    """

    packing: Packing
    capacity: int
    run: Callable[..., Any]
    evaluate: Callable[..., Any]


class Loop:
    """A solver's steps, from chunk to chunk.

    Args:
        solver: What takes a step.
        tolerances: The rules that were asked for.
        planned: How many steps there will be in all, at most.
        jit: As for `minimize`.
        clock: Returns the seconds since the run began.
        in_step: Whether other processes have to take chunks of the same lengths, which
            `adapt` then tells.

    Attributes:
        solver: As above.
        elapsed: How long the last chunk took, in seconds.
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
        """Compile nothing yet."""
        self.solver = solver
        self.elapsed, self._taken, self._in_step = 0.0, 0, in_step
        self.bad: Rows | None = None
        self.blame = ""
        self._tolerances = tolerances
        self._planned, self._jit, self._clock = planned, jit, clock
        self._length = 1
        self._chunks: dict[str, Chunk] = {}

    def start(self) -> tuple[State, Rows]:
        """Return where the run begins, and its row if it was evaluated."""
        state, evaluation = self.solver.init()
        if evaluation is None:
            return state, Rows({})
        return self._judged(state, evaluation)

    def _judged(self, state: State, evaluation: Evaluation) -> tuple[State, Rows]:
        """Return a state just begun, with the code of the rules, and its row."""
        code = int(state.code) or int(
            judge(self._step(state, state, is_start=tf.constant(True)))
        )
        state = state._replace(code=tf.constant(code))
        row = self.row(state, evaluation)
        if code == code_of("nonfinite"):
            self.bad = row
            state, self.blame = self.solver.recover(state)
        return state, row

    def row(self, state: State, evaluation: Evaluation) -> Rows:
        """Return the one row of the current point."""
        x = state.x if isinstance(state.x, tf.Tensor) else None
        row = self.solver.row(x, evaluation)
        if self.solver.lag:
            row["expected"] = state.expected
        columns = {name: _array([value]) for name, value in row.items()}
        columns = self.solver.named(columns)
        now = self._clock()
        return Rows({"step": np.array([int(state.step)]), **columns}).timed(now, now)

    def advance(self, state: State, limit: int) -> tuple[State, Rows]:
        """Take up to `limit` steps, at least one unless the run ends.

        Returns:
            Where it is then, and the rows of the points that were accepted.
        """
        began, first = self._clock(), int(state.step) + self.solver.lag
        form = self.solver.form(state, self._planned, self._jit)
        state = self.solver.prepare(state)
        if not self.solver.has_next(state):
            return state, Rows({})
        state, columns = self._by(form, state, limit)
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

    def _by(self, form: Form, state: State, limit: int) -> tuple[State, dict[str, Any]]:
        take = self._call if form.name == "calls" else self._take
        return take(form, state, limit)

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
        """Give back what the run has borrowed."""
        self.solver.close()

    # --- by single calls ---

    def _call(
        self, form: Form, state: State, limit: int
    ) -> tuple[State, dict[str, Any]]:
        """Take steps one by one, for as long as a chunk may take."""
        if self.solver.is_eager:
            return self._take_eagerly(state)
        began, taken = time.perf_counter(), 0
        if self._in_step:
            limit = min(limit, self._length)
        rows: list[dict[str, Any]] = []
        query, evaluations = self.solver.query(state), int(state.evaluations)
        inputs = self.solver.inputs(state, limit)
        packed: Any = None
        while True:
            evaluation = self.solver.evaluate(query)
            row = self.solver.row(query if self.solver.lag else None, evaluation)
            known = tf.nest.flatten(evaluation._replace(aux={}))
            if packed is None:
                turn = self._turn(state, evaluation)
                packed = turn.packing.pack(state)
            counts, expected, *rest = turn.run(*packed, *known, *inputs)
            leaves = len(rest) - len(packed)
            queried, packed = rest[:leaves], rest[leaves:]
            query = queried[0] if queried else ()
            code, accepted, _ = counts.numpy().tolist()
            evaluations += 1
            if accepted:
                taken += 1
                rows.append({**row, "expected": expected} if self.solver.lag else row)
            self.elapsed, self._taken = time.perf_counter() - began, taken
            is_late = self.elapsed > CHUNK_SECONDS and not self._in_step
            if code or taken >= limit or evaluations >= form.evaluations or is_late:
                break
        names = rows[0] if rows else ()
        columns = {name: _array([each[name] for each in rows]) for name in names}
        return turn.packing.unpack(packed), columns

    def adapt(self, seconds: float) -> None:
        """Let the next chunk be as long as one should be, by what the last one took."""
        growth = CHUNK_SECONDS / seconds if seconds else 1.0
        self._length = max(1, int(max(self._taken, 1) * min(GROWTH, growth)))

    def _take_eagerly(self, state: State) -> tuple[State, dict[str, Any]]:
        """Take one step that no trace can hold."""
        evaluation = self.solver.evaluate(self.solver.query(state))
        row = self.solver.row(None, evaluation)
        columns = {name: _array([value]) for name, value in row.items()}
        return self._decide(state, evaluation, *self.solver.inputs(state, 1)), columns

    def _turn(self, state: State, evaluation: Evaluation) -> Turn:
        """Return the compiled rest of a step, a new one if none is kept."""
        kept, key = self.solver.kept()
        kept = KEPT if kept is None else kept
        known = evaluation._replace(aux={})
        leaves = tf.nest.flatten((state, known))
        specs = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = "turn", key, self._tolerances, stopping.RULES, specs
        if key not in kept:
            kept[key] = self._compile_turn(state, known)
            if len(kept) > MOST_KEPT and kept is KEPT:
                KEPT.popitem(last=False)
        if kept is KEPT:
            KEPT.move_to_end(key)
        turn: Turn = kept[key]
        return turn

    def _compile_turn(self, state: State, evaluation: Evaluation) -> Turn:
        packing = Packing(state, is_for_calls=True)
        packed = packing.pack(state)

        def run(*tensors: tf.Tensor) -> Any:
            state = packing.unpack(tensors[: len(packed)])
            known = tf.nest.pack_sequence_as(evaluation, tensors[len(packed) :])
            state = self._decide(state, known)
            counts = tf.stack(
                [state.code, tf.cast(state.accepted, tf.int32), state.step]
            )
            query = tf.nest.flatten(self.solver.query(state))
            return [counts, state.expected, *query, *packing.pack(state)]

        specs = map(tf.TensorSpec.from_tensor, [*packed, *tf.nest.flatten(evaluation)])
        return Turn(
            packing, tf.function(run, autograph=False).get_concrete_function(*specs)
        )

    # --- in compiled chunks ---

    def _take(
        self, form: Form, state: State, limit: int
    ) -> tuple[State, dict[str, Any]]:
        """Take a chunk of steps in one call."""
        is_new = form.name not in self._chunks
        if is_new and not self._prepare(form, state):
            form = self.solver.form(state, self._planned, self._jit)
            return self._by(form, state, limit)
        chunk = self._chunks[form.name]
        began, length = time.perf_counter(), min(limit, self._length, chunk.capacity)
        inputs = self.solver.inputs(state, length)
        counts, packed, columns = chunk.run(
            tf.constant(length), chunk.packing.pack(state), *inputs
        )
        taken = self._taken = int(counts)
        self.elapsed = time.perf_counter() - began
        self.adapt(self.elapsed)
        rows = {name: column.numpy()[:taken] for name, column in columns.items()}
        state = chunk.packing.unpack(packed)
        if is_new and form.name == "xla" and not self._agrees(chunk, state):
            self.solver.kept_with_f()[0][NO_XLA] = True
            del self._chunks[form.name]
        return state, rows

    def _prepare(self, form: Form, state: State) -> bool:
        """Compile the chunk; return False if XLA cannot, or rounds otherwise."""
        self._length = 1
        is_xla = form.name == "xla"
        solver = self.solver.for_xla() if is_xla else self.solver
        kept, key = self.solver.kept_with_f()
        if solver is None and self._jit is True:
            solver = self.solver  # compiled anew at each call, but as it is asked
        if solver is None:
            kept[NO_XLA] = True
            return False
        specs = tuple(map(_key, tf.nest.flatten(state)))
        key = form.name, key, self._tolerances, stopping.RULES, specs
        if key not in kept:
            chunk = self._compile_chunk(solver, state, is_xla=is_xla)
            if is_xla and not self._agrees(chunk, state):
                kept[NO_XLA] = True
                return False
            kept[key] = chunk
        self._chunks[form.name] = kept[key]
        return True

    def _agrees(self, chunk: Chunk, state: State) -> bool:
        """Return whether XLA computes what the graph does, but for rounding.

        It is asked with `jit="auto"` only.
        """
        if self._jit is True:
            return True
        try:
            ours = chunk.evaluate(chunk.packing.pack(state))
        except tf.errors.OpError:  # XLA has no kernel for something in it
            return False
        return _agree(ours, self.solver.evaluate(self.solver.query(state)))

    def _compile_chunk(self, solver: Solver, state: State, *, is_xla: bool) -> Chunk:
        packing, carried = Packing(state), Packing((0, 0, state))
        jit = is_xla or None

        def evaluate(packed: list[tf.Tensor]) -> Evaluation:
            return solver.evaluate(solver.query(packing.unpack(packed)))

        def look(packed: list[tf.Tensor]) -> Any:
            query = solver.query(packing.unpack(packed))
            row = solver.row(query if solver.lag else None, solver.evaluate(query))
            return {**row, "expected": state.expected} if solver.lag else row

        specs = [_spec(tensor) for tensor in packing.pack(state)]
        looked = tf.function(look, autograph=False).get_concrete_function(specs)
        rows: dict[str, tf.TensorSpec] = looked.structured_outputs
        width = sum(s.dtype.size * s.shape.num_elements() for s in rows.values())
        capacity = max(1, ROW_BYTES // width)

        def run(limit: tf.Tensor, packed: list[tf.Tensor], *inputs: Any) -> Any:
            size = capacity if is_xla else limit  # XLA needs to know it
            arrays = {
                name: tf.TensorArray(spec.dtype, size, element_shape=spec.shape)
                for name, spec in rows.items()
            }

            def goes_on(tensors: list[tf.Tensor], _: Any) -> tf.Tensor:
                taken, turns, here = carried.unpack(tensors)
                # A chunk of steps that are never accepted must end, too.
                is_within = (taken < limit) & (turns < TURNS * limit)
                on: tf.Tensor = is_within & (here.code == RUNNING)
                return on & solver.has_next(here)

            def body(tensors: list[tf.Tensor], arrays: Any) -> Any:
                taken, turns, here = carried.unpack(tensors)
                query = solver.query(here)
                evaluation = solver.evaluate(query)
                row = solver.row(query if solver.lag else None, evaluation)
                after = self._decide(here, evaluation, *inputs, solver=solver)
                if solver.lag:
                    row["expected"] = after.expected
                # A row of a point that was not accepted is written over by the next.
                written = {n: array.write(taken, row[n]) for n, array in arrays.items()}
                taken += tf.cast(after.accepted, tf.int32)
                return carried.pack((taken, turns + 1, after)), written

            start = carried.pack((0, 0, packing.unpack(packed)))
            tensors, arrays = tf.while_loop(
                goes_on, body, (start, arrays), parallel_iterations=1
            )
            taken, _, last = carried.unpack(tensors)
            # Of many more places than there are steps, stacking all would take long.
            columns = {
                name: array.stack() if is_xla else array.gather(tf.range(taken))
                for name, array in arrays.items()
            }
            return taken, packing.pack(last), columns

        # Functions of their own: TensorFlow counts the traces of each name.
        own = functools.partial
        compiled = tf.function(own(run), autograph=False, jit_compile=jit)
        evaluated = tf.function(own(evaluate), autograph=False, jit_compile=jit)
        return Chunk(packing, capacity, compiled, evaluated)

    def _decide(
        self, state: State, evaluation: Evaluation, *inputs: Any, solver: Any = None
    ) -> State:
        """Return the state after a step, given the evaluation of it."""
        solver = solver or self.solver
        new = solver.accept(state, evaluation)
        judged = judge(self._step(state, new, is_start=new.step == 0))
        is_asked = (
            new.accepted & (new.code != code_of("nonfinite")) & (judged != RUNNING)
        )
        code = tf.where(is_asked, judged, new.code)
        after: State = solver.move(state, new._replace(code=code), evaluation, *inputs)
        return after

    def _step(self, old: State, new: State, *, is_start: Any) -> Step:
        """Return what the rules look at."""
        expected = new.expected
        if self.solver.knows_solutions:
            expected = tf.constant(expected.dtype.max, expected.dtype)
        x: tuple[list[Any], list[Any]] = ([], [])
        if self._tolerances.xtol is not None:
            x = self.solver.way(old, new)
        return Step(
            fun=new.evaluation.value,
            grad_max=new.evaluation.grad_max,
            x=x[0],
            expected=expected,
            first=new.first,
            before_fun=old.evaluation.value,
            before_x=x[1],
            before_expected=old.expected,
            is_start=is_start,
            tolerances=self._tolerances,
        )


def _array(values: list[Any]) -> np.ndarray[Any, Any]:
    # NumPy does not know the dtype of a single bfloat16 by itself.
    dtype = values[0].dtype.as_numpy_dtype
    return np.array([value.numpy() for value in values], dtype)


def _spec(leaf: Any) -> Any:
    is_plain = isinstance(leaf, bool | int | float)
    return tf.type_spec_from_value(tf.convert_to_tensor(leaf) if is_plain else leaf)


def _key(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, tf.Tensor) else type(leaf)


def _agree(a: Evaluation, b: Evaluation) -> bool:
    """Return whether two evaluations of one point agree but for rounding.

    Half the digits: sums taken in another order differ by more than a few last ones.
    """
    if not (np.isfinite(a.value) and np.isfinite(b.value)):
        return True
    groups = ([a.value], [b.value]), _lists(a.gradient, b.gradient)
    for ours, theirs in groups:
        size = max((_largest(y) for y in theirs), default=0.0)
        for x, y in zip(ours, theirs, strict=True):
            if not _largest(x - y) <= EPSILONS[y.dtype] ** 0.5 * size:
                return False
    return True


def _lists(*gradients: Any) -> Any:
    return tuple([g] if isinstance(g, tf.Tensor) else g for g in gradients)


def _largest(tensor: tf.Tensor) -> float:
    return float(np.max(np.abs(tensor), initial=0.0))
