"""The callback with which `Model.fit` writes to a run."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import keras

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.guard import Guard
from tfgrad.runs.values import as_array

_TAGS = ("epoch/", "batch/")


class RunCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no stubs
    """Curves, graph and histograms of a training; made by `Run.keras_callback`.

    Keras numbers the epochs of each `fit` from 0; the steps of the run go on instead.
    """

    def __init__(
        self,
        run: Any,
        next_step: Callable[[tuple[str, ...]], int],
        batches: int | None,
        histograms: int | None,
    ) -> None:
        super().__init__()
        self._run, self._next_step = run, next_step
        self._every_batches = _checked("batches", batches)
        self._every_epochs = _checked("histograms", histograms)
        self._guard = Guard("The training")
        self._next = 0  # the next step: an epoch or, with `batches`, a batch
        self._epoch_start = 0
        self._epochs = 0
        self._has_graph = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Continue after the last step of the run, whichever callback wrote it."""
        self._next = max(self._next, self._next_step(_TAGS))

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Remember at which batch the epoch begins."""
        self._epoch_start = self._next

    def on_train_batch_end(
        self, batch: int, logs: Mapping[str, Any] | None = None
    ) -> None:
        """Write the numbers of every n-th batch, and the graph at the first one."""
        if not self._has_graph:  # at the first batch, every model is built
            self._has_graph = True
            self._guard(self._write_graph)
        every = self._every_batches
        if every is not None:
            # With steps_per_execution, this is the last of several batches, and Keras
            # counts on beyond the last of the epoch.
            last = (self.params.get("steps") or batch + 1) - 1
            step = self._epoch_start + min(batch, last)
            if step // every > (self._next - 1) // every:
                self._guard(self._run.log, step, _tagged("batch", logs))
            self._next = step + 1

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Write the epoch's numbers and, after every n-th epoch, the weights."""
        if self._every_batches is None:
            step = max(epoch, self._next)
            self._next = step + 1
        else:
            step = self._next - 1  # the epoch's last batch
        scalars = _tagged("epoch", logs)
        if self.model.optimizer is not None:
            rate = as_array(self.model.optimizer.learning_rate)
            scalars["epoch/learning_rate"] = rate
        self._guard(self._run.log, step, scalars)
        if self._every_epochs and self._epochs % self._every_epochs == 0:
            for weight in self.model.trainable_weights:
                tag = f"weights/{weight.path}"
                self._guard(self._run.histogram, tag, weight, step)
        self._epochs += 1

    def _write_graph(self) -> None:
        # No graph of a model that TensorFlow cannot trace, nor a second one of a model.
        with contextlib.suppress(InvalidArgumentError):
            self._run.graph(self.model)


def _tagged(kind: str, logs: Mapping[str, Any] | None) -> dict[str, Any]:
    return {f"{kind}/{name}": value for name, value in (logs or {}).items()}


def _checked(name: str, every: Any) -> int | None:
    is_whole = isinstance(every, numbers.Integral) and not isinstance(every, bool)
    if every is None or (is_whole and every > 0):
        return every
    raise InvalidArgumentError(
        f"`{name}` says after how many of them something is written.",
        got=f"{name}={every!r}",
        hint=f"{name}=1 for each, or leave it out for none",
    )
