# ruff: noqa: SIM108 (AutoGraph's `if` statement is what is tested)

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.checks.gradcheck import check_grads
from tfgrad.errors import (
    GradientMismatchError,
    InvalidArgumentError,
    NoGradientError,
    WrongDerivativeError,
)

X = tf.constant([0.5, -1.2, 2.0], tf.float64)


def with_gradient(function, gradient):
    """Return `function` with a gradient written by hand."""

    @tf.custom_gradient
    def hand_made(x):
        return function(x), lambda dy: dy * gradient(x)

    return hand_made


def verdicts(report):
    return {(check.order, check.mode): check.verdict for check in report.checks}


def test_a_right_function_passes_in_every_mode_at_every_order():
    report = check_grads(tf.sin, X, order=3, modes=("reverse", "compiled", "xla"))

    assert report
    assert {order for order, _ in verdicts(report)} == {1, 2, 3}
    assert {mode for _, mode in verdicts(report)} == {
        "reverse",
        "compiled",
        "xla",
        "symmetry",
    }


def test_a_nest_is_checked_argument_by_argument():
    def loss(params, scale):
        return tf.reduce_sum(params["w"] ** 2 * scale) + tf.sin(params["b"])

    report = check_grads(loss, {"w": X, "b": 1.0}, tf.constant(2.0, tf.float64))

    names = [c.name for c in report.checks if (c.order, c.mode) == (1, "reverse")]
    assert report
    assert names == ["params['b']", "params['w']", "scale"]


def test_a_wrong_gradient_is_named_by_argument_and_element():
    wrong = tf.constant([1.0, 0.9, 1.0], tf.float64)
    f = with_gradient(lambda x: x**2, lambda x: wrong * 2 * x)

    with pytest.raises(GradientMismatchError, match="`hand_made`, `x`: 1 of 3") as info:
        check_grads(f, X)
    assert "worst at [1]" in info.value.got


def test_only_the_wrong_argument_fails():
    @tf.custom_gradient
    def product(x, y):
        return x * y, lambda dy: (dy * y, dy * 2 * x)

    report = check_grads(product, X, X, order=1, modes=("reverse",), raises=False)

    assert [check.verdict for check in report.checks] == ["pass", "fail"]


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
@pytest.mark.parametrize("factor", [1.001, 0.0, -1.0])
def test_a_wrong_second_derivative_behind_a_right_first_one_is_caught(factor, dtype):
    slope = with_gradient(tf.cos, lambda x: -factor * tf.sin(x))
    f = with_gradient(tf.sin, slope)
    report = check_grads(f, tf.cast(X, dtype), raises=False)

    assert verdicts(report)[1, "reverse"] == "pass"
    assert verdicts(report)[2, "reverse"] == "fail"


def test_a_matrix_of_second_derivatives_that_is_not_symmetric_is_caught():
    @tf.custom_gradient
    def twisted(x):
        def gradient(dy):
            return dy * (2 * x + tf.roll(x, 1, 0))

        return tf.reduce_sum(x**2), gradient

    report = check_grads(twisted, X, raises=False)

    assert verdicts(report)[2, "symmetry"] == "fail"


def test_a_gradient_of_any_size_is_checked():
    f = with_gradient(lambda x: 1e-6 * tf.sin(x), lambda x: 1.01e-6 * tf.cos(x))

    with pytest.raises(GradientMismatchError):
        check_grads(f, X)


def test_all_outputs_are_checked():
    @tf.custom_gradient
    def pair(x):
        return tf.stack([x, 2 * x]), lambda dy: dy[0] + 2.1 * dy[1]

    with pytest.raises(GradientMismatchError):
        check_grads(pair, X)


def test_few_wrong_elements_among_many_are_found_by_halving():
    mask = np.ones(5000)
    mask[1234] = 2.0
    f = with_gradient(lambda x: x**2, lambda x: 2 * x * mask)
    x = tf.constant(np.random.default_rng(0).normal(size=5000) + 3)

    report = check_grads(f, x, order=1, modes=("reverse",), raises=False)

    assert [element.index for element in report.checks[0].elements] == [(1234,)]


def test_full_looks_at_every_element():
    f = with_gradient(lambda x: x**2, lambda x: 2.5 * x)
    x = tf.ones([70], tf.float64)

    some, all_of_them = (
        check_grads(f, x, order=1, modes=("reverse",), full=full, raises=False)
        for full in (False, True)
    )

    assert (len(some.checks[0].elements), some.checks[0].complete) == (5, False)
    assert (len(all_of_them.checks[0].elements), all_of_them.checks[0].complete) == (
        70,
        True,
    )


# Variables, models, labels.


