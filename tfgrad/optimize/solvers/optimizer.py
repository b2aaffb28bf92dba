"""An optimizer that moves variables by itself, with or without batches.

A step evaluates the function at the current point, on the batch that comes next if
there is data; asks the rules; and lets the optimizer move the variables. The point that
the last step leads to is evaluated once more at the end.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfgrad.derivatives.tracing import suited
from tfgrad.diagnosis.graphs import has, operations_of, written_variables
from tfgrad.diagnosis.sources import restored
from tfgrad.errors import TfgradError
from tfgrad.nested import Nest
from tfgrad.optimize.compiled import direct
from tfgrad.optimize.data import SIZE, Source, size_of
from tfgrad.optimize.distribute import Copies
from tfgrad.optimize.evaluator import SMALL, Evaluation, dense, measured
from tfgrad.optimize.methods.keras_optimizer import (
    Factory,
    KerasMethod,
    plain,
    rates_of,
)
from tfgrad.optimize.problem import Problem, drawing, require_compiled
from tfgrad.optimize.solvers import NO_XLA, Form, Forms, Solver, State, Stepper
from tfgrad.optimize.solvers.backup import Backup
from tfgrad.optimize.solvers.feed import Feed
from tfgrad.optimize.solvers.pure import NOT_FOR_XLA
from tfgrad.optimize.stopping import RUNNING, rule_of, status_of
from tfgrad.optimize.traced import blame, not_moved, others, traced

LOOP_STEPS = 100
"""Compiling the loop pays from about here, measured on functions of 30 to 140 ops."""

XLA_STEPS = 3000
"""Compiling it with XLA pays from about here, measured likewise, ..."""

XLA_STEPS_PER_OP = 20
"""... and for larger functions, which take longer to compile, from this many per op."""

KEPT_SIZE = 2**16
"""The most elements of variables that are kept alive by an update compiled for them."""


LEAF = "leaf {} of x"
"""The column of a leaf of the points until it has the name that the user knows."""


class OptimizerStepper(Stepper):
    """Evaluate where the variables are, then let the optimizer move them.

    Args:
        problem: What to minimise.
        factory: Returns the optimizer; see `methods.keras_optimizer`.
        feed: The batches, if there is data.

    Attributes:
        method: The optimizer at work.
        moved: The variables that it moves.
        backup: The same before the last step.
        written: The variables that f writes, as far as a trace tells.
        before: Copies of these.
        compiled: The evaluation, compiled: f's own trace, or one around it; None if f
            runs eagerly.
    """

    lookahead = 0
    expects = False

    def __init__(self, problem: Problem, factory: Factory, feed: Feed | None) -> None:
        self.problem, self.feed = problem, feed
        self.method: Any = None
        owners = problem.x.owners
        if problem.x.takes_values:  # new ones, that hold the values
            start = problem.x.start()
            owners = [keras.Variable(x, dtype=x.dtype.name) for x in start]
        self.moved = [plain(owner) for owner in owners]
        self.compiled = self._compile()
        if not self.moved:  # they were found by the trace
            problem.find()
            owners = problem.x.owners
            self.moved = [plain(owner) for owner in owners]
        self.written: list[tf.Variable] = []
        if self.compiled is not None:
            self.written = not_moved(problem, written_variables(self.compiled))
        self.method = KerasMethod(factory, owners)
        is_whole = feed is None and self.compiled is not None and not self.written
        if is_whole and problem.options["verify"] and drawing(self.compiled) is None:
            evaluator: Any = problem.evaluator  # of f itself: there is no data
            at = problem.x.start() if problem.x.takes_values else None
            evaluator.check(problem.x.arguments(at))
        is_shared = feed is not None and problem.replicas.count > 1
        self._copies = Copies(self.moved if is_shared else ())
        if feed is not None and is_shared:
            if self.compiled is None:  # eagerly, f raises the user's own error
                self._evaluated(feed.first.get_value())
                require_compiled(problem.name, problem.replicas.count)
            problem.distribute(self.written, self._copies, are_own=feed.source.is_own)
        if is_shared or self.method.is_scaled:
            self.compiled = self._compile()
        self._direct: Any = None
        if is_whole and self.compiled is not None:
            with suited(self.compiled.graph):
                self._direct = direct(self.compiled)
        self.backup = Backup(self.moved, owners, self.method.optimizer)
        self.before = [tf.Variable(v, trainable=False) for v in self.written]

    @property
    def _is_own(self) -> bool:
        """Whether `compiled` is the trace of f itself, with values for arguments."""
        is_scaled = self.method is not None and self.method.is_scaled
        return self.feed is None and not is_scaled

    @property
    def is_eager(self) -> bool:
        """Whether the updates have to run outside of a trace."""
        return not self.method.is_compiled or self.compiled is None

    def has_next(self, state: State) -> Any:
        """Return whether there is a batch at hand."""
        return True if self.feed is None else state.batch.ahead.has_value()

    def query(self, state: State) -> Any:
        """Return the batch that comes next."""
        return () if self.feed is None else state.batch.ahead

    def evaluate(self, query: Any) -> Evaluation:
        """Return the function where the variables are, on a batch if there is data."""
        for kept, variable in zip(self.before, self.written, strict=True):
            kept.assign(variable.read_value())
        given: tuple[Any, ...] = ()
        if self.feed is not None:
            given = (query.get_value(),)
        if self.compiled is None:
            return self._evaluated(*given)
        if self._is_own and self.problem.x.takes_values:
            given = tuple(variable.read_value() for variable in self.moved)
        evaluation: Evaluation
        if self._direct is not None and tf.executing_eagerly():
            with contextlib.suppress(tf.errors.OpError):  # the other call explains it
                evaluation = self._direct(*given)
                return evaluation
        evaluation = self.compiled(*given)
        return evaluation

    def row(self, x: Any, evaluation: Evaluation) -> dict[str, Any]:
        """Return value, gradient and aux values, and the point while it is small."""
        row = {"fun": evaluation.value, "grad_max": evaluation.grad_max}
        if sum(variable.shape.num_elements() for variable in self.moved) <= SMALL:
            row |= {LEAF.format(i): v.read_value() for i, v in enumerate(self.moved)}
        rate = self.method.rate()
        if rate is not None:
            row["learning_rate"] = rate
        return {**row, **evaluation.aux}

    def accept(self, state: State, evaluation: Evaluation) -> State:
        """Return the state with the current point evaluated."""
        here = _carried(evaluation)
        if self.method.is_scaled:
            # An overflow is the optimizer's own affair: it takes a smaller scale.
            size = here.grad_max
            known = tf.where(tf.math.is_finite(size), size, size.dtype.max)
            here = here._replace(grad_max=known)
        return state._replace(
            evaluation=here,
            memory=state.evaluation,
            accepted=tf.constant(True),
            evaluations=state.evaluations + 1,
        )

    def way(self, old: State, new: State) -> tuple[list[Any], list[Any]]:
        """Return the current point and the one before, leaf by leaf."""
        read = [
            [v.read_value() for v in each]
            for each in (self.moved, self.backup.variables)
        ]
        return read[0], read[1]

    def inputs(self, state: State, limit: int) -> tuple[Any, ...]:
        """Return the iterator, and the step up to which batches are drawn from it."""
        return () if self.feed is None else self.feed.inputs(int(state.step) + limit)

    def move(self, new: State, evaluation: Evaluation, *inputs: Any) -> State:
        """Let the optimizer move the variables, unless the run has ended."""
        feed, batches = self.feed, new.batch

        def go() -> Any:
            self.backup.keep(evaluation.gradient)
            optimizer, gradient = self.method.optimizer, evaluation.gradient
            with self._copies.beside(optimizer, gradient) as gradient:
                self.method.update(gradient)
            if feed is None:
                return tf.constant(1), ()
            return tf.constant(1), feed.drawn(new.step + 1, self.moved, *inputs)

        def stay() -> Any:
            for kept, variable in zip(self.before, self.written, strict=True):
                variable.assign(kept.read_value())
            return tf.constant(0), () if feed is None else batches.ahead

        taken, ahead = tf.cond(new.code == RUNNING, go, stay)
        if feed is not None:
            count = batches.count + taken
            batches = batches._replace(ahead=ahead, last=batches.ahead, count=count)
        return new._replace(step=new.step + taken, batch=batches)

    def _compile(self) -> Any:
        """Return the compiled evaluation, for batches of all sizes at once.

        None if f leaves TensorFlow: eagerly, it runs or raises the user's own error.
        """
        specs = [] if self.feed is None else [self.feed.source.spec]
        try:
            if self._is_own:
                return traced(self.problem)
            function = tf.function(self._evaluated, autograph=False)
            return function.get_concrete_function(*specs)
        except TfgradError:
            raise
        except Exception:
            return None

    def _evaluated(self, *drawn: Any) -> Evaluation:
        """Return the evaluation, with the size of the batch among the aux values."""
        point = None
        if self.problem.x.takes_values:
            point = [variable.read_value() for variable in self.moved]
        scale = None if self.method is None else self.method.scale()
        arguments: tuple[Nest, ...] = ()
        if self.feed is not None:
            batch = self.feed.source.batch(*drawn)
            arguments = self.feed.arguments(batch)
        evaluation = self.problem.evaluate(point, arguments, scale)
        if self.feed is not None:
            aux = {SIZE: size_of(batch), **evaluation.aux}
            evaluation = evaluation._replace(aux=aux)
        is_traced = not tf.executing_eagerly()
        if is_traced and self.problem.graph(arguments, scale) is None:
            raise NotImplementedError  # f runs eagerly
        return evaluation


class OptimizerForms(Forms):
    """The compiled loop that pays for so many steps; it serves one run."""

    def __init__(self, stepper: OptimizerStepper) -> None:
        self._stepper = stepper
        self._kept: dict[Any, Any] = {}
        self._rates: Sequence[Any] = ()
        self._schedules = -1  # how many came after the first
        self.refresh()

    def refresh(self) -> None:
        """Compile all anew if the optimizer has another schedule, which traces hold."""
        stepper, before = self._stepper, self._rates
        self._rates = rates_of(stepper.method.optimizer)
        if before and not any(map(operator.is_not, self._rates, before)):
            return
        self._schedules += 1
        self._variables = [
            *stepper.moved, *stepper.backup.variables, *stepper.method.variables(),
            *stepper.written, *stepper.before,
        ]  # fmt: skip

    def form(self, state: State, planned: int, jit: bool | str) -> Form:
        """Return the compiled loop that pays for so many steps."""
        if self._stepper.is_eager:
            return Form("calls")
        if self._stepper.feed is not None:
            return Form("graph")
        if jit is True:
            return Form("xla")
        if planned < LOOP_STEPS:
            return Form("calls")
        operations = operations_of(self._stepper.compiled.graph)
        is_fit = not has(operations, NOT_FOR_XLA)
        is_long = planned >= max(XLA_STEPS, XLA_STEPS_PER_OP * len(operations))
        is_fit &= jit == "auto" and not self._kept.get(NO_XLA)
        return Form("xla" if is_fit and is_long else "graph")

    def kept(self) -> tuple[Any, Any]:
        """Return where updates are kept: of small variables, for all functions."""
        stepper = self._stepper
        size = sum(v.shape.num_elements() for v in stepper.moved)
        is_alone = stepper.feed is None and stepper.problem.replicas.count == 1
        if is_alone and size <= KEPT_SIZE and (key := stepper.method.settings()):
            return None, key
        return self.kept_with_f()

    def kept_with_f(self) -> tuple[Any, Any]:
        """Return that a compiled loop serves this run alone."""
        return self._kept, self._schedules

    def variables(self) -> list[tf.Variable]:
        """Return what is moved, with copies, the optimizer's state, what f writes."""
        return self._variables


