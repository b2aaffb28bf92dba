"""What a method is: it says where to evaluate f first, and where next.

A method is any object with `name`, `init` and `update`, as `Method` describes. The loop
does the rest: it evaluates the objective and its gradient once for each `update`, keeps
the history, applies the stopping rules, writes the log. Whatever was passed to
`minimize`, a method sees one vector of one float dtype.

This is all of the Barzilai-Borwein method (1988, IMA Journal of Numerical Analysis 8):

>>> import tensorflow as tf
>>> import tfgrad
>>> from tfgrad.optimize.methods.protocol import Move
>>> class BarzilaiBorwein:
...     name = "barzilai-borwein"
...     def init(self, start):
...         return Move(start.x - 1e-3 * start.grad)
...     def update(self, new, old, state):
...         s, y = new.x - old.x, new.grad - old.grad
...         step_size = tf.reduce_sum(s * s) / tf.reduce_sum(s * y)
...         return Move(new.x - step_size * new.grad)
>>> def bowl(x):
...     return tf.reduce_sum([1.0, 10.0, 100.0] * x**2)
>>> tfgrad.minimize(bowl, [1.0, 1.0, 1.0], method=BarzilaiBorwein(), gtol=1e-3).success
True

A method that needs more than value and gradient has a third function, `bind`: see
`Bindable` and `Curvature`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import tensorflow as tf


class Point(NamedTuple):
    """An evaluated point.

    Attributes:
        x: Where, shape `[n]`.
        fun: The value of the objective, shape `[]`; may be NaN or infinite.
        grad: Its gradient, shape `[n]`.
        linear: For sums of squares, the matrix of the linear model of the residuals,
            see `optimize.residuals.Linear`; else empty.
    """

    x: tf.Tensor
    fun: tf.Tensor
    grad: tf.Tensor
    linear: Any = ()

    @property
    def is_finite(self) -> Any:
        """Whether value and gradient are, shape `[]`."""
        grad_is = tf.reduce_all(tf.math.is_finite(self.grad))
        return tf.math.is_finite(self.fun) & grad_is

    @property
    def grad_max(self) -> tf.Tensor:
        """The largest |element| of the gradient, shape `[]`."""
        return tf.reduce_max(tf.abs(self.grad))


class Move(NamedTuple):
    """What a method wants next.

    Attributes:
        x: Where to evaluate next, shape `[n]`.
        state: What the method has to remember: a nest of tensors, of the same
            structure, shapes and dtypes every time.
        accepted: Whether the point just evaluated becomes the current one and so
            completes a step; a line search says False while it looks further.
        failed: Whether the method cannot do better than the current point.
        expected: The fall of f that the method still expects from the point that is
            now the current one, in the unit of f, shape `[]`; told at every accepted
            step, and when it failed. Minuit's EDM, the estimated vertical distance to
            the minimum (James and Roos 1975, Computer Physics Communications 10), is
            such a number. Infinity, or the largest number of the dtype, says that it
            does not know; 0 that the point is stationary. `methods.convergence` reads
            it.
    """

    x: tf.Tensor
    state: Any = ()
    accepted: Any = True
    failed: Any = False
    expected: Any = float("inf")


@runtime_checkable
class Method(Protocol):
    """A method of minimisation; both functions are pure and run inside a trace.

    It may have an attribute `failure`: the status of a run in which it `failed` where
    rounding is no excuse, "linesearch" (if there is none) or "trustregion". Its class
    may have an attribute `is_one_kernel`: True lets XLA make one kernel of `update`, if
    its ops are of those in `optimize.compiled.KERNEL_OPS`. With a function
    `of_any_size`, from the specs of a state of some parameters to those of any number
    of them, `update` is compiled once for all.
    """

    name: str

    def init(self, start: Point) -> Move:
        """Return the first move; its `accepted` and `failed` are not read."""

    def update(self, new: Point, old: Point, state: Any) -> Move:
        """Return the next move, given the point just evaluated and the current one."""


class Curvature(Protocol):
    """What an objective offers beyond value and gradient.

    Its functions may be called in `init` and `update`, in bodies of `tf.while_loop` and
    `tf.cond` too. They are made of the trace of the gradient: the objective is not
    traced again, but where TensorFlow's second derivative of it has to be repaired.
    They do not count as evaluations (`nfev`), nor are they verified as those of
    `tfgrad.hvp` are: a method has to compare what it predicts from them with the values
    that it gets.
    """

    def hvp(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return the Hessian at `x` times `v`; all three have shape `[n]`.

        Costs about two gradients; leaves the variables at `x`.
        """


@runtime_checkable
class Explained(Protocol):
    """A method with a convergence test of its own.

    The loop then applies only the rules that the user has asked for.
    """

    def why(self, state: Any) -> tuple[str, str] | None:
        """Return a status and a sentence for a `state` with which it failed.

        None: the loop's own status and sentence are used.
        """


@runtime_checkable
class Bindable(Protocol):
    """A method that asks for more than the value and the gradient of a point."""

    def bind(self, objective: Curvature) -> Method:
        """Return the method for one objective; called once, before `init`.

        A new one: the same instance may be at work on several objectives at a time.
        """