def test_variables_are_checked_and_restored():
    weight = tf.Variable([1.0, 2.0], dtype=tf.float64)

    report = check_grads(lambda: tf.reduce_sum(weight**3), wrt=weight)

    assert report
    assert weight.numpy().tolist() == [1.0, 2.0]


def test_variables_are_restored_after_an_error():
    weight = tf.Variable([1.0, 2.0], dtype=tf.float64)
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("enough")
        return tf.reduce_sum(weight**3)

    with pytest.raises(RuntimeError, match="enough"):
        check_grads(breaks, wrt=weight, modes=("reverse",))
    assert weight.numpy().tolist() == [1.0, 2.0]


def test_variables_that_the_function_changes_are_restored():
    keras.utils.set_random_seed(0)
    layer = keras.layers.BatchNormalization(dtype="float64")
    x = tf.reshape(tf.range(12.0, dtype=tf.float64), [4, 3]) ** 2
    layer(x)
    before = layer.moving_mean.numpy()

    check_grads(lambda x: layer(x, training=True)[0, 0], x, order=1)

    assert layer.moving_mean.numpy().tolist() == before.tolist()


def test_a_keras_model_with_integer_labels_passes():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input([3]), keras.layers.Dense(4, "tanh"), keras.layers.Dense(2)]
    )
    x, labels = tf.ones([5, 3]), tf.constant([0, 1, 1, 0, 1])

    def loss(x, labels):
        found = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(x))
        return tf.reduce_mean(found)

    by_model = check_grads(loss, x, labels, wrt=model)
    by_input = check_grads(loss, x, labels)

    assert "fail" not in verdicts(by_model).values()
    assert any(check.name.endswith("/kernel") for check in by_model.checks)
    assert {c.name for c in by_input.checks} == {"x"}


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_every_precision_passes_what_is_right_and_catches_what_is_not(dtype):
    x = tf.constant([0.5, -1.0, 2.0], dtype)
    wrong = with_gradient(tf.tanh, lambda x: tf.tanh(x) ** 2 - 1)

    right = check_grads(tf.tanh, x, order=1)

    assert verdicts(right)[1, "reverse"] != "fail"
    with pytest.raises(GradientMismatchError):
        check_grads(wrong, x, order=1)


def test_half_precision_inside_of_a_float32_function_is_noticed():
    def mixed(x):
        return tf.cast(tf.sin(tf.cast(x, tf.float16)), tf.float32)

    report = check_grads(mixed, tf.constant([0.5, -1.2]), order=1)

    assert "fail" not in verdicts(report).values()


def test_a_network_of_relus_does_not_fail_for_its_kinks():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(32, "relu") for _ in range(2)]
    model = keras.Sequential([keras.Input([8]), *layers, keras.layers.Dense(1)])
    x = tf.random.stateless_normal([64, 8], seed=(1, 2))

    report = check_grads(lambda: tf.reduce_mean(model(x) ** 2), wrt=model)

    assert not report.failures


def test_a_gradient_that_cancels_at_a_minimum_does_not_fail():
    x = tf.random.stateless_normal([16, 8], seed=(1, 2))
    goal = tf.nn.softmax(x)

    report = check_grads(
        lambda x: keras.losses.kl_divergence(goal, tf.nn.softmax(x)), x + 0.1
    )

    assert not report.failures


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_a_second_derivative_that_cancels_does_not_fail(dtype):
    x = 1e6 * tf.cast(X, dtype)

    assert not check_grads(lambda x: tf.reduce_sum(tf.sqrt(1 + x**2)), x).failures


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64])
def test_a_kink_close_by_is_not_taken_for_one_at_the_point(dtype):
    x = tf.constant([1 + 1e-4, 0.3, 2.0], dtype)

    assert check_grads(lambda x: tf.reduce_sum(tf.abs(x - 1)), x)


# What cannot be decided, or not be done.


def test_a_kink_is_inconclusive_and_named():
    report = check_grads(tf.nn.relu, tf.constant([0.0], tf.float64), order=1)

    assert verdicts(report)[1, "reverse"] == "inconclusive"
    assert not report
    assert "a kink: the slope is 0 on one side, 1" in str(report).replace("-0", "0")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_kink_with_equal_sides_is_named_where_differences_agree_with_autodiff(dtype):
    report = check_grads(tf.abs, np.asarray(0, dtype), order=1)

    assert not report
    assert "a kink: the slope is -1 on one side, 1 on the other" in str(report)


def test_a_kink_in_some_directions_is_noted_where_others_pass():
    report = check_grads(
        lambda x: tf.reduce_sum(tf.nn.relu(x)), tf.constant([0.0, 1.0], tf.float64)
    )

    assert verdicts(report)[1, "reverse"] == "pass"
    assert "a kink" in str(report)


