"""Laws that derivatives keep for every function and every point."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfgrad.derivatives.elementwise import derivative
from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.reverse import grad, vjp

WEIGHTS = np.random.default_rng(0).normal(size=(5, 4))

quick = settings(
    max_examples=20,
    deadline=None,  # the first example compiles
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)

# From four numbers to five, smooth everywhere: each law is tried on each of them.
MAPS = {
    "layer": lambda x: tf.tanh(tf.linalg.matvec(WEIGHTS, x)),
    "rational": lambda x: tf.linalg.matvec(WEIGHTS, x) / (1 + tf.reduce_sum(x**2)),
    "gathered": lambda x: tf.gather(x**2, [0, 0, 3, 1, 2]) * tf.sin(x[0]),
    "looped": lambda x: tf.linalg.matvec(
        WEIGHTS,
        tf.while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, tf.sin(x) * x), (0, x))[
            1
        ],
    ),
    "called": tf.function(lambda x: tf.exp(-(tf.linalg.matvec(WEIGHTS, x) ** 2))),
}


def vectors(size):
    numbers = st.floats(-2, 2, width=32)
    return st.lists(numbers, min_size=size, max_size=size).map(np.array)


def value_of(name):
    """Return a function from four numbers to one, kept so that it compiles once."""
    return lambda x: tf.reduce_sum(MAPS[name](x) ** 2)


# What takes f at each call would trace a plain function at each.
TRACED = {name: tf.function(f) for name, f in MAPS.items()}
VALUES = {name: value_of(name) for name in MAPS}
GRADIENTS = {name: grad(f) for name, f in VALUES.items()}
PRODUCTS = {name: hvp(f) for name, f in VALUES.items()}
HESSIANS = {name: hessian(f) for name, f in VALUES.items()}
JACOBIANS = {
    mode: {name: jacobian(f, mode=mode) for name, f in MAPS.items()}
    for mode in ("reverse", "forward")
}

each_map = pytest.mark.parametrize("name", MAPS)


@each_map
@quick
@given(x=vectors(4), v=vectors(4), u=vectors(5))
def test_push_forward_and_pull_back_are_adjoint(name, x, v, u):
    _, pushed = jvp(TRACED[name], (x,), (v,))
    (pulled,) = vjp(TRACED[name], x)[1](u)

    np.testing.assert_allclose(
        np.dot(u, pushed), np.dot(pulled, v), rtol=1e-9, atol=1e-9
    )


@each_map
@quick
@given(x=vectors(4), v=vectors(4))
def test_both_modes_give_one_jacobian_and_its_products(name, x, v):
    by_rows = JACOBIANS["reverse"][name](x)
    by_columns = JACOBIANS["forward"][name](x)
    _, pushed = jvp(TRACED[name], (x,), (v,))

    np.testing.assert_allclose(by_rows, by_columns, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(by_rows.numpy() @ v, pushed, rtol=1e-9, atol=1e-9)


@each_map
@quick
@given(x=vectors(4))
def test_hessians_are_symmetric(name, x):
    matrix = HESSIANS[name](x).numpy()

    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-9, atol=1e-9)


@each_map
@quick
@given(x=vectors(4), v=vectors(4))
def test_a_hessian_times_a_direction_is_the_product(name, x, v):
    expected = HESSIANS[name](x).numpy() @ v

    np.testing.assert_allclose(PRODUCTS[name](x, v), expected, rtol=1e-9, atol=1e-9)


@each_map
@quick
@given(x=vectors(4), v=vectors(4), w=vectors(4), a=st.floats(-3, 3))
def test_products_are_linear_in_the_direction(name, x, v, w, a):
    product = PRODUCTS[name]

    together = product(x, v + a * w)

    apart = product(x, v).numpy() + a * product(x, w).numpy()
    np.testing.assert_allclose(together, apart, rtol=1e-9, atol=1e-9)


@each_map
@quick
@given(x=vectors(4), v=vectors(4))
def test_the_taylor_remainder_falls_with_the_cube_of_the_step(name, x, v):
    f, slope, curvature = VALUES[name], GRADIENTS[name](x), PRODUCTS[name](x, v)
    first, second = np.dot(slope, v), np.dot(curvature, v) / 2

    def remainder(h):
        quadratic = f(tf.constant(x)) + h * first + h**2 * second
        return abs(float(f(tf.constant(x + h * v)) - quadratic))

    floor = 1e-12 * (1 + abs(float(f(tf.constant(x)))))
    assert remainder(1e-4) <= remainder(1e-3) / 300 + floor


@each_map
@quick
@given(x=vectors(4))
def test_gradients_of_sums_and_products_follow_the_rules(name, x):
    f, slope = VALUES[name], GRADIENTS[name](x).numpy()
    value = float(f(tf.constant(x)))

    twice = SUMS[name](x)
    square = SQUARES[name](x)

    np.testing.assert_allclose(twice, slope + 2 * x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(square, 2 * value * slope, rtol=1e-9, atol=1e-9)


SUMS = {
    name: grad(lambda x, f=f: f(x) + tf.reduce_sum(x**2)) for name, f in VALUES.items()
}
SQUARES = {name: grad(lambda x, f=f: f(x) ** 2) for name, f in VALUES.items()}


@each_map
@quick
@given(x=vectors(4), u=vectors(5))
def test_the_jacobian_of_a_composition_is_the_product_of_jacobians(name, x, u):
    outer = JACOBIANS["reverse"]["layer"]
    whole = COMPOSED[name](x).numpy()

    inner = JACOBIANS["reverse"][name](x).numpy()
    at = MAPS[name](tf.constant(x))[:4]

    np.testing.assert_allclose(
        whole, outer(at).numpy() @ inner[:4], rtol=1e-9, atol=1e-9
    )


COMPOSED = {
    name: jacobian(lambda x, f=f: MAPS["layer"](f(x)[:4])) for name, f in MAPS.items()
}


@each_map
@quick
@given(x=vectors(4))
def test_nesting_the_input_changes_nothing(name, x):
    nested = NESTED[name]({"a": x[:1], "b": (x[1:3], [x[3]])})

    flat = np.concatenate([np.ravel(leaf) for leaf in tf.nest.flatten(nested)])
    np.testing.assert_allclose(flat, GRADIENTS[name](x), rtol=1e-12, atol=1e-12)


def of_nest(f):
    def nested(p):
        return f(tf.concat([p["a"], p["b"][0], p["b"][1][0][None]], axis=0))

    return nested


NESTED = {name: grad(of_nest(f)) for name, f in VALUES.items()}


@each_map
@quick
@given(x=vectors(4))
def test_compiled_is_eager(name, x):
    point = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(point)
        value = VALUES[name](point)

    expected = tape.gradient(value, point)

    np.testing.assert_allclose(GRADIENTS[name](x), expected, rtol=1e-12, atol=1e-12)


@quick
@given(x=vectors(6), order=st.integers(1, 4))
def test_derivatives_of_any_order_are_closed_forms(x, order):
    np.testing.assert_allclose(
        SINES[order](x), np.sin(x + order * np.pi / 2), rtol=1e-9, atol=1e-9
    )


SINES = {order: derivative(tf.sin, order) for order in range(1, 5)}
