"""Derivatives against closed forms, and against finite differences in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.elementwise import derivative
from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.reverse import grad, value_and_grad, vjp
from tfgrad.differences import finite_difference

RNG = np.random.default_rng(0)
A = RNG.normal(size=(4, 4))
SYMMETRIC = A @ A.T + 4 * np.eye(4)
X = RNG.normal(size=4)


# --- closed forms


def test_a_quadratic_form():
    def f(x):
        return tf.tensordot(x, tf.linalg.matvec(A, x), 1) / 2

    symmetric = (A + A.T) / 2

    np.testing.assert_allclose(grad(f)(X), symmetric @ X, rtol=1e-13)
    np.testing.assert_allclose(hessian(f)(X), symmetric, rtol=1e-13)
    np.testing.assert_allclose(hvp(f)(X, X), symmetric @ X, rtol=1e-13)


def test_the_logarithm_of_a_determinant():
    # Petersen and Pedersen (2012), The Matrix Cookbook, (57) and (64).
    def f(x):
        return tf.linalg.slogdet(x)[1]

    inverse = np.linalg.inv(A)

    np.testing.assert_allclose(grad(f)(A), inverse.T, rtol=1e-9)
    np.testing.assert_allclose(
        hessian(f)(A), -np.einsum("li,jk->ijkl", inverse, inverse), rtol=1e-7, atol=1e-9
    )


def test_a_matrix_inverse():
    # The Matrix Cookbook (60).
    inverse = np.linalg.inv(SYMMETRIC)

    answer = jacobian(tf.linalg.inv)(SYMMETRIC)

    np.testing.assert_allclose(
        answer, -np.einsum("ik,lj->ijkl", inverse, inverse), rtol=1e-9, atol=1e-12
    )


def test_softmax_and_its_cross_entropy():
    p = np.exp(X) / np.sum(np.exp(X))
    labels = np.array([0.1, 0.2, 0.3, 0.4])

    def entropy(x):
        return tf.nn.softmax_cross_entropy_with_logits(labels, x)

    rows = np.diag(p) - np.outer(p, p)

    np.testing.assert_allclose(jacobian(tf.nn.softmax)(X), rows, rtol=1e-12)
    np.testing.assert_allclose(grad(entropy)(X), p - labels, rtol=1e-12)
    np.testing.assert_allclose(hessian(entropy)(X), rows, rtol=1e-12)


def test_a_norm():
    length = np.linalg.norm(X)

    np.testing.assert_allclose(grad(tf.norm)(X), X / length, rtol=1e-13)
    np.testing.assert_allclose(
        hessian(tf.norm)(X),
        (np.eye(4) - np.outer(X, X) / length**2) / length,
        rtol=1e-12,
        atol=1e-15,
    )


def test_rosenbrock():
    # Moré, Garbow and Hillstrom (1981), problem 21.
    def f(x):
        return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    diagonal = np.zeros(4)
    diagonal[:-1] = 1200 * X[:-1] ** 2 - 400 * X[1:] + 2
    diagonal[1:] += 200
    expected = np.diag(diagonal) - 400 * (np.diag(X[:-1], 1) + np.diag(X[:-1], -1))

    np.testing.assert_allclose(hessian(f)(X), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(grad(f)(np.ones(4)), np.zeros(4))


def test_the_least_squares_gradient_of_a_dense_layer():
    layer = keras.layers.Dense(2, dtype="float64")
    layer.build((None, 4))
    x, y = RNG.normal(size=(7, 4)), RNG.normal(size=(7, 2))

    value, (kernel, bias) = value_and_grad(
        lambda: tf.reduce_mean((layer(x) - y) ** 2), wrt=layer
    )()

    residual = x @ layer.kernel.numpy() - y
    assert float(value) == pytest.approx(np.mean(residual**2), rel=1e-13)
    np.testing.assert_allclose(kernel, 2 * x.T @ residual / residual.size, rtol=1e-12)
    np.testing.assert_allclose(bias, 2 * residual.sum(0) / residual.size, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_the_exponential_is_its_own_derivative(order):
    np.testing.assert_allclose(derivative(tf.exp, order)(X), np.exp(X), rtol=1e-13)


# --- finite differences


def loop(x):
    turn = lambda i, x: (i + 1, tf.sin(x) * x[::-1])  # noqa: E731  one line
    return tf.while_loop(lambda i, x: i < 3, turn, (0, x))[1]


def python_loop(x):
    turns = 0
    while tf.reduce_sum(x**2) > 0.1 and turns < 3:
        x = tf.sin(x) * 0.7 * x[::-1]
        turns += 1
    return x


def python_branch(x):
    if tf.reduce_sum(x) > -100:
        return x**2 * tf.sin(x)
    return x


def tensor_array(x):
    array = tf.TensorArray(x.dtype, 4)
    for i in tf.range(4):
        array = array.write(i, x[i] * x[(i + 1) % 4])
    return array.stack()


@tf.custom_gradient
def custom(x):
    return tf.sin(x) * x, lambda dy: dy * (tf.cos(x) * x + tf.sin(x))


FUNCTIONS = {
    "a number": lambda x: tf.reduce_sum(tf.sin(x) * x),
    "a matrix": lambda x: x[:, None] * tf.sin(x),
    "a call": tf.function(lambda x: tf.tanh(tf.linalg.matvec(A, x)) * tf.sin(x)),
    "a condition": lambda x: tf.cond(x[0] > -9, lambda: x**2 * tf.sin(x), lambda: x),
    "a branch in Python": python_branch,
    "a loop": loop,
    "a loop in Python": python_loop,
    "a scan": lambda x: tf.scan(lambda a, b: a * tf.sin(b) + b, x),
    "a map": lambda x: tf.map_fn(lambda a: a**3, x),
    "a TensorArray": tensor_array,
    "a gather": lambda x: tf.gather_nd(x, [[1], [1], [2]]) ** 2,
    "an embedding": lambda x: tf.nn.embedding_lookup(x[:, None] * x, [0, 1, 1]),
    "a custom gradient": lambda x: custom(x),
    "a choice": lambda x: tf.where(x > 0, x**2, tf.exp(x)),
    "a sort": lambda x: tf.sort(x) ** 2,
    "an eigenvalue": lambda x: tf.linalg.eigvalsh(SYMMETRIC + tf.linalg.diag(x)),
    "a Cholesky factor": lambda x: tf.linalg.cholesky(SYMMETRIC + x[:, None] * x),
}


def layer(kind, *args, training=None, **options):
    """Return a function of four numbers that go through a Keras layer."""
    keras.utils.set_random_seed(0)
    shape = options.pop("shape")
    built = kind(*args, dtype="float64", **options)
    built.build((None, *shape[1:]))
    arguments = {} if training is None else {"training": training}

    def f(x):
        spread = tf.reshape(tf.linalg.matvec(SPREAD[: int(np.prod(shape))], x), shape)
        return built(spread, **arguments)

    return f


def attention():
    keras.utils.set_random_seed(0)
    built = keras.layers.MultiHeadAttention(2, 2, dtype="float64")
    built.build((1, 3, 2), (1, 3, 2))

    def f(x):
        tokens = tf.reshape(tf.linalg.matvec(SPREAD[:6], x), [1, 3, 2])
        return built(tokens, tokens)

    return f


SPREAD = RNG.normal(size=(18, 4))
FUNCTIONS |= {
    "Dense": layer(keras.layers.Dense, 3, activation="tanh", shape=(2, 4)),
    "Conv2D": layer(keras.layers.Conv2D, 2, 2, activation="tanh", shape=(1, 3, 3, 1)),
    "MaxPooling2D": layer(keras.layers.MaxPooling2D, 2, 1, "same", shape=(1, 3, 3, 1)),
    "LSTM": layer(keras.layers.LSTM, 2, shape=(1, 3, 2)),
    "LayerNormalization": layer(keras.layers.LayerNormalization, shape=(3, 4)),
    "GroupNormalization": layer(keras.layers.GroupNormalization, 2, shape=(3, 4)),
    "BatchNormalization": layer(
        keras.layers.BatchNormalization, training=True, shape=(3, 4)
    ),
    "UpSampling2D": layer(keras.layers.UpSampling2D, 2, shape=(1, 2, 2, 1)),
    "MultiHeadAttention": attention(),
}

# Compiling takes most of the time, so not everything is tried with everything.
MATRICES = ["a number", "a call", "a condition", "a choice", "Conv2D", "MaxPooling2D"]
INSIDE = ["a call", "a branch in Python", "a loop", "an embedding", "Dense"]

each_function = pytest.mark.parametrize("name", FUNCTIONS)
DIRECTION = RNG.normal(size=4)


def weighted(f):
    """Return a function to one number that bends wherever `f` has a slope."""

    def value(x):
        y = f(x)
        weights = tf.reshape(tf.range(1.0, tf.size(y) + 1), tf.shape(y))
        return tf.reduce_sum(tf.sin(y * tf.cast(weights, y.dtype)))

    return value


def assert_close(actual, difference):
    """Hold an answer against a difference, to its own error bar and 1e-7."""
    value, error = difference
    scale = np.max(np.abs(value), initial=1e-3)
    np.testing.assert_allclose(
        actual, value, rtol=0, atol=10 * np.max(error, initial=0.0) + 1e-7 * scale
    )


@each_function
def test_first_derivatives_are_the_differences(name):
    f = FUNCTIONS[name]
    compiled = tf.function(f)
    expected = finite_difference(compiled, X, DIRECTION)

    (pulled,) = vjp(f, X)[1](np.ones(expected.value.shape))
    _, pushed = jvp(f, (X,), (DIRECTION,))
    rows = jacobian(f, mode="reverse")(X)

    assert_close(np.tensordot(rows, DIRECTION, 1), expected)
    assert_close(pushed, expected)
    assert np.dot(pulled, DIRECTION) == pytest.approx(np.sum(pushed), rel=1e-9)


@each_function
def test_second_derivatives_are_the_differences_of_the_first(name):
    f = weighted(FUNCTIONS[name])
    expected = finite_difference(grad(f), X, DIRECTION)

    assert_close(hvp(f)(X, DIRECTION), expected)
    if name in MATRICES:
        assert_close(np.dot(hessian(f)(X), DIRECTION), expected)
        assert_close(np.dot(jacobian(grad(f))(X), DIRECTION), expected)


@pytest.mark.parametrize("name", INSIDE)
def test_inside_of_a_users_function_it_is_the_same(name):
    f = weighted(FUNCTIONS[name])

    @tf.function
    def step(x, v):
        return grad(f)(x), hvp(f)(x, v), jacobian(FUNCTIONS[name])(x)

    first, second, rows = step(tf.constant(X), tf.constant(DIRECTION))

    np.testing.assert_allclose(first, grad(f)(X), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(second, hvp(f)(X, DIRECTION), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        rows, jacobian(FUNCTIONS[name])(X), rtol=1e-9, atol=1e-12
    )


def test_the_weights_of_a_recurrent_network():
    keras.utils.set_random_seed(0)
    cell = keras.layers.SimpleRNN(2, dtype="float64", unroll=True)
    cell.build((1, 3, 2))
    tokens = RNG.normal(size=(1, 3, 2))
    f = lambda: tf.reduce_sum(cell(tokens) ** 2)  # noqa: E731  one line

    direction = [RNG.normal(size=v.shape) for v in cell.trainable_variables]
    product = hvp(f, wrt=cell)(direction)

    def moved(t):
        before = [v.numpy() for v in cell.trainable_variables]
        for v, b, d in zip(cell.trainable_variables, before, direction, strict=True):
            v.assign(b + t * d)
        slopes = [g.numpy() for g in grad(f, wrt=cell)()]
        for v, b in zip(cell.trainable_variables, before, strict=True):
            v.assign(b)
        return slopes

    step = 1e-5
    for found, right, left in zip(product, moved(step), moved(-step), strict=True):
        np.testing.assert_allclose(found, (right - left) / (2 * step), atol=1e-7)
