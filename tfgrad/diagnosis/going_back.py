"""A model under training that can go back to the step at which it went wrong.

A check of every gradient in the compiled step costs 3 to 10 % of it on a CPU. So the
loss and the weights are looked at now and then. Where they are not finite, the model
goes back to the copy made at the look before, and takes the steps since then once more,
one by one.
"""

from __future__ import annotations

import functools
import math
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfgrad.diagnosis.explain import explain
from tfgrad.diagnosis.report import Explanation
from tfgrad.errors import InvalidArgumentError

_SHARE = 1 / 200
"""The part of the training time that looks at the weights may take, without copies."""

_SHARE_AT_ENDS = 1 / 100
"""The same of looks at the ends of epochs: of very short ones, not each has one."""

_MOST_BYTES = 2**28
"""Batches kept since the weights were last looked at."""


class Step(NamedTuple):
    """The training step that is to blame.

    Attributes:
        epoch: Of which epoch it is, from 0.
        batch: Its number there, from 0.
        data: Its batch.
        spoiled: Whether its loss is not finite; else its gradient is not.
        losses: Those of the steps before, the last ones.
        explain: Returns why its loss, or the gradient, is not finite.
    """

    epoch: int
    batch: int
    data: Any
    spoiled: bool
    losses: tuple[float, ...]
    explain: Callable[[], Explanation]


