"""Many problems in blocks: a fixed number of slots, each with a problem of its own.

All slots of a block take their steps together, in one compiled program of static
shapes. What has ended leaves its slot to the next problem that waits, so no step is
taken for nothing while there are others, and memory does not grow with their number.
There is a block for each core; all of them run the same program.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.signatures import signature
from tfgrad.derivatives.tracing import as_written, holding, level_of_caller, quiet
from tfgrad.derivatives.vectorized import is_straight
from tfgrad.diagnosis.graphs import has, inlined, operations_of
from tfgrad.nested import Nest, either, is_mapped, unravel
from tfgrad.optimize.evaluator import Evaluation, flat, measured
from tfgrad.optimize.history import Array
from tfgrad.optimize.hooks import Interrupts, bar_of
from tfgrad.optimize.methods.levenberg_marquardt import STATUSES
from tfgrad.optimize.methods.protocol import Bindable, Method
from tfgrad.optimize.options import STEPS, Options
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.solvers import Ruled, State
from tfgrad.optimize.solvers.pure import NOT_FOR_XLA, Memory, PureStepper, Start, seen
from tfgrad.optimize.stopping import RUNNING, code_of
from tfgrad.optimize.traced import CALLS, without_calls

WIDEST = 1024
"""Slots of a block: its numbers are in the cache, and starting an op is cheap beside
computing it."""

BLOCK_BYTES = 2**26
"""Bytes that the states and the data of a block may take up."""

PAUSE = 0.1
"""Seconds between two looks for Ctrl-C, and about what a call of the program takes."""

MOST_TURNS = 10_000
"""Steps of a block in one call of the program."""


class Row(NamedTuple):
    """One problem, with its data, for a method that takes products with its Hessian."""

    problem: Problem
    data: tuple[Nest, ...]

    def hvp(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return the Hessian at x times v, vectors."""
        return self.problem.hvp(x, v, self.data)


class Plan(NamedTuple):
    """What a program is compiled for.

    Attributes:
        problem: One problem, evaluated once: the first.
        data: What the first takes besides: nests of tensors.
        method: A pure method that asks for no more than gradients.
        options: As for `minimize`.
        pays: The number of problems, of all calls of one program, from which on XLA
            pays.
    """

    problem: Problem
    data: tuple[Nest, ...]
    method: Method
    options: Options
    pays: int

    @property
    def steps(self) -> int:
        """How many steps each may take."""
        return int(self.options.steps or STEPS)

    @property
    def graph(self) -> Any:
        """The graph of an evaluation; None if it cannot be compiled."""
        return self.problem.graph(self.data)


class Task(NamedTuple):
    """The problems: arrays with a row for each.

    Attributes:
        x: Where they start, shape `[count, n]`.
        sides: Lower and upper bounds, `[count, n]` each; or nothing.
        data: What each takes besides, flat.
    """

    x: Array
    sides: list[Array]
    data: list[Array]

    @property
    def given(self) -> list[Array]:
        """All of the arrays."""
        return [self.x, *self.sides, *self.data]

    def of(self, rows: Array) -> Task:
        """Return some of them."""
        sides, data = ([a[rows] for a in arrays] for arrays in (self.sides, self.data))
        return Task(self.x[rows], sides, data)


class Outcome(NamedTuple):
    """What came of them, a row for each.

    Attributes:
        x: The points, shape `[count, n]`; where a problem has not begun, its start.
        fun: The values there; NaN where it has not begun.
        grad: The gradients there, `[count, n]`.
        code: Why each ended, see `stopping.code_of`; RUNNING where it has not begun.
        nit: Steps taken.
        nfev: Evaluations.
        linear: Of sums of squares, the linear model: `[count, n, n + 1]`.
    """

    x: Array
    fun: Array
    grad: Array
    code: Array
    nit: Array
    nfev: Array
    linear: Array


