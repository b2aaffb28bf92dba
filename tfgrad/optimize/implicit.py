"""The derivative of a minimum: what the implicit function theorem says of it.

At a minimum x of f(x, s) the gradient g(x, s) of the free variables vanishes whatever s
is. So H dx + dg/ds ds = 0, with the Hessian H, and a weight u of x weighs s by
-v' dg/ds, where H v = u. The sources s are whatever f reads besides x: arguments,
tensors that it closes over, variables.

All of it is made of ops, and can be differentiated again: the derivative of v = H^-1 u
takes another solution of the same equations.

References:
    Nocedal and Wright (2006), Numerical Optimization, 2nd edition: theorem A.2 (the
    implicit function theorem), algorithm 5.2 (conjugate gradients), section 3.5
    (Newton's method near a solution).
    Kelley (1995), Iterative Methods for Linear and Nonlinear Equations, section 5.4:
    Newton steps with an earlier matrix (the chord and Shamanskii's method).
    Higham (2002), Accuracy and Stability of Numerical Algorithms, 2nd edition, chapter
    12: the correction of a quotient by what it leaves (iterative refinement); 14.4:
    Gauss-Jordan elimination.
    Goodnight (1979), A tutorial on the SWEEP operator, The American Statistician 33.
    Blondel et al. (2022), Efficient and modular implicit differentiation, NeurIPS 35:
    the same for arguments of any solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.derivatives.recording import dense
from tfgrad.derivatives.tapes import unrecorded, with_gradient
from tfgrad.diagnosis.graphs import trace
from tfgrad.diagnosis.number_causes import INDEFINITE
from tfgrad.diagnosis.path import find_cuts
from tfgrad.differences import EPSILONS
from tfgrad.optimize.methods.bounded import Bounds
from tfgrad.optimize.methods.protocol import Point

MOST_FOR_MATRIX = 200
"""Numbers in x up to which the Hessian is formed and inverted; of more, conjugate
gradients take products with it."""

FEW = 50
"""Numbers in x up to which H is inverted in a loop here: of 20, XLA takes 10 us for
that, 30 us for its own Cholesky factor, and 10 us more for the inverse of that."""

MOST_STEPS = 20
"""Pairs of Newton steps after the method's own; near a minimum one is enough."""

PRODUCTS = 10
"""Products with H for each of n variables that conjugate gradients may take: n would do
without rounding."""

ENOUGH = 0.75
"""The power of the dtype's epsilon at which Newton steps and residuals of conjugate
gradients are small; they have to be so at the power of a half: half of the digits."""

NEAR = 0.25
"""The power of epsilon up to which a Newton step is short: H before it serves after it,
for corrected quotients."""

CORRECTIONS = 2
"""Of a quotient by an H that was formed nearby: each leaves of the error a part as
large as H differs, so three powers of `NEAR` are left."""

LOOSE = 1e-3
"""The residual up to which a Newton step is solved for: it is corrected by the next."""

Args = Sequence[tf.Tensor]
"""The tensors among the arguments of f besides x, flat."""


