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

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call, Compiled, transform
from tfgrad.derivatives.outputs import float_outputs, with_aux
from tfgrad.derivatives.recording import Recording, dense, refusals_explained
from tfgrad.derivatives.repairs import ADJOINT, is_repaired
from tfgrad.derivatives.soundness import every, needs_repair
from tfgrad.derivatives.tracing import not_converted
from tfgrad.derivatives.verification import coarsest, random_like, rounding
from tfgrad.diagnosis.lines import line_of
from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError, NoGradientError, WrongDerivativeError
from tfgrad.nested import Nest, describe

MOST_FUNCTIONS = 16
"""User functions whose compiled forms are kept; the least recently used goes first."""

_PYTHON = {"PyFunc", "PyFuncStateless"}
"""Ops that, in a pull-back, hide from the tape how it depends on the cotangent."""


@not_converted
def jvp(
    f: Callable[..., Any], primals: Sequence[Nest], tangents: Sequence[Nest]
) -> tuple[Nest, Nest]:
    """Return `f(*primals)` and its derivative along `tangents`, in one pass.

    Use it for one direction; it costs about three times what `f` does, however many
    inputs there are. `f` is compiled at its first call, and again for each new function
    object: so define it once, outside of loops.

    Args:
        f: Takes nests of float tensors, returns a nest of float tensors.
        primals: The arguments, as a tuple.
        tangents: The direction: a tuple with the structure and the shapes of `primals`.

    Returns:
        `(y, dy)`: what `f` returns, and the Jacobian times the direction, which has the
        structure, shapes and dtypes of `y`.

    Raises:
        InvalidArgumentError: If an argument is no float array, or `tangents` do not
            match.
        NoGradientError: If a path from an argument to the output exists, but is cut.

    Example:
        >>> y, dy = jvp(lambda x: x**2, (3.0,), (10.0,))
        >>> float(y), float(dy)
        (9.0, 60.0)
    """
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple | list):
            raise InvalidArgumentError(
                f"`{name}` must be a tuple, with one item for each argument of f.",
                got=f"{name}={describe(given)}",
                hint="tfgrad.jvp(f, (x,), (v,))",
            )
    make = _cached_push if isinstance(f, Hashable) else _push
    answer: tuple[Nest, Nest] = make(f, len(primals))(*primals, tuple(tangents))
    return answer


def push_forward(
    recording: Recording,
) -> Callable[[Sequence[tf.Tensor]], list[tf.Tensor]]:
    """Return the function from one tangent per source to one per output: J times them.

    Raises:
        NoGradientError: If an op on the way back has no gradient of its own.
    """
    before = len(recording.operations)
    cotangents = [tf.zeros_like(output) for output in recording.outputs]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(cotangents)
        pulled = recording.pull(cotangents)
    made = recording.operations[before:]
    for op in every(made):
        # Repairs hold for the functions that are called, not for what a tape sees.
        if op.type in ADJOINT and (op in made or not is_repaired(op)):
            raise needs_repair(op, recording.name)
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


def require_adjoint(
    call: Call,
    tangents: Sequence[tf.Tensor],
    pushed: Sequence[tf.Tensor],
    *,
    has_aux: bool = False,
) -> None:
    """Refuse a push-forward that does not match the pull-back: <u, J v> = <J' u, v>.

    Args:
        call: Where.
        tangents: v, one for each source.
        pushed: J v, one for each output.
        has_aux: `f` returns more than its output.

    Raises:
        WrongDerivativeError: If the two differ by more than rounding.
    """
    weights = random_like(pushed, seed=1)

    def pull(call: Call) -> Any:
        function = with_aux(float_outputs, has_aux)
        recording = Recording(function, call, has_aux=has_aux)
        pairs = zip(weights, recording.outputs, strict=True)
        pulled = recording.gradients([tf.cast(u, y.dtype) for u, y in pairs])
        return pulled, recording.outputs

    compiled = Compiled(call.f, pull)
    (pulled, outputs), (again, _) = compiled(*call.nests), compiled(*call.nests)
    if not all(map(np.array_equal, pulled, again)):
        return  # a random function has another derivative each time
    forward, reverse = _products(weights, pushed), _products(pulled, tangents)
    graph = compiled.graph(*call.nests)
    made = every(graph.get_operations()) if graph is not None else ()
    epsilon = float(EPSILONS[coarsest([*pushed, *tangents], made)])
    allowed = epsilon**0.5 * (np.sum(np.abs(forward)) + np.sum(np.abs(reverse)))
    allowed += rounding(epsilon, outputs) * _size(weights) * _size(tangents)
    if abs(np.sum(forward) - np.sum(reverse)) > allowed:
        raise WrongDerivativeError(
            f"Forward and reverse mode disagree for `{call.name}`.",
            got=f"<u, J v> = {np.sum(forward):.6g}, <J' u, v> = {np.sum(reverse):.6g}",
            hint="tfgrad.vjp or mode='reverse', which differentiate once",
        )


def _push(f: Callable[..., Any], count: int) -> Callable[..., Any]:
    def body(call: Call) -> Any:
        recording = Recording(with_aux(float_outputs, False), call, persistent=True)
        recording.require_sound()
        pushed = push_forward(recording)(tf.nest.flatten(call.direction))
        return recording.output, tf.nest.pack_sequence_as(recording.output, pushed)

    def check(call: Call, answer: Any, compiled: Compiled) -> None:
        _, pushed = answer
        require_adjoint(call, *map(tf.nest.flatten, (call.direction, pushed)))

    return transform(
        f, body, argnums=tuple(range(count)), direction="tangents", check=check
    )


_cached_push = functools.lru_cache(MOST_FUNCTIONS)(_push)


def _products(
    left: Sequence[tf.Tensor], right: Sequence[tf.Tensor]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the products of all elements, as one vector."""
    pairs = zip(left, right, strict=True)
    arrays = [np.asarray(a, np.float64) * np.asarray(b, np.float64) for a, b in pairs]
    return np.concatenate([np.ravel(array) for array in arrays])


def _size(tensors: Sequence[tf.Tensor]) -> float:
    """Return the sum of the magnitudes of all elements."""
    return sum(float(np.sum(np.abs(np.asarray(t, np.float64)))) for t in tensors)


def _no_push(what: str) -> NoGradientError:
    return NoGradientError(
        "Forward mode needs the gradients of gradients, and one of them is missing.",
        got=what,
        hint="tfgrad.vjp or mode='reverse'",
    )
