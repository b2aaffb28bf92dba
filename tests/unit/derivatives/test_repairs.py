"""The gradients of our own, against differences of TensorFlow's first derivatives."""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.repairs import is_marked, is_repairable, repaired
from tfgrad.derivatives.reverse import grad
from tfgrad.errors import WrongDerivativeError

RNG = np.random.default_rng(0)
IMAGE = tf.constant(RNG.normal(size=(1, 4, 5, 2)).astype("float32"))


def pooled(function, kernel):
    return lambda x: tf.reduce_sum(tf.sin(function(x**2, kernel, 1, "SAME")))


def resized(method):
    def f(x):
        return tf.reduce_sum(
            tf.sin(tf.image.resize(x, [7, 3], method=method)) + x[0, 0, 0, 0]
        )

    return f


def cross_entropy(x):
    labels = tf.nn.softmax(x**2)
    return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(labels, x) ** 3)


CASES = {
    "max pooling": (pooled(tf.nn.max_pool2d, 2), IMAGE),
    "max pooling in 3d": (pooled(tf.nn.max_pool3d, 2), IMAGE[..., None]),
    "bilinear": (resized("bilinear"), IMAGE),
    "bicubic": (resized("bicubic"), IMAGE),
    "nearest": (resized("nearest"), IMAGE),
    "cross entropy": (cross_entropy, IMAGE[0, 0]),
    "moments": (lambda x: tf.reduce_sum(tf.nn.moments(x**2, [0])[1] ** 2), IMAGE[0, 0]),
    "moments of each row": (
        lambda x: tf.reduce_sum(
            tf.vectorized_map(lambda row: tf.nn.moments(row**2, [0])[1] ** 2, x)
        ),
        IMAGE[0, 0],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_those_of_the_first(name):
    f, x = CASES[name]
    v = tf.constant(RNG.normal(size=x.shape).astype("float32"))
    slope, step = grad(f), 1e-2
    expected = (slope(x + step * v) - slope(x - step * v)) / (2 * step)

    np.testing.assert_allclose(
        hvp(f)(x, v), expected, atol=4e-3 * float(tf.reduce_max(tf.abs(expected)))
    )


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_agrees_with_reverse_mode(name):
    f, x = CASES[name]
    v = tf.constant(RNG.normal(size=x.shape).astype("float32"))

    _, pushed = jvp(f, (x,), (v,))

    expected = float(tf.reduce_sum(grad(f)(x) * v))
    assert float(pushed) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "name", ["max pooling", "bilinear", "cross entropy", "moments"]
)
def test_third_derivatives_are_those_of_the_second(name):
    f, x = CASES[name]
    v = tf.constant(RNG.normal(size=x.shape).astype("float32"))
    twice, step = hvp(f), 1e-2
    expected = tf.reduce_sum(v * (twice(x + step * v, v) - twice(x - step * v, v)))

    third = grad(lambda x: tf.reduce_sum(v * hvp(f)(x, v)))(x)

    assert float(tf.reduce_sum(third * v)) == pytest.approx(
        float(expected) / (2 * step), rel=2e-2
    )


def test_values_and_first_derivatives_stay_what_they_were():
    for f, x in CASES.values():
        plain, other = (tf.function(grad(g))(x) for g in (f, repaired(f)))

        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-4)


def test_a_users_own_stop_stays_a_stop():

    def f(x):
        return tf.nn.moments(x, [0])[1] * tf.stop_gradient(x[0])

    x = tf.constant([2.0, 3.0, 7.0])

    answer = hvp(f)(x, x)

    np.testing.assert_allclose(answer, 2 * (x - 4.0) / 3 * 2.0, rtol=1e-6)


def test_ops_outside_of_a_repaired_function_are_left_alone():
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [3])
        outside = tf.stop_gradient(x)

    assert not is_marked(outside.op)


@pytest.mark.parametrize("name", ["max pooling", "bilinear", "moments"])
def test_repairs_survive_vectorisation(name):
    f, x = CASES[name]
    v = tf.constant(RNG.normal(size=x.shape).astype("float32"))

    by_rows = tf.tensordot(hessian(f)(x), v, x.shape.rank)
    by_columns = tf.tensordot(jacobian(grad(f), mode="forward")(x), v, x.shape.rank)

    expected = hvp(f)(x, v)
    np.testing.assert_allclose(by_rows, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(by_columns, expected, rtol=1e-3, atol=1e-3)


def test_max_pooling_under_xla_takes_the_same_of_equal_elements():
    f, x = CASES["max pooling"]
    ties = tf.round(x)

    np.testing.assert_array_equal(hessian(f, jit=True)(ties), hessian(f)(ties))


def test_the_users_own_functions_are_left_alone():
    inner = tf.function(lambda x: tf.reduce_prod(x))
    traced = inner.get_concrete_function(tf.TensorSpec([3], tf.float64))
    x = tf.constant([0.0, 2.0, 3.0], tf.float64)

    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(grad(inner)(x))
    again = tape.gradient(total, x)

    np.testing.assert_allclose(again, [5.0, 3.0, 2.0])
    np.testing.assert_allclose(hessian(inner)(x)[0], [0.0, 3.0, 2.0])
    assert not any(map(is_marked, traced.graph.get_operations()))


def test_what_is_not_differentiated_asks_for_no_second_trace():
    """A slope of x**2 is x**0 in the end, but the weights have no part in it."""
    points, traces = tf.constant([0.0, 1.0, 2.0], tf.float64), []

    def curvature(weights):
        traces.append(weights)
        u = lambda x: x**2 * tf.tanh(x * weights)  # noqa: E731  one line
        return tf.reduce_sum(tfgrad.derivative(u, order=2)(points))

    weights = tf.constant([0.5, 1.0, -1.0], tf.float64)
    value, error = tfgrad.finite_difference(curvature, weights)
    traces.clear()

    off = tf.reduce_max(tf.abs(grad(curvature)(weights) - value))
    assert off < 10 * tf.reduce_max(error)
    assert len(traces) == 1


def test_the_product_of_a_shape_asks_for_no_repair():
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None])
        count, product = tf.reduce_prod(tf.shape(x)), tf.reduce_prod(x)

    assert not is_repairable(count.op)
    assert is_repairable(product.op)


