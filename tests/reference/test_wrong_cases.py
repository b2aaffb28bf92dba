"""What was found wrong in answers of TensorFlow's, each with its right value."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.reverse import grad
from tfgrad.errors import NoGradientError, TfgradError

RNG = np.random.default_rng(0)


def close(answer, expected, rtol=1e-6):
    np.testing.assert_allclose(answer, expected, rtol=rtol, atol=1e-9)


# A tape of the user's own around a transform.

SKEWED = np.array([[1.0, 2.0, 4.0]])
FIRST = np.array([[1.0, 0.0, 0.0]])


LAYER = keras.layers.LayerNormalization(dtype="float64")
LAYER.build((None, 3))


def normalized(x):
    return tf.reduce_sum(LAYER(x) ** 3)


def by_tape(f, x, v):
    x, v = tf.constant(x), tf.constant(v)
    with tf.GradientTape() as tape:
        tape.watch(x)
        slope = tf.reduce_sum(grad(f)(x) * v)
    return tape.gradient(slope, x)


def by_accumulator(f, x, v):
    x, v = tf.constant(x), tf.constant(v)
    with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
        slope = grad(f)(x)
    return accumulator.jvp(slope)


def traced(road):
    return lambda f, x, v: tf.function(lambda: road(f, x, v))()


AROUND = {
    "a tape": by_tape,
    "a tape in a graph": traced(by_tape),
    "an accumulator": by_accumulator,
    "an accumulator in a graph": traced(by_accumulator),
    "hvp": lambda f, x, v: hvp(f)(x, v),
}


def pooled(x):
    return tf.reduce_sum(tf.nn.max_pool1d(x[:, :, None], 2, 1, "VALID") ** 2)


def resized(x):
    image = tf.cast(x[None, :, :, None], tf.float32)
    return tf.cast(tf.reduce_sum(tf.image.resize(image, (4, 4)) ** 3), x.dtype)


def entropy(x):
    labels, logits = tf.stack([x[0], 1 - x[0]]), tf.stack([x[1], 0 * x[1]])
    return tf.nn.softmax_cross_entropy_with_logits(labels, logits) ** 2


TWICE = {
    "normalisation": (normalized, SKEWED, FIRST),
    "max pooling": (pooled, np.array([[1.0, 3.0, 2.0, 5.0]]), np.ones((1, 4))),
    "resized": (resized, RNG.normal(size=(2, 2)), np.ones((2, 2))),
    "labels that move": (entropy, np.array([0.3, 0.5]), np.array([1.0, 0.5])),
    "a product": (tf.reduce_prod, np.array([0.0, 2.0, 3.0]), np.ones(3)),
}


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("road", AROUND)
def test_second_derivatives_by_the_users_own_tape(road, name):
    f, x, v = TWICE[name]
    step = 1e-2 if name == "resized" else 1e-6
    ahead, behind = grad(f)(x + step * v), grad(f)(x - step * v)

    answer = AROUND[road](f, x, v)

    close(answer, (ahead - behind) / (2 * step), rtol=1e-3)


def test_the_value_of_one_of_them():
    expected = [[0.12424392, 0.47347421, -0.59771813]]

    close(by_tape(normalized, SKEWED, FIRST), expected, rtol=1e-6)


# Products at zeros.

ZERO = np.array([0.0, 2.0, 3.0])
PRODUCT = np.array([[0.0, 3.0, 2.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0]])


def test_a_product_on_every_road():
    second = hessian(tf.reduce_prod)
    second(np.ones(3))
    close(second(ZERO), PRODUCT)
    close(jacobian(grad(tf.reduce_prod))(ZERO), PRODUCT)
    close(jvp(grad(tf.reduce_prod), (ZERO,), (np.ones(3),))[1], PRODUCT.sum(1))
    close(grad(lambda x: tf.reduce_sum(grad(tf.reduce_prod)(x)))(ZERO), PRODUCT.sum(1))
    close(tf.function(lambda x: hessian(tf.reduce_prod)(x))(tf.constant(ZERO)), PRODUCT)

    def kinked(x):
        return tf.reduce_prod(x) + tf.nn.relu(x[0] + 5)

    close(hessian(kinked)(ZERO.astype("float32")), PRODUCT)


INSIDE = {
    "a branch": lambda x: tf.cond(x[1] > 0, lambda: tf.reduce_prod(x), lambda: x[0]),
    "a loop": lambda x: tf.reduce_sum(tf.map_fn(tf.reduce_prod, x[tf.newaxis])),
    "a function": tf.function(lambda x: tf.reduce_prod(x)),
    "a function for XLA": tf.function(lambda x: tf.reduce_prod(x), jit_compile=True),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_product_inside_of(name):
    close(hessian(INSIDE[name])(ZERO), PRODUCT)
    close(by_tape(INSIDE[name], ZERO, np.ones(3)), PRODUCT.sum(1))


@pytest.mark.parametrize("jit", [False, True])
def test_cumulative_products_at_zeros(jit):
    f = lambda x: tf.reduce_sum(tf.math.cumprod(x))  # noqa: E731  one line

    close(grad(f, jit=jit)([2.0, 0.0, 3.0]), [1.0, 8.0, 0.0])


# First derivatives.


@pytest.mark.parametrize("jit", [False, True])
def test_labels_that_do_not_sum_to_one(jit):
    labels = tf.constant([[0.0, 1.0], [0.0, 0.0]])
    f = lambda z: tf.reduce_sum(  # noqa: E731  one expression
        tf.nn.softmax_cross_entropy_with_logits(labels, z)
    )
    half = 1 / (1 + np.exp(1.0))

    close(grad(f, jit=jit)([[1.0, 2.0]] * 2), [[half, -half], [0, 0]], 1e-5)


def test_images_that_are_moved():
    zoom = tf.constant([[2.0, 0, 0, 0, 2.0, 0, 0, 0]])
    f = lambda x: tf.reduce_sum(  # noqa: E731  one expression
        keras.ops.image.affine_transform(x[None, :, :, None], zoom)
    )

    close(grad(f)(np.ones((3, 3), "float32")), [[1, 0, 1], [0, 0, 0], [1, 0, 1]])


def test_of_values_for_one_place_the_last_one_counts():
    stitch = lambda x: tf.reduce_sum(tf.dynamic_stitch([[0, 0]], [x]) ** 2)  # noqa: E731
    x = np.array([1.0, 2.0, 3.0])

    def update(x):
        start = tf.zeros(3, tf.float64)
        updated = tf.tensor_scatter_nd_update(start, [[0], [1], [1]], x)
        return tf.reduce_sum(updated**2)

    def scatter(x):
        array = tf.TensorArray(tf.float64, 3).scatter([0, 1, 1], x)
        return tf.reduce_sum(array.gather([0, 1]) ** 2)

    close(grad(stitch)([1.0, 2.0]), [0.0, 4.0])
    close(grad(update)(x), [2.0, 0.0, 6.0])
    close(grad(scatter)(x), [2.0, 0.0, 6.0])


def test_elements_that_are_taken_twice():
    def f(x):
        return tf.reduce_sum(
            tf.TensorArray(tf.float64, 3).unstack(x).gather([2, 0, 2]) ** 2
        )

    close(grad(f)(np.array([1.0, 2.0, 3.0])), [2.0, 0.0, 12.0])


def test_smooth_functions_at_ties_and_at_zero():
    loss = tf.nn.weighted_cross_entropy_with_logits

    close(grad(lambda z: loss(1.0, z, 3.0))(0.0), -1.5)
    close(grad(lambda x: tf.math.xlogy(x, 3.0))(0.0), np.log(3.0))
    close(grad(lambda x: tf.math.xlog1py(x, 3.0))(0.0), np.log(4.0))
    close(grad(lambda x: tf.math.xdivy(x, 3.0))(0.0), 1 / 3)
    close(grad(lambda x: tf.reduce_sum(x ** [0.0, 1.0, 2.0]))(np.zeros(3)), [0, 1, 0])


def test_bessel_functions_at_zero():
    special = tf.math.special

    close(grad(special.bessel_i1)(0.0), 0.5)
    close(grad(special.bessel_j1)(0.0), 0.5)
    close(hvp(special.bessel_i0)(np.float64(0.0), 1.0), 0.5)
    close(hvp(special.bessel_j0)(np.float64(0.0), 1.0), -0.5)


def test_entropy_at_zero_stays_what_it_was():
    assert float(grad(lambda p: -tf.math.xlogy(p, p))(0.0)) == 0.0


# Complex numbers inside of real functions.

REAL, IMAGINARY = RNG.normal(size=(2, 3, 3))
WEIGHTS = RNG.normal(size=(3, 3))

COMPLEX = {
    "sqrt": tf.sqrt,
    "rsqrt": tf.math.rsqrt,
    "reciprocal": tf.math.reciprocal,
    "tanh": tf.tanh,
    "xlogy": lambda z: tf.math.xlogy(z, z + 1j),
    "xdivy": lambda z: tf.math.xdivy(z, z + 1j),
    "xlog1py": lambda z: tf.math.xlog1py(z, z + 1j),
    "multiply_no_nan": lambda z: tf.math.multiply_no_nan(z, z + 1j),
    "pow": lambda z: z ** (z + 1j),
    "det": tf.linalg.det,
    "slogdet": lambda z: sum(tf.linalg.slogdet(z)),
    "sqrtm": tf.linalg.sqrtm,
    "inv": tf.linalg.inv,
    "cumprod": tf.math.cumprod,
    "reduce_prod": tf.reduce_prod,
}


NOT_FOR_XLA = {"det", "slogdet", "sqrtm", "inv", "cumprod", "reduce_prod"}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", COMPLEX)
def test_conjugates(name, jit):
    def f(x):
        z = COMPLEX[name](tf.complex(x, IMAGINARY))
        weights = WEIGHTS if z.shape.rank else 1.0
        return tf.reduce_sum(tf.math.real(z) * weights + 2 * tf.math.imag(z) * weights)

    v, step = RNG.normal(size=(3, 3)), 1e-6
    expected = (f(REAL + step * v) - f(REAL - step * v)) / (2 * step)

    if jit and name in NOT_FOR_XLA:
        with pytest.raises(TfgradError, match="XLA"):
            grad(f, jit=jit)(REAL)
    else:
        close(np.sum(grad(f, jit=jit)(REAL) * v), expected, rtol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("transform", ["rfft", "rfft2d", "irfft", "irfft2d"])
def test_fourier_transforms_that_cut_or_pad(transform, length):
    lengths = [length] if "2" not in transform else [2, length]
    x = tf.constant(WEIGHTS)

    def f(x):
        given = tf.complex(x, x**2) if transform.startswith("i") else x
        output = getattr(tf.signal, transform)(given, lengths)
        return tf.reduce_sum(tf.abs(output + 0.1) ** 3)

    v, step = RNG.normal(size=(3, 3)), 1e-6
    expected = (f(x + step * v) - f(x - step * v)) / (2 * step)

    close(np.sum(grad(f)(x) * v), expected, rtol=1e-6)


# Errors of TensorFlow's, in words.

MATRIX = np.array([[1.0, 2.0], [2.0, 5.0], [1.0, 1.0]])

REFUSED = {
    "a full QR": lambda: grad(
        lambda a: tf.reduce_sum(tf.linalg.qr(a, full_matrices=True)[0] ** 3)
    )(MATRIX),
    "least squares": lambda: grad(
        lambda a: tf.reduce_sum(
            tf.linalg.lstsq(a, tf.ones((3, 1), a.dtype), fast=False)
        )
    )(MATRIX),
    "a dilated convolution": lambda: grad(
        lambda x: tf.reduce_sum(
            tf.nn.conv2d(x, tf.ones((2, 2, 1, 1), x.dtype), 1, "VALID", dilations=2)
        )
    )(np.ones((1, 5, 5, 1))),
}


@pytest.mark.filterwarnings("ignore:.*runs eagerly:RuntimeWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_tensorflow_raises_becomes_a_sentence(name):
    with pytest.raises(NoGradientError, match="TensorFlow"):
        REFUSED[name]()


def test_a_convolution_that_ended_the_process_under_xla():
    kernel = RNG.normal(size=(2, 3, 2, 2)).astype("float32")
    x = RNG.normal(size=(1, 4, 5, 2)).astype("float32")
    padding = [[0, 0], [1, 1], [0, 1], [0, 0]]

    def f(x):
        return tf.reduce_sum(tf.nn.conv2d(x, kernel, 2, padding) ** 2)

    def padded(x):
        return tf.reduce_sum(tf.nn.conv2d(tf.pad(x, padding), kernel, 2, "VALID") ** 2)

    close(grad(f, jit=True)(x), grad(padded)(x), rtol=1e-4)
