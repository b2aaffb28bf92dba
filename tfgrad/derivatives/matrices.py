"""Second derivatives and full matrices: `jacobian`, `hessian`, `hvp`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.calls import Call, transform
from tfgrad.derivatives.certificates import (
    Certificate,
    Ladder,
    inner,
    slope_along,
    times,
)
from tfgrad.derivatives.forward import push_forward
from tfgrad.derivatives.outputs import float_outputs, objective, with_aux
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.tracing import leaves_tensorflow, not_converted
from tfgrad.derivatives.vectorized import is_straight, rows, static_size
from tfgrad.derivatives.verification import Arrays
from tfgrad.errors import InvalidArgumentError, NoGradientError
from tfgrad.nested import Nest, require_bool

MODES = ("auto", "reverse", "forward")

FEW = 2**13
"""Numbers up to which it costs less to return a gradient that nobody asked for, at each
call, than to trace it once apart from the answer."""


@not_converted
def jacobian(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
) -> Callable[..., Any]:
    """Return the function that computes all partial derivatives of `f`.

    Use it for a function with several outputs. It costs one pull-back for each output
    element, or one push-forward for each input element, computed many at a time.

    Args:
        f: Takes nests of tensors, returns a nest of float tensors of any shapes.
        argnums: The position of the argument to differentiate, or a tuple of positions;
            negative ones count from the end.
        wrt: Variables that `f` reads, to differentiate instead of arguments: a
            `tf.Variable`, a `keras.Variable`, a nest of them, a `tf.Module` or a
            `keras.Model`.
        mode: "reverse" computes row by row, "forward" column by column, "auto" what is
            cheaper.
        chunk_size: How many rows (or columns) are computed together; fewer take less
            memory. None chooses so that they need at most 256 MB.
        has_aux: `f` returns `(value, aux)`; the answer is then `(jacobian, aux)`.
        jit: Compile with XLA.
        verify: Compare the first answer for each structure, shapes and dtypes with
            differences along a random direction.

    Returns:
        A function with the arguments of `f`. Its answer has the structure of the
        output, with the structure of the argument (of `wrt`) in place of each leaf; an
        array has the shape `output.shape + input.shape` and the dtype of the input.

    Raises:
        InvalidArgumentError: If an argument is no float array, an option is unknown, or
            the answer does not fit into memory.
        ScalarObjectiveError: If `f` returns anything but float tensors.
        NoGradientError: If a path from the argument to an output exists, but is cut.
        WrongDerivativeError: If TensorFlow's derivative is wrong, see `grad`.

    Example:
        >>> jacobian(lambda x: x**2)([1.0, 2.0]).numpy().tolist()
        [[2.0, 0.0], [0.0, 4.0]]
        >>> weigh = lambda p: {"sum": p["a"] + 3 * p["b"]}
        >>> float(jacobian(weigh)({"a": 1.0, "b": 2.0})["sum"]["b"])
        3.0

    References:
        Griewank and Walther (2008), Evaluating Derivatives, chapter 3.
    """
    if mode not in MODES:
        raise InvalidArgumentError(
            "`mode` must be 'auto', 'reverse' or 'forward'.",
            got=f"mode={mode!r}",
            hint="mode='auto', which takes the cheaper one",
        )
    _check_chunk_size(chunk_size)
    require_bool(has_aux=has_aux, verify=verify)

    def body(call: Call) -> tuple[Any, Ladder]:
        function = with_aux(float_outputs, has_aux)
        recording = Recording(function, call, has_aux=has_aux, persistent=True)
        _require_room(recording.outputs, recording.sources, "vjp or jvp")
        blocks = jacobian_blocks(recording, mode, chunk_size, jit=jit)
        packed = [call.pack(row) for row in blocks]
        answer = tf.nest.pack_sequence_as(recording.output, packed)
        # XLA fuses less where f itself is an output, too.
        ladder = [] if jit else [recording.outputs]
        return ((answer, recording.aux) if has_aux else answer), ladder

    def lower(call: Call) -> Ladder:
        function = with_aux(float_outputs, has_aux)
        return [Recording(function, call, has_aux=has_aux).outputs]

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        blocks = tf.nest.flatten(it.answer[0] if has_aux else it.answer)
        return [inner(times(blocks, v), weights[0])]

    return transform(
        f,
        body,
        argnums=argnums,
        wrt=wrt,
        jit=jit,
        slopes=slopes if verify else None,
        lower=lower,
    )


@not_converted
def hessian(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    chunk_size: int | None = None,
    has_aux: bool = False,
    verify: bool = True,
    jit: bool = False,
) -> Callable[..., Any]:
    """Return the function that computes all second partial derivatives of `f`.

    Use it for up to some thousand input elements: it costs as many gradients, computed
    many at a time. For more, `hvp` has what most algorithms need of it.

    Args:
        f: Takes nests of tensors, returns one float number (shape `[]`).
        argnums: The position, or positions, of the arguments to differentiate.
        wrt: Variables that `f` reads, to differentiate instead of arguments.
        chunk_size: How many rows are computed together; None chooses, see `jacobian`.
        has_aux: `f` returns `(value, aux)`; the answer is then `(hessian, aux)`.
        verify: Compare the first answer for each structure, shapes and dtypes with
            differences of the gradient, and that with differences of the value, along a
            random direction.
        jit: Compile with XLA.

    Returns:
        A function with the arguments of `f`. For an array the answer has the shape
        `x.shape + x.shape` and the dtype of `x`; for a nest, it is a nest of nests of
        blocks, as `hessian["a"]["b"]`. Unit: the value's per unit of x squared.

    Raises:
        InvalidArgumentError: If an argument is no float array, an option is unknown, or
            the answer does not fit into memory.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from the argument to the gradient exists, but is cut.
        WrongDerivativeError: If TensorFlow's second derivative is wrong, as that of
            several ops is. No such answer is returned.

    Example:
        >>> hessian(lambda x: x[0] ** 2 * x[1])([3.0, 5.0]).numpy().tolist()
        [[10.0, 6.0], [6.0, 0.0]]

    References:
        Griewank and Walther (2008), Evaluating Derivatives, chapter 3.
    """
    _check_chunk_size(chunk_size)
    require_bool(has_aux=has_aux, verify=verify)

    def require(call: Call) -> None:
        _require_room(call.sources, call.sources, "hvp")

    def body(call: Call) -> tuple[Any, Ladder]:
        gradient = _gradient(has_aux)
        recording = Recording(gradient, call, has_aux=True, persistent=True)
        recording.require_sound(separately=False)
        blocks = _by_rows(recording, chunk_size)
        answer = call.pack([call.pack(row) for row in blocks])
        _, aux = recording.aux
        return ((answer, aux) if has_aux else answer), []

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        blocks = tf.nest.flatten(it.answer[0] if has_aux else it.answer)
        first = float(weights[0][0]) * slope_along(it.ladder[1], v)
        return [first, inner(times(blocks, v), weights[1])]

    return transform(
        f,
        body,
        argnums=argnums,
        wrt=wrt,
        jit=jit,
        slopes=slopes if verify else None,
        lower=_gradient_ladder(has_aux),
        require=require,
    )


@not_converted
def hvp(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    wrt: Nest | None = None,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
) -> Callable[..., Any]:
    """Return the function that computes the Hessian of `f` times a direction.

    Use it where the Hessian is too large: it costs about two gradients, whatever the
    size. The first answer for each structure, shapes and dtypes is verified as by
    `hessian`.

    Args:
        f: Takes nests of tensors, returns one float number (shape `[]`).
        argnums: The position, or positions, of the arguments to differentiate.
        wrt: Variables that `f` reads, to differentiate instead of arguments.
        has_aux: `f` returns `(value, aux)`; the answer is then `(product, aux)`.
        jit: Compile with XLA.
        verify: As for `hessian`.

    Returns:
        A function `product(*args, v)` with the arguments of `f` and then the direction
        `v`, which has the structure and shapes of what is differentiated, and so has
        the answer.

    Raises:
        InvalidArgumentError: If an argument is no float array, or `v` does not match.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from the argument to the gradient exists, but is cut.
        WrongDerivativeError: If TensorFlow's second derivative is wrong, see `hessian`.

    Example:
        >>> hvp(lambda x: x[0] ** 2 * x[1])([3.0, 5.0], [1.0, 10.0]).numpy().tolist()
        [70.0, 6.0]

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian; here in reverse
        mode twice, which no op of TensorFlow refuses.
    """
    require_bool(has_aux=has_aux, verify=verify)

    def body(call: Call) -> tuple[Any, Ladder]:
        recording = Recording(_gradient(has_aux), call, has_aux=True)
        found = recording.gradients(tf.nest.flatten(call.direction))
        answer, (value, aux) = call.pack(found), recording.aux
        ladder = [value, recording.outputs]
        if (static_size(call.sources) or 0) > FEW:  # to trace them apart costs less
            ladder = []
        return ((answer, aux) if has_aux else answer), ladder

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        found = it.along(v)
        products = tf.nest.flatten(found[0] if has_aux else found)
        first = float(weights[0][0]) * slope_along(it.ladder[1], v)
        return [first, inner(products, weights[1])]

    return transform(
        f,
        body,
        argnums=argnums,
        wrt=wrt,
        jit=jit,
        direction="v",
        slopes=slopes if verify else None,
        lower=_gradient_ladder(has_aux),
        opens=True,
    )


def _gradient(has_aux: bool) -> Callable[[Call], Any]:
    """Return the function from a call to its gradient, flat, and what comes with it."""

    def gradient(call: Call) -> Any:
        recording = Recording(objective(has_aux), call, has_aux=has_aux)
        return recording.gradients(), (recording.outputs, recording.aux)

    return gradient


def _gradient_ladder(has_aux: bool) -> Callable[[Call], Ladder]:
    """Return the function from a call to its value and its gradient."""

    def lower(call: Call) -> Ladder:
        gradient, (value, _) = _gradient(has_aux)(call)
        return [value, gradient]

    return lower


def jacobian_blocks(
    recording: Recording,
    mode: str = "auto",
    chunk_size: int | None = None,
    *,
    jit: bool = False,
) -> list[list[tf.Tensor]]:
    """Return the Jacobian of a recording, by `[output][source]`, the cheaper way."""
    sizes = map(static_size, (recording.outputs, recording.sources))
    tall = _is_tall(*sizes, jit=jit and is_straight(recording.operations))
    is_forward = mode == "forward" or (mode == "auto" and tall)
    # With one output, the pull-back within the columns finds the same cuts.
    is_one = len(recording.outputs) == 1 and not leaves_tensorflow()
    if not (is_forward and is_one):
        recording.require_sound()
    if is_forward:
        try:
            return _by_columns(recording, chunk_size, is_sound=not is_one)
        except NoGradientError:  # forward mode differentiates twice
            if mode == "forward":
                raise
            recording.require_sound()  # else it is the user's function that is cut
    return _by_rows(recording, chunk_size)


def _by_rows(recording: Recording, chunk_size: int | None) -> list[list[tf.Tensor]]:
    """Return the blocks `[output][source]`, by pull-backs."""
    return rows(
        recording.pull,
        recording.outputs,
        recording.sources,
        recording.operations,
        chunk_size,
    )


def _by_columns(
    recording: Recording, chunk_size: int | None, *, is_sound: bool
) -> list[list[tf.Tensor]]:
    """Return the blocks `[output][source]`, by push-forwards."""
    push, sources = push_forward(recording, is_sound=is_sound), recording.sources
    blocks = rows(push, sources, recording.outputs, recording.operations, chunk_size)
    return [
        [
            _transposed(column[i], source)
            for column, source in zip(blocks, sources, strict=True)
        ]
        for i in range(len(recording.outputs))
    ]


def _transposed(block: tf.Tensor, source: tf.Tensor) -> tf.Tensor:
    """Return a block of shape `source.shape + output.shape` with the two exchanged."""
    rank, whole = source.shape.rank, block.shape.rank
    if rank is not None and whole is not None:
        return tf.transpose(block, [*range(rank, whole), *range(rank)])
    first = tf.rank(source)
    axes: Any = tf.concat([tf.range(first, tf.rank(block)), tf.range(first)], axis=0)
    transposed = tf.transpose(block, axes)
    if rank is not None:
        transposed.set_shape(block.shape[rank:].concatenate(source.shape))
    return transposed


def _is_tall(outputs: int | None, inputs: int | None, *, jit: bool) -> bool:
    """Return whether outputs outnumber inputs so far that columns are cheaper.

    A push-forward costs about twice what a pull-back does, but under XLA, which leaves
    out the pull-back that it is made of, somewhat less.
    """
    if outputs is None or inputs is None:
        return False
    return outputs >= inputs > 1 if jit else outputs > 2 * inputs


def _require_room(outputs: Sequence[Any], sources: Sequence[Any], instead: str) -> None:
    """Refuse a matrix that does not fit into the memory of this computer."""
    height, width = static_size(outputs), static_size(sources)
    if height is None or width is None or not sources:
        return
    itemsize = max(source.dtype.size for source in sources)
    needed, there = height * width * itemsize, _memory()
    if needed > there:
        raise InvalidArgumentError(
            "The matrix of all partial derivatives must fit into memory.",
            got=f"{height:,} by {width:,}: {needed / 2**30:,.0f} GiB of "
            f"{there / 2**30:,.0f}",
            hint=f"tfgrad.{instead}, which have it times a direction",
        )


def _memory() -> int:
    """Return the bytes of memory of this computer; 64 GiB if it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 64 * 2**30


def _check_chunk_size(chunk_size: Any) -> None:
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise InvalidArgumentError(
            "`chunk_size` must be a whole number of at least 1, or None.",
            got=f"chunk_size={chunk_size!r}",
            hint="chunk_size=None, which keeps to 256 MB",
        )