def solve(
    program: Program, task: Task, seconds: float | None, interrupts: Interrupts
) -> Outcome:
    """Solve all problems, as far as time, in seconds, and Ctrl-C let it."""
    queue = _Queue(program, task)
    ends = None if seconds is None else time.perf_counter() + seconds
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    workers = min(cores or os.cpu_count() or 1, -(-len(task.x) // program.width))
    with (
        optimizing(by_xla=program.is_xla),
        ThreadPoolExecutor(workers) as pool,
        bar_of(len(task.x), "problem") as bar,
    ):
        futures = [pool.submit(queue.work) for _ in range(workers)]
        try:
            while wait(futures, timeout=PAUSE).not_done:
                bar.update(queue.done - bar.n)
                if interrupts.heed():
                    queue.stop("interrupted")
                elif ends is not None and time.perf_counter() >= ends:
                    queue.stop("seconds")
        finally:
            queue.stop("interrupted")
    for future in futures:
        future.result()
    return queue.outcome


def optimizing(*, by_xla: bool) -> contextlib.AbstractContextManager[None]:
    """Let nothing but XLA optimise: TensorFlow's own takes as long as some blocks."""
    return contextlib.nullcontext() if by_xla else as_written(optimized=False)


class Program(NamedTuple):
    """A compiled block.

    Attributes:
        width: How many slots it has.
        empty: The state of slots that hold nothing.
        blank: The state of one problem before its first evaluation.
        advance: Takes and returns states; see `_compile`.
        evaluate: Takes points, and what f takes besides; returns values and gradients.
        is_xla: Whether XLA compiles it.
    """

    width: int
    empty: State
    blank: State
    advance: Callable[..., Any]
    evaluate: Callable[..., Any]
    is_xla: bool


class _Queue:
    """Problems that wait for a slot, and the outcome of those that have ended."""

    def __init__(self, program: Program, task: Task) -> None:
        (count, n), dtype = task.x.shape, task.x.dtype
        self._program, self._task = program, task
        self._next, self._lock = 0, threading.Lock()
        self._stopped = ""
        self.done = 0
        linear = getattr(program.empty.memory.method, "linear", None)
        shape = (0, 0) if linear is None else linear.shape[1:]
        none = np.zeros(count, np.int32)
        self.outcome = Outcome(
            np.array(task.x),
            np.full(count, np.nan, dtype),
            np.full((count, n), np.nan, dtype),
            none, none.copy(), none.copy(),
            np.full((count, *shape), np.nan, dtype),
        )  # fmt: skip

    def stop(self, status: str) -> None:
        """Let all blocks end where they are."""
        self._stopped = self._stopped or status

    def work(self) -> None:
        """Run one block until nothing waits."""
        try:
            self._work()
        except BaseException:
            self.stop("stopped")  # the other blocks
            raise

    def _work(self) -> None:
        width, task = self._program.width, self._task
        given = task.given
        held = [np.repeat(array[:1], width, axis=0) for array in given]
        slots, state, turns = np.full(width, -1), self._program.empty, 8
        while True:
            free = np.flatnonzero(slots < 0)
            new = self._take(len(free))
            free = free[: len(new)]
            slots[free] = new
            if np.all(slots < 0):
                return
            # A call may still read what it was given before.
            held = [array.copy() for array in held]
            for array, source in zip(held, given, strict=True):
                array[free] = source[new]
            is_new = np.zeros(width, bool)
            is_new[free] = True
            began = time.perf_counter()
            # While others wait, a block that is half empty is filled again.
            enough = width // 2 if self._next < len(task.x) else 0
            limits = (tf.constant(limit) for limit in (turns, enough))
            tensors = [tf.constant(array) for array in held]
            begins = tf.constant(is_new), self._program.blank
            state = self._program.advance(state, *begins, tensors, *limits)
            code = state.code.numpy()
            if time.perf_counter() - began < PAUSE / 2:
                turns = min(2 * turns, MOST_TURNS)
            if self._stopped:
                code = np.where(code == RUNNING, code_of(self._stopped), code)
            self._keep(slots, code, state)

    def _take(self, most: int) -> Array:
        """Return the numbers of the next problems."""
        with self._lock:
            end = self._next if self._stopped else self._next + most
            new = np.arange(self._next, min(end, len(self._task.x)))
            self._next += len(new)
            return new

    def _keep(self, slots: Array, code: Array, state: State) -> None:
        """Write down what has ended, and free its slots."""
        ended = np.flatnonzero((slots >= 0) & (code != RUNNING))
        if not len(ended):
            return
        rows, out, at = slots[ended], self.outcome, state.evaluation
        found = [state.x, at.value, at.gradient, code, state.step, state.evaluations]
        if out.linear.size:
            found.append(state.memory.method.linear)
        for array, values in zip(out, found, strict=False):
            array[rows] = np.asarray(values)[ended]
        slots[ended] = -1
        with self._lock:
            self.done += len(rows)


def program_of(plan: Plan, task: Task) -> Program:
    """Return the program, kept with a `tf.function`."""
    graph = plan.graph
    assert graph is not None
    kept = plan.problem.evaluator.kept
    settings = getattr(plan.method, "settings", None)
    key: Any = (
        "many", plan.options.tolerances, plan.steps,
        plan.method if settings is None else (type(plan.method), settings),
        tuple((a.shape[1:], a.dtype) for a in task.given),
        signature(plan.problem.x.template), signature(plan.data),
    )  # fmt: skip
    kept[key] = kept.get(key, 0) + len(task.x)
    known = key, "vectorises"

    def make(*, vectorises: bool) -> Program:
        kept[known] = vectorises
        return _program(plan, task, key, vectorises=vectorises)

    is_straightforward = kept.get(known, is_straight(graph.get_operations()))
    return by_rows(make, may_vectorise=is_straightforward)


def _program(plan: Plan, task: Task, key: Any, *, vectorises: bool) -> Program:
    """Return the program; trace it unless it was."""
    kept = plan.problem.evaluator.kept
    is_bound = isinstance(plan.method, Bindable)  # its loops differ in length
    operations = operations_of(plan.graph)
    is_for_xla = vectorises and not is_bound and not has(operations, NOT_FOR_XLA)
    pays = is_for_xla and kept[key] >= plan.pays
    jit = pays if plan.options.jit == "auto" else bool(plan.options.jit)
    is_new = (key, jit) not in kept
    parts: Any = kept.get((key, jit))
    if is_new:
        parts = _compile(plan, task, jit=jit, vectorises=vectorises)
    blank, advance, evaluate = parts
    size = sum(a[:1].nbytes for a in task.given)
    size += sum(s.shape.num_elements() * s.dtype.size for s in tf.nest.flatten(blank))
    width = slots_for(size, len(task.x))
    empty = tf.nest.map_structure(lambda s: tf.zeros([width, *s.shape], s.dtype), blank)
    empty = empty._replace(code=tf.fill([width], code_of("stopped")))
    if is_new:
        held = [tf.constant(np.repeat(a[:1], width, axis=0)) for a in task.given]
        none = tf.fill([width], False), blank, held, tf.constant(0), tf.constant(0)
        with optimizing(by_xla=jit), quiet():
            advance(empty, *none)  # else all workers would prepare it
        if not vectorises:
            warnings.warn(
                f"`{plan.problem.name}` does not vectorise, as loops, branches and "
                "some operations do not: its rows are evaluated one after the other, "
                "which is slower.",
                RuntimeWarning,
                stacklevel=level_of_caller(),
            )
        kept[key, jit] = blank, advance, evaluate
    return Program(width, empty, blank, advance, evaluate, jit)


def slots_for(size: int, count: int) -> int:
    """Return the slots of a block for so many problems of so many bytes each.

    They are a power of 2, so that vectors of a CPU are full.
    """
    fits = 2 ** int(np.log2(max(1, BLOCK_BYTES // size)))
    return int(min(WIDEST, fits, 2 ** int(np.ceil(np.log2(count)))))


def mapped(function: Any, rows: Any, spec: Any, *, vectorises: bool) -> Any:
    """Return what a function returns of each row, all at once if that vectorises."""
    if not vectorises:
        one_by_one: Any = tf.map_fn  # the stubs know no nests of specs
        return one_by_one(function, rows, fn_output_signature=spec)
    with holding(is_mapped, True):
        return tf.vectorized_map(
            function, rows, fallback_to_while_loop=False, warn=False
        )


def by_rows(make: Callable[..., Any], *, may_vectorise: bool) -> Any:
    """Return `make(vectorises=True)`; what a loop over rows makes if that fails."""
    if may_vectorise:
        with contextlib.suppress(Exception):  # whatever op the vectoriser does not know
            return make(vectorises=True)
    return make(vectorises=False)


def blank_state(method: Any, x: tf.Tensor) -> State:
    """Return the state before the first evaluation, at `x`: its step is -1."""
    zero, most = tf.zeros([], x.dtype), tf.constant(x.dtype.max, x.dtype)
    none = zero * float("nan")  # a start without a value keeps it
    return State(
        x,
        Evaluation(none, tf.zeros_like(x) + none, none, {}),
        Memory(x, method.blank(x)),
        tf.constant(True),
        tf.constant(RUNNING),
        tf.constant(-1),
        tf.constant(0),
        most,
        zero,
    )


class _Steps(NamedTuple):
    """The steps of one problem; a row is what is its own, without its point."""

    plan: Plan
    task: Task

    @property
    def is_blank(self) -> bool:
        """Whether the method begins with a blank state, without an evaluation."""
        return hasattr(self.plan.method, "blank")

    def stepper(self, row: list[tf.Tensor]) -> PureStepper:
        """Return what takes the steps."""
        problem, method = self.plan.problem, self.plan.method
        count = len(self.task.sides)
        data = tf.nest.pack_sequence_as(self.plan.data, row[count:])
        bound = isinstance(method, Bindable) and method.bind(Row(problem, data))
        return PureStepper(problem, bound or method, row[:2] if count else None)

    def begun(
        self, x: tf.Tensor, row: list[tf.Tensor], evaluation: Evaluation
    ) -> State:
        """Return the state after the first evaluation, at x."""
        stepper = self.stepper(row)
        state = stepper.begun(Start.at(x, evaluation))
        here, rules = state.evaluation, Ruled(stepper, self.plan.options.tolerances)
        code = rules.first(here.value, here.grad_max, state.expected, state.first)
        return state._replace(code=tf.where(state.code > 0, state.code, code))

    def turn(self, given: tuple[State, list[tf.Tensor], Evaluation]) -> State:
        """Return the state after an evaluation of its trial."""
        state, row, evaluation = given
        stepper, is_new = self.stepper(row), state.step < 0
        ruled = Ruled(stepper, self.plan.options.tolerances)
        if self.is_blank:
            first = tf.where(is_new, evaluation.value, state.first)
            new = ruled.step(state._replace(first=first), evaluation)
            new = new._replace(step=tf.maximum(new.step, 0))
        else:
            start = self.begun(state.memory.trial, row, evaluation)
            new = either(is_new, start, ruled.step(state, evaluation))
        code = new.code
        if stepper.knows_solutions:
            verdict = new.memory.method.verdict
            is_own = (code == code_of("converged")) | (code == stepper.failure)
            for position, status in STATUSES.items():
                holds = is_own & (verdict == position)
                code = tf.where(holds, code_of(status), code)
        is_used_up = (code == RUNNING) & (new.step >= self.plan.steps)
        new = new._replace(code=tf.where(is_used_up, code_of("steps"), code))
        return either(state.code == RUNNING, new, state)


def _evaluation_of(plan: Plan) -> Callable[[list[tf.Tensor]], Evaluation]:
    """Return f of one problem as a function of its point and its data."""
    problem = evaluated_by = plan.problem
    if not CALLS.isdisjoint(operations_of(plan.graph)):
        # The derivative of a call of another `tf.function` is many calls of it.
        evaluated_by = without_calls(problem, plan.data) or problem
    arguments = problem.x.template, *plan.data
    function = evaluated_by.evaluator.evaluate.function(arguments, None)

    def evaluate(row: list[tf.Tensor]) -> Evaluation:
        x, *rest = row
        given = *unravel(x, problem.x.leaves), *rest
        return seen(flat(function(*given)))._replace(aux={})

    return evaluate


def _compile(
    plan: Plan, task: Task, *, jit: bool, vectorises: bool
) -> tuple[Any, Callable[..., Any], Callable[..., Any]]:
    """Return the blank state of one problem; the steps of many; their values."""
    method, steps, splits = plan.method, _Steps(plan, task), 1 + len(task.sides)
    evaluate = _evaluation_of(plan)
    steps_vectorise = vectorises or not isinstance(method, Bindable)

    def evaluate_all(rows: list[tf.Tensor]) -> Evaluation:
        with inlined():  # the vectoriser makes a function of its own of each call
            every: Evaluation = mapped(evaluate, rows, evaluated, vectorises=vectorises)
        return measured(every)  # the vectoriser knows no op for the bits of a number

    def advance(
        state: State,
        is_new: tf.Tensor,
        blank: State,
        held: list[tf.Tensor],
        turns: Any,
        enough: Any,
    ) -> State:
        x, rest = held[0], held[1:]
        blank = blank._replace(x=x, memory=blank.memory._replace(trial=x))

        def renewed(new: tf.Tensor, old: tf.Tensor) -> tf.Tensor:
            ones = [1] * (len(old.shape) - 1)
            return tf.where(tf.reshape(is_new, [-1, *ones]), new, old)

        def goes_on(i: Any, state: State) -> Any:
            runs = tf.cast(state.code == RUNNING, tf.int32)
            return (i < turns) & (tf.reduce_sum(runs) > enough)

        def body(i: Any, state: State) -> Any:
            evaluation = evaluate_all([state.memory.trial, *held[splits:]])
            rows = state, rest, evaluation
            return i + 1, mapped(steps.turn, rows, like, vectorises=steps_vectorise)

        start = tf.constant(0), tf.nest.map_structure(renewed, blank, state)
        return tf.while_loop(goes_on, body, start, parallel_iterations=1)[1]

    def values(rows: list[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        evaluation = evaluate_all(rows)
        return evaluation.value, evaluation.gradient

    def one(x: tf.Tensor, *rest: tf.Tensor) -> tuple[Evaluation, State]:
        evaluation = evaluate([x, *rest[splits - 1 :]])
        return evaluation, steps.begun(x, list(rest), evaluation)

    evaluated, like = None, None
    if steps.is_blank:
        blank = blank_state(method, tf.constant(task.x[0]))
    if not steps.is_blank or not vectorises:  # else, a trace less
        rows = [tf.TensorSpec(a.shape[1:], a.dtype) for a in task.given]
        traced = tf.function(one, autograph=False).get_concrete_function(*rows)
        evaluated, like = tf.nest.map_structure(
            tf.TensorSpec.from_tensor, traced.structured_outputs
        )
    if not steps.is_blank:
        blank = tf.nest.map_structure(lambda s: tf.zeros(s.shape, s.dtype), like)
        blank = blank._replace(code=tf.constant(RUNNING), step=tf.constant(-1))
    # Functions of their own: TensorFlow counts the traces of each name.
    own = functools.partial(advance), functools.partial(values)
    both = [tf.function(f, autograph=False, jit_compile=jit or None) for f in own]
    return blank, *both
