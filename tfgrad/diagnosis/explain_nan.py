"""`ExplainNaN`: the callback of `Model.fit` that says why a loss became NaN."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.explain import explain
from tfgrad.diagnosis.report import Explanation
from tfgrad.errors import InvalidArgumentError, TfgradError
from tfgrad.nested import named_leaves

_SHARE = 1 / 200
"""Of the time of training, what looking at the weights may take; copies come to it."""

_MOST_BYTES = 2**28
"""Batches kept since the weights were last looked at."""


_MARK = "tfgrad_layer_"
_SMALLER = "a smaller learning rate, or clipnorm=1.0"


class ExplainNaN(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no stubs
    """Ends `fit` at the first loss or gradient that is not finite, and says why.

    Use it in place of `keras.callbacks.TerminateOnNaN`. It names the batch, the layer,
    the op and your line that made the NaN or the infinity, and what to write instead.
    The model and its optimizer are left as they were before that batch. An overflow
    that a `LossScaleOptimizer` skips is none.

    The cost until then is the memory of a copy of the weights and of the optimizer, and
    of the batches since that copy, and less than two per cent of the time: the loss is
    looked at in each step, the weights now and then. When one of them is not finite,
    the batches since the copy are trained on again, one by one.

    Args:
        raise_error: Raise the explanation as a `TfgradError` at the end of `fit`, in
            place of a warning.

    Attributes:
        epoch: The epoch of the batch that is to blame, from 0; None while all is well.
        batch: Its number in the epoch, from 0.
        data: The batch itself, as the model's `train_step` takes it.
        layer: The path of the layer that is to blame; empty if it is in none.
        explanation: What `tfgrad.explain` finds for the loss of this batch.

    Example:
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        >>> model.compile("sgd", loss=lambda y, p: tf.math.log(y - 3.0) - p)
        >>> watch = ExplainNaN()
        >>> x, y = tf.ones([8, 1]), tf.range(9.0, 1.0, -1)  # log(3 - 3) in batch 3
        >>> with warnings.catch_warnings(action="ignore"):
        ...     _ = model.fit(x, y, 2, shuffle=False, callbacks=[watch], verbose=0)
        >>> watch.batch, watch.explanation.findings[0].culprit.label
        (3, 'tf.math.log')
    """

    def __init__(self, raise_error: bool = False) -> None:
        """Watch nothing yet."""
        super().__init__()
        if not isinstance(raise_error, bool):
            raise InvalidArgumentError(
                "`raise_error` is True or False.",
                got=f"raise_error={raise_error!r}",
                hint="ExplainNaN(raise_error=True)",
            )
        self._raises = raise_error
        self._watch: _Watch | None = None
        self._forget()

    def _forget(self) -> None:
        self.epoch: int | None = None
        self.batch: int | None = None
        self.data: Any = None
        self.layer = ""
        self.explanation: Explanation | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Have the model keep its batches."""
        self._forget()
        self._watch = _Watch(self.model)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Remember where the epoch begins."""
        if self._watch is not None:
            self._watch.begin_epoch(epoch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Look at the weights before others save them."""
        if self._watch is not None:
            self._watch.look()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Leave the model as it was, and say what was found."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.end()
        if watch.spoiled:
            self._tell(watch.culprit())

    def _tell(self, culprit: _Step | None) -> None:
        rule, got, hint = (
            "The loss or the weights became NaN or infinite.",
            "it did not happen again when the batches were trained on again",
            "tfgrad.explain(loss, wrt=model), or keras.utils.set_random_seed",
        )
        if culprit is not None:
            self.epoch, self.batch, self.data = (
                culprit.epoch,
                culprit.batch,
                culprit.data,
            )
            place = f"batch {self.batch} of epoch {self.epoch}"
            rule = f"{'The gradient' if culprit.finite_loss else 'The loss'} of {place}"
            rule += " is not finite; training ended with the weights before it."
            got, hint = self._cause(culprit.data)
            if culprit.losses and culprit.losses[-1] > 10 * culprit.losses[0]:
                shown = ", ".join(f"{loss:.3g}" for loss in culprit.losses)
                got += f"; the loss was growing ({shown})"
                hint = f"{_SMALLER}; {hint}"
        error = TfgradError(rule, got=got, hint=hint)
        if self._raises:
            raise error
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def _cause(self, data: Any) -> tuple[str, str]:
        """Return what is to blame, and what to write instead."""
        for name, leaf in named_leaves(data, "batch"):
            bad = _bad_row(leaf)
            if bad is not None:
                hint = (
                    "data without it: dataset.filter(...), or tf.where(is_finite, ...)"
                )
                return f"{name} holds a NaN or an infinity, in row {bad}", hint
        layers = list(self.model._flatten_layers(include_self=False))
        try:
            self.explanation = _explained(self.model, layers, data)
        except Exception as error:  # a train_step of the user's may have no such loss
            return f"`compute_loss` of the model cannot tell why: {error}", _SMALLER
        for finding in self.explanation.findings:
            if finding.status == "non-finite" and finding.culprit is not None:
                marks = re.findall(rf"{_MARK}(\d+)", finding.culprit.name)
                self.layer = layers[int(marks[-1])].path if marks else ""
                layer = f", in the layer {self.layer}" if self.layer else ""
                return f"{finding.reason}, at {finding.place}{layer}", finding.hint
        return "the op is not known", _SMALLER


class _Step(NamedTuple):
    """The training step that is to blame."""

    epoch: int
    batch: int
    data: Any
    finite_loss: bool
    losses: tuple[float, ...]  # of the steps before, the last ones