class System(NamedTuple):
    """The equations that hold at a minimum of f(x, *args).

    Attributes:
        value: From x and the args to f.
        gradient: From x, shape `[n]`, and the args to the gradient g there.
        product: From x, v and the args to H v; with `gauss_newton`, to J'J v.
        matrix: From x and the args to H, shape `[n, n]`; None where n is too large.
        outside: The float tensors and the variables that f reads besides them.
        bounds: The lower and the upper bounds of x, arrays; None if there are none.
    """

    value: Callable[[tf.Tensor, Args], tf.Tensor]
    gradient: Callable[[tf.Tensor, Args], tf.Tensor]
    product: Callable[[tf.Tensor, tf.Tensor, Args], tf.Tensor]
    matrix: Callable[[tf.Tensor, Args], tf.Tensor] | None
    outside: list[Any]
    bounds: Any

    def free(self, x: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
        """Return 1 for each variable that no bound holds, and 0 for the others."""
        bounds = Bounds.of(self.bounds, x)
        if bounds is None:
            return tf.ones_like(x)
        is_free = bounds.free(Point(x, tf.zeros([], x.dtype), gradient))
        return tf.cast(is_free, x.dtype)

    def clip(self, x: tf.Tensor) -> tf.Tensor:
        """Return the nearest point within the bounds."""
        bounds = Bounds.of(self.bounds, x)
        return x if bounds is None else bounds.clip(x)


class Inverse(NamedTuple):
    """The inverse of H at a minimum or nearby, of the free variables.

    Attributes:
        free: 1 for each free variable, 0 for the others, shape `[n]`.
        matrix: The inverse of H; where H is not positive, H scaled to a diagonal of
            ones; where it is not formed, x.
        least: The least curvature that was seen, as a part of the largest, along the
            conjugate directions; with a matrix, 1 if it is positive, and else 0.
    """

    free: tf.Tensor
    matrix: tf.Tensor
    least: tf.Tensor

    def least_curvature(self) -> tf.Tensor:
        """Return `least`, but of a matrix that is not positive its eigenvalue."""
        if self.matrix.shape.rank == 1:
            return self.least
        return tf.cond(
            self.least > 0,
            lambda: self.least,
            # Rounding may let a singular matrix look positive.
            lambda: tf.minimum(tf.reduce_min(tf.linalg.eigvalsh(self.matrix)), 0),
        )


class Minimum(NamedTuple):
    """A minimum, and how Newton steps went there, two by two with one H.

    Attributes:
        x: Where, shape `[n]`; held as a constant.
        inverse: Of H there, or two short steps before.
        before: The length of the last step but one, see `error`.
        error: The length of the last step, relative to x, or to how far x went from the
            start if that is more; both measured by the Hessian, so that no units
            matter. Shape `[]`.
        is_settled: Whether the variables that are free here are those of the inverse.
    """

    x: tf.Tensor
    inverse: Inverse
    before: tf.Tensor
    error: tf.Tensor
    is_settled: tf.Tensor

    @classmethod
    def unknown(cls, system: System, x: tf.Tensor) -> Minimum:
        """Return what is known of a minimum near x before any step."""
        n = 0 if system.matrix is None else x.shape[0]
        one, huge = tf.ones([], x.dtype), tf.constant(x.dtype.max, x.dtype)
        inverse = Inverse(x, tf.eye(n, dtype=x.dtype) if n else x, one)
        return cls(x, inverse, huge, huge, tf.constant(True))

    @property
    def is_positive(self) -> Any:
        """Whether f bends up in all directions."""
        return self.inverse.least > 0

    @property
    def is_exact(self) -> Any:
        """Whether half of the digits of x are right."""
        return self.error <= EPSILONS[self.x.dtype] ** 0.5


def refined(system: System, x: tf.Tensor, start: tf.Tensor, args: Args) -> Minimum:
    """Return the minimum that x is near, after Newton steps with the Hessian."""
    epsilon = EPSILONS[x.dtype]
    enough, near = (tf.constant(epsilon**p, x.dtype) for p in (ENOUGH, NEAR))

    def goes_on(i: Any, at: Minimum) -> Any:
        # The next step would be shorter by as much as the last one was.
        left = at.error * (at.error / at.before)
        is_shorter: Any = at.error < at.before / 2  # else rounding forbids more
        is_near = at.is_exact & (at.before <= near) & ((left <= enough) | ~is_shorter)
        return ~(is_near & at.is_settled) & (i < MOST_STEPS) & at.is_positive

    def stepped(
        x: tf.Tensor, gradient: tf.Tensor, inverse: Inverse, size: tf.Tensor
    ) -> tuple[tf.Tensor, Inverse, tf.Tensor]:
        step, inverse = _solved(system, x, args, inverse, -gradient, LOOSE)
        new = system.clip(x + step)
        # Of a Newton step s: s'H s = -g's.
        fall = -tf.reduce_sum((new - x) * inverse.free * gradient)
        length = tf.sqrt(tf.maximum(fall, 0))
        return new, inverse, tf.where(length == 0, length, length / size)

    def body(i: Any, at: Minimum) -> Any:
        gradient = system.gradient(at.x, args)
        matrix = None if system.matrix is None else system.matrix(at.x, args)
        inverse = _inverted(matrix, at.x, system.free(at.x, gradient))

        def length(v: tf.Tensor) -> tf.Tensor:
            product = (
                system.product(at.x, v, args)
                if matrix is None
                else tf.linalg.matvec(matrix, v)
            )
            return tf.sqrt(tf.maximum(tf.reduce_sum(v * product), 0))

        size = tf.maximum(length(at.x), length(at.x - start))
        x, inverse, before = stepped(at.x, gradient, inverse, size)
        gradient = system.gradient(x, args)
        is_settled = tf.reduce_all(system.free(x, gradient) == inverse.free)
        x, inverse, error = stepped(x, gradient, inverse, size)
        return i + 1, Minimum(x, inverse, before, error, is_settled)

    first = 0, Minimum.unknown(system, x)
    _, minimum = tf.while_loop(goes_on, body, first, parallel_iterations=1)
    return minimum


def attached(system: System, inverse: Inverse, x: tf.Tensor, args: Args) -> tf.Tensor:
    """Return x with the derivative of a minimum by all that f reads besides."""

    def minimum(x: tf.Tensor, *given: tf.Tensor) -> Any:
        args = given[: len(given) - len(system.outside)]

        def back(u: tf.Tensor) -> Any:
            are_cut = unrecorded(lambda: _are_cut(system, x, args))
            # This is another graph; a third one may not reach what is in the first.
            at, here, own = _copied((inverse, x, args))
            here = attached(system, at, here, own)
            v = divided(system, at, here, u, own)

            def gradient(_: list[tf.Tensor]) -> tf.Tensor:
                return system.gradient(here, own)

            found = _pulled(system, gradient, [], own, -v)
            pairs = zip(found, are_cut, strict=True)
            return tf.zeros_like(x), *(None if is_cut else g for g, is_cut in pairs)

        return tf.identity(x), back

    outside = map(tf.convert_to_tensor, system.outside)
    return with_gradient(minimum, x, *args, *outside)


def divided(
    system: System, inverse: Inverse, x: tf.Tensor, u: tf.Tensor, args: Args
) -> tf.Tensor:
    """Return v with H v = u, of the free variables, and zeros elsewhere."""

    def quotient(x: tf.Tensor, u: tf.Tensor, *given: tf.Tensor) -> Any:
        args = given[: len(given) - len(system.outside)]
        v, found = unrecorded(lambda: _solved(system, x, args, inverse, u, None))
        v = withheld(v, found.least > 0, INDEFINITE)

        def back(w: tf.Tensor) -> Any:
            # dv = H^-1 (du - dH v), and H is symmetric.
            at, here, weight, own = _copied((inverse, x, u, args))
            s = divided(system, at, here, w, own)
            v = divided(system, at, here, weight, own)

            def product(before: list[tf.Tensor]) -> tf.Tensor:
                return at.free * system.product(before[0], v, own)

            by_x, *others = _pulled(system, product, [here], own, -s)
            return by_x, s, *others

        return v, back

    outside = map(tf.convert_to_tensor, system.outside)
    return with_gradient(quotient, x, u, *args, *outside)


def withheld(x: tf.Tensor, holds: Any, name: str) -> tf.Tensor:
    """Return x, or NaN where something does not hold.

    Args:
        x: A tensor.
        holds: What has to hold, shape `[]`.
        name: What to call the op that makes the NaN: `explain` knows it.
    """
    nothing = tf.zeros([], x.dtype)
    return x + tf.math.divide(nothing, tf.cast(holds, x.dtype), name=name)


def _inverted(matrix: tf.Tensor | None, x: tf.Tensor, free: tf.Tensor) -> Inverse:
    """Return H of the free variables, inverted if it can be formed."""
    one = tf.ones([], x.dtype)
    if matrix is None:
        return Inverse(free, x, one)
    n: Any = x.shape[0]
    is_known = tf.reduce_all(tf.math.is_finite(matrix))
    matrix = tf.where(is_known, matrix, tf.zeros_like(matrix))
    matrix = free[:, None] * (matrix + tf.transpose(matrix)) / 2 * free
    matrix += tf.linalg.diag(1 - free)
    sizes = tf.abs(tf.linalg.diag_part(matrix))
    scale = tf.math.rsqrt(tf.where(sizes > 0, sizes, tf.ones_like(sizes)))
    scaled = scale[:, None] * matrix * scale
    swept, pivot = (_swept if n <= FEW else _by_cholesky)(scaled)
    is_positive = pivot > n * EPSILONS[x.dtype]
    swept = tf.where(is_positive, scale[:, None] * swept * scale, scaled)
    return Inverse(free, swept, tf.cast(is_positive, x.dtype))


def _swept(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the inverse of a positive matrix, and its least pivot; see `FEW`.

    By Gauss and Jordan, in place: each turn makes minus the inverse of one more leading
    block, beside it the quotient by that of what is beside the block.
    """
    n: Any = matrix.shape[0]

    def body(k: Any, matrix: tf.Tensor, least: tf.Tensor) -> Any:
        row, is_own = tf.gather(matrix, k), tf.range(n) == k
        pivot = tf.gather(row, k)
        part = row / pivot
        swept = tf.where(is_own, -1 / pivot, part)
        matrix = tf.where(is_own, swept[:, None], matrix - row[:, None] * part)
        matrix = tf.where(is_own[:, None], swept, matrix)
        return k + 1, matrix, tf.minimum(least, pivot)

    first = 0, matrix, tf.ones([], matrix.dtype)
    _, matrix, least = tf.while_loop(
        lambda k, *_: k < n, body, first, parallel_iterations=1
    )
    return -matrix, least


def _by_cholesky(matrix: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the same."""
    n: Any = matrix.shape[0]
    triangle, unit = tf.linalg.cholesky(matrix), tf.eye(n, dtype=matrix.dtype)
    least = tf.reduce_min(tf.linalg.diag_part(triangle) ** 2)
    return tf.linalg.cholesky_solve(tf.where(least > 0, triangle, unit), unit), least


def _solved(
    system: System,
    x: tf.Tensor,
    args: Args,
    inverse: Inverse,
    u: tf.Tensor,
    part: float | None,
) -> tuple[tf.Tensor, Inverse]:
    """Return v with H v = u, and the inverse with the least curvature that was met.

    Args:
        system: The equations.
        x: Where.
        args: The arguments.
        inverse: Of H there.
        u: Shape `[n]`.
        part: The part of u that may be left of it; None for half of the digits.
    """
    u = inverse.free * u
    if system.matrix is not None:
        v = tf.linalg.matvec(inverse.matrix, u)
        for _ in range(CORRECTIONS if part is None else 0):
            rest = u - inverse.free * system.product(x, v, args)
            v += tf.linalg.matvec(inverse.matrix, rest)
        return v, inverse
    v, least = _conjugate_gradients(
        lambda d: inverse.free * system.product(x, d, args), u, part
    )
    return v, inverse._replace(least=tf.minimum(inverse.least, least))


def _conjugate_gradients(
    product: Callable[[tf.Tensor], tf.Tensor], u: tf.Tensor, part: float | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the solution, and the least curvature relative to the largest (5.2).

    That is 0, as of a direction without any, where the solution has less than half of
    the digits.
    """
    epsilon, dtype = EPSILONS[u.dtype], u.dtype
    enough = epsilon**ENOUGH if part is None else part
    size, n = tf.norm(u), tf.size(u)

    def goes_on(i: Any, v: Any, r: Any, d: Any, least: Any, most: Any) -> Any:
        return (least > 0) & (tf.norm(r) > enough * size) & (i < PRODUCTS * n + 10)

    def body(i: Any, v: Any, r: Any, d: Any, least: Any, most: Any) -> Any:
        h, square = product(d), tf.reduce_sum(r * r)
        bend = tf.reduce_sum(d * h)
        curvature = bend / tf.reduce_sum(d * d)
        most = tf.maximum(most, tf.abs(curvature))
        least = tf.minimum(least, curvature / most)
        least = tf.where(tf.math.is_finite(curvature), least, tf.zeros_like(least))
        t = tf.where(bend > 0, square / bend, tf.zeros_like(bend))
        v, r = v + t * d, r - t * h
        return i + 1, v, r, r + tf.reduce_sum(r * r) / square * d, least, most

    one = tf.ones([], dtype)
    start = (0, tf.zeros_like(u), u, u, one, tf.zeros([], dtype))
    _, v, r, _, least, _ = tf.while_loop(goes_on, body, start, parallel_iterations=1)
    is_solved = tf.norm(r) <= max(enough, epsilon**0.5) * size
    return v, tf.where(is_solved | (least <= 0), least, tf.zeros_like(least))


def _copied(nest: Any) -> Any:
    """Return copies, of the graph that is being traced."""
    return tf.nest.map_structure(tf.identity, nest)


def _pulled(
    system: System,
    function: Callable[[list[tf.Tensor]], tf.Tensor],
    before: list[tf.Tensor],
    args: Args,
    weights: tf.Tensor,
) -> list[tf.Tensor]:
    """Pull weights of an output back to `before`, the args and what is outside."""
    watched = [*before, *args, *system.outside]
    floats = [source for source in watched if source.dtype.is_floating]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(floats)
        output = function(before)
    given: Any = weights
    found = iter(tape.gradient(output, floats, output_gradients=given))
    gradients = [next(found) if x.dtype.is_floating else None for x in watched]
    return [dense(g, x) for g, x in zip(gradients, watched, strict=True)]


def _are_cut(system: System, like: tf.Tensor, args: Args) -> list[bool]:
    """Return, for args and what is outside, whether a path to f' is cut."""
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in (like, *args)]

    def slope(x: tf.Tensor, *args: tf.Tensor) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            value = system.value(x, args)
        return tape.gradient(value, x)  # right or not, the paths are these

    traced = trace(slope, specs)
    captured = zip(traced.captured_inputs, traced.graph.internal_captures, strict=True)
    places = {id(outer): inner for outer, inner in captured}
    handles = [getattr(s, "handle", s) for s in system.outside]
    roots = [*traced.inputs[1 : len(specs)], *(places.get(id(h)) for h in handles)]
    known = [r for r in roots if r is not None and not r.dtype.is_integer]
    found = find_cuts(traced.graph, traced.outputs, known)
    cuts = {root.ref() for root, cut in zip(known, found, strict=True) if cut}
    return [root is not None and root.ref() in cuts for root in roots]
