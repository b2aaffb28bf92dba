"""The function under check as one float64 number, with its derivatives in every mode.

A function with many outputs is checked through a weighted sum of them, with fixed
random weights: an error in any of its derivatives shows up there. The second order is
the first order of another such number: the gradient, weighted and summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.recording import dense
from tfgrad.diagnosis.sources import Sources
from tfgrad.differences import Array

Scalar = Callable[..., Any]
"""Takes the float arguments (none if variables are checked), returns a float64."""


class Point:
    """Where a function is checked: its float arguments, or variables, as arrays.

    Args:
        sources: What is differentiated.
    """

    def __init__(self, sources: Sources) -> None:
        self.names = sources.names
        self.variables = sources.variables
        self.leaves: tuple[Any, ...] = sources.tensors or sources.variables
        self.arrays = [np.asarray(leaf, np.float64) for leaf in self.leaves]
        self._held = list(self.arrays)

    def at(self, arrays: Sequence[Array]) -> tuple[tf.Tensor, ...]:
        """Return the arguments with the values of `arrays`; variables are assigned."""
        if not self.variables:
            return tuple(tf.constant(self.cast(i, a)) for i, a in enumerate(arrays))
        for index, (array, held) in enumerate(zip(arrays, self._held, strict=True)):
            if array is not held:
                self.variables[index].assign(self.cast(index, array))
        self._held = list(arrays)
        return ()

    def cast(self, index: int, array: Array) -> Any:
        """Return `array` in the dtype of argument `index`."""
        return array.astype(self.leaves[index].dtype.as_numpy_dtype)

    def sources(self, arguments: Sequence[tf.Tensor]) -> list[Any]:
        """Return what a tape has to watch."""
        return list(self.variables or arguments)


def weighted_output(f: Scalar, weights: Array) -> Scalar:
    """Return the sum of the outputs of `f`, weighted."""

    def scalar(*arguments: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.cast(f(*arguments), tf.float64) * weights)

    return scalar


def weighted_gradient(scalar: Scalar, point: Point, weights: Sequence[Array]) -> Scalar:
    """Return the sum of the elements of the gradient of `scalar`, weighted."""
    both = value_and_gradient(scalar, point)

    def summed(*arguments: tf.Tensor) -> tf.Tensor:
        _, found = both(*arguments)
        pairs = zip(found, weights, strict=True)
        return tf.add_n([tf.reduce_sum(tf.cast(g, tf.float64) * w) for g, w in pairs])

    return summed


def value_and_gradient(scalar: Scalar, point: Point) -> Callable[..., Any]:
    """Return the function that computes `scalar` and its gradient in reverse mode."""

    def both(*arguments: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        sources = point.sources(arguments)
        with tf.GradientTape() as tape:
            tape.watch(sources)
            value = scalar(*arguments)
        found = tape.gradient(value, sources)
        return value, list(map(dense, found, sources))

    return both


def forward_slope(
    scalar: Scalar, point: Point, tangents: Sequence[Array]
) -> Callable[..., tf.Tensor]:
    """Return the function that computes the slope along `tangents` in forward mode."""

    def slope(*arguments: tf.Tensor) -> tf.Tensor:
        primals = point.sources(arguments)
        pairs = zip(tangents, primals, strict=True)
        directions = [tf.constant(t, dtype=primal.dtype) for t, primal in pairs]
        forward: Any = tf.autodiff.ForwardAccumulator  # its stub knows one tensor only
        with forward(primals, directions) as accumulator:
            value = scalar(*arguments)
        found = accumulator.jvp(value)
        return tf.zeros_like(value) if found is None else found

    return slope


def inner(a: Array, b: Array) -> float:
    """Return the sum of the products of two arrays of one shape."""
    # Not np.vdot: on a busy machine the threads of BLAS wait for each other for longer
    # than everything else takes.
    return float(np.einsum("i,i", a.ravel(), b.ravel()))
