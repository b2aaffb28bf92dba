"""Laws of the gradient check: what is right passes, what is wrong does not."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.checks.gradcheck import check_grads
from tfgrad.errors import NoGradientError

SIZE = 6
MATRIX = np.random.default_rng(7).normal(size=(SIZE, SIZE)) / SIZE**0.5


def network(x):
    matrix = tf.constant(MATRIX, x.dtype)
    return tf.reduce_sum(tf.tanh(tf.linalg.matvec(matrix, tf.tanh(x))) * x)


RIGHT = {
    "square": lambda x: tf.reduce_sum(x**2),
    "rosenbrock": lambda x: tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2),
    "sines": lambda x: tf.reduce_sum(tf.sin(x)),
    "log-sum-exp": tf.reduce_logsumexp,
    "norm": lambda x: tf.sqrt(1 + tf.reduce_sum(x**2)),
    "logarithm": lambda x: tf.reduce_sum(tf.math.log(1 + x**2)),
    "network": network,
    "vector": lambda x: tf.nn.softplus(x) * tf.reduce_sum(x),
}


def point(scale, dtype, size=SIZE):
    return tf.constant(scale * np.random.default_rng(0).normal(size=size), dtype)


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_function_never_fails(name, scale, dtype):
    report = check_grads(RIGHT[name], point(scale, dtype), modes=("reverse",))

    assert not report.failures


BUGS = {
    "scaled": lambda g: g * 1.01,
    "sign": lambda g: -g,
    "one zeroed": lambda g: g * np.r_[0, np.ones(SIZE - 1)],
    "one doubled": lambda g: g * np.r_[2, np.ones(SIZE - 1)],
    "permuted": lambda g: tf.roll(g, 1, 0),
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", ["square", "sines", "logarithm", "network"])
def test_a_planted_bug_is_caught(name, bug):
    @tf.custom_gradient
    def wrong(x):
        def gradient(dy):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = RIGHT[name](x)
            return dy * tf.cast(BUGS[bug](tape.gradient(value, x)), x.dtype)

        return RIGHT[name](x), gradient

    for dtype in (tf.float32, tf.float64):
        report = check_grads(
            wrong, point(1.0, dtype), order=1, modes=("reverse",), raises=False
        )

        assert report.failures


def test_more_elements_do_not_need_more_evaluations():
    def evaluations(size):
        calls = []

        def counted(x):
            calls.append(1)
            return tf.reduce_sum(tf.sin(x))

        check_grads(counted, point(1.0, tf.float64, size), modes=("reverse",))
        return len(calls)

    assert evaluations(10_000) <= 2 * evaluations(10)


def reverse_over_forward(x):
    with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
        y = tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * x), [0, x])[1]
    return accumulator.jvp(y)


def image(size):
    values = np.random.default_rng(1).normal(size=(1, size, size, 1))
    return tf.constant(values, tf.float32)


def normalised(layer, **options):
    weights = tf.constant(np.random.default_rng(2).normal(size=(4, 6)))
    return lambda x: tf.reduce_sum(weights * layer(x, **options))


DOUBLES = {"dtype": "float64"}
TWO = tf.constant(2.0, tf.float64)
ROWS = point(1.0, tf.float64, (4, 6))

# What TensorFlow differentiates wrongly without a word: the function, the point, and
# the check that has to notice it: (order, mode).
SILENT = {
    "layer normalisation": (
        normalised(keras.layers.LayerNormalization(**DOUBLES)),
        [ROWS],
        (2, "reverse"),
    ),
    "batch normalisation": (
        normalised(keras.layers.BatchNormalization(**DOUBLES), training=True),
        [ROWS],
        (2, "reverse"),
    ),
    "group normalisation": (
        normalised(keras.layers.GroupNormalization(2, **DOUBLES)),
        [ROWS],
        (2, "reverse"),
    ),
    "moments": (
        lambda x: tf.reduce_sum(tf.nn.moments(x, [0])[1] ** 2),
        [ROWS],
        (2, "reverse"),
    ),
    "bilinear resize, second order": (
        lambda x: tf.reduce_sum(tf.image.resize(x, [5, 5]) ** 2),
        [image(3)],
        (2, "reverse"),
    ),
    "bilinear resize, forward": (
        lambda x: tf.reduce_sum(tf.image.resize(x, [5, 5]) ** 2),
        [image(3)],
        (1, "forward"),
    ),
    "angle under XLA": (
        lambda x: tf.math.angle(tf.complex(x, TWO)),
        [TWO / 3],
        (2, "xla"),
    ),
    "reverse over forward through a loop": (
        reverse_over_forward,
        [TWO],
        (1, "compiled"),
    ),
    "py_function": (
        lambda x: x * tf.py_function(lambda x: np.sin(x.numpy()), [x], tf.float64),
        [TWO],
        (1, "reverse"),
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_what_tensorflow_gets_wrong_in_silence_is_caught(name):
    function, args, expected = SILENT[name]
    order, mode = expected
    modes = ("compiled", mode)

    report = check_grads(function, *args, order=order, modes=modes, raises=False)

    assert expected in {(check.order, check.mode) for check in report.failures}


@pytest.mark.parametrize(
    ("function", "point"),
    [
        (lambda x: tf.math.zeta(x, TWO), TWO + 1),
        (lambda a: tf.math.betainc(a, TWO, TWO / 5), TWO),
        (lambda x: tf.reduce_sum(tf.round(x)), TWO),
    ],
)
def test_what_is_cut_is_refused(function, point):
    with pytest.raises(NoGradientError, match="cut"):
        check_grads(function, point)


def partitioned(x):
    small, large = tf.dynamic_partition(x, [0, 1, 0, 1], 2)
    return tf.reduce_sum(small**2) + tf.reduce_sum(large**3)


@pytest.mark.parametrize(
    ("function", "x", "order"),
    [
        (lambda x: tf.nn.max_pool2d(x, 2, 1, "VALID") ** 2, image(4), 2),
        (partitioned, point(1.0, tf.float64, 4), 2),
        (tf.linalg.expm, point(0.5, tf.float64, (2, 2)), 1),
    ],
    ids=["max_pool", "dynamic_partition", "expm"],
)
def test_what_tensorflow_gets_right_here_passes(function, x, order):
    assert check_grads(function, x, order=order, modes=("reverse", "compiled"))
