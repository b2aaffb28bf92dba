"""The derivative of functions that work element by element."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.calls import Call, transform
from tfgrad.derivatives.certificates import Certificate, Ladder, inner
from tfgrad.derivatives.outputs import float_output
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.soundness import every
from tfgrad.derivatives.tracing import not_converted
from tfgrad.derivatives.verification import Arrays, coarsest
from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import describe, name_of, require_bool


@not_converted
def derivative(
    f: Callable[..., Any],
    order: int = 1,
    *,
    argnums: int = 0,
    jit: bool = False,
    verify: bool = True,
) -> Callable[..., Any]:
    """Return f'(x) for a function that works element by element.

    Use it for functions of one number, at a number or at an array of points.

    Args:
        f: Takes a float tensor of shape `[...]` as its first argument, returns a tensor
            of the same shape; each element of the output depends on its own element
            only.
        order: Which derivative: 1 for f', 2 for f''. Costs about twice as much per
            order.
        argnums: The position of the argument to differentiate.
        jit: Compile with XLA.
        verify: Compare the first answer for each shape and dtype with differences of
            the derivative of one order less.

    Returns:
        A function with the arguments of `f` whose answer has the shape and dtype of the
        first.

    Raises:
        InvalidArgumentError: If `order` is no positive integer, the argument no float
            array, the output of another shape, or if an output depends on more than its
            own element.
        NoGradientError: If a path from x to f(x) exists, but is cut.
        WrongDerivativeError: If TensorFlow's second derivative is wrong, see `hessian`.

    Example:
        >>> derivative(lambda x: x * x)([[5.0, 10, 15.23232]]).numpy().tolist()
        [[10.0, 20.0, 30.46463966369629]]
        >>> float(derivative(lambda x: x**3, order=2)(2.0))
        12.0
    """
    if type(order) is not int or order < 1:
        raise InvalidArgumentError(
            "`order` must be a whole number of at least 1.",
            got=f"order={order!r}",
            hint="order=1 for f', order=2 for f''",
        )

    require_bool(verify=verify)
    if isinstance(argnums, list | tuple):
        raise InvalidArgumentError(
            "`derivative` takes the position of one argument.",
            got=f"argnums={argnums!r}",
            hint="argnums=0, or one transform for each argument",
        )

    def body(call: Call) -> tuple[Any, Ladder]:
        if call.differentiated is not call.sources[0]:
            raise InvalidArgumentError(
                "`derivative` works element by element on one array.",
                got=f"`{call.parameters[0]}` is a {type(call.differentiated).__name__}",
                hint="one array, or tfgrad.grad of a function that returns one number",
            )
        many = call.sources[0].shape.num_elements() != 1
        first = Recording(_same_shape, call, persistent=many)
        (slope,) = first.gradients()
        slopes = [first.output, slope, *(_slope(k)(call) for k in range(2, order + 1))]
        ladder = [[lower] for lower in slopes[:-1]]
        return (slopes[-1], _coupling(first, slope) if many else None), ladder

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        answer, coupling = it.answer
        if coupling is not None:
            _uncoupled(answer, coupling, name_of(f))
        higher = [*(lower for (lower,) in it.ladder[1:]), answer]
        return [inner([h * v[0]], w) for h, w in zip(higher, weights, strict=True)]

    transformed = transform(
        f, body, argnums=argnums, jit=jit, slopes=slopes if verify else None
    )

    @functools.wraps(transformed)
    @not_converted
    def derived(*args: Any, **kwargs: Any) -> Any:
        answer, coupling = transformed(*args, **kwargs)
        return answer if coupling is None else _uncoupled(answer, coupling, name_of(f))

    return derived


def _same_shape(call: Call) -> tf.Tensor:
    """Return the output of a call, which must have the shape of the one argument."""
    (x,) = call.sources
    output = float_output(call.output(), call.name)
    if not output.shape.is_compatible_with(x.shape):
        raise InvalidArgumentError(
            "`derivative` needs a function that keeps the shape of its argument.",
            got=f"`{call.name}` returned {describe(output)} for {describe(x)}",
            hint="tfgrad.grad for one number, tfgrad.jacobian for any other shape",
        )
    return output


def _slope(order: int) -> Callable[[Call], tf.Tensor]:
    """Return the derivative of an elementwise function: `order` pull-backs of ones."""
    if order == 0:
        return _same_shape
    return lambda call: Recording(_slope(order - 1), call).gradients()[0]


def _coupling(recording: Recording, slope: tf.Tensor) -> tf.Tensor:
    """Return how far f is from elementwise, divided by what rounding may explain.

    The Jacobian of an elementwise function is diagonal, so the gradient of the outputs
    weighted with w is w times the derivative. If elements are coupled, it is not.
    """
    (x,) = recording.sources
    weights = tf.random.stateless_uniform(
        tf.shape(x), seed=(0, 1), minval=0.5, maxval=1.5, dtype=x.dtype
    )
    (weighted,) = recording.pull([weights])
    # Where terms cancel, their rounding errors are left, of the size |f| / |x|.
    parts = tf.math.divide_no_nan(_largest(recording.output), _largest(x))
    dtype = coarsest([x], every(recording.operations))
    allowed = EPSILONS[dtype] ** 0.5 * tf.maximum(_largest(slope), parts)
    return tf.math.divide_no_nan(_largest(weighted - weights * slope), allowed)


def _largest(x: tf.Tensor) -> tf.Tensor:
    """Return the largest finite magnitude in `x`, 0 if there is none."""
    finite = tf.where(tf.math.is_finite(x), tf.abs(x), tf.zeros_like(x))
    return tf.reduce_max(tf.pad(tf.reshape(finite, [-1]), [[0, 1]]))


def _uncoupled(answer: tf.Tensor, coupling: tf.Tensor, name: str) -> tf.Tensor:
    """Return the answer if f was elementwise; raise, or in a trace assert, if not."""
    error = InvalidArgumentError(
        "`derivative` works element by element: f(x)[i] may depend on x[i] only.",
        got=f"`{name}` mixes elements: the answer would be a silent sum over outputs",
        hint="tfgrad.jacobian for all partial derivatives, tfgrad.grad of one number",
    )
    if not tf.executing_eagerly():
        with tf.control_dependencies(
            [tf.debugging.Assert(coupling <= 1, [str(error)])]
        ):
            return tf.identity(answer)
    if coupling > 1:
        raise error
    return answer
