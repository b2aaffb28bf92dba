"""Forward mode: the Jacobian times a direction, `jvp`.

A pull-back is linear in the cotangent, so its own pull-back is the push-forward. That
takes reverse mode only, which TensorFlow has for loops, branches and TensorArrays, too,
where its forward mode fails or returns zero. Compiled, the first pull-back is never
computed.

References:
    Townsend (2017), A new trick for calculating Jacobian vector products,
    https://j-towns.github.io/2017/06/12/A-new-trick.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.calls import Call, require_function, transform
from tfgrad.derivatives.certificates import Certificate, Ladder, inner
from tfgrad.derivatives.keeping import kept
from tfgrad.derivatives.outputs import float_outputs, with_aux
from tfgrad.derivatives.recording import Recording, dense, refusals_explained
from tfgrad.derivatives.soundness import every
from tfgrad.derivatives.tapes import resumed
from tfgrad.derivatives.tracing import not_converted
from tfgrad.derivatives.verification import Arrays
from tfgrad.diagnosis.lines import line_of
from tfgrad.errors import InvalidArgumentError, NoGradientError
from tfgrad.nested import Nest, describe, require_bool

_PYTHON = {"PyFunc", "PyFuncStateless"}
"""Ops that, in a pull-back, hide from the tape how it depends on the cotangent."""


@not_converted
def jvp(
    f: Callable[..., Any],
    primals: Sequence[Nest],
    tangents: Sequence[Nest],
    *,
    has_aux: bool = False,
    jit: bool = False,
    verify: bool = True,
) -> Any:
    """Return `f(*primals)` and its derivative along `tangents`, in one pass.

    Use it for one direction; it costs about three times what `f` does, however many
    inputs there are. `f` is compiled once if it is a `tf.function`, or a function that
    reads nothing that may change; else at each call.

    Args:
        f: Takes nests of float tensors, returns a nest of float tensors.
        primals: The arguments, as a tuple.
        tangents: The direction: a tuple with the structure and the shapes of `primals`.
        has_aux: `f` returns `(y, aux)`; the answer is then `(y, dy, aux)`.
        jit: Compile with XLA.
        verify: Compare the first answer for each structure, shapes and dtypes with
            differences along a random direction.

    Returns:
        `(y, dy)`: what `f` returns, and the Jacobian times the direction, which has the
        structure, shapes and dtypes of `y`.

    Raises:
        InvalidArgumentError: If an argument is no float array, or `tangents` do not
            match.
        NoGradientError: If a path from an argument to the output exists, but is cut.
        WrongDerivativeError: If TensorFlow's derivative is wrong, see `grad`.

    Example:
        >>> y, dy = jvp(lambda x: x**2, (3.0,), (10.0,))
        >>> float(y), float(dy)
        (9.0, 60.0)
    """
    require_function(f)
    require_bool(has_aux=has_aux, jit=jit, verify=verify)
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple | list):
            raise InvalidArgumentError(
                f"`{name}` must be a tuple, with one item for each argument of f.",
                got=f"{name}={describe(given)}",
                hint="tfgrad.jvp(f, (x,), (v,))",
            )
    push = kept(_push, f, len(primals), has_aux, jit, verify)
    y, dy, aux = push(*primals, tuple(tangents))
    return (y, dy, aux) if has_aux else (y, dy)


def push_forward(
    recording: Recording, *, is_sound: bool = True
) -> Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]:
    """Return the function from one tangent per source to one per output: J times them.

    Args:
        recording: Of the outputs.
        is_sound: Whether `require_sound` has passed; if not, the outputs are examined
            together.

    Raises:
        NoGradientError: If an op on the way back has no gradient of its own.
    """
    recording.require_right(twice=True)
    before = len(recording.operations)
    cotangents = [tf.zeros_like(output) for output in recording.outputs]
    tape = tf.GradientTape(persistent=True, watch_accessed_variables=False)
    with resumed(), tape:
        tape.watch(cotangents)
        pull = recording.pull if is_sound else recording.gradients
        pulled = pull(cotangents)
    made = recording.operations[before:]
    for op in every(made):
        if op.type in _PYTHON:
            raise _no_push(f"{op.type} at {line_of(op)}")

    def push(tangents: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        try:
            with refusals_explained(recording.name):
                found = tape.gradient(pulled, cotangents, list(tangents))
        except LookupError as error:
            raise _no_push(str(error).splitlines()[0]) from None
        pairs = zip(found, cotangents, strict=True)
        return [dense(dy, u) for dy, u in pairs]

    return push


def _push(
    f: Callable[..., Any], count: int, has_aux: bool, jit: bool, verify: bool
) -> Callable[..., Any]:
    def body(call: Call) -> tuple[Any, Ladder]:
        function = with_aux(float_outputs, has_aux)
        recording = Recording(function, call, has_aux=has_aux, persistent=True)
        recording.require_sound()
        pushed = push_forward(recording)(tf.nest.flatten(call.direction))
        dy = tf.nest.pack_sequence_as(recording.output, pushed)
        return (recording.output, dy, recording.aux), [recording.outputs]

    def slopes(it: Certificate, v: Arrays, weights: list[Arrays]) -> list[float]:
        return [inner(tf.nest.flatten(it.along(v)[1]), weights[0])]

    return transform(
        f,
        body,
        argnums=tuple(range(count)),
        jit=jit,
        direction="tangents",
        slopes=slopes if verify else None,
        opens=True,
    )


def _no_push(what: str) -> NoGradientError:
    return NoGradientError(
        "Forward mode needs the gradients of gradients, and one of them is missing.",
        got=what,
        hint="tfgrad.vjp or mode='reverse'",
    )
