"""A function on a grid: what a picture of it is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest

_MARGIN = 0.25  # of the path's extent, on each side
_FLATTEST = 0.2  # of the longer side: a path along an axis is shown in its valley


@dataclass(frozen=True)
class Grid:
    """Evenly spaced points in a box.

    Args:
        box: (low, high) of each coordinate.
        sizes: How many points there are along each.
    """

    box: Sequence[tuple[float, float]]
    sizes: Sequence[int]

    @property
    def axes(self) -> list[np.ndarray[Any, Any]]:
        """The values of each coordinate."""
        pairs = zip(self.box, self.sizes, strict=True)
        return [np.linspace(low, high, size) for (low, high), size in pairs]

    @property
    def points(self) -> np.ndarray[Any, Any]:
        """All points, shape `[product of the sizes, coordinates]`."""
        mesh = np.meshgrid(*self.axes, indexing="ij")
        return np.stack([axis.ravel() for axis in mesh], axis=1)


def box_around(path: np.ndarray[Any, Any]) -> list[tuple[float, float]]:
    """Return a box with room around the points of `path`, shape `[n, coordinates]`."""
    low, high = path.min(axis=0), path.max(axis=0)
    extent = high - low
    extent = np.maximum(extent, _FLATTEST * extent.max(initial=0.0))
    extent = np.where(extent > 0, extent, np.maximum(1.0, np.abs(low)))
    middle, half = (low + high) / 2, extent * (0.5 + _MARGIN)
    return list(zip((middle - half).tolist(), (middle + half).tolist(), strict=True))


def values_at(
    f: Callable[..., Any],
    points: np.ndarray[Any, Any],
    like: Nest,
    variables: Nest | None = None,
) -> np.ndarray[Any, Any]:
    """Return `f` at each of `points`, as float64 of shape `[n]`.

    All are evaluated in one compiled call or, if `f` cannot be compiled, one by one.

    Args:
        f: A function of a nest like `like`, or of nothing.
        points: Shape `[n, numbers in like]`.
        like: A nest of tensors, whose structure, shapes and dtypes `f` wants.
        variables: What `f` reads if it is of nothing; put back in the end.

    Raises:
        InvalidArgumentError: If `f` raises on its first point.
    """
    leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(like)]
    targets = tf.nest.flatten(variables) if variables is not None else None
    before = [variable.read_value() for variable in targets or []]

    def value(point: tf.Tensor) -> tf.Tensor:
        parts = nested.unravel(point, leaves)
        parts = [tf.cast(p, leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        if targets is None:
            output = f(tf.nest.pack_sequence_as(like, parts))
        else:
            for variable, part in zip(targets, parts, strict=True):
                variable.assign(part)
            output = f()
        return tf.cast(output[0] if isinstance(output, tuple) else output, tf.float64)

    def values(points: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(value, points, parallel_iterations=1)

    try:
        return _first_that_works(values, value, tf.constant(points, tf.float64))
    finally:
        for variable, old in zip(targets or [], before, strict=True):
            variable.assign(old)


def _first_that_works(
    all_at_once: Callable[[Any], Any], single: Callable[[Any], Any], points: tf.Tensor
) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(
            tf.function(all_at_once).get_concrete_function(points)(points)
        )
    except Exception:  # whatever TensorFlow or f raise: f may need to run eagerly
        try:
            return np.array([single(point).numpy() for point in tf.unstack(points)])
        except Exception as error:
            raise InvalidArgumentError(
                "A function is drawn that takes what was minimised.",
                got=f"{type(error).__name__}: {error}",
                hint="the function that was given to minimize, and wrt= if it had one",
            ) from error
