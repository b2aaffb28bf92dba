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


def summed_for(
    optimizer: Any, gradients: Sequence[Any], sources: Sequence[Any]
) -> list[Any]:
    """Return the gradients as the optimizer needs them: rows that repeat added up."""
    if _adds_rows(optimizer):
        return list(gradients)
    slices = tf.IndexedSlices
    pairs = zip(gradients, sources, strict=True)
    return [
        rows_summed(g, s.shape[0] or tf.shape(s)[0]) if isinstance(g, slices) else g
        for g, s in pairs
    ]


def rows_summed(slices: tf.IndexedSlices, rows: Any) -> tf.IndexedSlices:
    """Return the slices with rows that stand there twice added up, at the first place.

    Keras's optimizers need that: the square of a sum is not the sum of the squares. The
    number of slices stays, as XLA and collectives want it: those left over are zeros,
    for row 0. Nothing is sorted, which would take twice as long in the graph, and six
    times as long under XLA.
    """
    indices, count = slices.indices, tf.size(slices.indices)
    places = tf.range(count)
    first = tf.gather(tf.math.unsorted_segment_min(places, indices, rows), indices)
    values = tf.math.unsorted_segment_sum(slices.values, first, count)
    kept = tf.where(first == places, indices, tf.zeros_like(indices))
    return tf.IndexedSlices(values, kept, slices.dense_shape)


def _adds_rows(optimizer: Any) -> bool:
    """Return whether all that is done with a gradient is to subtract a multiple."""
    if type(optimizer) is not keras.optimizers.SGD:
        return False
    clips = optimizer.clipnorm, optimizer.global_clipnorm, optimizer.clipvalue
    return all(clip is None for clip in clips)
