"""`ExplainNaN`: the callback of `Model.fit` that says why a loss became NaN."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.going_back import Step, Watch
from tfgrad.diagnosis.report import Explanation
from tfgrad.errors import TfgradError
from tfgrad.nested import named_leaves, require_bool

_MARK = "tfgrad_layer_"
_SMALLER = "a smaller learning rate, or clipnorm=1.0"


class ExplainNaN(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no stubs
    """Ends training at the first loss or gradient that is not finite, and says why.

    Use it in place of `keras.callbacks.TerminateOnNaN`, in `fit` or in `minimize`. It
    names the batch, the layer, the op and your line that made the NaN or the infinity,
    and what to write instead. The model and its optimizer are left as they were before
    that batch. An overflow that a `LossScaleOptimizer` skips does not count.

    The cost in `fit` until then is the memory of a copy of the weights and of the
    optimizer, and of the batches since that copy, and less than two per cent of the
    time: the loss is looked at after each epoch, the weights now and then, and after
    each epoch that is not very short. When one of them is not finite, the batches since
    the copy are trained on again, one by one. `minimize` looks at each step anyway.

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
        super().__init__()
        require_bool(raise_error=raise_error)
        self._raises = raise_error
        self._watch: Any = None
        self._forget()

    def _forget(self) -> None:
        self.epoch: int | None = None
        self.batch: int | None = None
        self.data: Any = None
        self.layer = ""
        self.explanation: Explanation | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Have the model keep its batches; `minimize` watches by itself."""
        self._forget()
        self._watch = (self.params or {}).get("watch") or Watch(self.model)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Remember where the epoch begins."""
        self._watch.begin_epoch(epoch)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Look at the weights before others save them."""
        self._watch.end_epoch()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Leave the model as it was, and say what was found."""
        watch, self._watch = self._watch, None  # it holds a copy of the weights
        watch.end()
        if watch.spoiled:
            self._tell(watch.culprit())

    def _tell(self, culprit: Step | None) -> None:
        rule, got, hint = (
            "The loss or the weights became NaN or infinite.",
            "it did not happen again when the batches were trained on again",
            "tfgrad.explain(loss, wrt=model), or keras.utils.set_random_seed",
        )
        if culprit is not None:
            self.epoch, self.batch = culprit.epoch, culprit.batch
            self.data = culprit.data
            place = f"batch {self.batch} of epoch {self.epoch}"
            rule = f"The {'loss' if culprit.spoiled else 'gradient'} of {place}"
            rule += " is not finite; training ended with the weights before it."
            got, hint = self._cause(culprit)
            if culprit.losses and culprit.losses[-1] > 10 * culprit.losses[0]:
                shown = ", ".join(f"{loss:.3g}" for loss in culprit.losses)
                got += f"; the loss was growing ({shown})"
                hint = f"{_SMALLER}; {hint}"
        error = TfgradError(rule, got=got, hint=hint)
        if self._raises:
            raise error
        warnings.warn(str(error), RuntimeWarning, stacklevel=2)

    def _cause(self, culprit: Step) -> tuple[str, str]:
        """Return what is to blame, and what to write instead."""
        for name, leaf in named_leaves(culprit.data, "batch"):
            bad = _bad_row(leaf)
            if bad is not None:
                hint = "data without it: tf.data.Dataset.filter, or tf.where"
                return f"{name} holds a NaN or an infinity, in row {bad}", hint
        layers = list(self.model._flatten_layers(include_self=False))
        try:
            self.explanation = _explained(layers, culprit)
        except Exception as error:  # a train_step of the user's may have no such loss
            return f"the loss of the batch cannot tell why: {error}", _SMALLER
        for finding in self.explanation.findings:
            if finding.status == "non-finite" and finding.culprit is not None:
                marks = re.findall(rf"{_MARK}(\d+)", finding.culprit.name)
                self.layer = layers[int(marks[-1])].path if marks else ""
                layer = f", in the layer {self.layer}" if self.layer else ""
                return f"{finding.reason}, at {finding.place}{layer}", finding.hint
        return "the op is not known", _SMALLER


def _explained(layers: list[Any], culprit: Step) -> Explanation:
    """Return why the loss, or its gradient, is not finite, ops marked by layer."""
    with contextlib.ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(_marked(layer, f"{_MARK}{number}"))
        return culprit.explain()


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
