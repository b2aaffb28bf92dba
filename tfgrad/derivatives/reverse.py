"""Reverse mode: `grad`, `value_and_grad` and `vjp`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.arguments import arguments_in_tensors, direction_in_tensors
from tfgrad.derivatives.calls import Call, Compiled, require_function, transform
from tfgrad.derivatives.outputs import float_outputs, objective, with_aux
from tfgrad.derivatives.recording import Recording, dense, refusals_explained
from tfgrad.derivatives.soundness import require_right_kernels
from tfgrad.derivatives.tracing import as_written, is_compiling, not_converted
from tfgrad.nested import Nest, weak_dtype

MOST_FUNCTIONS = 16
"""User functions that `vjp` keeps compiled; the least recently used goes first."""


@not_converted
def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    has_aux: bool = False,
    jit: bool = False,
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
        jit: Compile with XLA.

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


@not_converted
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
        has_aux: `f` returns `(value, aux)`; the answer is then `((value, aux),
            gradient)`.
        jit: Compile with XLA.

    Returns:
        A function with the arguments of `f` that returns `(value, gradient)`, the
        gradient as `grad` describes it.

    Raises:
        InvalidArgumentError: If an argument is no float array; plain integers count as
            floats.
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


@not_converted
def vjp(f: Callable[..., Any], *primals: Nest) -> tuple[Nest, Callable[[Nest], Any]]:
    """Return `f(*primals)` and its pull-back: from a cotangent to the gradients.

    Use it to weigh several outputs, or to pull back more than once: what `f` computes
    on the way is kept until the pull-back is dropped. `f` is compiled at its first
    call, and again for each new function object: so define it once, outside of loops.

    Args:
        f: Takes nests of float tensors, returns a nest of float tensors.
        *primals: The arguments.

    Returns:
        `(y, pullback)`. `pullback(u)` takes weights `u` with the structure and the
        shapes of `y`, and returns a tuple with one nest per argument: the transposed
        Jacobian times u.

    Raises:
        InvalidArgumentError: If an argument is no float array; by the pull-back, if `u`
            does not match.
        ScalarObjectiveError: If `f` returns anything but float tensors.
        NoGradientError: If a path from an argument to the output exists, but is cut.

    Example:
        >>> y, pullback = vjp(lambda x, w: x * w, [1.0, 2.0], [3.0, 4.0])
        >>> [part.numpy().tolist() for part in pullback([1.0, 10.0])]
        [[3.0, 40.0], [1.0, 20.0]]
    """
    compiled = (_cached_forward if isinstance(f, Hashable) else _forward)(f)
    argnums, names = tuple(range(len(primals))), compiled.parameters(len(primals))
    weak = weak_dtype(primals)
    args, kwargs = arguments_in_tensors(primals, {}, argnums, names, weak)
    # The tape must tell apart two arguments that are one tensor.
    args = tf.nest.map_structure(tf.identity, args)
    sources, nests = tf.nest.flatten(args), (args, kwargs, argnums, None, None)
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(sources)
        y = compiled(*nests)
    outputs, runs_folded = tf.nest.flatten(y), compiled.folds_wrongly(*nests)

    @not_converted
    def pullback(cotangent: Nest) -> Any:
        weights = direction_in_tensors(cotangent, y, "cotangent", "the output")
        unfolded = as_written() if runs_folded else contextlib.nullcontext()
        with refusals_explained(compiled.name), unfolded:
            found = tape.gradient(outputs, sources, tf.nest.flatten(weights))
        pairs = zip(found, sources, strict=True)
        return tf.nest.pack_sequence_as(args, [dense(g, x) for g, x in pairs])

    return y, pullback


def _forward(f: Callable[..., Any]) -> Compiled:
    """Return `f`, compiled, and refused if it cannot be pulled back."""
    require_function(f)

    def body(call: Call) -> Any:
        recording = Recording(with_aux(float_outputs, False), call, persistent=True)
        recording.require_sound()
        if not tf.executing_eagerly():
            # The ops of the pull-back are not part of what is compiled here.
            pulled = recording.pull(list(map(tf.ones_like, recording.outputs)))
            require_right_kernels(pulled, call.name, own=is_compiling())
        return recording.output

    return Compiled(f, body)


_cached_forward = functools.lru_cache(MOST_FUNCTIONS)(_forward)
