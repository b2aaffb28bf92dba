"""Functions to try a method on, each with a start and its known minima.

They are what tests, benchmarks, notebooks and a first look share. Each is called like
any other function, in float32 or float64, and says where its minima are:

>>> from tfgrad import minimize, problems
>>> result = minimize(problems.rosenbrock, problems.rosenbrock.start)
>>> print(problems.rosenbrock.minima, result.x.numpy().round(6))
[[1. 1.]] [1. 1.]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

Array = np.ndarray[Any, Any]


class Problem:
    """A function to minimise, where to start, and what is known of the answer.

    Attributes:
        start: The point that the literature starts from, float64.
        minima: All global minima, float64, shape `[minima, *start.shape]`.
        minimum: The value there.
    """

    __name__: str

    def __init__(
        self,
        f: Callable[[Any], Any],
        start: Any,
        minima: Any,
        minimum: float,
    ) -> None:
        functools.update_wrapper(self, f)
        self._f = f
        self.start: Array = np.array(start, np.float64)
        self.minima: Array = np.array(minima, np.float64)
        self.minimum = minimum

    def __call__(self, x: Any) -> Any:
        """Return the value at `x`, a number of its dtype."""
        return self._f(tf.convert_to_tensor(x))

    def __repr__(self) -> str:
        return f"tfgrad.problems.{self.__name__}"


def problem(
    start: Any, minima: Any, minimum: float = 0.0
) -> Callable[[Callable[[Any], Any]], Problem]:
    """Return a decorator that makes a `Problem` of a function."""
    return lambda f: Problem(f, start, minima, minimum)


@problem(start=3.0, minima=[-0.5], minimum=-1.25)
def parabola(x: Any) -> Any:
    """x² + x - 1, for x of shape `[]`: what tfgrad began with.

    >>> float(parabola(3.0)), parabola.minimum
    (11.0, -1.25)
    """
    return x**2 + x - 1


@problem(start=[1.0, 1.0], minima=[[0.0, 0.0]])
def bowl(x: Any) -> Any:
    """The sum of 100^(i / (n - 1)) x[i]² / 2: curvatures from 1 to 100, shape `[n]`.

    >>> float(bowl([1.0, 1.0]))
    50.5

    References:
        Hansen et al. (2009), BBOB 2009 function definitions, f2 (condition 1e6 there).
    """
    curvatures = tf.cast(tf.experimental.numpy.logspace(0.0, 2.0, x.shape[0]), x.dtype)
    return tf.reduce_sum(curvatures * x**2) / 2


@problem(start=[-1.2, 1.0], minima=[[1.0, 1.0]])
def rosenbrock(x: Any) -> Any:
    """A curved valley: sum of 100 (x[i+1] - x[i]²)² + (1 - x[i])², shape `[n]`.

    From four dimensions on there is a second, local minimum near (-1, 1, ..., 1).

    >>> float(rosenbrock([1.0, 2.0])), float(rosenbrock([1.0, 1.0, 1.0]))
    (100.0, 0.0)

    References:
        Rosenbrock (1960), The Computer Journal 3, 175; Moré, Garbow and Hillstrom
        (1981), ACM TOMS 7, problem 1.
    """
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@problem(start=[1.0, 1.0], minima=[[3.0, 0.5]])
def beale(x: Any) -> Any:
    """Flat far out, steep at the corners, for x of shape `[2]`.

    >>> float(beale([1.0, 1.0])), float(beale([3.0, 0.5]))
    (14.203125, 0.0)

    References:
        Moré, Garbow and Hillstrom (1981), ACM TOMS 7, problem 5.
    """
    a, b = x[0], x[1]
    return (
        (1.5 - a * (1 - b)) ** 2
        + (2.25 - a * (1 - b**2)) ** 2
        + (2.625 - a * (1 - b**3)) ** 2
    )


@problem(
    start=[0.0, 0.0],
    minima=[
        [3.0, 2.0],
        [-2.805118086952745, 3.131312518250573],
        [-3.779310253377747, -3.283185991286170],
        [3.584428340330492, -1.848126526964404],
    ],
)
def himmelblau(x: Any) -> Any:
    """Four minima of the same depth, for x of shape `[2]`.

    >>> float(himmelblau([0.0, 0.0])), float(himmelblau([3.0, 2.0]))
    (170.0, 0.0)

    References:
        Himmelblau (1972), Applied Nonlinear Programming, problem 29.
    """
    a, b = x[0], x[1]
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


ALL = (parabola, bowl, rosenbrock, beale, himmelblau)
"""Every problem."""
