"""Gradients of lookups: sparse from the tape to the optimizer, each row once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfgrad.derivatives.recording import Recording


class SparseRecording(Recording):
    """A recording whose gradients stay sparse, and None where there is no path."""

    def _dense(self, found: Sequence[Any]) -> list[Any]:
        return list(found)


def summed_for(optimizer: Any, gradients: Sequence[Any]) -> list[Any]:
    """Return the gradients as the optimizer needs them: rows that repeat added up."""
    if _adds_rows(optimizer):
        return list(gradients)
    slices = tf.IndexedSlices
    return [rows_summed(g) if isinstance(g, slices) else g for g in gradients]


def rows_summed(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """Return the slices with rows that stand there twice added up.

    Keras's optimizers need that: the square of a sum is not the sum of the squares. The
    number of slices stays, as XLA and collectives want it: those left over are zeros,
    for row 0.
    """
    indices, count = slices.indices, tf.size(slices.indices)
    order = tf.argsort(indices)
    ordered = tf.gather(indices, order)
    begins = tf.concat([[True], ordered[1:] != ordered[:-1]], axis=0)[:count]
    groups = tf.cumsum(tf.cast(begins, tf.int32)) - 1
    group_of = tf.scatter_nd(order[:, None], groups, [count])
    values = tf.math.unsorted_segment_sum(slices.values, group_of, count)
    rows = tf.math.unsorted_segment_max(ordered, groups, count)
    return tf.IndexedSlices(values, tf.maximum(rows, 0), slices.dense_shape)


def _adds_rows(optimizer: Any) -> bool:
    """Return whether all that is done with a gradient is to subtract a multiple."""
    if type(optimizer) is not keras.optimizers.SGD:
        return False
    clips = optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue
    return all(clip is None for clip in clips)
