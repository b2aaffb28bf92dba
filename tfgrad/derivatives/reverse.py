"""Reverse mode: `grad`, `value_and_grad`, and the elementwise `derivative`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.calls import Call, transform
from tfgrad.derivatives.recording import (
    Recording,
    float_output,
    objective,
)
from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of


def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    has_aux: bool = False,
    jit: bool = False,
) -> Callable[..., Any]:
    """Return the function that computes the gradient of `f`.

    Use it where only the gradient is needed; `value_and_grad` costs the same and gives both.
    The first call for each structure, shapes and dtypes traces `f`; later ones run compiled.

    Args:
        f: Takes nests of tensors, returns one float number (shape `[]`).
        argnums: The position of the argument to differentiate, or a tuple of positions;
            negative ones count from the end.
        wrt: Variables that `f` reads, to differentiate instead of arguments: a `tf.Variable`,
            a `keras.Variable`, a nest of them, a `tf.Module` or a `keras.Model`.
        has_aux: `f` returns `(value, aux)`; the answer is then `(gradient, aux)`.
        jit: Compile with XLA.

    Returns:
        A function with the arguments of `f`. Its answer has the structure, shapes and dtypes
        of the argument (of `wrt`; one list per module), a tuple of such for a tuple of
        `argnums`. Always dense, never None: no path from the argument to the value gives
        zeros. Unit: that of the value per unit of the argument.

    Raises:
        InvalidArgumentError: If an argument is no float array; plain integers count as floats.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from the argument to the value exists, but is cut.

    Example:
        >>> float(grad(lambda x: x**2 + x - 1)(3.0))
        7.0
        >>> gradient = grad(lambda p: p["a"] ** 2 * p["b"])({"a": 3.0, "b": 2.0})
        >>> float(gradient["a"]), float(gradient["b"])
        (12.0, 9.0)

    References:
        Griewank and Walther (2008), Evaluating Derivatives, section 3.2.
    """

    def body(call: Call) -> Any:
        recording = Recording(objective(has_aux), call, has_aux=has_aux)
        answer = call.pack(recording.gradients())
        return (answer, recording.aux) if has_aux else answer

    return transform(f, body, argnums=argnums, wrt=wrt, jit=jit)


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    has_aux: bool = False,
    jit: bool = False,
) -> Callable[..., Any]:
    """Return the function that computes `f` and its gradient in one pass.

    Arguments and errors are those of `grad`.

    Args:
        f: Takes nests of tensors, returns one float number (shape `[]`).
        argnums: The position, or positions, of the arguments to differentiate.
        wrt: Variables that `f` reads, to differentiate instead of arguments.
        has_aux: `f` returns `(value, aux)`; the answer is then `((value, aux), gradient)`.
        jit: Compile with XLA.

    Returns:
        A function with the arguments of `f` that returns `(value, gradient)`, the gradient
        as `grad` describes it.

    Raises:
        InvalidArgumentError: If an argument is no float array; plain integers count as floats.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from the argument to the value exists, but is cut.

    Example:
        >>> value, gradient = value_and_grad(lambda x: x**2)(3.0)
        >>> float(value), float(gradient)
        (9.0, 6.0)

    References:
        Griewank and Walther (2008), Evaluating Derivatives, section 3.2.
    """

    def body(call: Call) -> Any:
        recording = Recording(objective(has_aux), call, has_aux=has_aux)
        value = (recording.output, recording.aux) if has_aux else recording.output
        return value, call.pack(recording.gradients())

    return transform(f, body, argnums=argnums, wrt=wrt, jit=jit)


def derivative(
    f: Callable[..., Any], order: int = 1, *, jit: bool = False
) -> Callable[..., Any]:
    """Return f'(x) for a function that works element by element.

    Use it for functions of one number, at a number or at an array of points.

    Args:
        f: Takes a float tensor of shape `[...]` as its first argument, returns a tensor of
            the same shape; each element of the output depends on its own element only.
        order: Which derivative: 1 for f', 2 for f''. Costs about twice as much per order.
        jit: Compile with XLA.

    Returns:
        A function with the arguments of `f` whose answer has the shape and dtype of the first.

    Raises:
        InvalidArgumentError: If `order` is no positive integer, the argument no float array,
            the output of another shape, or if an output depends on more than its own element.
        NoGradientError: If a path from x to f(x) exists, but is cut.

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

    def body(call: Call) -> Any:
        if call.differentiated is not call.sources[0]:
            raise InvalidArgumentError(
                "`derivative` works element by element on one array.",
                got=f"`{call.parameters[0]}` is a {type(call.differentiated).__name__}",
                hint="one array, or tfgrad.grad of a function that returns one number",
            )
        many = call.sources[0].shape.num_elements() != 1
        first = Recording(_same_shape, call, persistent=many)
        (slope,) = first.gradients()
        function = _same_shape
        for _ in range(order - 1):
            function = _slope(function)
        answer = slope if order == 1 else _slope(function)(call)
        return answer, _coupling(first, slope) if many else None

    transformed = transform(f, body, jit=jit)

    @functools.wraps(transformed)
    @tf.autograph.experimental.do_not_convert
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
            "`derivative` needs a function that returns an array of the argument's shape.",
            got=f"`{call.name}` returned {describe(output)} for {describe(x)}",
            hint="tfgrad.grad for one number, tfgrad.jacobian for any other shape",
        )
    return output


def _slope(function: Callable[[Call], tf.Tensor]) -> Callable[[Call], tf.Tensor]:
    """Return the derivative of an elementwise function: one pull-back of ones."""
    return lambda call: Recording(function, call).gradients()[0]


def _coupling(recording: Recording, slope: tf.Tensor) -> tf.Tensor:
    """Return how far f is from elementwise, in units of what rounding may explain.

    The Jacobian of an elementwise function is diagonal, so any weights of the outputs come
    back as the weights times the derivative. A coupling between elements mixes them.
    """
    (x,) = recording.sources
    weights = tf.random.stateless_uniform(
        tf.shape(x), seed=(0, 1), minval=0.5, maxval=1.5, dtype=x.dtype
    )
    (weighted,) = recording.gradients(weights)
    # Terms that cancel leave rounding of their own size behind: about |f| / |x|.
    parts = tf.math.divide_no_nan(_largest(recording.output), _largest(x))
    allowed = EPSILONS[x.dtype] ** 0.5 * tf.maximum(_largest(slope), parts)
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
        with tf.control_dependencies([tf.debugging.Assert(coupling <= 1, [str(error)])]):
            return tf.identity(answer)
    if coupling > 1:
        raise error
    return answer
