import numpy as np
import pytest
import tensorflow as tf

from tfgrad.diagnosis import path
from tfgrad.diagnosis.path import missing_gradients
from tfgrad.diagnosis.report import no_gradient_error

X = tf.constant(1.5)


def slope_of(function):
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tape.gradient(y, x)

    return slope


@pytest.mark.parametrize(
    "function",
    [
        lambda x: tf.constant(1.0),
        lambda x: tf.stop_gradient(x) * 2,
        lambda x: tf.cast(tf.stop_gradient(x) > 0, tf.float32),
        lambda x: tf.cast(tf.size(x), tf.float32),
        lambda x: tf.zeros_like(x) + tf.ones_like(x),
        lambda x: x * 2,
    ],
    ids=["unused", "stopped", "stopped before", "size", "like", "connected"],
)
def test_nothing_is_cut_where_zero_is_meant_or_the_gradient_exists(function):
    assert missing_gradients(function, [X]) == [None]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 3 * x,
        lambda x: tf.maximum(x, 0.0),
        lambda x: tf.reduce_max(tf.stack([x, 2 * x])),
        lambda x: tf.reduce_sum(tf.sort(tf.stack([x, 2 * x]))[:1]),
        lambda x: tf.gather(tf.stack([x, 2 * x]), tf.argmax(tf.stack([x, 2 * x]))),
        lambda x: tf.where(x > 0, 2 * x, x),
        lambda x: tf.math.floormod(x, 1.0),
    ],
    ids=["line", "maximum", "reduce_max", "sort", "argmax", "where", "floormod"],
)
def test_second_derivatives_of_piecewise_linear_functions_are_zero_not_cut(function):
    assert missing_gradients(slope_of(function), [X]) == [None]


def test_a_second_derivative_that_tensorflow_lacks_is_cut():
    def energy(x):
        image = tf.reshape(x * tf.ones([4]), [1, 2, 2, 1])
        with tf.GradientTape() as tape:
            tape.watch(image)
            y = tf.reduce_sum(tf.image.resize(image, [3, 3]) ** 2)
        return tf.reduce_sum(tape.gradient(y, image))

    (cut,) = missing_gradients(energy, [X])

    assert cut.op == "ResizeBilinearGrad"


def test_each_input_and_each_variable_is_told_apart():
    weight, unread = tf.Variable(2.0), tf.Variable(3.0)

    def function(x, y):
        return x + tf.floor(y) + tf.round(weight)

    cuts = missing_gradients(function, [X, X], [weight, unread])

    assert [cut and cut.op for cut in cuts] == [None, "Floor", "Round", None]


def test_the_inputs_may_be_symbolic_and_the_function_may_capture_others():
    seen = []

    @tf.function(autograph=False)
    def outer(x):
        seen.extend(missing_gradients(lambda y: tf.round(y) + x, [x * 2]))
        return x

    outer(X)

    assert seen[0].op == "Round"


def test_a_call_keeps_the_part_that_is_differentiated_apart_from_the_rest():
    @tf.function
    def loss_and_count(x, t):
        if x > 0:
            loss, count = x * 2, tf.round(t)
        else:
            loss, count = x, t
        return loss, count

    cuts = missing_gradients(lambda x, t: loss_and_count(x, t)[0], [X, X])

    assert cuts == [None, None]


def test_a_variable_is_cut_although_the_same_call_writes_to_another():
    weight, count = tf.Variable(2.5), tf.Variable(0.0)

    @tf.function
    def counted(x):
        if x > 0:
            count.assign_add(1.0)
        return x + tf.round(weight)

    cuts = missing_gradients(counted, [X], [weight, count])

    assert [cut and cut.op for cut in cuts] == [None, "Round", None]


def test_only_the_input_that_leaves_tensorflow_is_cut():
    cuts = missing_gradients(lambda x, y, z: x * np.sin(y), [X, X, X])

    assert [cut and cut.label for cut in cuts] == [None, "NumPy", None]


def test_the_error_names_function_argument_op_line_and_remedy():
    def loss(x):
        return tf.round(x)

    (cut,) = missing_gradients(loss, [X])
    error = no_gradient_error("loss", "x", cut)

    assert error.rule == "The gradient of `loss` with respect to `x` is cut."
    assert "tf.round at test_path.py:" in error.got
    assert "`return tf.round(x)`" in error.got
    assert error.hint.startswith("x + tf.stop_gradient(tf.round(x) - x)")


def test_the_gradients_of_a_body_are_built_once_for_all_inputs(monkeypatch):
    built = []
    connected = path.connected

    def counted(*arguments):
        built.append(arguments)
        return connected(*arguments)

    monkeypatch.setattr(path, "connected", counted)

    def either(*parts):
        return tf.cond(
            parts[0] > 0, lambda: tf.add_n(parts), lambda: tf.add_n(parts[1:])
        )

    cuts = missing_gradients(either, [X] * 5)

    assert cuts == [None] * 5
    assert len(built) == 3  # outside, and in each branch