def test_a_gradient_inside_of_a_function_that_rounds_its_shape_is_no_cut():
    """What may hide a cut is looked at once more, repaired as the answer is."""
    image = np.ones((1, 4, 4, 1), "float32")
    f = lambda x: tf.reduce_sum(tf.image.resize_with_pad(x, 5, 7) ** 2)  # noqa: E731

    answer = grad(lambda x: tf.reduce_sum(grad(f)(x)))(image)

    np.testing.assert_allclose(answer, hvp(f)(image, image), rtol=1e-5)


# Functions that write to variables, as dropout and batch normalisation do: in a user's
# own tf.function, they cannot be traced anew.


class Counting:
    """A linear model that counts its calls, with a loss whose labels may be masked."""

    def __init__(self):
        self.weights = tf.Variable(RNG.normal(size=(3, 2)))
        self.calls = tf.Variable(0)

    def __call__(self, x):
        self.calls.assign_add(1)
        labels = tf.constant([[0.0, 1.0], [0.0, 0.0]], tf.float64)
        logits = tf.matmul(x, self.weights)
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(labels, logits))


ROWS = tf.constant(RNG.normal(size=(2, 3)))


@pytest.mark.parametrize("by_weights", [True, False])
def test_a_first_derivative_in_a_users_function_writes_once_and_is_right(by_weights):
    model = Counting()
    slope = grad(model, wrt=model.weights) if by_weights else grad(model)
    expected = slope(ROWS)
    model.calls.assign(0)

    answer = tf.function(lambda x: slope(x))(ROWS)

    np.testing.assert_allclose(answer, expected, rtol=1e-12)
    assert int(model.calls) == 1


def test_a_tape_around_what_cannot_be_traced_anew_is_refused():
    model = Counting()

    @tf.function
    def penalty(x):
        with tf.GradientTape() as tape:
            size = tf.reduce_sum(grad(model)(x) ** 2)
        return tape.gradient(size, model.weights)

    @tf.function
    def attacked(x):
        with tf.GradientTape() as tape:
            with tape.stop_recording():
                slope = grad(model)(x)
            value = model(x + tf.sign(slope))
        return tape.gradient(value, model.weights)

    with pytest.raises(WrongDerivativeError, match="stop_recording"):
        penalty(ROWS)
    assert attacked(ROWS).shape == (3, 2)


@pytest.mark.parametrize("data", [[0.5, 2.0, 3.0], [0.0, 2.0, 3.0]])
def test_powers_of_data_are_repaired_only_where_the_data_hold_a_zero(data):
    calls, data = [], np.array(data)

    def f(b):
        calls.append(b)
        return tf.reduce_sum(data**b)

    grad(f)(tf.constant(1.5, tf.float64))

    assert len(calls) == (1 if data.all() else 2)  # to repair, f is traced anew
    logs = np.log(np.where(data > 0, data, 1.0))
    for exponent in (1.5, 0.0):
        b = tf.constant(exponent, tf.float64)
        np.testing.assert_allclose(grad(f)(b), np.sum(logs * data**exponent))
        np.testing.assert_allclose(hessian(f)(b), np.sum(logs**2 * data**exponent))


POWERS = {
    "a logistic base": lambda a, b: (1.0 + tf.exp(a)) ** b,
    "a sum of squares": lambda a, b: (tf.square(a) + tf.abs(a) + 0.5) ** b,
    "a reciprocal exponent": lambda a, b: a ** (1 / b),
    "a negative quotient": lambda a, b: a ** -(-2 / b),
}


@pytest.mark.parametrize("power", POWERS.values(), ids=POWERS)
def test_powers_that_cannot_be_0_to_the_0_are_not_repaired(power):
    calls = []

    def f(p):
        calls.append(p)
        return power(p[0], p[1])

    p = tf.constant([1.5, 0.7], tf.float64)
    found = grad(f)(p)

    assert len(calls) == 1
    for i in range(2):
        step = 1e-6 * np.eye(2)[i]
        slope = (f(p + step) - f(p - step)) / 2e-6
        np.testing.assert_allclose(found[i], slope, rtol=1e-7)


def test_second_derivatives_of_a_power_with_a_quotient_for_exponent_are_repaired():
    def f(p):
        return p[0] ** (1 / p[1])

    for exponent, bend in ((1.0, 0.0), (2.0, 2.0), (3.0, 0.0)):
        p = tf.constant([0.0, 1 / exponent], tf.float64)

        np.testing.assert_allclose(hessian(f)(p)[0, 0], bend)
        assert np.all(np.isfinite(hessian(f)(p)))
