"""The 35 problems of Moré, Garbow and Hillstrom, as residuals.

Each is a function from a vector x to the residuals whose sum of squares is minimised,
with the standard start and the sums at the known minima. The number of each problem is
in its name.

References:
    Moré, Garbow and Hillstrom (1981), Testing Unconstrained Optimization Software, ACM
    Transactions on Mathematical Software 7, 17-41.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

BARD = (
    0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10,
    4.39,
)  # fmt: skip
GAUSSIAN = (
    0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989, 0.3521, 0.2420,
    0.1295, 0.0540, 0.0175, 0.0044, 0.0009,
)  # fmt: skip
MEYER = (
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427,
    3820, 3307, 2872,
)  # fmt: skip
KOWALIK_OSBORNE = (
    (0.1957, 4), (0.1947, 2), (0.1735, 1), (0.1600, 0.5), (0.0844, 0.25),
    (0.0627, 0.167), (0.0456, 0.125), (0.0342, 0.1), (0.0323, 0.0833),
    (0.0235, 0.0714), (0.0246, 0.0625),
)  # fmt: skip
OSBORNE_1 = (
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718,
    0.685, 0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467,
    0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406,
)  # fmt: skip
OSBORNE_2 = (
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679,
    0.608, 0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644,
    0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395, 0.375, 0.372, 0.391,
    0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581,
    0.428, 0.292, 0.162, 0.098, 0.054,
)  # fmt: skip


def counted(first, last, like):
    return tf.range(first, last + 1, dtype=like.dtype)


def rosenbrock(x):
    return tf.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x):
    return tf.stack(
        [
            -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
            -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
        ]
    )


def powell_badly_scaled(x):
    return tf.stack([1e4 * x[0] * x[1] - 1, tf.exp(-x[0]) + tf.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x):
    return tf.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x):
    y = tf.constant([1.5, 2.25, 2.625], x.dtype)
    return y - x[0] * (1 - x[1] ** counted(1, 3, x))


def jennrich_sampson(x):
    i = counted(1, 10, x)
    return 2 + 2 * i - tf.exp(i * x[0]) - tf.exp(i * x[1])


def helical_valley(x):
    # The angle as in the paper: from -1/4 to 3/4 of a turn.
    turn = tf.atan(x[1] / x[0]) / (2 * np.pi)
    theta = tf.where(x[0] > 0, turn, turn + 0.5)
    radius = tf.sqrt(x[0] ** 2 + x[1] ** 2)
    return tf.stack([10 * (x[2] - 10 * theta), 10 * (radius - 1), x[2]])


def bard(x):
    u = counted(1, 15, x)
    v = 16 - u
    return tf.constant(BARD, x.dtype) - (
        x[0] + u / (v * x[1] + tf.minimum(u, v) * x[2])
    )


def gaussian(x):
    t = (8 - counted(1, 15, x)) / 2
    return x[0] * tf.exp(-x[1] * (t - x[2]) ** 2 / 2) - tf.constant(GAUSSIAN, x.dtype)


def meyer(x):
    t = 45 + 5 * counted(1, 16, x)
    return x[0] * tf.exp(x[1] / (t + x[2])) - tf.constant(MEYER, x.dtype)


def gulf(x):
    t = counted(1, 99, x) / 100
    y = 25 + (-50 * tf.math.log(t)) ** (2 / 3)
    return tf.exp(-(tf.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x):
    t = counted(1, 10, x) / 10
    model = tf.exp(-t * x[0]) - tf.exp(-t * x[1])
    return model - x[2] * (tf.exp(-t) - tf.exp(-10 * t))


def powell_singular(x):
    return tf.stack(
        [
            x[0] + 10 * x[1],
            5**0.5 * (x[2] - x[3]),
            (x[1] - 2 * x[2]) ** 2,
            10**0.5 * (x[0] - x[3]) ** 2,
        ]
    )


def wood(x):
    return tf.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            10**-0.5 * (x[1] - x[3]),
        ]
    )


def kowalik_osborne(x):
    y, u = tf.unstack(tf.constant(KOWALIK_OSBORNE, x.dtype), axis=1)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x):
    t = counted(1, 20, x) / 5
    a, b = x[0] + t * x[1] - tf.exp(t), x[2] + x[3] * tf.sin(t) - tf.cos(t)
    return a**2 + b**2


def osborne_1(x):
    t = 10 * counted(0, 32, x)
    model = x[0] + x[1] * tf.exp(-t * x[3]) + x[2] * tf.exp(-t * x[4])
    return tf.constant(OSBORNE_1, x.dtype) - model


def biggs_exp6(x):
    t = counted(1, 13, x) / 10
    y = tf.exp(-t) - 5 * tf.exp(-10 * t) + 3 * tf.exp(-4 * t)
    model = x[2] * tf.exp(-t * x[0]) - x[3] * tf.exp(-t * x[1])
    return model + x[5] * tf.exp(-t * x[4]) - y


def osborne_2(x):
    t = counted(0, 64, x)[:, None] / 10
    bells = tf.reduce_sum(x[1:4] * tf.exp(-((t - x[8:11]) ** 2) * x[5:8]), axis=1)
    return tf.constant(OSBORNE_2, x.dtype) - (x[0] * tf.exp(-t[:, 0] * x[4]) + bells)


def watson(x):
    n = x.shape[0]
    t = counted(1, 29, x)[:, None] / 29
    j = counted(1, n, x)
    slope = tf.reduce_sum((j[1:] - 1) * x[1:] * t ** (j[1:] - 2), axis=1)
    value = tf.reduce_sum(x * t ** (j - 1), axis=1)
    ends = tf.stack([x[0], x[1] - x[0] ** 2 - 1])
    return tf.concat([slope - value**2 - 1, ends], axis=0)


def extended_rosenbrock(x):
    return tf.concat([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]], axis=0)


def extended_powell_singular(x):
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    parts = [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    return tf.concat(parts, axis=0)


def penalty_1(x):
    return tf.concat([1e-5**0.5 * (x - 1), [tf.reduce_sum(x**2) - 0.25]], axis=0)


def penalty_2(x):
    n = x.shape[0]
    i = counted(2, n, x)
    y = tf.exp(i / 10) + tf.exp((i - 1) / 10)
    pairs = tf.exp(x[1:] / 10) + tf.exp(x[:-1] / 10) - y
    singles = tf.exp(x[1:] / 10) - tf.exp(tf.constant(-0.1, x.dtype))
    weights = n - counted(1, n, x) + 1
    last = tf.reduce_sum(weights * x**2) - 1
    root = 1e-5**0.5
    return tf.concat([[x[0] - 0.2], root * pairs, root * singles, [last]], axis=0)


def variably_dimensioned(x):
    s = tf.reduce_sum(counted(1, x.shape[0], x) * (x - 1))
    return tf.concat([x - 1, [s, s**2]], axis=0)


def trigonometric(x):
    n = x.shape[0]
    i = counted(1, n, x)
    return n - tf.reduce_sum(tf.cos(x)) + i * (1 - tf.cos(x)) - tf.sin(x)


def brown_almost_linear(x):
    linear = x[:-1] + tf.reduce_sum(x) - (x.shape[0] + 1)
    return tf.concat([linear, [tf.reduce_prod(x) - 1]], axis=0)


def discrete_boundary_value(x):
    n = x.shape[0]
    h = 1 / (n + 1)
    padded, t = tf.pad(x, [[1, 1]]), h * counted(1, n, x)
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


def discrete_integral_equation(x):
    n = x.shape[0]
    h = 1 / (n + 1)
    t = h * counted(1, n, x)
    cubes = (x + t + 1) ** 3
    before = tf.cumsum(t * cubes)
    after = tf.cumsum((1 - t) * cubes, reverse=True, exclusive=True)
    return x + h * ((1 - t) * before + t * after) / 2


def broyden_tridiagonal(x):
    padded = tf.pad(x, [[1, 1]])
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(x):
    ones = tf.ones([x.shape[0]] * 2, x.dtype)
    band = tf.linalg.band_part(ones, 5, 1) - tf.eye(x.shape[0], dtype=x.dtype)
    return x * (2 + 5 * x**2) + 1 - tf.linalg.matvec(band, x * (1 + x))


def linear_full_rank(x, m=20):
    mean = 2 / m * tf.reduce_sum(x) + 1
    return tf.concat([x - mean, tf.repeat(-mean, m - x.shape[0])], axis=0)


def linear_rank_1(x, m=20):
    return counted(1, m, x) * tf.reduce_sum(counted(1, x.shape[0], x) * x) - 1


def linear_rank_1_with_zeros(x, m=20):
    inner = tf.reduce_sum(counted(2, x.shape[0] - 1, x) * x[1:-1])
    middle = counted(1, m - 2, x) * inner - 1
    ends = -tf.ones([1], x.dtype)
    return tf.concat([ends, middle, ends], axis=0)


def chebyquad(x):
    n = x.shape[0]
    before, polynomial = tf.ones_like(x), 2 * x - 1
    rows = []
    for i in range(1, n + 1):
        integral = 0 if i % 2 else -1 / (i**2 - 1)
        rows.append(tf.reduce_mean(polynomial) - integral)
        before, polynomial = polynomial, 2 * (2 * x - 1) * polynomial - before
    return tf.stack(rows)


class Problem(NamedTuple):
    """Residuals, the standard start, and the sums of squares at the known minima."""

    residuals: Callable
    start: list
    minima: list

    def objective(self, x):
        return tf.reduce_sum(self.residuals(x) ** 2)


def grid(n):
    return [j / (n + 1) for j in range(1, n + 1)]


PROBLEMS = {
    "1 Rosenbrock": Problem(rosenbrock, [-1.2, 1], [0]),
    "2 Freudenstein-Roth": Problem(freudenstein_roth, [0.5, -2], [0, 48.98425]),
    "3 Powell badly scaled": Problem(powell_badly_scaled, [0, 1], [0]),
    "4 Brown badly scaled": Problem(brown_badly_scaled, [1, 1], [0]),
    "5 Beale": Problem(beale, [1, 1], [0]),
    "6 Jennrich-Sampson": Problem(jennrich_sampson, [0.3, 0.4], [124.36218]),
    "7 helical valley": Problem(helical_valley, [-1, 0, 0], [0]),
    # With x -> (0.84, -inf, -inf) it falls to a second one.
    "8 Bard": Problem(bard, [1, 1, 1], [8.21487e-3, 17.42869]),
    "9 Gaussian": Problem(gaussian, [0.4, 1, 0], [1.12793e-8]),
    "10 Meyer": Problem(meyer, [0.02, 4000, 250], [87.94586]),
    "11 Gulf": Problem(gulf, [5, 2.5, 0.15], [0]),
    "12 Box": Problem(box, [0, 10, 20], [0]),
    "13 Powell singular": Problem(powell_singular, [3, -1, 0, 1], [0]),
    "14 Wood": Problem(wood, [-3, -1, -3, -1], [0]),
    "15 Kowalik-Osborne": Problem(
        kowalik_osborne, [0.25, 0.39, 0.415, 0.39], [3.07505e-4, 1.02734e-3]
    ),
    "16 Brown-Dennis": Problem(brown_dennis, [25, 5, -5, -1], [85822.20]),
    "17 Osborne 1": Problem(osborne_1, [0.5, 1.5, -1, 0.01, 0.02], [5.46489e-5]),
    "18 Biggs EXP6": Problem(
        biggs_exp6, [1, 2, 1, 1, 1, 1], [0, 5.65565e-3, 0.30636677]
    ),
    "19 Osborne 2": Problem(
        osborne_2, [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5], [4.01377e-2]
    ),
    "20 Watson 6": Problem(watson, [0] * 6, [2.28767e-3]),
    "20 Watson 9": Problem(watson, [0] * 9, [1.39976e-6]),
    "20 Watson 12": Problem(watson, [0] * 12, [4.72238e-10]),
    "21 extended Rosenbrock": Problem(extended_rosenbrock, [-1.2, 1] * 10, [0]),
    "22 extended Powell singular": Problem(
        extended_powell_singular, [3, -1, 0, 1] * 5, [0]
    ),
    "23 penalty I": Problem(penalty_1, list(range(1, 11)), [7.08765e-5]),
    "24 penalty II": Problem(penalty_2, [0.5] * 10, [2.93660e-4]),
    "25 variably dimensioned": Problem(
        variably_dimensioned, [1 - k / 10 for k in range(1, 11)], [0]
    ),
    "26 trigonometric": Problem(trigonometric, [0.1] * 10, [0, 2.79506e-5]),
    "27 Brown almost linear": Problem(brown_almost_linear, [0.5] * 10, [0, 1]),
    "28 discrete boundary value": Problem(
        discrete_boundary_value, [t * (t - 1) for t in grid(10)], [0]
    ),
    "29 discrete integral equation": Problem(
        discrete_integral_equation, [t * (t - 1) for t in grid(10)], [0]
    ),
    "30 Broyden tridiagonal": Problem(broyden_tridiagonal, [-1] * 10, [0]),
    "31 Broyden banded": Problem(broyden_banded, [-1] * 10, [0]),
    "32 linear, full rank": Problem(linear_full_rank, [1] * 10, [10]),
    "33 linear, rank 1": Problem(linear_rank_1, [1] * 10, [20 * 19 / (2 * 41)]),
    "34 linear, rank 1 with zeros": Problem(
        linear_rank_1_with_zeros, [1] * 10, [(400 + 60 - 6) / (2 * 37)]
    ),
    "35 Chebyquad 8": Problem(chebyquad, grid(8), [3.51687e-3]),
    "35 Chebyquad 10": Problem(chebyquad, grid(10), [6.50395e-3, 4.77271e-3]),
}
