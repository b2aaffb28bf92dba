import collections

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.differences import finite_difference, line_derivative, step_for
from tfgrad.errors import InvalidArgumentError, ScalarObjectiveError

DOUBLE = tf.constant([1.0, 2.0, 3.0], tf.float64)


def test_the_derivative_at_a_number_comes_with_its_error():
    value, error = finite_difference(lambda x: x**3, tf.constant(2.0, tf.float64))

    assert abs(value - 12.0) <= error < 1e-8
    assert value.dtype == error.dtype == tf.float64


def test_plain_numbers_are_float32():
    value, error = finite_difference(lambda x: x * x, 5.0)

    assert value.dtype == tf.float32
    assert abs(value - 10.0) <= error < 1e-3


def test_an_array_gets_the_gradient():
    value, error = finite_difference(lambda x: tf.reduce_sum(x**2), DOUBLE)

    np.testing.assert_allclose(value, [2, 4, 6], rtol=1e-9)
    assert np.all(np.abs(value - 2 * DOUBLE) <= error)


def test_a_nest_gets_a_gradient_of_its_structure():
    Point = collections.namedtuple("Point", ["weight", "bias"])
    point = Point({"w": DOUBLE}, (tf.constant(2.0, tf.float64),))

    value, _ = finite_difference(
        lambda p: tf.reduce_sum(p.weight["w"]) * p.bias[0] ** 2, point
    )

    np.testing.assert_allclose(value.weight["w"], [4, 4, 4], rtol=1e-9)
    np.testing.assert_allclose(value.bias[0], 24, rtol=1e-9)


def test_a_direction_gives_the_jacobian_times_it():
    matrix = tf.constant([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], tf.float64)
    direction = tf.constant([1.0, 0.0, -1.0], tf.float64)

    value, _ = finite_difference(
        lambda x: tf.linalg.matvec(matrix, x), DOUBLE, direction
    )

    np.testing.assert_allclose(value, [1, -3], atol=1e-9)


def test_ones_as_direction_give_an_elementwise_derivative():
    x = tf.cast(tf.linspace(-10.0, 10.0, 21), tf.float64)

    value, error = finite_difference(tf.sin, x, direction=tf.ones_like(x))

    assert np.all(np.abs(value - tf.cos(x)) <= error)
    assert value.shape == x.shape


@pytest.mark.parametrize("length", [1e-9, 1.0, 1e9])
def test_the_length_of_the_direction_only_scales_the_answer(length):
    value, error = finite_difference(
        lambda x: tf.reduce_sum(tf.sin(x)), DOUBLE, length * tf.ones_like(DOUBLE)
    )

    expected = length * float(tf.reduce_sum(tf.cos(DOUBLE)))
    assert abs(value - expected) <= error < 1e-8 * length


def test_numpy_inside_of_the_function_is_no_obstacle():
    value, _ = finite_difference(lambda x: np.exp(x), np.float64(0.0))

    assert float(value) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_the_error_bar_covers_the_error_in_every_precision(dtype):
    x = tf.constant(0.7, dtype)

    value, error = finite_difference(lambda x: tf.exp(x) * x, x)

    exact = float(np.exp(np.float64(x)) * (1 + np.float64(x)))
    assert abs(float(value) - exact) <= float(error) < exact


def test_a_huge_coordinate_does_not_spoil_a_small_one():
    x = tf.constant([1e6, 1.0], tf.float64)

    value, _ = finite_difference(lambda x: tf.sin(x[1]) + x[0] * 1e-6, x)

    np.testing.assert_allclose(value, [1e-6, np.cos(1.0)], rtol=1e-6)


def test_a_step_out_of_the_domain_is_shortened():
    value, error = finite_difference(tf.math.log, np.float64(1e-3))

    assert abs(value - 1e3) <= error < 1


def test_where_the_function_is_not_finite_the_error_is_infinite():
    value, error = finite_difference(tf.sqrt, -1.0)

    assert np.isnan(value)
    assert np.isinf(error)


def test_the_zero_direction_has_the_slope_zero():
    value, _ = finite_difference(lambda x: tf.reduce_sum(x**2), DOUBLE, 0 * DOUBLE)

    assert value == 0


def test_a_gradient_of_many_outputs_is_refused_with_its_shape():
    with pytest.raises(ScalarObjectiveError, match=r"shape \(3,\)"):
        finite_difference(lambda x: x**2, DOUBLE)


@pytest.mark.parametrize("returned", [None, "text", 3, (1.0, 2.0), tf.constant(1)])
def test_an_answer_that_is_no_float_tensor_is_refused(returned):
    with pytest.raises(InvalidArgumentError, match="must return one float tensor"):
        finite_difference(lambda x: returned, 1.0)


@pytest.mark.parametrize("direction", [[1.0], {"a": 1.0}])
def test_a_direction_of_another_structure_is_refused(direction):
    with pytest.raises(InvalidArgumentError, match="structure and the shapes of `x`"):
        finite_difference(tf.reduce_sum, DOUBLE, direction)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_point_that_is_not_finite_is_refused(bad):
    with pytest.raises(InvalidArgumentError, match=r"holds (nan|inf) at \[1\]"):
        finite_difference(tf.reduce_sum, [1.0, bad])


@pytest.mark.parametrize("nothing", [[], {}, ()])
def test_a_point_without_an_array_is_refused(nothing):
    with pytest.raises(InvalidArgumentError, match=r"holds none\n  try: np.zeros\(0\)"):
        finite_difference(lambda x: x**2, nothing)


def test_integers_are_refused():
    with pytest.raises(InvalidArgumentError, match="float dtype"):
        finite_difference(tf.reduce_sum, tf.constant([1, 2]))


def test_a_call_inside_of_tf_function_is_refused():
    @tf.function(autograph=False)
    def compiled(x):
        return finite_difference(tf.sin, x).value

    with pytest.raises(InvalidArgumentError, match=r"outside of tf\.function"):
        compiled(tf.constant(1.0))


def test_the_error_of_the_method_is_of_fourth_order():
    def error(step):
        # One step, no refinement: rounding is declared to be all there is.
        value, _ = line_derivative(lambda t: np.exp(t), step, 1.0)
        return abs(float(value) - 1.0)

    assert error(0.2) / error(0.1) == pytest.approx(16, rel=0.1)


def test_the_step_is_a_power_of_two_and_grows_with_the_point():
    small, large = (step_for([np.full(4, size)], 2.0**-52) for size in (1.0, 1024.0))

    assert np.log2(small).is_integer()
    assert large == 1024 * small


def test_what_is_no_function_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"(?s)got: f=int 3.*try: finite_d"):
        finite_difference(3, 1.0)
