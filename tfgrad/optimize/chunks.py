"""Many steps in one call: a compiled loop, in the graph or under XLA."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.nested import Nest
from tfgrad.optimize.compiled import compiled_once, in_one_kernel, spec_of
from tfgrad.optimize.evaluator import LARGE, Evaluation, measured
from tfgrad.optimize.solvers import NO_XLA, Form, Ruled, Solver, State
from tfgrad.optimize.stopping import RUNNING

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


class Packing:
    """A nest as few tensors: what a compiled loop carries from turn to turn.

    A scalar costs a loop as much as a small vector: a buffer to carry, and a kernel to
    compute it. So the scalars of a nest travel together.

    Args:
        like: A nest of the structure, shapes and dtypes.
        group: How many scalars are in one vector at most.

    Attributes:
        specs: Of these tensors.

    >>> packing = Packing({"a": tf.constant(1.0), "b": [tf.constant(2.0), tf.ones(3)]})
    >>> packed = packing.pack({"a": 1.0, "b": [2.0, tf.ones(3)]})
    >>> [tensor.numpy().tolist() for tensor in packed]
    [[1.0, 2.0], [1.0, 1.0, 1.0]]
    >>> rows = [tf.stack([tensor, 2 * tensor]) for tensor in packed]
    >>> packing.unpack(rows, axis=1)["a"].numpy().tolist()
    [1.0, 2.0]
    """

    def __init__(self, like: Nest, group: int = GROUP) -> None:
        leaves = [spec_of(leaf) for leaf in tf.nest.flatten(like)]
        self._structure = tf.nest.pack_sequence_as(like, leaves)
        scalars: dict[tf.DType, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, tf.TensorSpec) and leaf.shape.rank == 0:
                scalars.setdefault(leaf.dtype, []).append(i)
        self._groups = [
            indices[k : k + group]
            for indices in scalars.values()
            for k in range(0, len(indices), group)
        ]
        grouped = {i for group in self._groups for i in group}
        self._others = [i for i in range(len(leaves)) if i not in grouped]
        self.specs = [
            tf.TensorSpec([len(group)], leaves[group[0]].dtype)
            for group in self._groups
        ] + [leaves[i] for i in self._others]

    def pack(self, nest: Nest) -> list[Any]:
        """Return the tensors that hold the leaves of a nest."""
        leaves = tf.nest.flatten(nest)
        vectors = [tf.stack([leaves[i] for i in group]) for group in self._groups]
        return vectors + [leaves[i] for i in self._others]

    def unpack(self, tensors: Sequence[Any], axis: int = 0) -> Any:
        """Return the nest whose leaves they hold: the inverse of `pack`.

        Args:
            tensors: What `pack` returned, or stacks of it, with more axes in front.
            axis: How many.
        """
        leaves = dict(zip(self._others, tensors[len(self._groups) :], strict=True))
        for group, vector in zip(self._groups, tensors, strict=False):
            leaves |= dict(zip(group, tf.unstack(vector, axis=axis), strict=True))
        ordered = [leaf for _, leaf in sorted(leaves.items())]
        return tf.nest.pack_sequence_as(self._structure, ordered)


@dataclass
class Chunk:
    """A compiled loop of steps.

    Attributes:
        capacity: How many steps it can take at most.
        run: Takes the limit, the state, and what `Stepper.inputs` returns; returns how
            many rows there are, the state with None for its variables, and the columns.
        evaluate: Takes what `Stepper.query` returns; returns the evaluation there.
        seconds: What a step took when last timed, in this run or in one before.
    """

    capacity: int
    run: Callable[..., Any]
    evaluate: Callable[..., Any]
    seconds: float = math.inf


class Pace:
    """How many steps a chunk may take, so that it takes about `CHUNK_SECONDS`.

    Attributes:
        length: The most steps of the next chunk.
        elapsed: How long the last one took, in seconds.
    """

    def __init__(self) -> None:
        self.length, self.elapsed, self._taken = 1, 0.0, 0

    def recall(self, seconds: float) -> None:
        """Set the first length by what a step took in another run."""
        if not self.elapsed:
            self.length = max(1, int(CHUNK_SECONDS / seconds))

    def took(self, steps: int, seconds: float) -> None:
        """Take note of a chunk."""
        self._taken, self.elapsed = steps, seconds
        self.adapt(seconds)

    def adapt(self, seconds: float) -> None:
        """Set the next length as if the last chunk had taken so many seconds."""
        growth = CHUNK_SECONDS / seconds if seconds else 1.0
        self.length = max(1, int(max(self._taken, 1) * min(GROWTH, growth)))


class Chunks:
    """The compiled loops of a run.

    XLA may round otherwise, and get a function wrong: with `jit="auto"`, the first
    chunk is one step, which is held against the graph.

    Args:
        solver: The method at work.
        ruled: Its stepper, under the rules.
        jit: As for `minimize`.
        pace: How long a chunk may be.
        in_step: Whether other processes have to take chunks of the same lengths.
    """

    def __init__(
        self,
        solver: Solver,
        ruled: Ruled,
        jit: bool | str,
        pace: Pace,
        *,
        in_step: bool,
    ) -> None:
        self._solver, self._ruled, self._stepper = solver, ruled, ruled.stepper
        self._jit, self._pace, self._in_step = jit, pace, in_step
        self._doubted: dict[Any, Chunk] = {}

    def take(
        self, form: Form, state: State, limit: int
    ) -> tuple[State, dict[str, Any]] | None:
        """Take a chunk of steps in one call.

        Returns:
            Where the run is then, and the rows; None if the steps are to be taken in
            another form, now and later on.
        """
        state = held(state)
        place, key = self._solver.forms.kept_with_f()
        specs = tuple(map(_key, tf.nest.flatten(state)))
        key = form.name, key, self._ruled.key, specs
        if key in place:
            return self._run(place[key], state, limit)
        if form.name != "xla" or self._jit is True:
            place[key] = self._compiled(form, state)
            return self._run(place[key], state, limit)
        found = self._tried(form, key, state)
        if found is None:
            place[NO_XLA] = True
        elif int(found[0].step) > int(state.step) and not place.get(NO_XLA):
            place[key] = self._doubted[key]
        return found

    def _tried(
        self, form: Form, key: Any, state: State
    ) -> tuple[State, dict[str, Any]] | None:
        """Take one step under XLA; return None if that is not to be trusted."""
        chunk = self._doubted.get(key) or self._compiled(form, state)
        if chunk is None:
            return None
        self._doubted[key], self._pace.length = chunk, 1
        try:
            if not self._predicts(chunk, state):
                return None
            after, rows = self._run(chunk, state, 1)
        except tf.errors.OpError:  # XLA has no kernel for something in it
            return None
        if not self._predicts(chunk, after):  # the step itself was right
            self._solver.forms.kept_with_f()[0][NO_XLA] = True
        if self._confirms(after):
            return after, rows
        is_there = not any(isinstance(t, tf.Variable) for t in tf.nest.flatten(state))
        return None if is_there else self._begun_at(after)

    def _begun_at(self, after: State) -> tuple[State, dict[str, Any]]:
        """Begin anew at the point of a state whose other parts cannot be trusted."""
        self._solver.forms.kept_with_f()[0][NO_XLA] = True
        before, point = after._replace(step=after.step - 1), self._solver.point(after)
        state, evaluation = self._solver.init(point, before)
        assert evaluation is not None
        row = {**self._stepper.row(state.x, evaluation), "expected": state.expected}
        return state, {name: array([value]) for name, value in row.items()}

    def _run(
        self, chunk: Chunk, state: State, limit: int
    ) -> tuple[State, dict[str, Any]]:
        """Take steps in one call."""
        began = time.perf_counter()
        if not self._in_step:
            self._pace.recall(chunk.seconds)
        length = min(limit, self._pace.length, chunk.capacity)
        inputs = self._stepper.inputs(state, length)
        counts, after, columns = chunk.run(tf.constant(length), state, *inputs)
        taken, elapsed = int(counts), time.perf_counter() - began
        self._pace.took(taken, elapsed)
        chunk.seconds = elapsed / max(taken, 1)
        rows = {name: column.numpy()[:taken] for name, column in columns.items()}
        return _filled(state, after), rows

    def _compiled(self, form: Form, state: State) -> Any:
        """Return a new chunk; None if f is in no form that XLA compiles once."""
        if form.name != "xla":
            return compile_chunk(self._ruled, state, is_xla=False)
        stepper = self._stepper.for_xla()
        if stepper is None and self._jit is True:
            stepper = self._stepper  # compiled anew at each call, but as it is asked
        if stepper is None:
            return None
        return compile_chunk(self._ruled._replace(stepper=stepper), state, is_xla=True)

    def _predicts(self, chunk: Chunk, state: State) -> bool:
        """Return whether XLA's next evaluation is that of the graph, but for rounding.

        Used where an optimizer moves variables, since nothing restores them.
        """
        if self._stepper.lookahead:
            return True
        query = self._stepper.query(state)
        return _agree(chunk.evaluate(query), self._stepper.evaluate(query))

    def _confirms(self, after: State) -> bool:
        """Return whether the graph and XLA agree at the point, but for rounding."""
        if not self._stepper.lookahead:
            return True
        x, ours = tf.nest.map_structure(
            tf.convert_to_tensor, (after.x, after.evaluation)
        )
        return _agree(ours, self._stepper.evaluate(x))


def compile_chunk(ruled: Ruled, state: State, *, is_xla: bool) -> Chunk:
    """Return the compiled loop of steps from a state like this."""
    stepper = ruled.stepper
    carried, jit = Packing((0, 0, state)), is_xla or None
    is_one = is_xla and stepper.is_one_kernel

    def look(query: Any) -> Any:
        evaluation = measured(stepper.evaluate(query))
        row = stepper.row(query if stepper.lookahead else None, evaluation)
        return {**row, "expected": state.expected} if stepper.lookahead else row

    query = tf.nest.map_structure(spec_of, stepper.query(state))
    traced = tf.function(look, autograph=False).get_concrete_function(query)
    rows: dict[str, tf.TensorSpec] = traced.structured_outputs
    packing = Packing(rows)
    width = sum(s.dtype.size * s.shape.num_elements() for s in rows.values())
    capacity = ROW_BYTES // max(1, min(width, ROW_BYTES))

    def loop(limit: tf.Tensor, start: list[Any], *inputs: Any) -> Any:
        size = capacity if is_xla else limit  # XLA needs to know it
        arrays = [
            tf.TensorArray(spec.dtype, size, element_shape=spec.shape)
            for spec in packing.specs
        ]

        def goes_on(tensors: list[tf.Tensor], _: Any) -> tf.Tensor:
            taken, turns, here = carried.unpack(tensors)
            is_within = taken < limit
            if stepper.lookahead:  # steps that are never accepted must end, too
                is_within &= turns < TURNS * limit
            on: tf.Tensor = is_within & (here.code == RUNNING)
            return on & stepper.has_next(here)

        def turn(place: Any, found: Evaluation) -> list[Any]:
            taken, turns, here = place
            evaluation, query = measured(found, is_xla=is_xla), stepper.query(here)
            row = stepper.row(query if stepper.lookahead else None, evaluation)
            after = ruled.step(here, evaluation, *inputs)
            if stepper.lookahead:
                row["expected"] = after.expected
            taken += tf.cast(after.accepted, tf.int32)
            return [*packing.pack(row), *carried.pack((taken, turns + 1, after))]

        def turn_packed(nest: tuple[list[tf.Tensor], Evaluation]) -> list[Any]:
            return turn(carried.unpack(nest[0]), nest[1])

        def body(tensors: list[tf.Tensor], arrays: Any) -> Any:
            place, count = carried.unpack(tensors), len(arrays)
            found = stepper.evaluate(stepper.query(place[2]))
            if is_one:
                results = in_one_kernel(turn_packed, (tensors, found))
            else:
                results = turn(place, found)
            # A row of a point that was not accepted is written over by the next.
            parts = zip(arrays, results[:count], strict=True)
            return results[count:], [a.write(place[0], part) for a, part in parts]

        tensors, arrays = tf.while_loop(
            goes_on, body, (list(map(_value, start)), arrays), parallel_iterations=1
        )
        taken = carried.unpack(tensors)[0]
        # Of many more places than there are steps, stacking all would take long.
        columns = [a.stack() if is_xla else a.gather(tf.range(taken)) for a in arrays]
        return list(map(_assigned, start, tensors)), columns

    # Functions of their own: TensorFlow counts the traces of each name.
    own = functools.partial
    evaluated = tf.function(own(stepper.evaluate), autograph=False, jit_compile=jit)
    looped = compiled_once(own(loop), jit=jit, suits=not (is_xla or state.batch))

    def run(limit: tf.Tensor, state: State, *inputs: Any) -> Any:
        # Packed here, where XLA has no kernel to compile for each number.
        tensors, columns = looped(limit, carried.pack((0, 0, state)), *inputs)
        taken, _, after = carried.unpack(tensors)
        return taken, after, packing.unpack(columns, axis=1)

    return Chunk(capacity, run, evaluated)


def in_trace(ruled: Ruled, state: State, limit: Any) -> State:
    """Return the state after up to `limit` steps within the trace that is being made.

    Args:
        ruled: What takes them.
        state: Where they begin; the rules have not been asked.
        limit: How many there are at most. There are no rows, and nobody looks beside a
            saddle.
    """
    here = state.evaluation
    code = ruled.first(here.value, here.grad_max, state.expected, state.first)
    state = state._replace(code=tf.where(state.code == RUNNING, code, state.code))
    chunk = compile_chunk(ruled, state, is_xla=False)
    after: State = chunk.run(tf.convert_to_tensor(limit), state)[1]
    return after


def held(state: State) -> State:
    """Return a state whose large vectors are variables: XLA writes them in place.

    A tensor that is handed from call to call is copied by each call. While a value read
    from a variable is in use, the next write to the variable copies it.
    """
    if not holds_large(state):
        return state
    return tf.nest.map_structure(
        lambda leaf: tf.Variable(leaf, trainable=False) if is_large(leaf) else leaf,
        state,
    )


def released(state: State) -> State:
    """Return a state of tensors alone: the inverse of `held`."""
    if not any(isinstance(leaf, tf.Variable) for leaf in tf.nest.flatten(state)):
        return state
    tensors: State = tf.nest.map_structure(tf.convert_to_tensor, state)
    return tensors


def in_place(tensors: Sequence[Any], outputs: Any) -> Any:
    """Return what a trace returns, with rows of large arguments written in place.

    `tf.tensor_scatter_nd_update` copies the other rows. All other outputs are computed
    before, so that nothing reads the argument whose buffer is written to.
    """
    own = {id(tensor) for tensor in tensors if is_large(tensor)}
    leaves = tf.nest.flatten(outputs)

    def is_row(leaf: Any) -> bool:
        if not is_large(leaf) or leaf.op.type != "TensorScatterUpdate":
            return False
        return id(leaf.op.inputs[0]) in own and leaf.op.inputs[1].shape[1:] == [1]

    def written(leaf: tf.Tensor) -> tf.Tensor:
        x, places, rows = leaf.op.inputs
        return tf.raw_ops.InplaceUpdate(x=x, i=tf.reshape(places, [-1]), v=rows)

    others = [leaf for leaf in leaves if not is_row(leaf)]
    with tf.control_dependencies([x for x in others if isinstance(x, tf.Tensor)]):
        leaves = [written(leaf) if is_row(leaf) else leaf for leaf in leaves]
    return tf.nest.pack_sequence_as(outputs, leaves)


def holds_large(state: State) -> bool:
    """Return whether one of the leaves of a state is large."""
    return any(map(is_large, tf.nest.flatten(state)))


def is_large(leaf: Any) -> bool:
    """Return whether a leaf of a state is a tensor that is better not copied."""
    if not isinstance(leaf, tf.Tensor) or leaf.shape.rank == 0:
        return False
    return (leaf.shape.num_elements() or 0) >= LARGE


def _value(leaf: Any) -> Any:
    return leaf.read_value() if isinstance(leaf, tf.Variable) else leaf


def _assigned(leaf: Any, tensor: Any) -> Any:
    if not isinstance(leaf, tf.Variable):
        return tensor
    leaf.assign(tensor)  # which XLA does where it is
    return None


def _filled(state: State, after: State) -> State:
    """Return a state after another one, with the variables of that for None."""
    if not any(isinstance(leaf, tf.Variable) for leaf in tf.nest.flatten(state)):
        return after  # at once: TensorFlow takes its time to map a nest
    whole: State = tf.nest.map_structure(
        lambda old, new: old if isinstance(old, tf.Variable) else new, state, after
    )
    return whole


def array(values: list[Any]) -> np.ndarray[Any, Any]:
    """Return one column of rows: scalars or vectors, stacked."""
    # NumPy does not know the dtype of a single bfloat16 by itself.
    dtype = values[0].dtype.as_numpy_dtype
    return np.array([value.numpy() for value in values], dtype)


def _key(leaf: Any) -> Any:
    is_numbers = isinstance(leaf, tf.Tensor | tf.Variable)
    return (type(leaf), leaf.shape, leaf.dtype) if is_numbers else type(leaf)


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
