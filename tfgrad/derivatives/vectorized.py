"""All rows of a Jacobian: pull-backs of a basis, many at a time where that is safe.

A vectorised pull-back is fastest for small functions, whose cost is that of starting
ops. It needs graphs without control flow: through a loop it fails, or ends the process
(`tf.linalg.expm`), so the traced ops are looked at first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.soundness import every
from tfgrad.derivatives.tracing import quiet
from tfgrad.errors import TfgradError

PullBack = Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]
"""From one cotangent for each output to one gradient for each source."""

WORKING_MEMORY = 256 * 2**20
"""Bytes that the rows computed together may need."""

FEW = 4
"""Rows up to which each is traced by itself."""

_map: Any = tf.map_fn  # the stubs know no lists of specs

_NOT_VECTORISED = (
    "While",
    "If",
    "Case",
    "TensorList",
    "TensorArray",
    "Stack",
    "PyFunc",
)


def rows(
    pull: PullBack,
    outputs: Sequence[tf.Tensor],
    sources: Sequence[tf.Tensor],
    operations: Sequence[tf.Operation],
    chunk_size: int | None = None,
) -> list[list[tf.Tensor]]:
    """Return the Jacobian, one block for each output and source.

    Args:
        pull: The pull-back, linear in the cotangents.
        outputs: Float tensors.
        sources: Tensors or variables.
        operations: The ops of the evaluation and of one pull-back; none in eager mode.
        chunk_size: Rows computed together; None chooses from `WORKING_MEMORY`.

    Returns:
        `blocks[i][j]` of shape `outputs[i].shape + sources[j].shape`.
    """
    if not sources or not outputs:  # an empty nest
        return [[] for _ in outputs]
    total = static_size(outputs)
    if not total or not operations or not is_straight(operations):
        stacked = _one_by_one(pull, outputs, sources)
    else:
        chunk = min(chunk_size or _affordable(operations), total)
        try:
            with quiet():
                stacked = _in_chunks(pull, outputs, sources, total, chunk)
        except TfgradError:
            raise
        except Exception:  # whatever op the vectoriser does not know
            stacked = _one_by_one(pull, outputs, sources)
    return _blocks(stacked, outputs, sources)


def static_size(tensors: Sequence[tf.Tensor]) -> int | None:
    """Return how many elements there are in all, None if that depends on values."""
    counts = [tensor.shape.num_elements() for tensor in tensors]
    return None if None in counts else sum(counts)


def _one_by_one(
    pull: PullBack, outputs: Sequence[tf.Tensor], sources: Sequence[tf.Tensor]
) -> list[tf.Tensor]:
    """Return for each source its rows of all outputs, `[rows, *source.shape]`."""

    def row(index: tf.Tensor) -> list[tf.Tensor]:
        basis = _basis(outputs, index[tf.newaxis])
        return pull([tf.squeeze(part, axis=0) for part in basis])

    specs = [tf.TensorSpec(source.shape, source.dtype) for source in sources]
    total = static_size(outputs)
    if total:
        found: list[tf.Tensor] = _map(row, tf.range(total), fn_output_signature=specs)
        return found
    # A loop without a turn does not know the shapes of its results, so there is one
    # turn even if there are no rows.
    count = tf.add_n([tf.size(output) for output in outputs])
    turns = tf.range(tf.maximum(count, 1))
    return [part[:count] for part in _map(row, turns, fn_output_signature=specs)]


def _in_chunks(
    pull: PullBack,
    outputs: Sequence[tf.Tensor],
    sources: Sequence[tf.Tensor],
    total: int,
    chunk: int,
) -> list[tf.Tensor]:
    """Return what `_one_by_one` does, about `chunk` rows of `total` at a time."""

    def vectorised(indices: tf.Tensor) -> list[tf.Tensor]:
        found: list[tf.Tensor] = tf.vectorized_map(
            pull, _basis(outputs, indices), fallback_to_while_loop=False, warn=False
        )
        return found

    if chunk == total <= FEW:  # to vectorise takes longer than to trace a few rows
        found = [pull(_units(outputs, i)) for i in range(total)]
        return [tf.stack(part) for part in zip(*found, strict=True)]
    if chunk == total:
        return vectorised(tf.range(total))
    chunks = math.ceil(total / chunk)
    size = math.ceil(total / chunks)  # the last rows of the last chunk may be idle
    stacked = _map(
        vectorised,
        tf.reshape(tf.range(chunks * size), [chunks, size]),
        fn_output_signature=[tf.TensorSpec([size, *s.shape], s.dtype) for s in sources],
        parallel_iterations=1,  # one chunk is what fits into the working memory
    )
    return [
        tf.reshape(part, [chunks * size, *source.shape])[:total]
        for part, source in zip(stacked, sources, strict=True)
    ]


def _basis(outputs: Sequence[tf.Tensor], indices: tf.Tensor) -> list[tf.Tensor]:
    """Return unit cotangents by number, of shape `[len(indices), *output.shape]`."""
    basis, first = [], 0
    for output in outputs:
        size = output.shape.num_elements()
        size = tf.size(output) if size is None else size
        # An index that belongs to another output gives zeros.
        units = tf.one_hot(indices - first, size, dtype=output.dtype)
        basis.append(_in_shape(units, indices, output))
        first += size
    return basis


def _units(outputs: Sequence[tf.Tensor], index: int) -> list[tf.Tensor]:
    """Return the unit cotangents of one number, constants."""
    units, first = [], 0
    for output in outputs:
        size: Any = output.shape.num_elements()
        unit = np.zeros(size, output.dtype.as_numpy_dtype)
        if first <= index < first + size:
            unit[index - first] = 1
        units.append(tf.constant(unit.reshape(output.shape)))
        first += size
    return units


def _in_shape(tensor: tf.Tensor, *like: tf.Tensor) -> tf.Tensor:
    """Return a tensor in the shapes of others, one after the other: known or not."""
    shape = tf.TensorShape([])
    for other in like:
        shape = shape.concatenate(other.shape)
    if shape.is_fully_defined():
        return tensor if tensor.shape == shape else tf.reshape(tensor, shape)
    found = tf.reshape(tensor, tf.concat([tf.shape(other) for other in like], axis=0))
    found.set_shape(shape)
    return found


def _blocks(
    stacked: Sequence[tf.Tensor],
    outputs: Sequence[tf.Tensor],
    sources: Sequence[tf.Tensor],
) -> list[list[tf.Tensor]]:
    """Return the rows of each source split by output, in the shapes of an answer."""
    sizes = [tf.size(output) for output in outputs] if len(outputs) > 1 else []
    blocks: list[list[tf.Tensor]] = [[] for _ in outputs]
    for part, source in zip(stacked, sources, strict=True):
        parts = tf.split(part, sizes) if len(outputs) > 1 else [part]
        for row, output, block in zip(parts, outputs, blocks, strict=True):
            block.append(_in_shape(row, output, source))
    return blocks


def is_straight(operations: Sequence[tf.Operation]) -> bool:
    """Return whether the ops run without loops, branches, lists and Python code."""
    return not any(
        part in op.type for op in every(operations) for part in _NOT_VECTORISED
    )


def _affordable(operations: Sequence[tf.Operation]) -> int:
    """Return how many rows fit into the working memory.

    A row needs about what all results of one pull-back take up together.
    """
    results = [tensor for op in operations for tensor in op.outputs]
    sizes = [
        (tensor.shape.num_elements() or 0) * tensor.dtype.size
        for tensor in results
        if tensor.dtype.is_floating
    ]
    return max(1, WORKING_MEMORY // max(1, sum(sizes)))
