"""`derivative`: element by element, of any order, and never a silent sum."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.elementwise import derivative
from tfgrad.errors import (
    InvalidArgumentError,
    NoGradientError,
    ScalarObjectiveError,
)

X = np.linspace(0.3, 2.0, 7)

MIXING = {
    "softmax": tf.nn.softmax,
    "running sum": tf.cumsum,
    "centred": lambda x: x - tf.reduce_mean(x),
    "turned around": lambda x: tf.reverse(x, [0]),
    "times its mirror image": lambda x: x * x[::-1],
    "sorted": lambda x: tf.sort(x, direction="DESCENDING"),
}


def test_the_founding_examples():
    square = derivative(lambda x: x * x)

    assert float(square(5.0)) == 10.0
    np.testing.assert_allclose(
        square([[5.0, 10, 15.23232]]), [[10.0, 20.0, 30.46464]], rtol=1e-7
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sine_returns_after_four_derivatives(order):
    expected = np.sin(X + order * np.pi / 2)

    np.testing.assert_allclose(derivative(tf.sin, order)(X), expected, rtol=1e-12)
    np.testing.assert_allclose(
        derivative(tf.sin, order, jit=True)(X), expected, rtol=1e-12
    )


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_shape_and_dtype_are_kept(dtype):
    x = tf.constant(X.reshape(1, 7), dtype)

    answer = derivative(lambda x: x**3, order=2)(x)

    assert (answer.shape, answer.dtype) == (x.shape, dtype)
    np.testing.assert_allclose(tf.cast(answer, tf.float64), 6 * X[None], rtol=0.03)


def test_second_derivatives_of_something_linear_are_zero():
    assert float(derivative(lambda x: 3 * x, order=2)(2.0)) == 0.0


def test_rounding_in_a_derivative_that_vanishes_is_no_wrong_derivative():
    x = np.linspace(-1.0, 2.0, 4)

    one = derivative(lambda x: tf.sin(x) ** 2 + tf.cos(x) ** 2, 2)(x)

    np.testing.assert_allclose(one, np.zeros(4), atol=1e-15)


def test_an_empty_array_has_an_empty_derivative():
    assert derivative(tf.sin)(tf.zeros([0, 3])).shape == (0, 3)


def test_other_arguments_are_passed_on():
    power = derivative(lambda x, n, *, scale: scale * x**n)

    assert float(power(2.0, 3, scale=10.0)) == 120.0


def test_terms_that_cancel_are_no_coupling():
    answer = derivative(lambda x: tf.sin(x) ** 2 + tf.cos(x) ** 2)(X.astype("float32"))

    np.testing.assert_allclose(answer, np.zeros(7), atol=1e-6)


@pytest.mark.parametrize("name", MIXING)
def test_a_function_that_mixes_elements_is_refused(name):
    with pytest.raises(InvalidArgumentError, match=r"silent sum(.|\n)*tfgrad.jacobian"):
        derivative(MIXING[name])(X)


def test_a_mixing_function_is_refused_inside_of_a_users_function():
    step = tf.function(derivative(tf.nn.softmax))

    with pytest.raises(tf.errors.InvalidArgumentError, match="silent sum"):
        step(tf.constant(X))


def test_another_shape_is_refused():
    for f in (tf.reduce_sum, lambda x: x[:2], lambda x: x[None]):
        with pytest.raises(InvalidArgumentError, match="keeps the shape"):
            derivative(f)(X)


@pytest.mark.parametrize("order", [0, -1, 1.0, True, None])
def test_an_order_that_is_no_positive_integer_is_refused_at_once(order):
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        derivative(tf.sin, order)


def test_nests_are_refused():
    with pytest.raises(InvalidArgumentError, match="`p` is a dict"):
        derivative(lambda p: p)({"a": 1.0})


def test_a_cut_is_refused():
    with pytest.raises(NoGradientError, match=r"tf.round"):
        derivative(tf.round)(1.2)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(ScalarObjectiveError, match="returned NoneType"):
        derivative(lambda x: None)(1.2)
