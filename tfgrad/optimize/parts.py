"""Evaluations put together from those of parts: of batches, of replicas' shares.

The mean over all rows is the sum of the means of the parts, each times its share of the
rows; so is the gradient. A part without rows, whose mean would be NaN, counts as 0. A
sum over rows, as `least_squares` has it, is the sum of the parts' sums. Numbers of half
precision are added up in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.tracing import Traces
from tfgrad.nested import Nest
from tfgrad.optimize.data import SIZE, Source, rows_of, size_of
from tfgrad.optimize.distribute import Copies, Replicas, without_nan
from tfgrad.optimize.evaluator import Evaluation, Evaluator, python_of, small


class Part(NamedTuple):
    """The result of one part: nests of tensors.

    Attributes:
        means: Of what is a mean over the rows of a batch, times this part's share.
        sums: Of what is a sum over rows.
        linear: The linear model of residuals; empty if there is none.
    """

    means: Any
    sums: Any
    linear: Any = ()


class Parts:
    """How the results of parts are combined.

    Args:
        replicas: Who computes a share of each batch.
        written: The variables that f writes: float ones are averages, which become the
            mean of the replicas'; integers of shape `[2]` are Keras's seeds.
        source: The data, all of which is gone through each time; None for a batch that
            is handed over.
        arguments: Returns what f takes of a batch of the source.
        are_own: Whether each worker has a batch of its own.
    """

    def __init__(
        self,
        replicas: Replicas,
        written: Sequence[tf.Variable],
        source: Source | None = None,
        arguments: Callable[[Nest], tuple[Nest, ...]] = tuple,
        *,
        are_own: bool = False,
    ) -> None:
        self.is_shared = replicas.count > 1
        many = written if self.is_shared else ()
        self._averages = [v for v in many if v.dtype.is_floating]
        integers = [v for v in many if v.dtype.is_integer]
        self._seeds = [v for v in integers if v.shape.as_list() == [2]]
        self._replicas, self._source, self._arguments = replicas, source, arguments
        self._are_own = are_own

    def put_together(
        self,
        compute: Callable[[Nest, tuple[Nest, ...], Any], Part],
        given: Nest,
        batch: tuple[Nest, ...],
        like: Callable[[], Part],
        join: Callable[[Any, Any], Any] = lambda a, b: (),
    ) -> list[Part]:
        """Return the combined result of all parts, on each device of this process.

        Args:
            compute: Takes `given`, what f takes of a batch, and the part's share of its
                rows (shape `[]`, None for all of them).
            given: What is the same for all parts: a nest of tensors.
            batch: What f takes of the batch, if there is no source.
            like: Returns what a part looks like: a nest of specs or tensors.
            join: Returns the linear model of two parts together.
        """

        def one(given: Nest, batch: tuple[Nest, ...]) -> Any:
            return self.of_replica(compute, given, batch, like, join)

        answers = self._replicas.run_on_each(one, given, batch)
        self.settle(answers[0][1])
        return [part for part, _ in answers]

    def of_replica(
        self,
        compute: Callable[[Nest, tuple[Nest, ...], Any], Part],
        given: Nest,
        batch: tuple[Nest, ...],
        like: Callable[[], Part] = lambda: Part((), ()),
        join: Callable[[Any, Any], Any] = lambda a, b: (),
    ) -> tuple[Part, list[tf.Tensor]]:
        """Return the combined result within one of the replicas; `settle` its averages.

        The arguments are those of `put_together`.
        """
        with self._replicas.own_masks(self._seeds):
            if self._source is None:
                part, share = self._of_share(compute, given, batch)
            else:
                part, share = self._of_all(compute, given, like(), join)
        return self._total(part, share, join)

    def settle(self, averages: Sequence[tf.Tensor]) -> None:
        """Let the averages that f writes be the replicas' mean, outside of those."""
        for variable, mean in zip(self._averages, averages, strict=True):
            variable.assign(mean)

    def _of_share(
        self, compute: Callable[..., Part], given: Nest, batch: tuple[Nest, ...]
    ) -> tuple[Part, Any]:
        """Return the result of this replica's share of a batch, and the share."""
        if self._replicas.count == 1:
            return compute(given, batch, None), None
        rows = rows_of(batch)
        mine, own = self._replicas.share(batch, rows, are_own=self._are_own)
        is_step = self._are_own and self._source is None
        if is_step:  # a batch is what all workers have drawn
            (rows,) = self._replicas.total([tf.cast(own, tf.float64)])
        share = _quotient(own, rows)
        part = compute(given, mine, share)
        if is_step:
            part.sums.aux[SIZE] = own
        return part, share

    def _of_all(
        self,
        compute: Callable[..., Part],
        given: Nest,
        like: Part,
        join: Callable[[Any, Any], Any],
    ) -> tuple[Part, Any]:
        """Return the same of the share of all batches of the source."""
        source: Any = self._source

        def add(sums: Any, drawn: Any) -> Any:
            total, rows, own = sums
            batch = self._arguments(source.batch(drawn))
            rows_in = rows_of if self.is_shared else size_of
            count = tf.cast(rows_in(batch), tf.float64)
            part, share = self._of_share(compute, given, batch)
            means = _map(lambda x: _wide(without_nan(x, share)), part.means)
            means = _map(lambda x: x * tf.cast(count, x.dtype), means)
            next_one = Part(means, _map(_wide, part.sums))
            added = _map(tf.add, total._replace(linear=()), next_one)
            linear = join(total.linear, part.linear)
            mine = count if share is None else share * count
            return added._replace(linear=linear), rows + count, own + mine

        zeros = _map(lambda x: tf.zeros(x.shape, _wide_dtype(x.dtype)), like)
        none = tf.zeros([], tf.float64)
        total, rows, own = source.fold(add, (zeros, none, none))
        if self._are_own and self.is_shared:
            (rows,) = self._replicas.total([own])
        means = _map(lambda x: x / tf.cast(rows, x.dtype), total.means)
        total = total._replace(means=means)
        return _map(lambda x, y: tf.cast(x, y.dtype), total, like), own / rows

    def _total(
        self, part: Part, share: Any, join: Callable[[Any, Any], Any]
    ) -> tuple[Part, list[tf.Tensor]]:
        """Return the sum over the replicas, and the mean of the averages."""
        replicas = self._replicas
        if replicas.count == 1:
            return part, []
        averages = [
            tf.math.multiply_no_nan(v.read_value(), tf.cast(share, v.dtype))
            for v in self._averages
        ]
        linear = _map(replicas.stacked, part.linear)
        parts = (part._replace(linear=linear), averages)
        totals = replicas.total(tf.nest.flatten(parts), share)
        part, averages = tf.nest.pack_sequence_as(parts, totals)
        if tf.nest.flatten(linear):
            unstacked = zip(*map(tf.unstack, tf.nest.flatten(part.linear)), strict=True)
            each = [tf.nest.pack_sequence_as(linear, leaves) for leaves in unstacked]
            part = part._replace(linear=functools.reduce(join, each))
        return part, averages


