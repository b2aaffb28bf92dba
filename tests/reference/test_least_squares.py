"""`least_squares` on the problems of Moré, Garbow and Hillstrom (1981), ACM TOMS 7.

The number of a problem there is in its name; minima are of the sum of squares.
"""

import functools

import numpy as np
import pytest
import tensorflow as tf

import tfgrad


def steps(first, last, x):
    return tf.range(first, last + 1, dtype=x.dtype)


def constant(values, x):
    return tf.constant(values, x.dtype)


def rosenbrock(x):
    return [10 * (x[1] - x[0] ** 2), 1 - x[0]]


def freudenstein_roth(x):
    return [
        -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
        -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
    ]


def powell_badly_scaled(x):
    return [1e4 * x[0] * x[1] - 1, tf.exp(-x[0]) + tf.exp(-x[1]) - 1.0001]


def brown_badly_scaled(x):
    return [x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2]


def beale(x):
    return [y - x[0] * (1 - x[1] ** (i + 1)) for i, y in enumerate((1.5, 2.25, 2.625))]


def jennrich_sampson(x):
    i = steps(1, 10, x)
    return 2 + 2 * i - (tf.exp(i * x[0]) + tf.exp(i * x[1]))


def helical_valley(x):
    angle = tf.atan2(x[1], x[0]) / (2 * np.pi)
    radius = tf.sqrt(x[0] ** 2 + x[1] ** 2)
    return [10 * (x[2] - 10 * angle), 10 * (radius - 1), x[2]]


BARD = [
    0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34,
    2.10, 4.39,
]  # fmt: skip


def bard(x):
    u = steps(1, 15, x)
    v = 16 - u
    return constant(BARD, x) - (x[0] + u / (v * x[1] + tf.minimum(u, v) * x[2]))


GAUSSIAN = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989]


def gaussian(x):
    y = constant(GAUSSIAN + GAUSSIAN[-2::-1], x)
    t = (8 - steps(1, 15, x)) / 2
    return x[0] * tf.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


MEYER = [
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147,
    4427, 3820, 3307, 2872,
]  # fmt: skip


def meyer(x):
    t = 45 + 5 * steps(1, 16, x)
    return x[0] * tf.exp(x[1] / (t + x[2])) - constant(MEYER, x)


def gulf(x):
    t = steps(1, 99, x) / 100
    y = 25 + (-50 * tf.math.log(t)) ** (2 / 3)
    return tf.exp(-(tf.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x):
    t = steps(1, 10, x) / 10
    model = tf.exp(-t * x[0]) - tf.exp(-t * x[1])
    return model - x[2] * (tf.exp(-t) - tf.exp(-10 * t))


def powell_singular(x):
    return [
        x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]),
        (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2,
    ]  # fmt: skip


def wood(x):
    return [
        10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2],
        10**0.5 * (x[1] + x[3] - 2), 10**-0.5 * (x[1] - x[3]),
    ]  # fmt: skip


KOWALIK = [
    0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235,
    0.0246,
]  # fmt: skip


def kowalik_osborne(x):
    u = [4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625]
    u = constant(u, x)
    return constant(KOWALIK, x) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x):
    t = steps(1, 20, x) / 5
    a, b = x[0] + t * x[1] - tf.exp(t), x[2] + x[3] * tf.sin(t) - tf.cos(t)
    return a**2 + b**2


OSBORNE_1 = [
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718,
    0.685, 0.658, 0.628, 0.603, 0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467,
    0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411, 0.406,
]  # fmt: skip


def osborne_1(x):
    t = 10 * steps(0, 32, x)
    model = x[0] + x[1] * tf.exp(-t * x[3]) + x[2] * tf.exp(-t * x[4])
    return constant(OSBORNE_1, x) - model


def biggs_exp6(x):
    t = steps(1, 13, x) / 10
    y = tf.exp(-t) - 5 * tf.exp(-10 * t) + 3 * tf.exp(-4 * t)
    model = x[2] * tf.exp(-t * x[0]) - x[3] * tf.exp(-t * x[1])
    return model + x[5] * tf.exp(-t * x[4]) - y


OSBORNE_2 = [
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679,
    0.608, 0.655, 0.616, 0.606, 0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644,
    0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423, 0.395, 0.375, 0.372, 0.391,
    0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581,
    0.428, 0.292, 0.162, 0.098, 0.054,
]  # fmt: skip


def osborne_2(x):
    t = steps(0, 64, x) / 10
    model = x[0] * tf.exp(-t * x[4])
    for size, width, centre in ((1, 5, 8), (2, 6, 9), (3, 7, 10)):
        model += x[size] * tf.exp(-((t - x[centre]) ** 2) * x[width])
    return constant(OSBORNE_2, x) - model


def watson(x):
    t, powers = (steps(1, 29, x) / 29)[:, None], steps(0, x.shape[0] - 1, x)
    value = tf.reduce_sum(x * t**powers, axis=1)
    slope = tf.reduce_sum(x[1:] * powers[1:] * t ** powers[:-1], axis=1)
    return {"ode": slope - value**2 - 1, "start": [x[0], x[1] - x[0] ** 2 - 1]}


