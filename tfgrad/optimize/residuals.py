"""The residuals being fitted: an objective that also knows their Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.forward import push_forward
from tfgrad.derivatives.matrices import jacobian_blocks
from tfgrad.derivatives.outputs import float_outputs, with_aux
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.tracing import Traces
from tfgrad.derivatives.vectorized import static_size
from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError, WrongDerivativeError
from tfgrad.nested import Nest, describe, ravel
from tfgrad.optimize.objective import Evaluation, Objective

DTYPES = (tf.float32, tf.float64)
"""The dtypes that TensorFlow factorises matrices in."""

MOST_PARAMETERS = 500
"""Parameters up to which there are matrices: a step takes a second or so there."""

MOST_ELEMENTS = 2**25
"""Elements that a Jacobian may have: 256 MB in float64."""


class Residuals(Objective):
    """Half the sum of squares of what a user's function returns: any nest of floats.

    Args:
        f: The function, as for `Objective`; it returns the residuals.
        x0: Where to start.
        wrt: The variables.
        has_aux: `f` returns `(residuals, aux)`.
        jit: As for `Objective`.
    """

    takes_many_steps = False

    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        wrt: Nest,
        *,
        has_aux: bool,
        jit: bool = False,
    ) -> None:
        """Check the point; nothing is traced."""
        super().__init__(f, x0, wrt, has_aux=has_aux, jit=jit)
        self._residuals = with_aux(self._checked, has_aux)
        self._output: Nest = None
        self._count: int | None = None
        self._squares = Traces(self._multiply_twice, f, jit=False)
        self._linear = Traces(self._linearize, f, jit=False, check=self._check)
        _check_dtypes(self.variables)

    def fits_in_memory(self) -> bool:
        """Return whether the Jacobian is small enough to be formed and factorised."""
        if self._count is None:
            self.evaluate()  # the trace knows
        n = sum(variable.shape.num_elements() for variable in self.variables)
        return n <= MOST_PARAMETERS and (self._count or 0) * n <= MOST_ELEMENTS

    def evaluate(
        self, scale: tf.Tensor | None = None, batch: tuple[Nest, ...] = ()
    ) -> Evaluation:
        """Return half the sum of squares and its gradient where the variables are."""
        evaluation: Evaluation = self._traces(scale, batch)[0]
        return evaluation

    def residuals(self) -> Nest:
        """Return the residuals where the variables are, as the function does."""
        return self._traces(None, ())[1]

    def linearize(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Return residuals `[m]` and Jacobian `[m, n]` where the variables are."""
        linear: tuple[tf.Tensor, tf.Tensor] = self._linear()
        return linear

    def gauss_newton(self, direction: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return J'J where the variables are times a direction; traced once."""
        product: list[tf.Tensor] = self._squares(*direction)
        return product

    def _run(
        self, f: Callable[..., Any], scale: tf.Tensor | None, batch: tuple[Nest, ...]
    ) -> Any:
        evaluation = super()._run(f, scale, batch)
        return evaluation, self._output

    def _record(self, call: Call) -> Recording:
        outputs = []

        def half_square(output: Nest, name: str) -> tf.Tensor:
            outputs.append(self._checked(output, name))
            return tf.reduce_sum(ravel(tf.nest.flatten(outputs[-1])) ** 2) / 2

        function = with_aux(half_square, self._has_aux)
        recording = Recording(function, call, has_aux=self._has_aux)
        self._output = outputs[0]  # later ones may belong to another trace
        return recording

    def _record_residuals(self, f: Callable[..., Any]) -> Recording:
        return Recording(
            self._residuals, self._call(f), has_aux=self._has_aux, persistent=True
        )

    def _linearize(self, f: Callable[..., Any]) -> tuple[tf.Tensor, tf.Tensor]:
        recording = self._record_residuals(f)
        sizes = [source.shape.num_elements() for source in recording.sources]
        rows = [
            tf.concat(
                [tf.reshape(b, [-1, n]) for b, n in zip(row, sizes, strict=True)], 1
            )
            for row in jacobian_blocks(recording)
        ]
        return ravel(recording.outputs), tf.concat(rows, axis=0)

    def _multiply_twice(
        self, f: Callable[..., Any], *direction: tf.Tensor
    ) -> list[tf.Tensor]:
        recording = self._record_residuals(f)
        recording.require_sound()
        return recording.pull(push_forward(recording)(direction))

    def _checked(self, output: Nest, name: str) -> Nest:
        residuals = float_outputs(output, name)
        leaves = tf.nest.flatten(residuals)
        self._count = static_size(leaves)
        if not tf.nest.is_nested(residuals) and residuals.shape.rank == 0:
            raise InvalidArgumentError(
                "`least_squares` squares and sums the residuals itself.",
                got=f"`{name}` returned one number, {describe(residuals)}",
                hint="return model - data, one element for each; or tfgrad.minimize",
            )
        if self._count == 0:
            raise InvalidArgumentError(
                "There must be at least one residual.",
                got=f"`{name}` returned {describe(leaves[0])}",
                hint="return model - data, one element for each",
            )
        dtypes = {leaf.dtype.name for leaf in (*leaves, *self.variables)}
        if len(dtypes) > 1:
            raise InvalidArgumentError(
                "Residuals and parameters must share one dtype.",
                got=f"`{name}` involves {' and '.join(sorted(dtypes))}",
                hint="np.float64 for the data and the start alike",
            )
        return residuals

    def _check(self, answer: Any) -> None:
        """Refuse a Jacobian that differs from the gradient, which took another way."""
        residuals, jacobian = map(np.asarray, answer)
        gradient = np.asarray(ravel(self.evaluate().gradient))
        size = np.abs(jacobian).T @ np.abs(residuals)
        allowed = EPSILONS[self.variables[0].dtype] ** 0.5 * size
        difference = np.abs(jacobian.T @ residuals - gradient)
        if np.any(difference > allowed):
            worst = int(np.argmax(difference - allowed))
            raise WrongDerivativeError(
                f"Forward and reverse mode disagree for `{self.name}`.",
                got=f"parameter {worst}: {(jacobian.T @ residuals)[worst]:.6g} "
                f"and {gradient[worst]:.6g} as the slope of half the sum of squares",
                hint="tfgrad.check_grads(f, x0); is f random?",
            )


def _check_dtypes(variables: Sequence[tf.Variable]) -> None:
    for variable in variables:
        if variable.dtype not in DTYPES:
            raise InvalidArgumentError(
                "`least_squares` works in float32 or float64.",
                got=f"parameters of {variable.dtype.name}",
                hint="tf.cast(x0, tf.float32)",
            )