class _Watch:
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
        self._before = model.train_function
        self._like: Any = None  # the structure of a batch
        self._stage = _Stage()
        self._logs: Any = {}  # of the last steps
        self._losses: deque[float] = deque(maxlen=3)
        self._calls, self._most_calls = 0, 1
        self._one = self._compile()
        self._kept: list[tf.Variable] = []
        self._epochs = [(0, 0, 0)]  # its first position in the stage, epoch, batch

    def begin_epoch(self, epoch: int) -> None:
        self._epochs.append((self._stage.size(), epoch, 0))

    def look(self) -> None:
        """Look at the loss and the weights now; stop if they are not finite."""
        # Keras's loss is a mean over the epoch: a NaN stays in it.
        if not (_is_finite(self._logs) and self._copy()):
            self.spoiled = self._model.stop_training = True
        elif self._logs:
            self._losses.append(_loss_in(self._logs))

    def end(self) -> None:
        """Give the model its own training back."""
        del self._model.train_step
        self._model.train_function = self._before
        if self._kept and not self.spoiled:
            self.look()

    def culprit(self) -> _Step | None:
        """Return the step to blame, found by training again; the model is before it."""
        self._assign(self._saved)
        for position in range(self._stage.size()):
            data = self._stage.batch(self._like)
            before, _ = self._read()
            logs = self._one(data)
            finite_loss = _is_finite(logs)
            if not (finite_loss and self._read()[1]):
                self._assign(before)
                marks = [mark for mark in self._epochs if mark[0] <= position]
                first, epoch, batch = marks[-1]
                losses = tuple(self._losses)
                return _Step(epoch, batch + position - first, data, finite_loss, losses)
            self._losses.append(_loss_in(logs))
        return None

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
        if not model.built and hasattr(iterator, "element_spec"):
            # Layers make their variables while they are traced; nothing is computed.
            tf.function(self._step).get_concrete_function(iterator.element_spec)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        kept = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
        self._kept = list({id(v): v.value for v in kept}.values())
        self._read = tf.function(self._state, autograph=False)
        self._copy()

    def _watched(self, iterator: Any) -> Any:
        if not self._kept:
            self._begin(iterator)
        self._logs = logs = self._train(iterator)
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
        self._next = began + (time.perf_counter() - began) / _SHARE
        return True

    def _assign(self, values: list[tf.Tensor]) -> None:
        for variable, value in zip(self._kept, values, strict=True):
            variable.assign(value)


class _Stage:
    """Batches, kept in order by TensorFlow itself, from within a compiled loop."""

    def __init__(self) -> None:
        """Keep none."""
        self._options: dict[str, Any] = {"shared_name": f"tfgrad_{uuid.uuid4().hex}"}

    def put(self, data: Any) -> None:
        leaves = _tensors(data)
        self._options["dtypes"] = [leaf.dtype for leaf in leaves]
        shared_name = self._options["shared_name"]
        tf.raw_ops.Stage(values=leaves, shared_name=shared_name)

    def size(self) -> int:
        return int(tf.raw_ops.StageSize(**self._options)) if self._used() else 0

    def most(self) -> int:
        """Return how many batches like the first one may be kept."""
        first = tf.raw_ops.StagePeek(index=tf.constant(0), **self._options)
        size = sum(leaf.dtype.size * int(tf.size(leaf)) for leaf in first)
        return _MOST_BYTES // max(size, 1)

    def clear(self) -> None:
        if self._used():
            tf.raw_ops.StageClear(**self._options)

    def batch(self, like: Any) -> Any:
        leaves = iter(tf.raw_ops.Unstage(**self._options))
        flat = tf.nest.flatten(like, expand_composites=True)
        filled = [None if leaf is None else next(leaves) for leaf in flat]
        return tf.nest.pack_sequence_as(like, filled, expand_composites=True)

    def _used(self) -> bool:
        return "dtypes" in self._options


def _tensors(data: Any) -> list[tf.Tensor]:
    leaves = tf.nest.flatten(data, expand_composites=True)
    return [tf.convert_to_tensor(leaf) for leaf in leaves if leaf is not None]


def _loss_in(logs: Mapping[str, Any]) -> float:
    return float(logs["loss"]) if "loss" in logs else math.nan


def _is_finite(logs: Mapping[str, Any]) -> bool:
    """Return whether the loss, or where there is none by that name all, is finite."""
    numbers = [logs["loss"]] if "loss" in logs else tf.nest.flatten(logs)
    return all(math.isfinite(float(number)) for number in numbers)


def _explained(model: Any, layers: list[Any], data: Any) -> Explanation:
    """Return why the loss, or its gradient, is not finite."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)

    def loss() -> tf.Tensor:
        predicted = model(x, training=True)
        return model.compute_loss(
            x=x, y=y, y_pred=predicted, sample_weight=sample_weight, training=True
        )

    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(_marked(layer, f"{_MARK}{number}"))
        return explain(loss, wrt=model)


@contextlib.contextmanager
def _marked(layer: Any, mark: str) -> Iterator[None]:
    """Have the ops of a layer begin with a mark: Keras's own names are ambiguous."""
    call = layer.call

    @functools.wraps(call)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with tf.name_scope(mark):
            return call(*args, **kwargs)

    layer.call = marked
    try:
        yield
    finally:
        del layer.call


def _bad_row(leaf: Any) -> int | None:
    """Return the first row of a part of a batch that is not finite; None if all are."""
    if not isinstance(leaf, tf.Tensor) or not leaf.dtype.is_floating:
        return None
    bad = np.argwhere(~np.isfinite(np.asarray(leaf, np.float64)))
    return int(bad[0, 0]) if bad.size else None
