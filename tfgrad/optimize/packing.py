"""A nest as few tensors: what a compiled loop carries from turn to turn.

A scalar costs a loop as much as a small vector: a buffer to carry, and a kernel to
compute it. So the scalars of a nest travel together.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tfgrad.nested import Nest

GROUP = 8
"""Scalars in one vector: of more operands, XLA makes a kernel each (measured with
TensorFlow 2.21)."""


class Packing:
    """How nests of one structure, and of the same shapes and dtypes, are packed.

    Args:
        like: One of them.

    >>> packing = Packing({"a": tf.constant(1.0), "b": [tf.constant(2.0), tf.ones(3)]})
    >>> [tensor.numpy().tolist() for tensor in packing.pack(packing.like)]
    [[1.0, 2.0], [1.0, 1.0, 1.0]]
    """

    def __init__(self, like: Nest) -> None:
        """Group the scalars by dtype."""
        self.like = tf.nest.map_structure(tf.convert_to_tensor, like)
        leaves = tf.nest.flatten(self.like)
        scalars: dict[tf.DType, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if leaf.shape.rank == 0:
                scalars.setdefault(leaf.dtype, []).append(i)
        self._groups = [
            indices[k : k + GROUP]
            for indices in scalars.values()
            for k in range(0, len(indices), GROUP)
        ]
        grouped = {i for group in self._groups for i in group}
        self._others = [i for i in range(len(leaves)) if i not in grouped]

    def pack(self, nest: Nest) -> list[tf.Tensor]:
        """Return the tensors that hold the leaves of a nest."""
        leaves = tf.nest.flatten(nest)
        vectors = [tf.stack([leaves[i] for i in group]) for group in self._groups]
        return vectors + [tf.convert_to_tensor(leaves[i]) for i in self._others]

    def unpack(self, tensors: Sequence[tf.Tensor]) -> Nest:
        """Return the nest whose leaves they hold: the inverse of `pack`."""
        leaves = dict(zip(self._others, tensors[len(self._groups) :], strict=True))
        for group, vector in zip(self._groups, tensors, strict=False):
            leaves.update(zip(group, tf.unstack(vector), strict=True))
        ordered = [leaf for _, leaf in sorted(leaves.items())]
        return tf.nest.pack_sequence_as(self.like, ordered)
