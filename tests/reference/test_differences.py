"""Finite differences against closed forms, and against NumPy's and SciPy's."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.differences import finite_difference

CLOSED_FORMS = {
    "sin": (tf.sin, np.cos, 0.8),
    "exp": (tf.exp, np.exp, 1.3),
    "log": (tf.math.log, lambda x: 1 / x, 0.4),
    "tanh": (tf.tanh, lambda x: 1 / np.cosh(x) ** 2, 0.6),
    "power": (lambda x: x**7, lambda x: 7 * x**6, 1.1),
    "root": (tf.sqrt, lambda x: 0.5 / np.sqrt(x), 2.0),
    "erf": (tf.math.erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2)), 0.5),
    "large": (lambda x: x**2, lambda x: 2 * x, 1e4),
    "fast": (lambda x: tf.sin(50 * x), lambda x: 50 * np.cos(50 * x), 0.3),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_closed_form_is_within_the_error_bar(name):
    function, slope, x = CLOSED_FORMS[name]

    value, error = finite_difference(function, np.float64(x))

    assert abs(value - slope(x)) <= error
    assert error <= 1e-7 * abs(slope(x))


def test_the_gradient_agrees_with_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    x = np.array([-1.2, 1.0, 0.7, 1.5])

    def rosenbrock(x):
        return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    value, _ = finite_difference(rosenbrock, x)

    np.testing.assert_allclose(value, optimize.rosen_der(x), rtol=1e-8)


def test_it_is_closer_than_a_plain_central_difference():
    x = np.float64(0.8)
    step = np.finfo(float).eps ** (1 / 3)
    plain = (np.exp(x + step) - np.exp(x - step)) / (2 * step)

    value, _ = finite_difference(tf.exp, x)

    assert abs(value - np.exp(x)) < abs(plain - np.exp(x))