def test_a_wrong_gradient_at_a_kink_still_fails():
    f = with_gradient(tf.abs, lambda x: 3 * tf.ones_like(x))

    with pytest.raises(GradientMismatchError, match="a kink"):
        check_grads(f, tf.constant([0.0], tf.float64), order=1, modes=("reverse",))


def test_a_slope_below_rounding_is_inconclusive():
    report = check_grads(lambda x: 1e6 + 1e-3 * tf.sin(x), tf.constant(0.5), order=1)

    assert verdicts(report)[1, "reverse"] == "inconclusive"
    assert "float64" in str(report)


def test_a_flat_function_passes():
    assert check_grads(lambda x: tf.constant(2.0) + 0 * x, tf.constant(0.5))


def test_a_function_that_only_runs_eagerly_is_checked_and_that_is_noted():
    report = check_grads(lambda x: x * np.sin(x), tf.constant(2.0), raises=False)

    # To the tape, np.sin(x) is a constant.
    assert verdicts(report)[1, "reverse"] == "fail"
    assert "compiled, order 1: not checked" in report.notes[0]


def test_autograph_is_applied_where_it_is_needed():
    def branches(x):
        if tf.reduce_sum(x) > 0:
            y = tf.sin(x)
        else:
            y = x
        return y

    report = check_grads(branches, X)

    assert report
    assert (1, "compiled") in verdicts(report)


def test_a_gradient_that_is_not_finite_fails_and_points_to_explain():
    with pytest.raises(GradientMismatchError, match="explain"):
        check_grads(lambda x: tf.where(x > 0, tf.sqrt(x), 0.0), tf.constant([0.0, 1.0]))


def test_an_op_without_gradient_raises_with_its_line():
    def factors(x):
        return tf.reduce_sum(tf.linalg.lu(x)[0])

    with pytest.raises(NoGradientError, match=r"tf.linalg.lu at test_gradcheck.py"):
        check_grads(factors, tf.constant([[2.0, 1.0], [1.0, 3.0]]))


def test_a_gradient_of_another_shape_is_refused_as_grad_refuses_it():
    f = with_gradient(tf.reduce_sum, lambda x: tf.ones([3, 1], x.dtype))

    with pytest.raises(WrongDerivativeError, match=r"shape \(3, 1\), float64"):
        check_grads(f, X)


def test_the_same_seed_gives_the_same_report():
    one, two = (check_grads(tf.sin, X, seed=3) for _ in range(2))

    assert one == two


# What is refused.


@pytest.mark.parametrize(
    "random",
    [
        lambda x: x * tf.random.uniform([]),
        lambda x: tf.nn.dropout(tf.cast(x, tf.float32), 0.5),
    ],
    ids=["uniform", "dropout"],
)
def test_a_random_function_is_refused(random):
    with pytest.raises(InvalidArgumentError, match="training=False, a fixed seed"):
        check_grads(random, tf.ones([20]))


@pytest.mark.parametrize(
    "returned", [None, "text", [tf.constant(1.0), 2], tf.constant(1)]
)
def test_an_answer_that_is_no_float_tensor_is_refused(returned):
    with pytest.raises(InvalidArgumentError, match="must return one float tensor"):
        check_grads(lambda x: returned, X)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(InvalidArgumentError, match="explain"):
        check_grads(tf.math.log, tf.constant([-1.0, 1.0]))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ([tf.constant([1, 2])], {}, "float argument or a variable"),
        ([tf.constant([1.0, np.nan])], {}, r"holds nan at \[1\]"),
        ([], {}, "float argument or a variable"),
        ([1.0], {"wrt": []}, "at least one variable"),
        ([1.0], {"wrt": 2.0}, "`wrt` names variables"),
        ([1.0], {"order": 0}, "`order` must be a whole number"),
        ([1.0], {"directions": 1.5}, "`directions` must be a whole number"),
        ([1.0], {"modes": "reverse"}, "`modes` must be some of"),
        ([1.0], {"modes": ["backwards"]}, "`modes` must be some of"),
    ],
)
def test_bad_arguments_are_refused_with_a_way_out(args, kwargs, message):
    with pytest.raises(InvalidArgumentError, match=message):
        check_grads(tf.identity, *args, **kwargs)


def test_a_cut_gradient_is_refused_as_grad_refuses_it():
    with pytest.raises(NoGradientError, match=r"tf.round"):
        check_grads(lambda x: tf.reduce_sum(tf.round(x)), [1.2, 3.7])
    with pytest.raises(NoGradientError, match=r"leaves this input out"):
        check_grads(lambda x: x + tf.math.zeta(x, 2.0), 3.0)


@pytest.mark.parametrize("rtol", [float("nan"), -1.0, 2.0])
def test_a_tolerance_that_lets_everything_through_is_refused(rtol):
    with pytest.raises(InvalidArgumentError, match="`rtol` must be a number"):
        check_grads(tf.sin, 1.0, rtol=rtol)
