"""The residuals being fitted: a problem that also knows its linear model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.derivatives.forward import push_forward
from tfgrad.derivatives.matrices import jacobian_blocks
from tfgrad.derivatives.outputs import float_outputs, with_aux
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.tracing import Traces
from tfgrad.derivatives.vectorized import static_size
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, ravel, unravel
from tfgrad.optimize.evaluator import Evaluation, Evaluator
from tfgrad.optimize.methods import losses
from tfgrad.optimize.methods.levenberg_marquardt import MOST_FOR_QR
from tfgrad.optimize.parts import EvaluatorOfParts, Part
from tfgrad.optimize.problem import Problem

DTYPES = (tf.float32, tf.float64)
"""The dtypes that TensorFlow factorises matrices in."""

LARGEST_SCALE = 0.45
"""The power of the dtype's largest number that `f_scale` may be, and one over it: its
square is a part of what is minimised, and divides the squares of the residuals."""

MOST_PARAMETERS = 500
"""Parameters up to which there are matrices: a step takes a second or so there."""

MOST_ELEMENTS = 2**25
"""Elements that a Jacobian may have: 256 MB in float64."""


class Linear(NamedTuple):
    """The residuals r and their Jacobian J at a point, of n parameters.

    Attributes:
        matrix: Of up to `MOST_FOR_QR` parameters, the upper triangle R that QR leaves
            of J, and Q'r beside it; of more, J'J and J'r. Shape `[n, n + 1]`. Empty
            where J is too large to be formed.
        residuals: r, as the user's function returns it; empty if r is too long to be
            kept: put together from parts of the data.
        count: How many residuals there are then, shape `[]`.
    """

    matrix: Any
    residuals: Nest
    count: Any = ()


class ResidualEvaluator(Evaluator):
    """Half the sum of squares of what a user's function returns: any nest of floats."""

    fits_in_memory = True
    """Whether the Jacobian is small enough to be formed and factorised; known once the
    function was evaluated."""

    def __init__(
        self, *args: Any, loss: str = "linear", f_scale: float = 1.0, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.loss = loss, f_scale
        self.jacobian = Traces(self._jacobian, self.f, jit=False)

    def record(self, f: Callable[..., Any], arguments: tuple[Nest, ...]) -> Recording:
        """Return the residuals on a tape."""
        return Recording(
            with_aux(self._checked, self.has_aux),
            self.call(f, arguments),
            has_aux=self.has_aux,
            persistent=True,
        )

    def value(
        self, recording: Recording, scale: Any
    ) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
        """Return half the sum of squares, its gradient, and the linear model."""
        check_dtypes(recording)
        residuals = ravel(recording.outputs)
        is_linear = self.loss[0] == "linear"
        value = (
            tf.nn.l2_loss(residuals)  # the same in one op
            if is_linear
            else losses.cost(residuals, *self.loss)
        )
        n, m = (static_size(x) or 0 for x in (recording.sources, recording.outputs))
        self.fits_in_memory = n <= MOST_PARAMETERS and m * n <= MOST_ELEMENTS
        if not self.fits_in_memory:
            recording.require_sound()
            slopes = [losses.slope(r, *self.loss) for r in recording.outputs]
            return value, recording.pull(slopes), Linear((), recording.output)
        blocks = jacobian_blocks(recording)
        jacobian = _matrix(blocks, recording.sources)
        if not is_linear:
            residuals, weights = losses.weighted(residuals, *self.loss)
            jacobian *= weights[:, None]
        column = tf.expand_dims(residuals, 1)
        side = tf.matmul(jacobian, column, transpose_a=True)
        gradient = unravel(tf.squeeze(side, 1), recording.sources)
        if n > MOST_FOR_QR:
            square = tf.matmul(jacobian, jacobian, transpose_a=True)
            matrix = tf.concat([square, side], axis=1)
        else:
            matrix = _triangle(tf.concat([jacobian, column], axis=1))
        return value, gradient, Linear(matrix, recording.output)

    def multiply(
        self, f: Callable[..., Any], arguments: tuple[Nest, ...], direction: list[Any]
    ) -> list[tf.Tensor]:
        """Return J'J times a direction."""
        recording = self.record(f, arguments)
        recording.require_sound()
        tangents = push_forward(recording)(direction)
        weights = [losses.curvature(r, *self.loss) for r in recording.outputs]
        pairs = zip(tangents, weights, strict=True)
        return recording.pull([weight * tangent for tangent, weight in pairs])

    def _jacobian(self, f: Callable[..., Any], arguments: tuple[Nest, ...]) -> Any:
        recording = self.record(f, arguments)
        jacobian = _matrix(jacobian_blocks(recording), recording.sources)
        _, weights = losses.weighted(ravel(recording.outputs), *self.loss)
        return jacobian * weights[:, None]

    def _checked(self, output: Nest, name: str) -> Nest:
        residuals = float_outputs(output, name)
        leaves = tf.nest.flatten(residuals)
        if not tf.nest.is_nested(residuals) and residuals.shape.rank == 0:
            raise InvalidArgumentError(
                "The method squares and sums the residuals itself.",
                got=f"`{name}` returned one number, {describe(residuals)}",
                hint="return model - data, one element for each; or tfgrad.minimize",
            )
        if static_size(leaves) == 0:
            raise InvalidArgumentError(
                "There must be at least one residual.",
                got=f"`{name}` returned {describe(leaves[0])}",
                hint="return model - data, one element for each",
            )
        return residuals


class ResidualEvaluatorOfParts(EvaluatorOfParts):
    """Half the sum of squares of the residuals of all parts."""

    is_sum = True

    @property
    def fits_in_memory(self) -> bool:
        """Whether the Jacobian of a part is small enough; see `ResidualEvaluator`."""
        of_part: Any = self.of_part
        return bool(of_part.fits_in_memory)

    def value(
        self, recording: Recording, weight: Any
    ) -> tuple[tf.Tensor, list[tf.Tensor], Any]:
        """Return half the sum of squares of a part, and so on; a sum has no weight."""
        return self.of_part.value(recording, None)

    def as_part(self, evaluation: Evaluation, share: Any) -> Part:
        """Return an evaluation as a part, with what the linear model is made of."""
        leaves = tf.nest.flatten(evaluation.linear.residuals)
        count: Any = tf.TensorSpec([], tf.int32)
        if not any(isinstance(leaf, tf.TypeSpec) for leaf in leaves):
            count = tf.add_n([tf.size(leaf) for leaf in leaves])
        linear = Linear(evaluation.linear.matrix, (), count)
        return super().as_part(evaluation, share)._replace(linear=linear)

    def joined(self, a: Linear, b: Linear) -> Linear:
        """Return the triangle of both, stacked, from that of each; or the sum of J'J.

        QR of the stack of two triangles is that of the stack of what they are of
        (Demmel et al. 2012, Communication-optimal parallel and sequential QR and LU
        factorizations, section 3), with all of the digits, which J'J would halve.
        """
        matrix = a.matrix
        if tf.is_tensor(matrix):  # else it is too large to be formed
            if matrix.shape[0] > MOST_FOR_QR:
                matrix += b.matrix
            else:
                matrix = _triangle(tf.concat([matrix, b.matrix], axis=0))
        return Linear(matrix, (), a.count + b.count)


class Residuals(Problem):
    """Half the sum of squares of residuals; see `Problem` and `losses.cost`.

    Raises:
        InvalidArgumentError: If the parameters are of a dtype without factorisations,
            or of one that cannot hold the square of `f_scale`.
    """

    kind = ResidualEvaluator
    kind_of_parts = ResidualEvaluatorOfParts
    has_hessian = False  # `hvp` multiplies by J'J

    def __init__(
        self, *args: Any, loss: str = "linear", f_scale: float = 1.0, **options: Any
    ) -> None:
        f_scale = 1.0 if loss == "linear" else f_scale  # which does not depend on it
        self.options = {**self.options, "loss": loss, "f_scale": f_scale}
        super().__init__(*args, **options)
        for leaf in self.x.leaves:
            if leaf.dtype not in DTYPES:
                raise InvalidArgumentError(
                    "`least_squares` works in float32 or float64.",
                    got=f"parameters of {leaf.dtype.name}",
                    hint="tf.cast(x0, tf.float32)",
                )
            largest = float(leaf.dtype.max) ** LARGEST_SCALE
            if not 1 / largest < f_scale < largest:
                raise InvalidArgumentError(
                    f"`f_scale` must be a number whose square {leaf.dtype.name} holds.",
                    got=f"f_scale={f_scale:g}",
                    hint="float64 parameters and data; the size of a residual that is "
                    "no outlier yet",
                )

    @property
    def fits_in_memory(self) -> bool:
        """Whether the Jacobian is small enough to be formed and factorised."""
        evaluator: Any = self.evaluator
        return bool(evaluator.fits_in_memory)

    def jacobian(self, x: list[tf.Tensor]) -> tf.Tensor:
        """Return J at a point, weighted as the loss says, shape `[m, n]`."""
        evaluator: Any = self.evaluator
        return evaluator.jacobian(self.x.arguments(x))


def linear_size(linear: Linear) -> int:
    """Return how many residuals a linear model is of."""
    leaves = tf.nest.flatten(linear.residuals)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    return sum(sizes) if leaves else int(linear.count)


def check_dtypes(recording: Recording) -> None:
    """Refuse residuals of another dtype than the parameters'."""
    leaves = (*recording.outputs, *recording.sources)
    dtypes = {leaf.dtype.name for leaf in leaves}
    if len(dtypes) > 1:
        raise InvalidArgumentError(
            "Residuals and parameters must share one dtype.",
            got=f"`{recording.name}` involves {' and '.join(sorted(dtypes))}",
            hint="np.float64 for the data and the start alike",
        )


def _matrix(blocks: Any, sources: list[Any]) -> tf.Tensor:
    """Return the Jacobian `[m, n]` of its blocks, one for each output and source."""
    sizes = [source.shape.num_elements() for source in sources]
    pairs = [zip(row, sizes, strict=True) for row in blocks]
    flat = [[_rows(block, n) for block, n in row] for row in pairs]
    return _concat([_concat(row, axis=1) for row in flat], axis=0)


def _rows(block: tf.Tensor, n: int) -> tf.Tensor:
    is_matrix = block.shape.rank == 2 and block.shape[1] == n
    return block if is_matrix else tf.reshape(block, [-1, n])


def _concat(parts: list[tf.Tensor], axis: int) -> tf.Tensor:
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=axis)


def _triangle(both: tf.Tensor) -> tf.Tensor:
    """Return R and, beside it, Q'r: of a Jacobian J and, in the last column, r."""
    columns: Any = both.shape[1]
    n = columns - 1
    # QR of what is not finite may not end.
    is_known = tf.reduce_all(tf.math.is_finite(both))
    given, both = both, tf.where(is_known, both, tf.zeros_like(both))
    m = both.shape[0]
    if m is None or m < n:
        missing = tf.maximum(n - tf.shape(both)[0], 0)
        both = tf.pad(both, [[0, missing], [0, 0]])
    triangle = tf.linalg.qr(both).r[:n]
    triangle = tf.where(is_known, triangle, tf.reduce_sum(given))
    has_shape = triangle.shape.is_fully_defined()
    return triangle if has_shape else tf.ensure_shape(triangle, [n, n + 1])
