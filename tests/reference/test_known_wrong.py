"""What TensorFlow 2.21 gets wrong without a word: the right answer, or an error."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.elementwise import derivative
from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.reverse import grad, vjp
from tfgrad.differences import finite_difference
from tfgrad.errors import NoGradientError, WrongDerivativeError

RNG = np.random.default_rng(0)
ROWS, DIRECTION = RNG.normal(size=(5, 6)), RNG.normal(size=(5, 6))
IMAGE = RNG.normal(size=(1, 4, 4, 2))
LOOK = RNG.normal(size=IMAGE.shape)


def difference(f, x, v):
    """Return the derivative of the gradient of `f` along `v`, and its error."""
    value, error = finite_difference(grad(f), x, v)
    return value.numpy(), 10 * float(tf.reduce_max(error)) + 1e-9


def second_derivatives(f, x, v):
    """Return the second derivative of `f` along `v`, in the ways there are."""
    yield hvp(f)(x, v)
    yield tf.tensordot(hessian(f)(x), tf.constant(v), np.ndim(x))
    yield grad(lambda x: tf.reduce_sum(v * grad(f)(x)))(x)


def compositions(f, x, v):
    """Return the second derivative of `f` along `v`, out of two first derivatives."""
    yield tf.tensordot(jacobian(grad(f))(x), tf.constant(v), np.ndim(x))
    yield jvp(grad(f), (x,), (v,))[1]
    yield vjp(grad(f), x)[1](v)[0]


def normalized(kind, *args, **arguments):
    keras.utils.set_random_seed(0)
    layer = kind(*args, dtype="float64")
    layer.build((None, 6))
    return lambda x: tf.reduce_sum(tf.sin(layer(x, **arguments)) ** 3)


MEANS = {
    "LayerNormalization": normalized(keras.layers.LayerNormalization),
    "GroupNormalization": normalized(keras.layers.GroupNormalization, 3),
    "BatchNormalization": normalized(keras.layers.BatchNormalization, training=True),
    "tf.nn.moments": lambda x: tf.reduce_sum(tf.sin(tf.nn.moments(x, [0])[1] * x)),
}


@pytest.mark.parametrize("name", MEANS)
def test_second_derivatives_through_normalization(name):
    expected, error = difference(MEANS[name], ROWS, DIRECTION)

    for answer in second_derivatives(MEANS[name], ROWS, DIRECTION):
        np.testing.assert_allclose(answer, expected, rtol=0, atol=error)


def test_compositions_through_moments():
    expected, error = difference(MEANS["tf.nn.moments"], ROWS, DIRECTION)

    for answer in compositions(MEANS["tf.nn.moments"], ROWS, DIRECTION):
        np.testing.assert_allclose(answer, expected, rtol=0, atol=error)


def test_max_pooling_that_overwrites_its_input():
    def f(x):
        return tf.reduce_sum(tf.sin(tf.nn.max_pool2d(x**2, 2, 1, "SAME")))

    expected, error = difference(f, IMAGE, LOOK)
    answers = [*second_derivatives(f, IMAGE, LOOK), *compositions(f, IMAGE, LOOK)]

    for answer in [*answers, hvp(f, jit=True)(IMAGE, LOOK)]:
        np.testing.assert_allclose(answer, expected, rtol=0, atol=error)
    _, pushed = jvp(f, (IMAGE,), (LOOK,))
    assert float(pushed) == pytest.approx(np.sum(grad(f)(IMAGE) * LOOK), rel=1e-12)


def test_partitions_that_are_folded():
    parts = np.array([1, 0, 0, 0, 1, 0], "int32")

    def f(x):
        return tf.reduce_sum(tf.dynamic_partition(x, parts, 2)[0] ** 3)

    x = np.linspace(-1, 2, 6)
    kept = (parts == 0).astype(float)

    for _ in range(2):
        np.testing.assert_allclose(grad(f)(x), 3 * x**2 * kept, rtol=1e-12)
        ways = (second_derivatives, compositions)
        for answer in itertools.chain(*(way(f, x, np.ones(6)) for way in ways)):
            np.testing.assert_allclose(answer, 6 * x * kept, rtol=1e-12)
    with pytest.raises(WrongDerivativeError, match="boolean_mask"):
        tf.function(hvp(f))(tf.constant(x), tf.constant(x))


@pytest.mark.parametrize("method", ["bilinear", "nearest", "bicubic"])
def test_resized_images(method):
    def f(x):
        small = tf.image.resize(x, [3, 7], method=method)
        return tf.reduce_sum(x**3) + tf.reduce_sum(tf.sin(small))

    image, look = IMAGE.astype("float32"), LOOK.astype("float32")
    expected, error = difference(f, image, look)

    for answer in second_derivatives(f, image, look):
        np.testing.assert_allclose(answer, expected, rtol=0, atol=error)
    _, pushed = jvp(f, (image,), (look,))
    assert float(pushed) == pytest.approx(np.sum(grad(f)(image) * look), rel=1e-4)


@pytest.mark.parametrize("alone", [True, False])
def test_partial_derivatives_that_tensorflow_does_not_have(alone):
    other = 0.0 if alone else 1.0
    functions = [
        lambda x: other * x + tf.math.zeta(x, 2.0),
        lambda x: other * x + tf.math.betainc(x, 2.0, 0.3),
        lambda x: other * x + tf.math.betainc(2.0, x, 0.3),
        lambda x: other * x + tf.math.polygamma(x, 2.0),
    ]

    for f in functions:
        with pytest.raises(NoGradientError, match="leaves this input out"):
            grad(f)(3.0)


def test_the_angle_under_xla():
    def f(x):
        return tf.math.angle(tf.complex(x[0], x[1]))

    x = np.array([1.0, 2.0])

    with pytest.raises(WrongDerivativeError, match=r"Angle(.|\n)*XLA"):
        hessian(f, jit=True)(x)
    np.testing.assert_allclose(hvp(f, jit=True)(x, x), [0.4, -0.2], rtol=1e-12)
    np.testing.assert_allclose(hessian(f)(x), [[0.16, 0.12], [0.12, -0.16]], rtol=1e-12)


def test_reverse_over_forward_through_a_loop():
    def f(x):
        turn = lambda i, x: (i + 1, tf.sin(x) * x)  # noqa: E731  one line
        return tf.while_loop(lambda i, x: i < 3, turn, (0, x))[1]

    x = tf.constant(1.2, tf.float64)
    one = tf.ones_like(x)

    over = grad(lambda x: jvp(f, (x,), (one,))[1])(x)

    assert float(over) == pytest.approx(float(derivative(f, 2)(x)), rel=1e-12)
    assert float(over) == pytest.approx(float(difference(f, x, one)[0]), rel=1e-7)


@pytest.mark.parametrize("transform", ["grad", "jacobian", "hessian", "vjp", "jvp"])
@pytest.mark.parametrize("alone", [True, False])
def test_numpy_in_a_py_function(transform, alone):
    def f(x):
        outside = tf.py_function(lambda a: np.sin(a.numpy()), [x], x.dtype)
        return tf.ensure_shape(outside, []) + (0.0 if alone else x**2)

    calls = {
        "grad": lambda: grad(f)(0.5),
        "jacobian": lambda: jacobian(f)(0.5),
        "hessian": lambda: hessian(f)(0.5),
        "vjp": lambda: vjp(f, 0.5),
        "jvp": lambda: jvp(f, (0.5,), (1.0,)),
    }

    with pytest.raises(NoGradientError, match=r"tf\.py_function at test_known"):
        calls[transform]()


def test_rows_that_are_coupled_by_their_batch():
    keras.utils.set_random_seed(0)
    layer = keras.layers.BatchNormalization(dtype="float64")
    layer.build((None, 6))
    f = lambda x: layer(x, training=True)  # noqa: E731  one line

    whole = tf.tensordot(jacobian(f)(ROWS), tf.constant(DIRECTION), 2)

    step = 1e-5
    right, left = (f(tf.constant(ROWS + s * DIRECTION)) for s in (step, -step))
    np.testing.assert_allclose(whole, (right - left) / (2 * step), atol=1e-8)


def test_the_norm_of_slices_with_repeated_rows():
    table = tf.Variable(tf.ones([3, 1]))

    slopes = grad(lambda: tf.reduce_sum(tf.gather(table, [1, 1])), wrt=[table])()

    assert float(tf.linalg.global_norm(slopes)) == 2.0


def test_the_jacobian_of_a_matrix_exponential():
    # With a diagonal A the answer is known, and the process has to survive.
    a = np.array([0.5, -1.0, 2.0])

    answer = jacobian(lambda t: tf.linalg.expm(tf.linalg.diag(a * t)))(0.3)

    np.testing.assert_allclose(answer, np.diag(a * np.exp(0.3 * a)), rtol=1e-5)


def test_a_cross_entropy_whose_labels_move():
    def f(x):
        labels = tf.nn.softmax(x**2)
        return tf.reduce_sum(tf.nn.softmax_cross_entropy_with_logits(labels, x) ** 2)

    expected, error = difference(f, ROWS, DIRECTION)

    for answer in second_derivatives(f, ROWS, DIRECTION):
        np.testing.assert_allclose(answer, expected, rtol=0, atol=error)
