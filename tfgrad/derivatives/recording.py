"""What every derivative is made of: a recorded evaluation whose gradients are never None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.diagnosis.path import Cut, missing_gradients
from tfgrad.diagnosis.report import no_gradient_error
from tfgrad.differences import finite_difference
from tfgrad.errors import InvalidArgumentError, ScalarObjectiveError, TfgradError
from tfgrad.nested import describe, is_variable

RTOL = {tf.float64: 1e-6, tf.float32: 1e-3}
"""Relative disagreement with a finite difference, beyond its error bar, that is refused."""


class Recording:
    """One evaluation of `function(call)` on a tape, ready to be pulled back.

    Args:
        function: Takes a `Call`, returns one float tensor, or with `has_aux` a pair of it
            and anything else.
        call: Where to evaluate it, and what to differentiate.
        has_aux: See `function`.
        persistent: Allow several calls of `gradients`.
    """

    def __init__(
        self,
        function: Callable[[Call], Any],
        call: Call,
        *,
        has_aux: bool = False,
        persistent: bool = False,
    ) -> None:
        """Evaluate the function."""
        if call.variables is None:
            # The tape must tell apart two arguments that are one tensor.
            call = call.at([tf.identity(source) for source in call.sources])
        finds = isinstance(call.variables, tuple) and not call.variables
        self._tape = tf.GradientTape(
            persistent=persistent, watch_accessed_variables=finds
        )
        with self._tape:
            self._tape.watch(call.sources)
            returned = function(call)
        if finds:
            call = replace(call, variables=self._tape.watched_variables())
        self._function = function
        self._call = call
        self._has_aux = has_aux
        self.sources = call.sources
        self.output, self.aux = returned if has_aux else (returned, None)

    def gradients(self, cotangent: tf.Tensor | None = None) -> list[tf.Tensor]:
        """Return the gradient of each source: dense, zeros where there is no path.

        Args:
            cotangent: Weights of the output's elements, of its shape; None means ones.

        Raises:
            NoGradientError: If a path exists, but is cut.
        """
        try:
            found = self._tape.gradient(
                self.output, self.sources, output_gradients=cotangent
            )
        except LookupError:  # an operation has no gradient: one of the sources is cut
            found = [None] * len(self.sources)
        if tf.executing_eagerly():
            # A function that leaves TensorFlow: what the tape saw may not be all.
            dense = [_dense(g, s) for g, s in zip(found, self.sources, strict=True)]
            self._verify(dense, cotangent)
            return dense
        if any(gradient is None for gradient in found):
            self._settle(found)
        return [_dense(g, s) for g, s in zip(found, self.sources, strict=True)]

    def _settle(self, found: list[Any]) -> None:
        """Raise if one of the missing gradients is cut; the others are zeros."""
        for index, cut in enumerate(self._cuts()):
            if found[index] is None and cut is not None:
                raise no_gradient_error(self._call.name, self._call.names[index], cut)

    def _cuts(self) -> list[Cut | None]:
        if self._call.variables is not None:
            return missing_gradients(lambda: self._at([]), [], self.sources)
        return missing_gradients(lambda *inputs: self._at(list(inputs)), self.sources)

    def _at(self, inputs: list[tf.Tensor]) -> tf.Tensor:
        call = self._call.at(inputs) if inputs else self._call
        output = self._function(call)
        return output[0] if self._has_aux else output

    def _verify(self, found: list[tf.Tensor], cotangent: tf.Tensor | None) -> None:
        """Compare each gradient with a finite difference along one random direction."""
        generator = np.random.default_rng(0)
        for index, (gradient, source) in enumerate(
            zip(found, self.sources, strict=True)
        ):
            direction = tf.constant(
                generator.normal(size=gradient.shape), gradient.dtype
            )
            value, error = finite_difference(
                lambda x, i=index: self._moved(i, x, cotangent),
                tf.convert_to_tensor(source),
                direction,
            )
            claimed = tf.reduce_sum(gradient * direction)
            rtol = RTOL.get(gradient.dtype, 3e-2)
            allowed = 3 * error + rtol * tf.maximum(tf.abs(value), tf.abs(claimed))
            if not tf.abs(claimed - value) <= allowed:
                cut = next(filter(None, self._cuts()), None)
                raise no_gradient_error(self._call.name, self._call.names[index], cut)

    def _moved(self, index: int, x: tf.Tensor, cotangent: Any) -> tf.Tensor:
        """Return the weighted output with one source replaced by `x`."""
        if self._call.variables is None:
            inputs = list(self.sources)
            inputs[index] = x
            output = self._at(inputs)
        else:
            variable = self.sources[index]
            before = tf.identity(variable)
            try:
                variable.assign(x)
                output = self._at([])
            finally:
                variable.assign(before)
        return tf.reduce_sum(output if cotangent is None else output * cotangent)


def objective(has_aux: bool) -> Callable[[Call], Any]:
    """Return the function from a call to its one number, or to (number, aux)."""

    def scalar(call: Call) -> Any:
        if not has_aux:
            return scalar_output(call.output(), call.name)
        value, aux = aux_pair(call.output(), call.name)
        return scalar_output(value, call.name), aux

    return scalar


def float_output(output: Any, name: str) -> tf.Tensor:
    """Return what the user's function returned as a float tensor, or refuse it."""
    if is_variable(output):
        output = tf.convert_to_tensor(output)
    if isinstance(output, tf.Tensor) and output.dtype.is_floating:
        return output
    if isinstance(output, np.ndarray | np.generic | float):
        hint = "tf.* functions all the way: what left TensorFlow has no derivative"
    elif isinstance(output, tf.Tensor) and output.dtype.is_complex:
        hint = "tf.math.real(...) or tf.abs(...) of it"
    elif isinstance(output, tf.Tensor):
        hint = "tf.cast(..., tf.float32), before anything is rounded"
    else:
        hint = "return the tensor; is a `return` missing?"
    raise ScalarObjectiveError(
        "The function to differentiate must return a real float tensor.",
        got=f"`{name}` returned {describe(output)}",
        hint=hint,
    )


def aux_pair(returned: Any, name: str) -> tuple[Any, Any]:
    """Return the pair (value, aux) that the user's function returned, or refuse it."""
    if isinstance(returned, tuple) and len(returned) == 2:
        return returned
    raise InvalidArgumentError(
        "With has_aux=True the function must return a pair (value, aux).",
        got=f"`{name}` returned {describe(returned)}",
        hint="return value, aux",
    )


def scalar_output(output: Any, name: str) -> tf.Tensor:
    """Return what the user's function returned as one float number, or refuse it."""
    tensor = float_output(output, name)
    if tensor.shape.rank is None:
        return tf.ensure_shape(tensor, [])
    if tensor.shape.rank != 0:
        raise ScalarObjectiveError(
            "The gradient needs an objective that returns one number.",
            got=f"`{name}` returned {describe(tensor)}",
            hint="tf.reduce_mean(...) or tf.reduce_sum(...) around it, or "
            "tfgrad.jacobian for one row per output, or tfgrad.derivative elementwise",
        )
    return tensor


def _dense(gradient: Any, source: Any) -> tf.Tensor:
    """Return a tensor of the shape of `source`; zeros for None."""
    if gradient is None:
        return tf.zeros_like(source)
    if isinstance(gradient, tf.IndexedSlices):
        # Rows that stand there twice are added up, as the chain rule wants.
        return tf.math.unsorted_segment_sum(
            gradient.values, gradient.indices, tf.shape(source)[0]
        )
    return gradient
