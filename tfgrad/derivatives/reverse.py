"""Reverse mode: `grad`, `value_and_grad` and `vjp`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.arguments import arguments_in_tensors, direction_in_tensors
from tfgrad.derivatives.calls import (
    Call,
    Compiled,
    require_function,
    transform,
)
from tfgrad.derivatives.certificates import Certificate, Ladder, slope_along
from tfgrad.derivatives.keeping import kept
from tfgrad.derivatives.outputs import float_outputs, objective, with_aux
from tfgrad.derivatives.recording import Recording, dense, refusals_explained
from tfgrad.derivatives.soundness import require_right_kernels
from tfgrad.derivatives.tracing import as_written, is_compiling, not_converted
from tfgrad.derivatives.verification import Arrays
from tfgrad.errors import NoGradientError
from tfgrad.nested import Nest, require_bool, weak_dtype


@not_converted
def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
) -> Callable[..., Any]:
    """Return the function that computes the gradient of `f`.

    Use it where only the gradient is needed; `value_and_grad` costs the same and gives
    both. The first call for each structure, shapes and dtypes traces `f`; later ones
    run compiled.

    Args:
        f: Takes nests of tensors, returns one float number (shape `[]`).
        argnums: The position of the argument to differentiate, or a tuple of positions;
            negative ones count from the end.
        wrt: Variables that `f` reads, to differentiate instead of arguments: a
            `tf.Variable`, a `keras.Variable`, a nest of them, a `tf.Module` or a
            `keras.Model`.
        has_aux: `f` returns `(value, aux)`; the answer is then `(gradient, aux)`.
        jit: Compile with XLA. For the same seed, `tf.random.stateless_*` draw other
            numbers there.
        verify: Compare the first answer for each structure, shapes and dtypes with
            differences along a random direction. Inside a user's own tf.function, where
            there are no numbers yet, nothing is compared.

    Returns:
        A function with the arguments of `f`. Its answer has the structure, shapes and
        dtypes of the argument (of `wrt`; one list per module), a tuple of such for a
        tuple of `argnums`. Always dense, never None: no path from the argument to the
        value gives zeros. Unit: that of the value per unit of the argument.

    Raises:
        InvalidArgumentError: If an argument is no float array; plain integers count as
            floats.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from the argument to the value exists, but is cut.
        WrongDerivativeError: If TensorFlow's derivative is wrong, and tfgrad has no
            right one. No such answer is returned.

    Example:
        >>> float(grad(lambda x: x**2 + x - 1)(3.0))
        7.0
        >>> gradient = grad(lambda p: p["a"] ** 2 * p["b"])({"a": 3.0, "b": 2.0})
        >>> float(gradient["a"]), float(gradient["b"])
        (12.0, 9.0)

    References:
        Griewank and Walther (2008), Evaluating Derivatives, section 3.2.
    """
    require_bool(has_aux=has_aux, verify=verify)

    def answer(recording: Recording, gradient: Nest) -> Any:
        return (gradient, recording.aux) if has_aux else gradient

    return _gradient_transform(
        f,
        answer,
        lambda answer: answer[0] if has_aux else answer,
        has_aux=has_aux,
        verify=verify,
        argnums=argnums,
        wrt=wrt,
        jit=jit,
    )


@not_converted
def value_and_grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
) -> Callable[..., Any]:
    """Return the function that computes `f` and its gradient in one pass.

    Arguments and errors are those of `grad`.

    Args:
        f: Takes nests of tensors, returns one float number (shape `[]`).
        argnums: The position, or positions, of the arguments to differentiate.
        wrt: Variables that `f` reads, to differentiate instead of arguments.
        has_aux: `f` returns `(value, aux)`; the answer is then `((value, aux),
            gradient)`.
        jit: Compile with XLA.
        verify: As for `grad`.

    Returns:
        A function with the arguments of `f` that returns `(value, gradient)`, the
        gradient as `grad` describes it.

    Raises:
        InvalidArgumentError: If an argument is no float array; plain integers count as
            floats.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from the argument to the value exists, but is cut.
        WrongDerivativeError: If TensorFlow's derivative is wrong, and tfgrad has no
            right one. No such answer is returned.

    Example:
        >>> value, gradient = value_and_grad(lambda x: x**2)(3.0)
        >>> float(value), float(gradient)
        (9.0, 6.0)

    References:
        Griewank and Walther (2008), Evaluating Derivatives, section 3.2.
    """
    require_bool(has_aux=has_aux, verify=verify)

    def answer(recording: Recording, gradient: Nest) -> Any:
        value = (recording.output, recording.aux) if has_aux else recording.output
        return value, gradient

    return _gradient_transform(
        f,
        answer,
        lambda answer: answer[1],
        has_aux=has_aux,
        verify=verify,
        argnums=argnums,
        wrt=wrt,
        jit=jit,
    )


def _gradient_transform(
    f: Callable[..., Any],
    answer_with: Callable[[Recording, Nest], Any],
    gradient_in: Callable[[Any], Nest],
    *,
    has_aux: bool,
    verify: bool,
    **options: Any,
) -> Callable[..., Any]:
    """Return the transform whose answer holds the gradient."""

    def body(call: Call) -> tuple[Any, Ladder]:
        recording = Recording(objective(has_aux), call, has_aux=has_aux)
        gradient = call.pack(recording.gradients())
        return answer_with(recording, gradient), [recording.outputs]

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        gradient = gradient_in(it.answer)
        return [float(weights[0][0]) * slope_along(tf.nest.flatten(gradient), v)]

    return transform(f, body, slopes=slopes if verify else None, opens=True, **options)


@not_converted
def vjp(
    f: Callable[..., Any],
    *primals: Nest,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
) -> Any:
    """Return `f(*primals)` and its pull-back: from a cotangent to the gradients.

    Use it to weigh several outputs, or to pull back more than once: what `f` computes
    on the way is kept until the pull-back is dropped. `f` is compiled once if it is a
    `tf.function`, or a function that reads nothing that may change; else at each call.

    Args:
        f: Takes nests of float tensors, returns a nest of float tensors.
        *primals: The arguments.
        has_aux: `f` returns `(y, aux)`; the answer is then `(y, pullback, aux)`.
        jit: Compile with XLA.
        verify: Compare the first answer for each structure, shapes and dtypes with
            differences along a random direction.

    Returns:
        `(y, pullback)`. `pullback(u)` takes weights `u` with the structure and the
        shapes of `y`, and returns a tuple with one nest per argument: the transposed
        Jacobian times u.

    Raises:
        InvalidArgumentError: If an argument is no float array; by the pull-back, if `u`
            does not match.
        ScalarObjectiveError: If `f` returns anything but float tensors.
        NoGradientError: If a path from an argument to the output exists, but is cut.
        WrongDerivativeError: If TensorFlow's derivative is wrong, see `grad`.

    Example:
        >>> y, pullback = vjp(lambda x, w: x * w, [1.0, 2.0], [3.0, 4.0])
        >>> [part.numpy().tolist() for part in pullback([1.0, 10.0])]
        [[3.0, 40.0], [1.0, 20.0]]
    """
    require_function(f)
    require_bool(has_aux=has_aux, jit=jit, verify=verify)
    compiled = kept(_forward, f, has_aux, jit, verify)
    argnums, names = tuple(range(len(primals))), compiled.parameters(len(primals))
    weak = weak_dtype(primals)
    args, kwargs = arguments_in_tensors(primals, {}, argnums, names, weak)
    # The tape must tell apart two arguments that are one tensor.
    args = tf.nest.map_structure(tf.identity, args)
    sources, nests = tf.nest.flatten(args), (args, kwargs, argnums, None, None)

    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    is_kept = True
    try:
        with tape:
            tape.watch(sources)
            y, aux = compiled(*nests)
    except NoGradientError:
        # A tape that is kept asks for the gradients of gradients, which there may not
        # be. Then f is verified without a tape, and each pull-back evaluates it anew.
        y, aux = compiled(*nests)
        is_kept = False
    runs_folded = compiled.folds_wrongly(*nests)

    @not_converted
    def pullback(cotangent: Nest) -> Any:
        nonlocal is_kept
        weights = direction_in_tensors(cotangent, y, "cotangent", "the output")
        if is_kept:
            unfolded = as_written() if runs_folded else contextlib.nullcontext()
            try:
                with refusals_explained(compiled.name), unfolded:
                    flat = map(tf.nest.flatten, (y, sources, weights))
                    found = tape.gradient(*flat)
                pairs = zip(found, sources, strict=True)
                return tf.nest.pack_sequence_as(args, [dense(g, x) for g, x in pairs])
            except NoGradientError:  # some show only now that there are none of those
                is_kept = False
        return kept(_backward, f, has_aux, jit)(*nests[:-1], weights)

    return (y, pullback, aux) if has_aux else (y, pullback)


def _backward(f: Callable[..., Any], has_aux: bool, jit: bool) -> Compiled:
    """Return the pull-back of `f`, compiled with an evaluation of its own."""

    def body(call: Call) -> tuple[Any, Ladder]:
        function = with_aux(float_outputs, has_aux)
        recording = Recording(function, call, has_aux=has_aux)
        return call.pack(recording.gradients(tf.nest.flatten(call.direction))), []

    return Compiled(f, body, jit=jit)


def _forward(f: Callable[..., Any], has_aux: bool, jit: bool, verify: bool) -> Compiled:
    """Return `f`, compiled, and refused if it cannot be pulled back."""

    def body(call: Call) -> tuple[Any, Ladder]:
        function = with_aux(float_outputs, has_aux)
        recording = Recording(function, call, has_aux=has_aux, persistent=True)
        recording.require_sound()
        if not tf.executing_eagerly():
            # The ops of the pull-back are not part of what is compiled here.
            pulled = recording.pull(list(map(tf.ones_like, recording.outputs)))
            require_right_kernels(pulled, call.name, own=is_compiling())
        return (recording.output, recording.aux), [recording.outputs]

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        return [slope_along(it.pulled(weights[0]), v)]

    # No dimension is left open: what is compiled has no gradients in it that could show
    # that one of its ops has to know its shape.
    return Compiled(f, body, jit=jit, slopes=slopes if verify else None)
