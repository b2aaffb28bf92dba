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
"""Of the time of training, what looking at the weights may take; copies come to it."""

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
        """Compile the training of the model anew, with batches that are kept."""
        if model.distribute_strategy.num_replicas_in_sync > 1:
            raise InvalidArgumentError(
                "ExplainNaN watches the training of one replica.",
                got=f"a model of {type(model.distribute_strategy).__name__}",
                hint="fit without the strategy until the NaN is found",
            )
        self.spoiled = False
        self._model, self._step = model, model.train_step
        self._own = vars(model).get("train_step")
        self._before = model.train_function
        self._like: Any = None  # the structure of a batch
        self._stage = Stage()
        self._logs: Any = {}  # of the last steps
        self._losses: deque[float] = deque(maxlen=3)
        self._calls, self._most_calls = 0, 1
        self._one = self._compile()
        self._kept: list[tf.Variable] = []
        self._epochs = [(0, 0, 0)]  # its first position in the stage, epoch, batch

    def begin_epoch(self, epoch: int) -> None:
        """Count the batches of an epoch from here."""
        self._epochs.append((self._stage.size(), epoch, 0))

    def end_epoch(self) -> None:
        """Look before others save the weights, unless the last look was just now."""
        if _spoiled(self._logs) or time.perf_counter() > self._next_at_end:
            self.look()

    def look(self) -> None:
        """Look at the loss and the weights now; stop if they are not finite."""
        # Keras's loss is a mean over the epoch: a NaN stays in it.
        if _spoiled(self._logs) or not self._copy():
            self.spoiled = self._model.stop_training = True
        elif self._logs:
            self._losses.append(_loss_in(self._logs))

    def end(self) -> None:
        """Give the model its own training back."""
        del self._model.train_step
        if self._own is not None:
            self._model.train_step = self._own
        self._model.train_function = self._before
        if self._kept and not self.spoiled:
            self.look()

    def culprit(self) -> Step | None:
        """Return the step to blame, found by training again; the model is before it."""
        self._assign(self._saved)
        for position in range(self._stage.size()):
            data = self._stage.batch(self._like)
            before, _ = self._read()
            logs = self._one(data)
            spoiled = _spoiled(logs)
            if spoiled or not self._read()[1]:
                self._assign(before)
                marks = [mark for mark in self._epochs if mark[0] <= position]
                first, epoch, batch = marks[-1]
                losses = tuple(self._losses)
                number, loss = batch + position - first, self._loss_of(data, spoiled)
                why = functools.partial(explain, loss, wrt=self._model)
                return Step(epoch, number, data, bool(spoiled), losses, why)
            self._losses.append(_loss_in(logs))
        return None

    def _loss_of(self, data: Any, spoiled: str) -> Callable[[], Any]:
        """Return what computes the loss of a batch.

        Args:
            data: The batch.
            spoiled: The name in its logs that is not finite; "" for the gradient.
        """
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

    def _compile(self) -> Callable[..., Any]:
        """Have the model's training keep its batches; return one step of it."""
        model, jit = self._model, self._model.jit_compile
        one = self._step
        if not model.run_eagerly:
            options = {"jit_compile": jit or None, "reduce_retracing": True}
            one = tf.function(self._step, autograph=False, **options)

        def step(data: Any) -> Any:
            self._like = data
            self._stage.put(data)
            return one(data) if jit else self._step(data)

        model.train_step, model.jit_compile = step, False
        try:  # XLA has no stage: it compiles what is in the step, and not around it
            model.make_train_function(force=True)
        finally:
            model.jit_compile = jit
        train, model.train_function = model.train_function, self._watched
        self._train = train
        return one

    def _begin(self, iterator: Any) -> None:
        """Copy the state before the first step."""
        model = self._model
        if model.built and type(model).train_step is keras.Model.train_step:
            model.optimizer.build(model.trainable_variables)
        elif hasattr(iterator, "element_spec"):
            # What is not built is built while it is traced; nothing is computed.
            tf.function(self._step).get_concrete_function(iterator.element_spec)
        kept = [*model.variables, *model.metrics_variables]
        kept += [v for optimizer in _optimizers(model) for v in optimizer.variables]
        self._kept = list({id(v): v.value for v in kept}.values())
        self._read = tf.function(self._state, autograph=False)
        self._copy()

    def _watched(self, iterator: Any) -> Any:
        if not self._kept:
            self._begin(iterator)
        try:
            self._logs = logs = self._train(iterator)
        except BaseException as error:
            if not isinstance(error, StopIteration | tf.errors.OutOfRangeError):
                self.end()  # `fit` ends without `on_train_end`
            raise
        self._calls += 1
        if time.perf_counter() > self._next or self._calls > self._most_calls:
            self.look()
        return logs

    def _state(self) -> tuple[list[tf.Tensor], tf.Tensor]:
        """Return the values of all variables, and whether the weights are finite."""
        weights = [w.value for w in self._model.weights if w.value.dtype.is_floating]
        finite = [tf.reduce_all(tf.math.is_finite(w)) for w in weights]
        optimizer = self._model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            # It halves its scale at each overflow; at 1, there is none to skip.
            finite.append(optimizer.dynamic_scale.value >= 1)
        return [v.read_value() for v in self._kept], tf.reduce_all(finite)

    def _copy(self) -> bool:
        """Copy the state and forget the batches before, if the weights are finite."""
        began = time.perf_counter()
        saved, finite = self._read()
        if not finite:
            return False
        self._saved = saved
        first, epoch, batch = self._epochs[-1]
        size = self._stage.size()
        if size:
            in_call = -(-size // self._calls)
            self._most_calls = max(1, self._stage.most() // in_call)
        self._epochs, self._calls = [(0, epoch, batch + size - first)], 0
        self._stage.clear()
        cost = time.perf_counter() - began
        self._next = began + cost / _SHARE
        self._next_at_end = began + cost / _SHARE_AT_ENDS
        return True

    def _assign(self, values: list[tf.Tensor]) -> None:
        for variable, value in zip(self._kept, values, strict=True):
            variable.assign(value)


class Stage:
    """Batches, kept in order by TensorFlow itself, from within a compiled loop."""

    def __init__(self) -> None:
        """Keep none."""
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
        """Return how many batches like the first one may be kept."""
        first = tf.raw_ops.StagePeek(index=tf.constant(0), **self._options)
        size = sum(leaf.dtype.size * int(tf.size(leaf)) for leaf in first)
        return _MOST_BYTES // max(size, 1)

    def clear(self) -> None:
        """Keep none of those that are kept."""
        if self._used():
            tf.raw_ops.StageClear(**self._options)

    def batch(self, like: Any) -> Any:
        """Return the first batch, structured like another, and keep it no longer."""
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


def _loss_in(logs: Mapping[str, Any]) -> float:
    return float(logs["loss"]) if "loss" in logs else math.nan


def _spoiled(logs: Mapping[str, Any]) -> str:
    """Return the first name in the logs that is not finite; the loss, if there."""
    names = ["loss"] if "loss" in logs else list(logs)
    spoiled = (name for name in names if not math.isfinite(float(logs[name])))
    return next(spoiled, "")
