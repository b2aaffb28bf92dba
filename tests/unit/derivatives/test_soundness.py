"""The ops that drop a term of a gradient are found where they matter, only there."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.matrices import hvp
from tfgrad.derivatives.repairs import RepairableGradientError, repaired
from tfgrad.derivatives.reverse import grad, vjp
from tfgrad.derivatives.soundness import (
    every,
    folds_wrongly,
    may_drop,
    require_right_kernels,
)
from tfgrad.errors import NoGradientError, WrongDerivativeError

# f(x) whose gradient in TensorFlow lacks a term, beside one that it has.
LACKING = {
    "tf.math.zeta": lambda x: x + tf.math.zeta(x, 2.0),
    "tf.math.polygamma": lambda x: x + tf.math.polygamma(x, 2.0),
    "tf.math.betainc": lambda x: x + tf.math.betainc(x, 2.0, 0.3),
    "tf.one_hot": lambda x: tf.reduce_sum(x * tf.one_hot(1, 3, on_value=x)),
    "tf.pad": lambda x: tf.reduce_sum(x * tf.pad([1.0], [[1, 1]], constant_values=x)),
    "tf.linalg.diag": lambda x: x * tf.linalg.diag([1.0, 2.0], padding_value=x)[0, 1],
    "tf.random.shuffle": lambda x: x + tf.random.shuffle([x, x])[0],
    "tf.range": lambda x: x + tf.reduce_sum(tf.range(0.0, x)),
    "tf.image.hsv_to_rgb": lambda x: (
        x + tf.reduce_sum(tf.image.hsv_to_rgb([[[x / 9, 0.5, 0.5]]]))
    ),
    "text": lambda x: x**2 + tf.strings.to_number(tf.strings.as_string(x)),
    "bytes": lambda x: x**2 + tf.io.parse_tensor(tf.io.serialize_tensor(x), x.dtype),
}

# f(x) with the same ops where they drop nothing, and its derivative at 3.
WHOLE = {
    "zeta along q": (lambda x: tf.math.zeta(3.0, x), -3 * (np.pi**4 / 90 - 1 - 1 / 16)),
    "a stopped zeta": (lambda x: x**2 + tf.math.zeta(tf.stop_gradient(x), 2.0), 6.0),
    "a compared zeta": (
        lambda x: x**2 * tf.cast(tf.math.zeta(x, 2.0) > 0, x.dtype),
        6.0,
    ),
    "an unused zeta": (lambda x: [tf.math.zeta(x, 2.0), x**2][1], 6.0),
    "a pad of zeros": (lambda x: tf.reduce_sum(tf.pad([x**2], [[1, 1]])), 6.0),
    "a range of ints": (lambda x: x**2 * tf.cast(tf.range(3)[1], x.dtype), 6.0),
    "text of a shape": (
        lambda x: x**2 + tf.strings.to_number(tf.strings.as_string(tf.rank(x))),
        6.0,
    ),
}


@pytest.mark.parametrize("label", LACKING)
def test_a_gradient_that_lacks_a_term_is_refused_with_its_line(label):
    with pytest.raises(NoGradientError, match=r"at test_soundness.py:"):
        grad(LACKING[label])(3.0)


@pytest.mark.parametrize("wrap", ["function", "branch", "loop"])
def test_at_any_depth(wrap):
    inner = LACKING["tf.math.zeta"]
    wrapped = {
        "function": tf.function(inner),
        "branch": lambda x: tf.cond(x > 0, lambda: inner(x), lambda: x),
        "loop": lambda x: tf.while_loop(
            lambda i, x: i < 1, lambda i, x: (i + 1, inner(x)), (0, x)
        )[1],
    }

    with pytest.raises(NoGradientError, match="Zeta"):
        grad(wrapped[wrap])(3.0)


@pytest.mark.parametrize("name", WHOLE)
def test_a_gradient_that_lacks_nothing_is_given(name):
    f, expected = WHOLE[name]

    assert float(grad(f)(3.0)) == pytest.approx(expected, rel=1e-4)


def test_only_the_variable_on_the_path_is_refused():
    v, w = tf.Variable(3.0), tf.Variable(2.0)
    f = lambda: tf.math.zeta(v, w)  # noqa: E731  one line

    assert float(grad(f, wrt=w)()) < 0
    with pytest.raises(NoGradientError, match="Variable"):
        grad(f, wrt=[v, w])()


def test_moments_are_right_once_and_repaired_twice():
    f = lambda x: tf.nn.moments(x, [0])[1]  # noqa: E731  one line
    x, v = tf.constant([1.0, 2.0, 6.0]), tf.constant([1.0, -1.0, 0.5])

    first, second = grad(f)(x), hvp(f)(x, v)

    np.testing.assert_allclose(first, 2 * (x - 3.0) / 3, rtol=1e-6)
    np.testing.assert_allclose(second, 2 * (v - tf.reduce_mean(v)) / 3, rtol=1e-6)


def looped_moments(x):
    def turn(i, x):
        return (i + 1, x * tf.nn.moments(x, [0])[1])

    return tf.reduce_sum(tf.while_loop(lambda i, x: i < 1, turn, (0, x))[1])


def unrolled_moments(x):
    return tf.reduce_sum(x) * tf.math.reduce_variance(x)


def test_moments_in_a_loop_are_right_once_and_repaired_twice():
    x, v = tf.constant([1.0, 2.0, 6.0]), tf.constant([1.0, -1.0, 0.5])

    once, twice = grad(looped_moments)(x), hvp(looped_moments)(x, v)

    np.testing.assert_allclose(once, grad(unrolled_moments)(x), rtol=1e-5)
    np.testing.assert_allclose(twice, hvp(unrolled_moments)(x, v), rtol=1e-5)


def test_a_users_function_that_writes_is_not_traced_twice():
    counter = tf.Variable(0.0)

    def f(x):
        counter.assign_add(1.0)
        return tf.nn.moments(x, [0])[1]

    x = tf.constant([1.0, 2.0, 6.0])

    np.testing.assert_allclose(hvp(f)(x, x), 2 * (x - 3.0) / 3, rtol=1e-6)
    with pytest.raises(WrongDerivativeError, match=r"your own tf.function"):
        tf.function(hvp(f))(x, x)


def test_a_partition_may_be_folded_by_others_and_not_by_us():
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [3])
        outputs = tf.dynamic_partition(x, [0, 1, 0], 2)

    assert folds_wrongly(graph.get_operations()).type == "DynamicPartition"
    require_right_kernels(outputs, "f", own=True)
    with pytest.raises(WrongDerivativeError, match=r"`f`(.|\n)*tf.boolean_mask"):
        require_right_kernels(outputs, "f", own=False)
    require_right_kernels([x], "f", own=False)


def test_ops_are_found_inside_of_functions():
    inner = tf.function(lambda x: tf.cond(x > 0, lambda: tf.sin(x), lambda: x))
    outer = tf.function(lambda x: inner(x)).get_concrete_function(tf.TensorSpec([]))

    types = {op.type for op in every(outer.graph.get_operations())}

    assert "Sin" in types
    assert not may_drop(outer.graph.get_operations())


def test_a_repaired_function_is_not_repaired_again():
    f = lambda x: tf.nn.moments(x, [0])[1]  # noqa: E731  one line
    x = tf.constant([1.0, 2.0, 6.0])

    answer = tf.function(lambda x: hvp(repaired(f))(x, x))(x)

    np.testing.assert_allclose(answer, 2 * (x - 3.0) / 3, rtol=1e-6)
    assert issubclass(RepairableGradientError, WrongDerivativeError)


def test_a_repair_further_out_does_not_hide_one_that_is_needed_further_in():
    def variance(x):
        return tf.nn.moments(x, [0])[1]

    def f(x):
        # The first term needs the repair of this function, the second one of its own.
        return tf.reduce_sum(grad(variance)(x) ** 2) + tf.reduce_sum(
            hvp(variance)(x, x**3)
        )

    x = tf.constant([1.0, 2.0, 6.0], tf.float64)
    centred = lambda a: 2 * (a - tf.reduce_mean(a)) / 3  # noqa: E731  one line

    def expected(x):
        return tf.reduce_sum(centred(x) ** 2) + tf.reduce_sum(centred(x**3))

    np.testing.assert_allclose(grad(f)(x), grad(expected)(x), rtol=1e-12, atol=1e-12)


def test_moments_in_a_loop_are_repaired_in_a_composition_too():
    x = tf.constant([1.0, 2.0, 6.0])

    def squared(f):
        return grad(lambda x: tf.reduce_sum(grad(f)(x) ** 2))(x)

    np.testing.assert_allclose(
        squared(looped_moments), squared(unrolled_moments), rtol=1e-5
    )


def test_an_op_that_the_runtime_does_not_know_is_refused():
    logits = np.random.default_rng(0).normal(size=(1, 4, 3)).astype("float32")

    def loss(logits):
        return tf.nn.ctc_loss(
            [[1, 2]], logits, [2], [4], logits_time_major=False, blank_index=0
        )[0]

    first = grad(loss)(logits)
    for _ in range(2):  # TensorFlow gives its gradient of a gradient one name for ever
        with pytest.raises(
            NoGradientError, match=r"SymbolicGradient|once in a process"
        ):
            hvp(loss)(logits, logits)
        np.testing.assert_allclose(vjp(loss, logits)[1](1.0)[0], first, rtol=1e-5)