class Watch:
    """A model that keeps a copy of its state, and the batches trained on since then.

    Attributes:
        spoiled: Whether a loss or a weight was not finite.
    """

    def __init__(self, model: Any) -> None:
        if model.distribute_strategy.num_replicas_in_sync > 1:
            raise InvalidArgumentError(
                "ExplainNaN watches the training of one replica.",
                got=f"a model of {type(model.distribute_strategy).__name__}",
                hint="fit without the strategy until the NaN is found",
            )
        self.spoiled = False
        self._model, self._training = model, Training(model, self._watched)
        self._copy: Copy | None = None
        self._logs: Any = {}  # of the last steps
        self._losses: deque[float] = deque(maxlen=3)
        self._calls_left = 1  # until the batches kept are too many
        self._seconds = self._cost = 0.0  # of the calls since the last look; of a look
        self._epochs = [(0, 0, 0)]  # its first position in the stage, epoch, batch

    def begin_epoch(self, epoch: int) -> None:
        """Count the batches of an epoch from here."""
        self._epochs.append((self._training.stage.size(), epoch, 0))

    def end_epoch(self) -> None:
        """Look before others save the weights, unless the last look was just now."""
        if _spoiled(self._logs) or self._seconds * _SHARE_AT_ENDS > self._cost:
            self.look()

    def look(self) -> None:
        """Look at the loss and the weights now; stop if they are not finite."""
        # Keras's loss is a mean over the epoch: a NaN stays in it.
        if _spoiled(self._logs) or not self._keep():
            self.spoiled = self._model.stop_training = True
        elif self._logs:
            self._losses.append(_loss_in(self._logs))

    def end(self) -> None:
        """Give the model its own training back."""
        self._training.end()
        if self._copy is not None and not self.spoiled:
            self.look()

    def culprit(self) -> Step | None:
        """Return the step to blame, found by training again; undo that step."""
        copy, training = self._copy, self._training
        assert copy is not None
        copy.assign(copy.saved)
        for position in range(training.stage.size()):
            data = training.stage.batch(training.like)
            before, _ = copy.read()
            logs = training.one(data)
            spoiled = _spoiled(logs)
            if spoiled or not copy.read()[1]:
                copy.assign(before)
                marks = [mark for mark in self._epochs if mark[0] <= position]
                first, epoch, batch = marks[-1]
                losses = tuple(self._losses)
                number, loss = batch + position - first, self._loss_of(data, spoiled)
                why = functools.partial(explain, loss, wrt=self._model)
                return Step(epoch, number, data, bool(spoiled), losses, why)
            self._losses.append(_loss_in(logs))
        return None

    def _loss_of(self, data: Any, spoiled: str) -> Callable[[], Any]:
        """Return what computes the loss of a batch, or what `spoiled` names in logs."""
        model = self._model

        def loss() -> Any:
            if spoiled and type(model).train_step is not keras.Model.train_step:
                return model.train_step(data)[spoiled]
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            predicted = model(x, training=True)
            return model.compute_loss(
                x=x, y=y, y_pred=predicted, sample_weight=sample_weight, training=True
            )

        return loss

    def _watched(self, iterator: Any) -> Any:
        if self._copy is None:
            self._training.build(iterator)
            self._copy = Copy(self._model)
            self._keep()
        began = time.perf_counter()
        try:
            self._logs = logs = self._training.run(iterator)
        except BaseException as error:
            if not isinstance(error, StopIteration | tf.errors.OutOfRangeError):
                self.end()  # `fit` ends without `on_train_end`
            raise
        self._calls_left -= 1
        self._seconds += time.perf_counter() - began
        if self._seconds * _SHARE > self._cost or self._calls_left < 0:
            self.look()
        return logs

    def _keep(self) -> bool:
        """Copy the state and forget the batches before, if the weights are finite."""
        began, stage = time.perf_counter(), self._training.stage
        assert self._copy is not None
        if not self._copy.take():
            return False
        first, epoch, batch = self._epochs[-1]
        size = stage.size()
        if size:
            in_call = int(self._model.steps_per_execution)
            self._calls_left = max(1, stage.most() // in_call)
        self._epochs = [(0, epoch, batch + size - first)]
        stage.clear()
        self._seconds, self._cost = 0.0, time.perf_counter() - began
        return True


class Training:
    """The training of a model, compiled anew so that it keeps its batches.

    `fit` calls `watched` in place of `run`.

    Attributes:
        stage: The batches.
        like: A batch, for its structure.
        one: Takes one step with a batch.
    """

    def __init__(self, model: Any, watched: Callable[[Any], Any]) -> None:
        self._model, self._step = model, model.train_step
        self._own = vars(model).get("train_step")
        self._before = model.train_function
        self.like: Any = None
        self.stage, jit = Stage(), model.jit_compile
        one = self._step
        if not model.run_eagerly:
            options = {"jit_compile": jit or None, "reduce_retracing": True}
            one = tf.function(self._step, autograph=False, **options)

        def step(data: Any) -> Any:
            self.like = data
            self.stage.put(data)
            return one(data) if jit else self._step(data)

        model.train_step, model.jit_compile = step, False
        try:  # XLA has no stage: it compiles what is in the step, and not around it
            model.make_train_function(force=True)
        finally:
            model.jit_compile = jit
        self.one = one
        self._run, model.train_function = model.train_function, watched
        self._single: Any = None
        if model.steps_per_execution == 1 and not model.run_eagerly:
            options = {"autograph": False, "reduce_retracing": True}
            self._single = tf.function(self._next, **options)

    def run(self, iterator: Any) -> Any:
        """Take the steps of one call of `fit`; return the logs.

        A single step does without what Keras needs for several in one call: that pays
        for the batches being kept.
        """
        if self._single is not None and isinstance(iterator, tf.data.Iterator):
            return self._single(iterator)
        return self._run(iterator)

    def _next(self, iterator: Any) -> Any:
        drawn = tf.nest.map_structure(_or_none, iterator.get_next())
        return self._model.distribute_strategy.run(self._model.train_step, (drawn,))

    def build(self, iterator: Any) -> None:
        """Make all variables, before the first step."""
        model = self._model
        if model.built and type(model).train_step is keras.Model.train_step:
            model.optimizer.build(model.trainable_variables)
        elif hasattr(iterator, "element_spec"):
            # What is not built is built while it is traced; nothing is computed.
            tf.function(self._step).get_concrete_function(iterator.element_spec)

    def end(self) -> None:
        """Give the model its own back."""
        del self._model.train_step
        if self._own is not None:
            self._model.train_step = self._own
        self._model.train_function = self._before


class Copy:
    """The values of all that training changes in a model that is built.

    Attributes:
        saved: The values when they were last taken.
        read: Returns the values of now, and whether the weights are finite.
    """

    saved: list[tf.Tensor]

    def __init__(self, model: Any) -> None:
        kept = [*model.variables, *model.metrics_variables]
        kept += [v for optimizer in _optimizers(model) for v in optimizer.variables]
        self._kept = list({id(v): v.value for v in kept}.values())
        self._model = model
        self.read = tf.function(self._state, autograph=False)

    def take(self) -> bool:
        """Take the values, if the weights are finite; return whether they are."""
        saved, finite = self.read()
        if finite:
            self.saved = saved
        return bool(finite)

    def assign(self, values: list[tf.Tensor]) -> None:
        """Put the model to some values."""
        for variable, value in zip(self._kept, values, strict=True):
            variable.assign(value)

    def _state(self) -> tuple[list[tf.Tensor], tf.Tensor]:
        weights = [w.value for w in self._model.weights if w.value.dtype.is_floating]
        finite = [tf.reduce_all(tf.math.is_finite(w)) for w in weights]
        optimizer = self._model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            # The loss scale is halved at each overflow; at 1, no overflow can be
            # skipped.
            finite.append(optimizer.dynamic_scale.value >= 1)
        return [v.read_value() for v in self._kept], tf.reduce_all(finite)


class Stage:
    """Batches, kept in order by TensorFlow itself, from within a compiled loop."""

    def __init__(self) -> None:
        self._options: dict[str, Any] = {"shared_name": f"tfgrad_{uuid.uuid4().hex}"}

    def put(self, data: Any) -> None:
        """Keep a batch; may be traced."""
        leaves = _tensors(data)
        self._options["dtypes"] = [leaf.dtype for leaf in leaves]
        shared_name = self._options["shared_name"]
        tf.raw_ops.Stage(values=leaves, shared_name=shared_name)

    def size(self) -> int:
        """Return how many batches are kept."""
        return int(tf.raw_ops.StageSize(**self._options)) if self._used() else 0

    def most(self) -> int:
        """Return how many batches of the first one's size may be kept."""
        first = tf.raw_ops.StagePeek(index=tf.constant(0), **self._options)
        size = sum(leaf.dtype.size * int(tf.size(leaf)) for leaf in first)
        return _MOST_BYTES // max(size, 1)

    def clear(self) -> None:
        """Drop all batches."""
        if self._used():
            tf.raw_ops.StageClear(**self._options)

    def batch(self, like: Any) -> Any:
        """Remove the first batch and return it, structured like another."""
        leaves = iter(tf.raw_ops.Unstage(**self._options))
        flat = tf.nest.flatten(like, expand_composites=True)
        filled = [None if leaf is None else next(leaves) for leaf in flat]
        return tf.nest.pack_sequence_as(like, filled, expand_composites=True)

    def _used(self) -> bool:
        return "dtypes" in self._options


def _optimizers(model: Any) -> list[Any]:
    """Return the optimizers of a model: Keras's, and those of its own train_step."""
    parts = [model, *vars(model).values()]
    found = [*parts, *(getattr(part, "optimizer", None) for part in parts)]
    kind = keras.optimizers.Optimizer
    return list({id(o): o for o in found if isinstance(o, kind)}.values())


def _tensors(data: Any) -> list[tf.Tensor]:
    leaves = tf.nest.flatten(data, expand_composites=True)
    return [tf.convert_to_tensor(leaf) for leaf in leaves if leaf is not None]


def _or_none(leaf: Any) -> Any:
    """Return a part of a batch; None for what Keras has put in the place of None."""
    return None if isinstance(leaf, tf.experimental.Optional) else leaf


def _loss_in(logs: Mapping[str, Any]) -> float:
    return float(logs["loss"]) if "loss" in logs else math.nan


def _spoiled(logs: Mapping[str, Any]) -> str:
    """Return the first name in the logs that is not finite; the loss, if there."""
    names = ["loss"] if "loss" in logs else list(logs)
    spoiled = (name for name in names if not math.isfinite(float(logs[name])))
    return next(spoiled, "")