def penalty(x):
    return {"pull": 1e-5**0.5 * (x - 1), "sphere": [tf.reduce_sum(x**2) - 0.25]}


def linear(x):
    m, n = 10, x.shape[0]
    tail = tf.fill([m - n], -2 * tf.reduce_sum(x) / m - 1)
    return [x - 2 * tf.reduce_sum(x) / m - 1, tail]


def linear_rank_1(x):
    return steps(1, 10, x) * tf.reduce_sum(steps(1, x.shape[0], x) * x) - 1


PROBLEMS = {
    "1 Rosenbrock": (rosenbrock, [-1.2, 1], [0]),
    "2 Freudenstein-Roth": (freudenstein_roth, [0.5, -2], [0, 48.98425]),
    "3 Powell badly scaled": (powell_badly_scaled, [0, 1], [0]),
    "4 Brown badly scaled": (brown_badly_scaled, [1, 1], [0]),
    "5 Beale": (beale, [1, 1], [0]),
    "6 Jennrich-Sampson": (jennrich_sampson, [0.3, 0.4], [124.36218]),
    "7 helical valley": (helical_valley, [-1, 0, 0], [0]),
    "8 Bard": (bard, [1, 1, 1], [8.21487e-3, 17.4286]),
    "9 Gaussian": (gaussian, [0.4, 1, 0], [1.12793e-8]),
    "10 Meyer": (meyer, [0.02, 4000, 250], [87.94586]),
    "11 Gulf": (gulf, [5, 2.5, 0.15], [0]),
    "12 Box": (box, [0, 10, 20], [0]),
    "13 Powell singular": (powell_singular, [3, -1, 0, 1], [0]),
    "14 Wood": (wood, [-3, -1, -3, -1], [0]),
    "15 Kowalik-Osborne": (kowalik_osborne, [0.25, 0.39, 0.415, 0.39], [3.07506e-4]),
    "16 Brown-Dennis": (brown_dennis, [25, 5, -5, -1], [85822.20]),
    "17 Osborne 1": (osborne_1, [0.5, 1.5, -1, 0.01, 0.02], [5.46489e-5]),
    "18 Biggs EXP6": (biggs_exp6, [1, 2, 1, 1, 1, 1], [0, 5.65565e-3]),
    "19 Osborne 2": (
        osborne_2,
        [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5],
        [4.01377e-2],
    ),
    "20 Watson": (watson, [0] * 6, [2.28767e-3]),
    "23 penalty": (penalty, [1, 2, 3, 4], [2.24997e-5]),
    "32 linear": (linear, [1] * 5, [5]),
    "33 linear, rank 1": (linear_rank_1, [1] * 5, [10 * 9 / (2 * 21)]),
}


@functools.cache
def solved(name, dtype):
    f, start, _ = PROBLEMS[name]
    return tfgrad.least_squares(f, np.array(start, dtype))


def is_minimum(result, name, tolerance):
    minima = PROBLEMS[name][2]
    return any(abs(2 * result.fun - f) <= tolerance * max(f, tolerance) for f in minima)


@pytest.mark.parametrize("name", PROBLEMS)
def test_float64_ends_at_a_known_minimum_and_says_so(name):
    result = solved(name, np.float64)

    assert is_minimum(result, name, 1e-5), result
    assert result.success
    assert result.status in ("gtol", "xtol", "target")
    assert len(result.history["fun"]) == result.nit + 1
    assert np.all(np.diff(result.history["fun"]) <= 1e-9 * result.history["fun"][:-1])


@pytest.mark.parametrize("name", ["1", "5", "8", "15"])
def test_float32_ends_near_it_without_spinning(name):
    name = next(known for known in PROBLEMS if known.split()[0] == name)

    result = solved(name, np.float32)

    assert is_minimum(result, name, 1e-3), result
    assert result.success
    assert result.nfev < 100


def test_the_median_problem_takes_at_most_35_evaluations():
    counts = [solved(name, np.float64).nfev for name in PROBLEMS]

    assert np.median(counts) <= 35


def test_vector_nest_and_variables_take_the_same_path():
    start = np.array([-3.0, -1, -3, -1])
    vector = solved("14 Wood", np.float64)
    nest = tfgrad.least_squares(
        lambda p: wood([p["a"][0], p["a"][1], p["b"][0], p["b"][1]]),
        {"a": start[:2], "b": (start[2], start[3])},
    )
    x = tf.Variable(start)
    variable = tfgrad.least_squares(lambda: wood(x), wrt=x)

    for other in (nest, variable):
        assert other.nfev == vector.nfev
        np.testing.assert_allclose(other.history["fun"], vector.history["fun"])
    assert np.array_equal(variable.x, x)


@pytest.mark.parametrize("name", ["7", "10", "13", "17"])
def test_starts_ten_times_as_far_end_at_the_minimum_too(name):
    name = next(known for known in PROBLEMS if known.split()[0] == name)
    f, start, _ = PROBLEMS[name]

    result = tfgrad.least_squares(f, 10 * np.array(start, np.float64))

    assert is_minimum(result, name, 1e-5), result
    assert result.success