class GivenParts(Parts):
    """Parts of a batch that nobody cuts: each replica has been given one."""

    def _of_share(
        self, compute: Callable[..., Part], given: Nest, batch: tuple[Nest, ...]
    ) -> tuple[Part, Any]:
        """Return the result of what this replica was given, and its share of all rows.

        Parts of several lengths, as of a batch and some weights, have the least one.
        """
        counts = [size_of(x) for x in tf.nest.flatten(batch) if x.shape.rank]
        count = tf.reduce_min(tf.stack(counts or [tf.constant(1)]))
        count = tf.cast(count, tf.float64)
        (rows,) = self._replicas.total([count])
        share = tf.math.divide_no_nan(count, rows)
        return compute(given, batch, share), share


class EvaluatorOfParts:
    """What an `Evaluator` computes, put together from parts.

    Args:
        of_part: Evaluates one; its second derivatives call no graph. That f is sound
            was seen in an evaluation of one batch, outside of replicas.
        parts: How they become one.
        like: An evaluation of one batch, or its specs, where `parts` go through data.
        copies: Where the gradient on other devices of this process is kept, if at all.
        jit: Compile the evaluation of a part with XLA.
    """

    is_sum = False
    """Whether the value is a sum over the rows of a batch, or else their mean."""

    def __init__(
        self,
        of_part: Evaluator,
        parts: Parts,
        like: Any = None,
        copies: Copies | None = None,
        *,
        jit: bool = False,
    ) -> None:
        self.of_part, self.variables = of_part, of_part.variables
        self.kept: dict[Any, Any] = {}
        self._parts, self._like, self._copies, self._jit = parts, like, copies, jit
        f = python_of(of_part.f)
        self.evaluate = Traces(self._evaluate, f, jit=False, in_turn=True)
        self.products = Traces(self._multiply, f, jit=False, in_turn=True)

    def _evaluate(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], scale: Any
    ) -> Evaluation:
        if tf.executing_eagerly() and self._parts.is_shared:  # no trace: say why
            traced = tf.function(self._evaluate, autograph=False)
            return traced(f, arguments, scale)
        point, batch = self._split(arguments)
        evaluate = self._evaluate_part
        if self._jit:
            evaluate = tf.function(evaluate, autograph=False, jit_compile=True)

        def compute(given: Nest, batch: tuple[Nest, ...], share: Any) -> Part:
            point, scales = given
            weights = [*scales] if self.is_sum or share is None else [*scales, share]
            # In float64: a third of the rows is no third in float32.
            wide = [tf.cast(each, tf.float64) for each in weights]
            weight = tf.reduce_prod(tf.stack(wide)) if wide else None
            return self.as_part(evaluate(f, (*point, *batch), weight), share)

        def like() -> Part:
            return self.as_part(self._like, None)

        scales = () if scale is None else (scale,)
        part, *others = self._parts.put_together(
            compute, (point, scales), batch, like, self.joined
        )
        found: Evaluation = part.sums if self.is_sum else part.means
        if self._copies is not None:
            self._copies.keep([other.means.gradient for other in others])
        aux = {**part.means.aux, **part.sums.aux}
        return found._replace(aux=aux, linear=part.linear)

    def _evaluate_part(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], weight: Any
    ) -> Evaluation:
        recording = self.of_part.record(f, arguments)
        value, gradient, linear = self.value(recording, weight)
        return Evaluation(value, gradient, (), small(recording.aux), linear)

    def value(
        self, recording: Recording, weight: Any
    ) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
        """Return the value, the gradient times a weight, and a linear model."""
        value = recording.output
        one = tf.ones_like(value) if weight is None else tf.cast(weight, value.dtype)
        return value, recording.pull([one]), ()

    def as_part(self, evaluation: Evaluation, share: Any) -> Part:
        """Return an evaluation as a part; what is a mean of it, times its share."""
        aux = evaluation.aux.items()
        floats = {n: weighted(a, share) for n, a in aux if a.dtype.is_floating}
        counts = {n: a for n, a in aux if a.dtype.is_integer}
        value, gradient = evaluation.value, evaluation.gradient
        whole = Evaluation(value, gradient, (), {})
        empty: Any = ()
        none = whole._replace(value=empty, gradient=empty)
        if self.is_sum:
            return Part(none._replace(aux=floats), whole._replace(aux=counts))
        whole = whole._replace(value=weighted(value, share), aux=floats)
        return Part(whole, none._replace(aux=counts))

    def joined(self, a: Any, b: Any) -> Any:
        """Return the linear model of two parts together."""
        return ()

    def _multiply(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], direction: list[Any]
    ) -> list[tf.Tensor]:
        point, batch = self._split(arguments)

        def compute(given: Nest, batch: tuple[Nest, ...], share: Any) -> Part:
            point, direction = given
            product = self.of_part.multiply(f, (*point, *batch), direction)
            if self.is_sum:
                return Part((), product)
            return Part([weighted(leaf, share) for leaf in product], ())

        def like() -> Part:
            return Part((), direction) if self.is_sum else Part(direction, ())

        part, *_ = self._parts.put_together(compute, (point, direction), batch, like)
        product: list[tf.Tensor] = part.sums if self.is_sum else part.means
        return product

    def _split(self, arguments: tuple[Nest, ...]) -> tuple[Any, Any]:
        """Return the arguments before the batch, and those made of it."""
        count = int(self.variables is None)
        return arguments[:count], arguments[count:]


def _quotient(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """Return a / b in float64: a constant if both are."""
    known = tf.get_static_value(a), tf.get_static_value(b)
    if None not in known:
        return tf.constant(known[0] / known[1], tf.float64)
    quotient: tf.Tensor = tf.cast(a, tf.float64) / tf.cast(b, tf.float64)
    return quotient


def weighted(tensor: tf.Tensor, share: Any) -> tf.Tensor:
    """Return a mean over some of the rows, times their share of all: 0 for no rows."""
    if share is None:
        return tensor
    return tf.math.multiply_no_nan(tensor, tf.cast(share, tensor.dtype))


def _wide(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, _wide_dtype(tensor.dtype))


def _wide_dtype(dtype: tf.DType) -> tf.DType:
    """Return the dtype that numbers are added up in: float32 for half precision."""
    return tf.float32 if dtype.is_floating and dtype.size < 4 else dtype


def _map(function: Callable[..., Any], *nests: Any) -> Any:
    return tf.nest.map_structure(function, *nests)
