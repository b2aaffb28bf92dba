"""Problems within bounds, most of them active at the solution, from their formulas.

Each has f, a start, bounds and the least value known (by two solvers to all digits
that are given, or from the reference).

References:
    Hock and Schittkowski (1981), Test Examples for Nonlinear Programming Codes: HS.
    Gould, Orban and Toint (2015), CUTEst, Computational Optimization and Applications
    60: the collection that names most of the others.
    Dixon and Szegö (1978), Towards Global Optimisation 2: camel, Hartman.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tests.reference import cutest_like, more_garbow_hillstrom
from tests.reference.cutest_like import count, total

INFINITY = float("inf")


class Problem(NamedTuple):
    """f, the start, the bounds (numbers stand for all variables), the minima."""

    objective: Callable
    start: list
    lower: object
    upper: object
    minima: list

    @property
    def bounds(self):
        n = len(self.start)
        return tuple(np.full(n, bound, float) for bound in (self.lower, self.upper))


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def hs3(x):
    return x[1] + 1e-5 * (x[1] - x[0]) ** 2


def hs4(x):
    return (x[0] + 1) ** 3 / 3 + x[1]


def hs5(x):
    return tf.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1


def hs45(x):
    return 2 - tf.reduce_prod(x) / 120


def hs110(x):
    logs = tf.math.log(x - 2) ** 2 + tf.math.log(10 - x) ** 2
    return total(logs) - tf.reduce_prod(x) ** 0.2


def camel(x):
    a, b = x[0] ** 2, x[1] ** 2
    return (4 - 2.1 * a + a**2 / 3) * a + x[0] * x[1] + (4 * b - 4) * b


def hartman(x):
    a = [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14],
         [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]  # fmt: skip
    p = [[0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886],
         [0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991],
         [0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.665],
         [0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381]]  # fmt: skip
    a, p = tf.constant(a, x.dtype), tf.constant(p, x.dtype)
    bells = tf.exp(-tf.reduce_sum(a * (x - p) ** 2, axis=1))
    return -total(tf.constant([1, 1.2, 3, 3.2], x.dtype) * bells)


def hatflda(x):
    return (x[0] - 1) ** 2 + total((x[:-1] - tf.sqrt(x[1:])) ** 2)


def mccormck(x):
    a, b = x[:-1], x[1:]
    return total(-1.5 * a + 2.5 * b + 1 + (a - b) ** 2 + tf.sin(a + b))


def nonscomp(x):
    return (x[0] - 1) ** 2 + total(4 * (x[1:] - x[:-1] ** 2) ** 2)


def bdexp(x):
    a, b, c = x[:-2], x[1:-1], x[2:]
    return total((a + b) * tf.exp((a + b) * -c))


def explin(x):
    half = x[: x.shape[0] // 2]
    return total(tf.exp(0.1 * half[:-1] * half[1:]), -10 * count(x) * x)


def expquad(x):
    half, rest = x[: x.shape[0] // 2], x[x.shape[0] // 2 :]
    pairs = tf.exp(0.1 * half[:-1] * half[1:])
    return total(pairs, -10 * count(x) * x, 4 * rest**2, rest[1:] * rest[:-1])


def probpenl(x):
    n, h = x.shape[0], 1e5
    return 1e-4 * total((x[:-1] + x[1:]) ** 2) + (total(x) - 1) ** 2 * h / n


def obstacle(force):
    """An elastic membrane over the unit square, pressed against its bounds."""

    def f(x):
        side = round(x.shape[0] ** 0.5)
        plate = tf.pad(tf.reshape(x, [side, side]), [[1, 1], [1, 1]])
        stretch = total((plate[1:] - plate[:-1]) ** 2) / 2
        stretch += total((plate[:, 1:] - plate[:, :-1]) ** 2) / 2
        return stretch - force / (side + 1) ** 2 * total(x)

    return f


def nonnegative_least_squares(x):
    generator = np.random.default_rng(2)
    rows = generator.normal(size=(40, x.shape[0]))
    y = rows @ generator.normal(size=x.shape[0]) + generator.normal(size=40)
    misfit = tf.linalg.matvec(tf.constant(rows, x.dtype), x) - tf.constant(y, x.dtype)
    return total(misfit**2)


def ill_conditioned(x):
    n = x.shape[0]
    scales = tf.exp(9 * tf.range(n, dtype=x.dtype) / (n - 1))
    return total(scales * (x - tf.sin(3 * count(x))) ** 2) / 2 + 0.1 * total(x) ** 2


def normal_likelihood(x):
    y = tf.constant([0.2, -0.5, 1.1, 0.7, 0.3, 0.9, -0.1, 0.4], x.dtype)
    return total(((y - x[0]) / x[1]) ** 2 / 2 + tf.math.log(x[1]))


def gaussian_process(x):
    t = tf.range(12, dtype=x.dtype) / 4
    y = tf.sin(2 * t) + 0.1 * tf.cos(9 * t)
    squares = (t[:, None] - t) ** 2
    kernel = x[0] ** 2 * tf.exp(-squares / (2 * x[1] ** 2))
    root = tf.linalg.cholesky(kernel + x[2] ** 2 * tf.eye(12, dtype=x.dtype))
    white = tf.linalg.triangular_solve(root, y[:, None])
    return total(white**2) / 2 + total(tf.math.log(tf.linalg.diag_part(root)))


def poisson(x):
    generator = np.random.default_rng(8)
    rows = np.abs(generator.normal(size=(30, x.shape[0])))
    counts = generator.poisson(rows @ np.maximum(generator.normal(size=x.shape[0]), 0))
    rates = tf.linalg.matvec(tf.constant(rows, x.dtype), x)
    return total(rates - tf.constant(counts, x.dtype) * tf.math.log(rates))


def standard(name):
    return more_garbow_hillstrom.PROBLEMS[name].objective


PROBLEMS = {
    "HS1": Problem(rosenbrock, [-2, 1], [-INFINITY, -1.5], INFINITY, [0]),
    "HS2": Problem(rosenbrock, [-2, 1.5], [-INFINITY, 1.5], INFINITY, [4.941229318]),
    "HS3": Problem(hs3, [10, 1], [-INFINITY, 0], INFINITY, [0]),
    "HS4": Problem(hs4, [1.125, 0.125], [1, 0], INFINITY, [2.666666667]),
    "HS5": Problem(hs5, [0, 0], [-1.5, -3], [4, 3], [-1.913222955]),
    "HS38": Problem(standard("14 Wood"), [-3, -1, -3, -1], -10, 10, [0]),
    "HS45": Problem(hs45, [1] * 5, 0, [1, 2, 3, 4, 5], [1.0]),
    "HS110": Problem(hs110, [9] * 10, 2.001, 9.999, [-45.77846971]),
    "CAMEL6": Problem(camel, [1.1, 1.1], [-3, -1.5], [3, 1.5], [-1.031628453]),
    "HART6": Problem(hartman, [0.2] * 6, 0, 1, [-3.322368011]),
    "HATFLDA": Problem(hatflda, [0.1] * 4, 1e-7, INFINITY, [0]),
    "HATFLDB": Problem(
        hatflda, [0.1] * 4, 1e-7, [INFINITY, 0.8, INFINITY, INFINITY], [0.005572809]
    ),
    "MCCORMCK": Problem(mccormck, [0] * 30, -1.5, 3, [-27.86246654]),
    "NONSCOMP": Problem(
        nonscomp, [3] * 24, [1 if i % 2 == 0 else -100 for i in range(24)], 100, [0]
    ),
    "BDEXP": Problem(bdexp, [1] * 20, 0, 10, [0]),
    "EXPLIN": Problem(explin, [0] * 24, 0, 10, [-27337.49179]),
    "EXPQUAD": Problem(expquad, [0] * 24, 0, 10, [-21437.49179]),
    "PROBPENL": Problem(probpenl, [0.5] * 20, -0.5, 0.5, [9.99999998e-06]),
    "membrane under a ceiling": Problem(
        obstacle(8), [0] * 100, 0, 0.2, [-0.7682227282]
    ),
    "membrane over a floor": Problem(
        obstacle(-8), [0.3] * 100, -0.1, 1, [-0.4840407798]
    ),
    "BIGGSB1": Problem(cutest_like.biggsb1, [0] * 25, 0, 0.9, [0.02]),
    "CHEBYQAD": Problem(
        standard("35 Chebyquad 8"),
        [i / 9 for i in range(1, 9)],
        0.1,
        0.85,
        [0.04953046611],
    ),
    "extended Rosenbrock": Problem(
        standard("21 extended Rosenbrock"), [-1.2, 0.5] * 5, -2, 0.7, [0.45]
    ),
    "extended Powell singular": Problem(
        standard("22 extended Powell singular"),
        [3, -1, 0, 1] * 5,
        [0.1, -5, -5, -5] * 5,
        5,
        [0.0009390981503],
    ),
    "Kowalik-Osborne": Problem(
        standard("15 Kowalik-Osborne"),
        [0.25, 0.39, 0.415, 0.39],
        0.15,
        0.4,
        [0.0003120752739],
    ),
    "Osborne 1": Problem(
        standard("17 Osborne 1"),
        [0.5, 1.5, -1, 0.01, 0.02],
        [0, 0, -2, 0, 0],
        [0.37, 2, 0, 0.1, 0.1],
        [6.749214426e-05],
    ),
    "trigonometric": Problem(
        standard("26 trigonometric"), [0.1] * 10, 0.02, 1, [2.795056122e-05]
    ),
    "variably dimensioned": Problem(
        standard("25 variably dimensioned"),
        [0.9 - k / 10 for k in range(8)],
        -1,
        0.8,
        [2739.5456],
    ),
    "nonnegative least squares": Problem(
        nonnegative_least_squares, [1] * 15, 0, INFINITY, [225.4953632]
    ),
    "ill-conditioned": Problem(ill_conditioned, [0] * 30, -0.5, 0.5, [1113.424484]),
    "normal likelihood": Problem(
        normal_likelihood, [3, 5], [-INFINITY, 0], INFINITY, [-1.677336861]
    ),
    "Gaussian process": Problem(
        gaussian_process, [1, 1, 0.5], [0, 0.05, 0.1], [5, 3, 2], [-11.0895314]
    ),
    "Poisson regression": Problem(poisson, [1] * 8, 1e-8, INFINITY, [-62.56967853]),
    "logistic regression": Problem(
        cutest_like.logistic, [0] * 8, -0.3, 0.3, [0.5320481059]
    ),
    "SCHMVETT": Problem(cutest_like.schmvett, [0.5] * 20, 0.2, 1, [-54.0]),
    "linear, at a corner": Problem(lambda x: total(count(x) * x), [0.5] * 6, 0, 1, [0]),
}
