"""The batches of a run, one by one, from one epoch into the next."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfgrad.nested import Nest
from tfgrad.optimize.data import Source, arguments_of, names_of_parts, require_batch
from tfgrad.optimize.problem import Problem


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


class Feed:
    """Draws the batches of a source for the steps of a run.

    Args:
        problem: Whose function takes them.
        source: Where they come from.
        position: How many epochs are over, and how many batches of the next one.

    Attributes:
        arguments: Returns what the function takes of a batch.
        first: What the iterator yielded first, a `tf.experimental.Optional`.

    Raises:
        InvalidArgumentError: If there is no batch, or the function does not take it.
    """

    def __init__(
        self, problem: Problem, source: Source, position: tuple[int, int]
    ) -> None:
        self._problem, self.source, self._position = problem, source, position
        # The threads of a data set may take ten milliseconds to end.
        self._old = ThreadPoolExecutor(1, thread_name_prefix="tfgrad-data")
        self._next: Any = lambda iterator: iterator.get_next_as_optional()
        if source.is_own:  # eagerly, its spec would be that of one batch alone
            self._next = tf.function(self._next, autograph=False)
        epoch, count = position
        # One batch earlier: if the rest of the epoch is empty, that batch shows the
        # form of batches.
        self._iterator = source.open(epoch, max(0, count - 1))
        self.first = self._draw()
        require_batch(bool(self.first.has_value()))
        batch = source.batch(self.first.get_value())
        if not source.is_own:
            problem.replicas.require_same(batch)
        self.arguments = arguments_of(problem.f, int(problem.x.takes_values), batch)
        problem.example = self.arguments(batch)

    def begin(self) -> Batches:
        """Return the batches at hand where the run begins."""
        epoch, count = self._position
        ahead = self._draw() if count else self.first
        return Batches(ahead, self.first, tf.constant(count), tf.constant(epoch))

    def refill(self, batches: Batches) -> Batches:
        """Return the batches with the next one, drawn if it is not at hand yet."""
        if bool(batches.ahead.has_value()):
            return batches
        return batches._replace(ahead=self._draw())

    @property
    def may_draw(self) -> bool:
        """Whether the epoch may have a batch that is not drawn yet."""
        return self.source.is_python and not self._is_exhausted

    def next_epoch(self, batches: Batches, *, opens: bool) -> Batches:
        """Return the batches of the next epoch: its first one if it opens."""
        epoch, ahead = int(batches.epoch) + 1, batches.ahead
        if opens:
            old, self._iterator = [self._iterator], self.source.open(epoch)
            self._old.submit(old.clear)
            ahead = self._draw()
            replicas = self._problem.replicas
            is_same = replicas.is_clustered and not self.source.is_own
            if is_same and bool(ahead.has_value()):
                replicas.require_same(self.source.batch(ahead.get_value()))
        return Batches(ahead, batches.last, tf.constant(0), tf.constant(epoch))

    def inputs(self, last_step: int) -> tuple[Any, ...]:
        """Return what `drawn` takes besides, up to a step."""
        return self._iterator, tf.constant(last_step)

    def drawn(
        self,
        step: tf.Tensor,
        moved: list[tf.Variable],
        iterator: Any,
        last_step: tf.Tensor,
    ) -> Any:
        """Return the batch that comes after a step, which has `moved` variables.

        No batch is drawn from the user's code after `last_step`.
        """
        if not self.source.is_python:
            return iterator.get_next_as_optional()
        optional: Any = tf.experimental.Optional  # it may read the variables, so:
        with tf.control_dependencies([v.read_value() for v in moved]):
            draws = tf.identity(step) < last_step
        return tf.cond(
            draws,
            lambda: iterator.get_next_as_optional(),
            lambda: optional.empty(self.source.spec),
        )

    def arguments_at_hand(self, batches: Batches) -> tuple[Nest, ...]:
        """Return what the function takes of the batch that comes next."""
        return self.arguments(self.source.batch(batches.ahead.get_value()))

    def blame(self, batches: Batches, arguments: tuple[Nest, ...]) -> str:
        """Return what is not finite in the batch at hand, or ""."""
        before = int(self._problem.x.takes_values)
        names = names_of_parts(self._problem.f, before, arguments)
        for name, leaf in zip(names, tf.nest.flatten(arguments), strict=True):
            if not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
                continue
            bad = np.argwhere(~np.isfinite(leaf.numpy().astype(np.float64)))
            if len(bad):
                drawn = batches.ahead.get_value()
                row = f", {self.source.row(drawn, bad[0][0])}" if bad.size else ""
                value = leaf.numpy()[tuple(bad[0])]
                where = f"batch {int(batches.count)} of epoch {int(batches.epoch)}"
                return f"{where} (counted from 0) holds {value} in `{name}`{row}"
        return ""

    def _draw(self) -> Any:
        """Return the next batch, if there is one."""
        ahead = self._next(self._iterator)
        self._is_exhausted = not bool(ahead.has_value())
        return ahead