class OptimizerSolver(Solver):
    """An optimizer at work on a problem, with or without batches.

    Args:
        problem: What to minimise.
        factory: Returns the optimizer; see `methods.keras_optimizer`.
        source: The batches, if there is data.
        position: How many epochs are over, and how many batches of the next one.

    Attributes:
        optimizer: The optimizer.
        blamed: The leaves of a point that was not finite, and what f took besides.
    """

    def __init__(
        self,
        problem: Problem,
        factory: Factory,
        source: Source | None = None,
        position: tuple[int, int] = (0, 0),
    ) -> None:
        self._feed = None if source is None else Feed(problem, source, position)
        self._problem = problem
        self.stepper = OptimizerStepper(problem, factory, self._feed)
        self.forms = OptimizerForms(self.stepper)
        self.optimizer = self.stepper.method.optimizer
        self.blamed: tuple[list[tf.Tensor], tuple[Nest, ...]] = [], ()

    def init(
        self, x: list[tf.Tensor] | None = None, before: State | None = None
    ) -> tuple[State, Evaluation | None]:
        """Return where the variables are; nothing is evaluated if f can be traced."""
        batch = () if self._feed is None else self._feed.begin()
        if self.stepper.compiled is None:  # only a look can tell its dtypes
            query = getattr(batch, "ahead", ())
            evaluation = _carried(self.stepper.evaluate(query))
        else:
            specs = _carried(self.stepper.compiled.structured_outputs)
            evaluation = tf.nest.map_structure(
                lambda spec: tf.zeros(spec.shape, spec.dtype),
                specs._replace(grad_max=specs.value),
            )
        dtype = evaluation.value.dtype
        state = State(
            x=(),
            evaluation=evaluation,
            memory=evaluation,
            accepted=tf.constant(True),
            code=tf.constant(RUNNING),
            step=tf.constant(0),
            evaluations=tf.constant(0),
            expected=tf.constant(dtype.max, dtype),
            first=evaluation.value,
            batch=batch,
        )
        return state, None

    def point(self, state: State) -> list[tf.Tensor]:
        """Return the values of the variables."""
        return [variable.read_value() for variable in self.stepper.moved]

    def named(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns with the names of leaves that the user knows."""
        places = [LEAF.format(i) for i in range(len(self.stepper.moved))]
        if places[0] not in columns:
            return columns
        leaves = self._problem.x.named([columns[place] for place in places])
        return {n: c for n, c in columns.items() if n not in places} | leaves

    def gradient(self, evaluation: Evaluation) -> list[tf.Tensor]:
        """Return the gradient without the loss scale, dense."""
        leaves, scale = dense(evaluation.gradient), self.stepper.method.scale()
        if scale is None:
            return leaves
        return [leaf / tf.cast(scale, leaf.dtype) for leaf in leaves]

    def variables(self) -> list[tf.Variable]:
        """Return what is moved, the optimizer's moments, and what else f reads."""
        stepper = self.stepper
        # What f reads comes in reading order, the same in every process.
        of_f = (*others(self._problem), *stepper.written)
        parts = (
            stepper.moved,
            stepper.backup.variables,
            stepper.method.variables(),
            of_f,
        )
        return list({id(v): v for part in parts for v in part}.values())

    def look(self, state: State) -> Evaluation:
        """Return the function where the variables are; undo what that writes."""
        query: Any = ()
        if self._feed is not None:
            batch = state.batch
            query = batch.ahead if bool(batch.ahead.has_value()) else batch.last
        with restored(self.stepper.written):
            return measured(self.stepper.evaluate(query))

    def look_back(self, state: State) -> Evaluation:
        """Return the function where the variables were before the last step."""
        moved = self.stepper.moved
        with restored(moved):
            for v, kept in zip(moved, self.stepper.backup.variables, strict=True):
                v.assign(kept.read_value())
            return self.look(state)

    def refresh(self, state: State) -> State:
        """Return the same: what the user has changed is evaluated next."""
        self.stepper.backup.forget()
        self.forms.refresh()
        return state

    def recover(self, state: State) -> tuple[State, str]:
        """Say what is not finite, and go back to the point before, if there is one."""
        point = self.point(state)
        arguments: tuple[Nest, ...] = ()
        found = ""
        if self._feed is not None:
            arguments = self._feed.arguments_at_hand(state.batch)
            found = self._feed.blame(state.batch, arguments)
        found = found or blame(self._problem, point, *arguments)
        self.blamed = point, arguments
        if int(state.step) == 0:
            return state, found
        pairs = zip(self.stepper.backup.variables, self.stepper.moved, strict=True)
        for kept, variable in pairs:
            variable.assign(kept.read_value())
        state = state._replace(step=state.step - 1, evaluation=state.memory)
        return state, found

    def finish(self, state: State) -> tuple[State, Evaluation | None]:
        """Let the optimizer put its averages in place; evaluate the last point.

        With data, on the batch that comes next, or on the last one again.
        """
        state = self.prepare(state)
        evaluation = self.look(state)
        ended = status_of(int(state.code))
        has_row = ended is not None and rule_of(ended).holds is not None
        last, counted = evaluation, int(not has_row)
        if self.stepper.method.finish():  # the averages are in place now
            last, counted = self.look(state), counted + 1
        evaluations = state.evaluations + counted
        state = state._replace(evaluation=last, evaluations=evaluations)
        return state, None if has_row else evaluation

    # --- batches ---

    def prepare(self, state: State) -> State:
        """Draw the next batch if it is not at hand yet."""
        if self._feed is None:
            return state
        return state._replace(batch=self._feed.refill(state.batch))

    def has_more(self, state: State) -> bool:
        """Return whether the epoch may have another batch, at hand or not drawn yet."""
        assert self._feed is not None
        return bool(self.stepper.has_next(state)) or self._feed.may_draw

    def next_epoch(self, state: State, *, opens: bool) -> State:
        """Return the state at the next epoch, at its first batch if it opens."""
        assert self._feed is not None
        return state._replace(batch=self._feed.next_epoch(state.batch, opens=opens))


def _carried(evaluation: Evaluation) -> Evaluation:
    return evaluation._replace(gradient=(), aux={}, linear=())
