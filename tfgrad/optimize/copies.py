"""The gradient on each device of this process, for the copy of the variables there.

Replicas add up what they have computed, so that each has the whole gradient. An
optimizer is given that of the first one, and TensorFlow would send it to all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfgrad.optimize.distribute import strategy_of


class Copies:
    """The gradients on the devices of this process besides the first, if any.

    Variables hold them: what a function returns, and what a branch is handed, goes
    through the first device.

    Args:
        moved: The variables that an optimizer moves.
    """

    def __init__(self, moved: Sequence[tf.Variable] = ()) -> None:
        """Hold zeros."""
        self._held: list[dict[str, tf.Variable]] = []
        for variable in moved:
            each = strategy_of(variable).experimental_local_results(variable)
            self._held.append({v.device: _zeros(v) for v in each[1:]})

    def keep(self, gradients: Sequence[Sequence[tf.Tensor]]) -> None:
        """Hold the gradients of a batch, within the function that computes them."""
        for held, *leaves in zip(self._held, *gradients, strict=False):
            for variable, leaf in zip(held.values(), leaves, strict=True):
                variable.assign(leaf, read_value=False)

    @contextlib.contextmanager
    def beside(
        self, optimizer: Any, gradient: Sequence[Any]
    ) -> Iterator[Sequence[Any]]:
        """Let an optimizer move each copy of a variable by the gradient beside it.

        What it has changed before, as by clipping, comes from the first device.

        Yields:
            The gradient on the first device, as the optimizer is to be given it.
        """
        is_keras = isinstance(optimizer, keras.optimizers.Optimizer)
        if not (is_keras and any(self._held)):
            yield gradient
            return
        given = [tf.identity(leaf) for leaf in gradient]  # in this graph
        held = {
            id(leaf): others for leaf, others in zip(given, self._held, strict=True)
        }
        update = optimizer.update_step

        def update_step(gradient: tf.Tensor, variable: Any, rate: Any) -> Any:
            origin = gradient
            while id(origin) not in held and "Identity" in origin.op.type:
                origin = origin.op.inputs[origin.value_index]
            other = held.get(id(origin), {}).get(variable.device)
            own = gradient if other is None else other.read_value()
            return update(own, variable, rate)

        optimizer.update_step = update_step
        try:
            yield given
        finally:
            del optimizer.update_step


def _zeros(like: tf.Variable) -> tf.Variable:
    with tf.device(like.device):
        return tf.Variable(tf.zeros(like.shape, like.dtype), trainable=False)
