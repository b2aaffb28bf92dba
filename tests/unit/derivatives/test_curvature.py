"""Second derivatives are held against differences of the first."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.calls import Call, Compiled
from tfgrad.derivatives.curvature import gradient, require_derivative
from tfgrad.errors import WrongDerivativeError


def held_to(f, x, product):
    """Verify a Hessian product for `f` at `x`."""
    x = tf.constant(x)
    call = Call(f, "f", ("x",), (x,), {}, 0, None)
    compiled = Compiled(f, gradient)
    compiled(*call.nests)
    require_derivative(call, gradient, lambda v: [product(x, v[0])], compiled)


def cubes(x):
    return tf.reduce_sum(x**3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_right_second_derivative_passes(dtype):
    x = np.array([0.5, 1.0, 2.0], dtype)

    held_to(cubes, x, lambda x, v: 6 * x * v)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_second_derivative_that_is_five_percent_off_is_refused(dtype):
    x = np.array([0.5, 1.0, 2.0], dtype)

    with pytest.raises(WrongDerivativeError, match=r"by `x`(.|\n)*differences"):
        held_to(cubes, x, lambda x, v: 6 * x * v * [1.0, 1.05, 1.0])


@pytest.mark.parametrize("f", [tf.nn.relu, tf.abs, tf.nn.elu, tf.nn.relu6])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_networks_with_kinks_raise_no_false_alarm(f, dtype):
    generator = np.random.default_rng(0)
    w = [generator.normal(size=s).astype(dtype) for s in ((64, 8), (8, 16), (16, 1))]

    def loss(x):
        return tf.reduce_mean(f(f(w[0] * x @ w[1]) @ w[2]) ** 2)

    x = tf.constant(generator.normal(size=8).astype(dtype))

    def product(x, v):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = loss(x)
            slope = tape.gradient(y, x)
        return outer.gradient(slope, x, v)

    held_to(loss, x, product)


def test_kinks_do_not_hide_a_wrong_derivative_in_double_precision():
    x = np.array([0.5, -1.0, 2.0])

    with pytest.raises(WrongDerivativeError):
        held_to(lambda x: tf.reduce_sum(tf.nn.relu(x) ** 3), x, lambda x, v: 6 * x * v)
