"""An optimizer that moves variables by itself, with or without batches.

A step evaluates the function at the current point, on the batch that comes next if
there is data; asks the rules; and lets the optimizer move the variables. The point that
the last step leads to is evaluated once more at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
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
from tfgrad.optimize.evaluator import SMALL, Evaluation, dense, operations_of
from tfgrad.optimize.methods.keras_optimizer import Factory, KerasMethod, plain
from tfgrad.optimize.problem import Problem, require_compiled
from tfgrad.optimize.solvers import NO_XLA, Form, Solver, State
from tfgrad.optimize.solvers.pure import NOT_FOR_XLA
from tfgrad.optimize.stopping import RUNNING, rule_of, status_of
from tfgrad.optimize.traced import blame, not_moved, others

SIZE = "size of the batch"
"""A column of the rows: the weight of a batch in the mean of its epoch."""

LOOP_STEPS = 100
"""Compiling the loop pays from about here, measured on functions of 30 to 140 ops."""

XLA_STEPS = 3000
"""Compiling it with XLA pays from about here, measured likewise, ..."""

XLA_STEPS_PER_OP = 20
"""... and for larger functions, which take longer to compile, from this many per op."""


class Batches(NamedTuple):
    """The batches at hand: `tf.experimental.Optional`s, and a count, shape `[]`.

    Attributes:
        ahead: The one that the next step takes, if there is one in the epoch.
        last: The one that the last step took.
        count: How many were taken in the epoch.
        epoch: How many epochs are over.
    """

    ahead: Any
    last: Any
    count: Any
    epoch: Any


class OptimizerSolver(Solver):
    """Evaluate where the variables are, then let the optimizer move them.

    Args:
        problem: What to minimise.
        factory: Returns the optimizer; see `methods.keras_optimizer`.
        source: The batches, if there is data.
        position: How many epochs are over, and how many batches of the next one.
    """

    lag = 0

    def __init__(
        self,
        problem: Problem,
        factory: Factory,
        source: Source | None = None,
        position: tuple[int, int] = (0, 0),
    ) -> None:
        """Find the variables, build the optimizer; evaluate nothing else."""
        self.problem = problem
        self._source, self._position = source, position
        self._is_exhausted = False
        self._method: Any = None
        self._kept: dict[Any, Any] = {}
        self.blamed: tuple[list[tf.Tensor], tuple[Nest, ...]] = [], ()
        self._owners = self._make_variables()
        self.moved = [plain(owner) for owner in self._owners]
        if source is not None:
            self._open_first(source)
        self._compiled = self._compile()
        if not self.moved:  # they were found by the trace
            problem.find()
            self._owners = problem.owners
            self.moved = [plain(owner) for owner in self._owners]
        self._written = self._written_by_f()
        self._method = KerasMethod(factory, self._owners)
        self.name, self.optimizer = self._method.name, self._method.optimizer
        is_shared = source is not None and problem.replicas.count > 1
        if is_shared:
            if self._compiled is None:  # eagerly, f raises the user's own error
                self._evaluated(self._first.get_value())
                require_compiled(problem.name, problem.replicas.count)
            problem.distribute(self._written)
        if is_shared or self._method.scale() is not None:
            self._compiled = self._compile()
        self.backup = [tf.Variable(v, trainable=False) for v in self.moved]
        self._before = [tf.Variable(v, trainable=False) for v in self._written]

    @property
    def is_eager(self) -> bool:
        """Whether the updates have to run outside of a trace."""
        return not self._method.is_compiled or self._compiled is None

    def kept(self) -> tuple[Any, Any]:
        """Return that what is compiled serves this run alone."""
        return self._kept, None

    def init(self) -> tuple[State, Evaluation | None]:
        """Return where the variables are; nothing is evaluated if f can be traced."""
        batch = self._batches() if self._source is not None else ()
        evaluation = self._nothing(batch)
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

    def _nothing(self, batch: Any) -> Evaluation:
        """Return an evaluation before the first one, of the same dtypes."""
        if self._compiled is None:  # only a look can tell
            return _carried(self.evaluate(getattr(batch, "ahead", ())))
        specs = _carried(self._compiled.structured_outputs)
        nothing: Evaluation = tf.nest.map_structure(
            lambda spec: tf.zeros(spec.shape, spec.dtype), specs
        )
        return nothing

    def inputs(self, state: State, limit: int) -> tuple[Any, ...]:
        """Return the iterator, and the step up to which batches are drawn from it."""
        if self._source is None:
            return ()
        return self._iterator, tf.constant(int(state.step) + limit)

    def query(self, state: State) -> Any:
        """Return the batch that comes next."""
        return state.batch.ahead if self._source is not None else ()

    def evaluate(self, query: Any, *inputs: Any) -> Evaluation:
        """Return the function where the variables are, on a batch if there is data."""
        for kept, variable in zip(self._before, self._written, strict=True):
            kept.assign(variable.read_value())
        drawn = () if self._source is None else (query.get_value(),)
        if self._compiled is None:
            return self._evaluated(*drawn)
        evaluation: Evaluation = self._compiled(*drawn)
        return evaluation

    def row(self, x: Any, evaluation: Evaluation) -> dict[str, Any]:
        """Return value, gradient and aux values, and the point while it is small."""
        row = {"fun": evaluation.value, "grad_max": evaluation.grad_max}
        if sum(variable.shape.num_elements() for variable in self.moved) <= SMALL:
            row |= self.problem.named([v.read_value() for v in self.moved])
        rate = self._method.rate()
        if rate is not None:
            row["learning_rate"] = rate
        return {**row, **evaluation.aux}

    def accept(self, state: State, evaluation: Evaluation) -> State:
        """Return the state with the current point evaluated."""
        here = _carried(evaluation)
        if self._method.scale() is not None:
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
        read = [[v.read_value() for v in each] for each in (self.moved, self.backup)]
        return read[0], read[1]

    def move(
        self, old: State, new: State, evaluation: Evaluation, *inputs: Any
    ) -> State:
        """Let the optimizer move the variables, unless the run has ended."""

        def go() -> tf.Tensor:
            for kept, variable in zip(self.backup, self.moved, strict=True):
                kept.assign(variable.read_value())
            self._method.update(evaluation.gradient)
            return tf.constant(1)

        def stay() -> tf.Tensor:
            for kept, variable in zip(self._before, self._written, strict=True):
                variable.assign(kept.read_value())
            return tf.constant(0)

        taken = tf.cond(new.code == RUNNING, go, stay)
        new = new._replace(step=new.step + taken)
        source = self._source
        if source is None:
            return new
        iterator, last_step = inputs
        batch, count = new.batch, new.batch.count + taken

        def draw() -> Any:
            return iterator.get_next_as_optional()

        def none() -> Any:
            optional: Any = tf.experimental.Optional
            return optional.empty(source.spec)

        draws = new.code == RUNNING
        if source.is_python:  # it may read the variables: after the update
            with tf.control_dependencies([v.read_value() for v in self.moved]):
                draws &= tf.identity(new.step) < last_step
            other = tf.cond(new.code == RUNNING, none, lambda: batch.ahead)
        else:
            other = batch.ahead
        ahead = tf.cond(draws, draw, lambda: other)
        return new._replace(batch=Batches(ahead, batch.ahead, count, batch.epoch))

    def has_next(self, state: State) -> Any:
        """Return whether there is a batch at hand."""
        return True if self._source is None else state.batch.ahead.has_value()

    def recover(self, state: State) -> tuple[State, str]:
        """Say what is not finite, and go back to the point before, if there is one."""
        blame = self._blame(state)
        if int(state.step) == 0:
            return state, blame
        for kept, variable in zip(self.backup, self.moved, strict=True):
            variable.assign(kept.read_value())
        state = state._replace(step=state.step - 1, evaluation=state.memory)
        return state, blame

    def finish(self, state: State) -> tuple[State, Evaluation | None]:
        """Let the optimizer put its averages in place; evaluate the last point.

        With data, on the batch that comes next, or on the last one again.
        """
        state = self.prepare(state)
        evaluation = self.look(state)
        ended = status_of(int(state.code))
        has_row = ended is not None and rule_of(ended).holds is not None
        last, counted = evaluation, int(not has_row)
        if self._method.finish():  # the averages are in place now
            last, counted = self.look(state), counted + 1
        evaluations = state.evaluations + counted
        state = state._replace(evaluation=last, evaluations=evaluations)
        return state, None if has_row else evaluation

    def look(self, state: State) -> Evaluation:
        """Return the function where the variables are; undo what that writes."""
        query: Any = ()
        if self._source is not None:
            batch = state.batch
            query = batch.ahead if bool(batch.ahead.has_value()) else batch.last
        before = [variable.read_value() for variable in self._written]
        evaluation = self.evaluate(query)
        for variable, value in zip(self._written, before, strict=True):
            variable.assign(value)
        return evaluation

    def point(self, state: State) -> list[tf.Tensor]:
        """Return the values of the variables."""
        return [variable.read_value() for variable in self.moved]

    def gradient(self, evaluation: Evaluation) -> list[tf.Tensor]:
        """Return the gradient without the loss scale, dense."""
        leaves, scale = dense(evaluation.gradient), self._method.scale()
        if scale is None:
            return leaves
        return [leaf / tf.cast(scale, leaf.dtype) for leaf in leaves]

    def variables(self) -> list[tf.Variable]:
        """Return what is moved, the optimizer's moments, and what else f reads."""
        # What f reads comes in reading order, the same in every process.
        of_f = (*others(self.problem), *self._written)
        parts = (self.moved, self.backup, self._method.variables(), of_f)
        return list({id(v): v for part in parts for v in part}.values())

    def form(self, state: State, planned: int, jit: bool | str) -> Form:
        """Return the compiled loop that pays for so many steps."""
        if self.is_eager:
            return Form("calls")
        if self._source is not None:
            return Form("graph")
        if jit is True:
            return Form("xla")
        if planned < LOOP_STEPS:
            return Form("calls")
        operations = operations_of(self._compiled.graph)
        is_fit = not any(part in op for op in operations for part in NOT_FOR_XLA)
        is_long = planned >= max(XLA_STEPS, XLA_STEPS_PER_OP * len(operations))
        is_fit &= jit == "auto" and not self._kept.get(NO_XLA)
        return Form("xla" if is_fit and is_long else "graph")

    def set_rate(self, rate: Any) -> None:
        """Let the optimizer go on with another learning rate."""
        if not callable(rate):
            self._method.optimizer.learning_rate = rate

    # --- batches ---

    def may_draw(self, state: State) -> bool:
        """Return whether the epoch may have a batch that is not drawn yet."""
        assert self._source is not None
        return self._source.is_python and not self._is_exhausted

    def next_epoch(self, state: State, *, opens: bool) -> State:
        """Return the state at the next epoch, at its first batch if it opens."""
        assert self._source is not None
        batch, epoch = state.batch, state.batch.epoch + 1
        ahead = batch.ahead
        if opens:
            self._iterator = self._source.open(int(epoch))
            ahead = self._draw()
            if self.problem.replicas.is_clustered and bool(ahead.has_value()):
                self.problem.replicas.require_same(
                    self._source.batch(ahead.get_value())
                )
        return state._replace(batch=Batches(ahead, batch.last, 0 * epoch, epoch))

    def prepare(self, state: State) -> State:
        """Draw the next batch if it is not at hand yet."""
        if self._source is None or bool(state.batch.ahead.has_value()):
            return state
        return state._replace(batch=state.batch._replace(ahead=self._draw()))

    def _draw(self) -> Any:
        """Return the next batch, if there is one."""
        ahead = self._iterator.get_next_as_optional()
        self._is_exhausted = not bool(ahead.has_value())
        return ahead

    def _open_first(self, source: Source) -> None:
        """Open the data where the run begins; look at what a batch is."""
        epoch, count = self._position
        # The batch before is what an empty rest of an epoch is judged by.
        self._iterator = source.open(epoch, max(0, count - 1))
        self._first = self._draw()
        require_batch(bool(self._first.has_value()))
        batch = source.batch(self._first.get_value())
        self.problem.replicas.require_same(batch)
        self._spreads = spreads(self.problem.f, int(self.problem.takes_values), batch)
        self.problem.example = self._arguments(batch)

    def _batches(self) -> Batches:
        epoch, count = self._position
        ahead = self._first if self._source is not None else ()
        if count:
            ahead = self._draw()
        return Batches(ahead, self._first, tf.constant(count), tf.constant(epoch))

    def _make_variables(self) -> list[Any]:
        """Return the user's variables, or new ones that hold the values."""
        if not self.problem.takes_values:
            return self.problem.owners
        start = self.problem.start()
        return [keras.Variable(leaf, dtype=leaf.dtype.name) for leaf in start]

    def _compile(self) -> Any:
        """Return the compiled evaluation, for batches of all sizes at once.

        None if f leaves TensorFlow: eagerly, it runs or raises the user's own error.
        """
        function = tf.function(self._evaluated, autograph=False)
        specs = [] if self._source is None else [self._source.spec]
        try:
            return function.get_concrete_function(*specs)
        except TfgradError:
            raise
        except Exception:
            return None

    def _written_by_f(self) -> list[tf.Variable]:
        """Return the other variables that f writes to, as far as a trace tells."""
        if self._compiled is None:
            return []
        return not_moved(self.problem, written_variables(self._compiled))

    def _evaluated(self, *drawn: Any) -> Evaluation:
        """Return the evaluation, with the size of the batch among the aux values."""
        point = None
        if self.problem.takes_values:
            point = [variable.read_value() for variable in self.moved]
        scale = None if self._method is None else self._method.scale()
        if self._source is None:
            evaluation = self.problem.evaluate(point, (), scale)
            arguments: tuple[Nest, ...] = ()
        else:
            batch = self._source.batch(*drawn)
            arguments = self._arguments(batch)
            evaluation = self.problem.evaluate(point, arguments, scale)
            aux = {**evaluation.aux, SIZE: size_of(batch)}
            evaluation = evaluation._replace(aux=aux)
        if not tf.executing_eagerly() and self._runs_eagerly(arguments, scale):
            raise NotImplementedError
        return evaluation

    def _runs_eagerly(self, arguments: tuple[Nest, ...], scale: Any) -> bool:
        return self.problem.graph(arguments, scale) is None

    def _arguments(self, batch: Nest) -> tuple[Nest, ...]:
        """Return what the loss takes of a batch."""
        return tuple(batch) if self._spreads else (batch,)

    def _blame(self, state: State) -> str:
        """Return what is not finite in the batch at hand, or with it; "" if unknown."""
        point = [variable.read_value() for variable in self.moved]
        self.blamed = point, ()
        if self._source is None:
            return blame(self.problem, point)
        drawn = state.batch.ahead.get_value()
        arguments = self._arguments(self._source.batch(drawn))
        self.blamed = point, arguments
        before = int(self.problem.takes_values)
        names = names_of_parts(self.problem.f, before, arguments)
        for name, leaf in zip(names, tf.nest.flatten(arguments), strict=True):
            if not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
                continue
            bad = np.argwhere(~np.isfinite(leaf.numpy().astype(np.float64)))
            if len(bad):
                row = f", {self._source.row(drawn, bad[0][0])}" if bad.size else ""
                value = leaf.numpy()[tuple(bad[0])]
                epoch, count = int(state.batch.epoch), int(state.batch.count)
                where = f"batch {count} of epoch {epoch}"
                return f"{where} (counted from 0) holds {value} in `{name}`{row}"
        return blame(self.problem, point, *arguments)


def _carried(evaluation: Evaluation) -> Evaluation:
    return evaluation._replace(gradient=(), aux={}, linear=())
