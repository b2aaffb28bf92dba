"""The trust-region Newton method on standard problems whose minima are known.

Problems, starts and minima: Moré, Garbow and Hillstrom (1981), Testing Unconstrained
Optimization Software, ACM TOMS 7; the number of each problem there is in its name.
"""

import functools

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.nested import ravel


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def powell_badly_scaled(x):
    return (1e4 * x[0] * x[1] - 1) ** 2 + (tf.exp(-x[0]) + tf.exp(-x[1]) - 1.0001) ** 2


def brown_badly_scaled(x):
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def beale(x):
    y = [1.5, 2.25, 2.625]
    return tf.add_n([(y[i] - x[0] * (1 - x[1] ** (i + 1))) ** 2 for i in range(3)])


def helical_valley(x):
    theta = tf.atan2(x[1], x[0]) / (2 * np.pi)
    radius = tf.sqrt(x[0] ** 2 + x[1] ** 2)
    return 100 * ((x[2] - 10 * theta) ** 2 + (radius - 1) ** 2) + x[2] ** 2


def powell_singular(x):
    a, b, c, d = tf.unstack(x)
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def wood(x):
    a, b, c, d = tf.unstack(x)
    return (
        100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
        + 10 * (b + d - 2) ** 2 + (b - d) ** 2 / 10
    )  # fmt: skip


def trigonometric(x):
    n = x.shape[0]
    i = tf.range(1, n + 1, dtype=x.dtype)
    r = n - tf.reduce_sum(tf.cos(x)) + i * (1 - tf.cos(x)) - tf.sin(x)
    return tf.reduce_sum(r**2)


def chebyquad(x):
    n, y = x.shape[0], 2 * x - 1
    t = [tf.ones_like(x), y]
    for _ in range(2, n + 1):
        t.append(2 * y * t[-1] - t[-2])
    integrals = [0 if i % 2 else -1 / (i * i - 1) for i in range(1, n + 1)]
    return tf.reduce_sum((tf.reduce_mean(t[1:], axis=1) - integrals) ** 2)


def himmelblau(x):
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


PROBLEMS = {
    "1 Rosenbrock": (rosenbrock, [-1.2, 1], [0]),
    "3 Powell badly scaled": (powell_badly_scaled, [0, 1], [0]),
    "4 Brown badly scaled": (brown_badly_scaled, [1, 1], [0]),
    "5 Beale": (beale, [1, 1], [0]),
    "7 helical valley": (helical_valley, [-1, 0, 0], [0]),
    "13 Powell singular": (powell_singular, [3, -1, 0, 1], [0]),
    "14 Wood": (wood, [-3, -1, -3, -1], [0]),
    "26 trigonometric": (trigonometric, [0.1] * 10, [0, 2.79506e-5]),
    "35 Chebyquad": (chebyquad, [i / 9 for i in range(1, 9)], [3.51687e-3]),
    "Himmelblau": (himmelblau, [0, 0], [0]),
}


@functools.cache
def solved(name, dtype):
    f, start, _ = PROBLEMS[name]
    return tfgrad.minimize(f, np.array(start, dtype), method="newton")


def is_minimum(fun, minima, tolerance):
    return any(abs(fun - least) <= tolerance for least in minima)


@pytest.mark.parametrize("name", PROBLEMS)
def test_float64_ends_at_a_known_minimum_and_says_so(name):
    result = solved(name, np.float64)

    assert is_minimum(result.fun, PROBLEMS[name][2], 1e-6), result
    assert result.status == "gtol"
    assert result.history["grad_norm"][-1] <= 1e-6
    assert len(result.history["fun"]) == result.nit + 1
    assert np.all(np.diff(result.history["fun"]) <= 1e-12)
    assert result.nfev <= 110


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_ends_near_it_without_spinning(name):
    result = solved(name, np.float32)

    assert is_minimum(result.fun, PROBLEMS[name][2], 1e-3), result
    assert result.status in ("gtol", "precision")
    assert result.nfev <= 110


def test_the_median_problem_takes_at_most_20_evaluations():
    assert np.median([solved(name, np.float64).nfev for name in PROBLEMS]) <= 20


def test_float32_asked_for_more_than_it_has_stops_at_its_precision():
    f, start, _ = PROBLEMS["26 trigonometric"]

    result = tfgrad.minimize(
        f, np.array(start, np.float32), method="newton", gtol=1e-12
    )

    assert result.status == "precision"
    assert not result.success
    assert result.fun == pytest.approx(2.79506e-5, rel=1e-3)
    assert result.nfev <= 60


def test_half_precision_gets_as_far_as_it_can():
    start = np.array([1.5, -2.0], np.float16)

    result = tfgrad.minimize(lambda x: tf.reduce_sum((x - 1) ** 2), start,
                             method="newton")  # fmt: skip

    assert result.success
    np.testing.assert_allclose(result.x, [1, 1], atol=0.1)
    assert result.x.dtype == tf.float16


def test_vector_nest_and_variables_take_the_same_path():
    start = np.array([-3.0, -1, -3, -1])
    vector = solved("14 Wood", np.float64)
    nest = tfgrad.minimize(
        lambda p: wood(tf.concat([p["a"], [p["b"][0]], [p["b"][1]]], 0)),
        {"a": start[:2], "b": (start[2], start[3])},
        method="newton",
    )
    x = tf.Variable(start)
    variable = tfgrad.minimize(lambda: wood(x), wrt=x, method="newton")

    for other in (nest, variable):
        # Sums in another order round otherwise, and steps amplify that.
        np.testing.assert_allclose(
            other.history["fun"][:10], vector.history["fun"][:10]
        )
        np.testing.assert_allclose(ravel(tf.nest.flatten(other.x)), vector.x, atol=1e-6)
    assert np.array_equal(variable.x, x)


@pytest.mark.parametrize("jit", [True, False])
def test_a_thousand_parameters_in_a_valley_and_xla_agrees(jit):
    result = tfgrad.minimize(
        lambda x: tf.reduce_sum(100 * (x[1::2] - x[::2] ** 2) ** 2 + (1 - x[::2]) ** 2),
        np.tile([-1.2, 1.0], 500),
        method="newton",
        jit=jit,
    )

    assert result.success
    np.testing.assert_allclose(result.x, np.ones(1000), atol=1e-6)
    assert result.nfev < 100


def test_an_ill_conditioned_bowl_takes_few_steps():
    scales = np.logspace(0, 8, 30)

    result = tfgrad.minimize(
        lambda x: tf.reduce_sum(scales * (x - 1) ** 2), np.zeros(30), method="newton"
    )

    assert result.success
    np.testing.assert_allclose(result.x, np.ones(30), atol=1e-6)
    assert result.nfev <= 30
