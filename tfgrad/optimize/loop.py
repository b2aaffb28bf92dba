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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import Nest
from tfgrad.optimize import stopping
from tfgrad.optimize.compiled import compiled, kept, shapes_of
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

LARGE = 2**18
"""Numbers from which on a vector is held in a variable, so that it is not copied."""

TURNS = 8
"""Evaluations that a compiled chunk may take per step; a line search takes one to
three."""

GROUP = 8
"""Scalars in one vector: of more operands, XLA makes a kernel each (measured with
TensorFlow 2.21)."""


class Packing:
    """A nest as few tensors: what a compiled loop carries from turn to turn.

    A scalar costs a loop as much as a small vector: a buffer to carry, and a kernel to
    compute it. So the scalars of a nest travel together.

    Args:
        like: A nest of the structure, shapes and dtypes.

    >>> packing = Packing({"a": tf.constant(1.0), "b": [tf.constant(2.0), tf.ones(3)]})
    >>> packed = packing.pack({"a": 1.0, "b": [2.0, tf.ones(3)]})
    >>> [tensor.numpy().tolist() for tensor in packed]
    [[1.0, 2.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, like: Nest) -> None:
        """Group the scalars by dtype."""
        leaves = [_spec(leaf) for leaf in tf.nest.flatten(like)]
        self._structure = tf.nest.pack_sequence_as(like, leaves)
        scalars: dict[tf.DType, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, tf.TensorSpec) and leaf.shape.rank == 0:
                scalars.setdefault(leaf.dtype, []).append(i)
        self._groups = [
            indices[k : k + GROUP]
            for indices in scalars.values()
            for k in range(0, len(indices), GROUP)
        ]
        grouped = {i for group in self._groups for i in group}
        self._others = [i for i in range(len(leaves)) if i not in grouped]

    def pack(self, nest: Nest) -> list[Any]:
        """Return the tensors that hold the leaves of a nest."""
        leaves = tf.nest.flatten(nest)
        vectors = [tf.stack([leaves[i] for i in group]) for group in self._groups]
        return vectors + [leaves[i] for i in self._others]

    def unpack(self, tensors: Sequence[Any]) -> Any:
        """Return the nest whose leaves they hold: the inverse of `pack`."""
        leaves = dict(zip(self._others, tensors[len(self._groups) :], strict=True))
        for group, vector in zip(self._groups, tensors, strict=False):
            leaves |= dict(zip(group, tf.unstack(vector), strict=True))
        ordered = [leaf for _, leaf in sorted(leaves.items())]
        return tf.nest.pack_sequence_as(self._structure, ordered)


class Chunk(NamedTuple):
    """A compiled loop of steps.

    Attributes:
        packing: Of the state.
        capacity: How many steps it can take at most.
        run: Takes the limit and the packed state; returns how many rows there are, the
            packed state, but for its variables, and the columns.
        evaluate: Takes what `Solver.query` returns; returns the evaluation there.
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

    Attributes:
        solver: As above.
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
    ) -> None:
        """Compile nothing yet."""
        self.solver = solver
        self.bad: Rows | None = None
        self.blame = ""
        self._tolerances = tolerances
        self._planned, self._jit, self._clock = planned, jit, clock
        self._length = 1
        self._doubted: Chunk | None = None

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
            key = "start", self._tolerances, stopping.RULES, shapes_of(asked)
            knows = self.solver.knows_solutions
            rules = kept(None, (*key, knows), lambda: compiled(self._first, *asked))
            state = state._replace(code=rules(*asked))
        row = self.row(state, evaluation)
        if int(state.code) == code_of("nonfinite"):
            self.bad = row
            state, self.blame = self.solver.recover(state)
        return state, row

    def _first(self, fun: Any, grad_max: Any, expected: Any, first: Any) -> tf.Tensor:
        """Return the code of the rules at a start."""
        if self.solver.knows_solutions:
            expected = tf.constant(expected.dtype.max, expected.dtype)
        return judge(
            Step(
                fun, grad_max, [fun], expected, first, fun, [fun], expected,
                tf.constant(True), self._tolerances,
            )
        )  # fmt: skip

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
        rows: list[dict[str, Any]] = []
        query, evaluations = self.solver.query(state), int(state.evaluations)
        inputs = self.solver.inputs(state, limit)
        state = tf.nest.map_structure(tf.convert_to_tensor, state)  # none is held
        leaves, turn = tf.nest.flatten(state), None
        while True:
            evaluation = self.solver.evaluate(query)
            row = self.solver.row(query if self.solver.lag else None, evaluation)
            if turn is None:
                turn = self._turn(state, evaluation)
            known = tf.nest.flatten(evaluation._replace(aux={}))
            flags, query, expected, leaves = turn(*leaves, *known, *inputs)
            code, accepted = flags.numpy()
            evaluations += 1
            if accepted:
                taken += 1
                rows.append({**row, "expected": expected} if self.solver.lag else row)
            is_late = time.perf_counter() - began > CHUNK_SECONDS
            if code or taken >= limit or evaluations >= form.evaluations or is_late:
                break
        names = rows[0] if rows else ()
        columns = {name: _array([each[name] for each in rows]) for name in names}
        return tf.nest.pack_sequence_as(state, leaves), columns

    def _take_eagerly(self, state: State) -> tuple[State, dict[str, Any]]:
        """Take one step that no trace can hold."""
        evaluation = self.solver.evaluate(self.solver.query(state))
        row = self.solver.row(None, evaluation)
        columns = {name: _array([value]) for name, value in row.items()}
        return self._decide(state, evaluation, *self.solver.inputs(state, 1)), columns

    def _turn(self, state: State, evaluation: Evaluation) -> Callable[..., Any]:
        """Return the compiled rest of a step, a new one if none is kept."""
        known = evaluation._replace(aux={})

        def run(state: State, known: Evaluation) -> Any:
            state = self._decide(state, known)
            flags = tf.stack([state.code, tf.cast(state.accepted, tf.int32)])
            query = self.solver.query(state)
            return flags, query, state.expected, tf.nest.flatten(state)

        place, key = self.solver.kept()
        key = "turn", key, self._tolerances, stopping.RULES, shapes_of((state, known))
        made: Callable[..., Any] = kept(place, key, lambda: compiled(run, state, known))
        return made

    # --- in compiled chunks ---

    def _take(
        self, form: Form, state: State, limit: int
    ) -> tuple[State, dict[str, Any]]:
        """Take a chunk of steps in one call; the first one, of one step, is a trial."""
        state = held(state)
        chunk, place, key = self._chunk(form, state)
        if chunk is not None and key in place:
            return self._run(chunk, state, limit)
        is_doubted = form.name == "xla" and self._jit is not True
        try:
            if chunk is None or (is_doubted and not self._predicts(chunk, state)):
                return self._without_xla(state, limit)
            self._length = 1
            after, rows = self._run(chunk, state, 1)
        except tf.errors.OpError:  # XLA has no kernel for something in it
            if not is_doubted:
                raise
            return self._without_xla(state, limit)
        if is_doubted and not self._confirms(after):
            if not any(isinstance(leaf, tf.Variable) for leaf in tf.nest.flatten(state)):
                return self._without_xla(state, limit)
            self.solver.kept_with_f()[0][NO_XLA] = True
            return self._begun_at(after)
        if int(after.step) > int(state.step) or not is_doubted:
            place[key] = chunk
        return after, rows

    def _without_xla(self, state: State, limit: int) -> tuple[State, dict[str, Any]]:
        """Take the steps in another form, now and later on."""
        self.solver.kept_with_f()[0][NO_XLA] = True
        form = self.solver.form(state, self._planned, self._jit)
        return self._by(form, state, limit)

    def _begun_at(self, after: State) -> tuple[State, dict[str, Any]]:
        """Begin anew at the point of a state of which nothing else is right."""
        before = after._replace(step=after.step - 1)
        state, evaluation = self.solver.begin(self.solver.point(after), before)
        row = {**self.solver.row(state.x, evaluation), "expected": state.expected}
        return held(state), {name: _array([value]) for name, value in row.items()}

    def _run(
        self, chunk: Chunk, state: State, limit: int
    ) -> tuple[State, dict[str, Any]]:
        """Take steps in one call."""
        began, length = time.perf_counter(), min(limit, self._length, chunk.capacity)
        inputs, given = self.solver.inputs(state, length), chunk.packing.pack(state)
        counts, packed, columns = chunk.run(tf.constant(length), given, *inputs)
        taken = int(counts)
        growth = CHUNK_SECONDS / (time.perf_counter() - began)
        self._length = max(1, int(max(taken, 1) * min(GROWTH, growth)))
        rows = {name: column.numpy()[:taken] for name, column in columns.items()}
        return chunk.packing.unpack(_filled(given, packed)), rows

    def _chunk(self, form: Form, state: State) -> tuple[Chunk | None, Any, Any]:
        """Return the chunk, None if XLA cannot; where it is to be kept, and its key."""
        place, key = self.solver.kept_with_f()
        specs = tuple(map(_key, tf.nest.flatten(state)))
        key = form.name, key, self._tolerances, stopping.RULES, specs
        chunk = place.get(key) or self._doubted
        if chunk is not None:
            return chunk, place, key
        is_xla = form.name == "xla"
        solver = self.solver.for_xla() if is_xla else self.solver
        if solver is None and self._jit is True:
            solver = self.solver  # compiled anew at each call, but as it is asked
        if solver is not None:
            chunk = self._doubted = self._compile_chunk(solver, state, is_xla=is_xla)
        return chunk, place, key

    def _predicts(self, chunk: Chunk, state: State) -> bool:
        """Return whether XLA's next evaluation is that of the graph, but for rounding.

        It is asked where an optimizer moves variables, which nothing puts back.
        """
        if self.solver.lag:
            return True
        query = self.solver.query(state)
        return _agree(chunk.evaluate(query), self.solver.evaluate(query))

    def _confirms(self, after: State) -> bool:
        """Return whether the graph's evaluation of the point is XLA's, likewise."""
        if not self.solver.lag:
            return True
        x, ours = tf.nest.map_structure(
            tf.convert_to_tensor, (after.x, after.evaluation)
        )
        return _agree(ours, self.solver.evaluate(x))

    def _compile_chunk(self, solver: Solver, state: State, *, is_xla: bool) -> Chunk:
        packing, carried = Packing(state), Packing((0, 0, state))
        jit = is_xla or None

        def look(query: Any) -> Any:
            row = solver.row(query if solver.lag else None, solver.evaluate(query))
            return {**row, "expected": state.expected} if solver.lag else row

        query = tf.nest.map_structure(_spec, solver.query(state))
        looked = tf.function(look, autograph=False).get_concrete_function(query)
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

            start = carried.pack((0, 0, packing.unpack(list(map(_value, packed)))))
            tensors, arrays = tf.while_loop(
                goes_on, body, (start, arrays), parallel_iterations=1
            )
            taken, _, last = carried.unpack(tensors)
            # Of many more places than there are steps, stacking all would take long.
            columns = {
                name: array.stack() if is_xla else array.gather(tf.range(taken))
                for name, array in arrays.items()
            }
            ended, others = packing.pack(last), []
            for there, tensor in zip(packed, ended, strict=True):
                if isinstance(there, tf.Variable):
                    there.assign(tensor)  # which XLA does where it is
                else:
                    others.append(tensor)
            return taken, others, columns

        # Functions of their own: TensorFlow counts the traces of each name.
        own = functools.partial
        compiled = tf.function(own(run), autograph=False, jit_compile=jit)
        evaluated = tf.function(
            own(solver.evaluate), autograph=False, jit_compile=jit
        )
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


def held(state: State) -> State:
    """Return a state whose large vectors are variables: XLA writes them in place.

    A tensor that is handed from call to call is copied by each. What is read of a
    variable stays as it is: then the next write is not in place.
    """
    return tf.nest.map_structure(
        lambda leaf: tf.Variable(leaf, trainable=False) if _is_large(leaf) else leaf,
        state,
    )


def _is_large(leaf: Any) -> bool:
    count = leaf.shape.num_elements() if isinstance(leaf, tf.Tensor) else None
    return count is not None and count >= LARGE


def _value(leaf: Any) -> Any:
    return leaf.read_value() if isinstance(leaf, tf.Variable) else leaf


def _filled(given: list[Any], others: list[Any]) -> list[Any]:
    """Return the leaves of a state, its variables among them."""
    left = iter(others)
    return [leaf if isinstance(leaf, tf.Variable) else next(left) for leaf in given]


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
