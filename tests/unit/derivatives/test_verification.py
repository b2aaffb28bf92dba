"""A derivative against differences: no false alarm, and no wrong one let through."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.verification import (
    coarsest,
    disagreement,
    random_like,
    wrong_gradient,
)

DTYPES = [tf.float32, tf.float64]


def rounded(array, dtype):
    """Return the array as if it had been computed in `dtype`."""
    return np.asarray(array, dtype.as_numpy_dtype).astype(np.float64)


def cubes(dtype):
    return lambda point: rounded(point[0], dtype) ** 3


def slopes_of_cubes(x, factor=1.0):
    return lambda direction: factor * 3 * x**2 * direction[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_right_derivative_passes(dtype, scale):
    x = scale * np.random.default_rng(0).normal(size=50)

    assert disagreement(cubes(dtype), slopes_of_cubes(x), [x], dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_wrong_element_in_fifty_is_named(dtype):
    x = np.random.default_rng(0).uniform(1, 2, size=50)
    factor = np.ones(50)
    factor[17] = 1.05

    wrong = disagreement(cubes(dtype), slopes_of_cubes(x, factor), [x], dtype)

    assert wrong.element == 17
    assert wrong.claimed / wrong.difference == pytest.approx(1.05, rel=1e-3)
    assert "differences" in str(wrong)


def test_a_kink_at_the_point_is_no_disagreement():
    x = np.array([0.0, 1.0, -1.0])

    for side in (-1.0, 0.0, 1.0):
        slope = np.array([side, 1.0, -1.0])
        found = disagreement(
            lambda point: np.abs(point[0]),
            lambda direction, slope=slope: slope * direction[0],
            [x],
            tf.float64,
        )
        assert found is None


def test_a_slope_that_is_on_neither_side_of_a_kink_is_wrong():
    wrong = disagreement(
        lambda point: np.abs(point[0]),
        lambda direction: 3.0 * direction[0],
        [np.zeros(1)],
        tf.float64,
    )

    assert wrong.claimed != 0


def test_a_random_function_cannot_be_told():
    generator = np.random.default_rng(0)

    found = disagreement(
        lambda point: point[0] * generator.normal(),
        lambda direction: 100 * direction[0],
        [np.ones(2)],
        tf.float64,
    )

    assert found is None


def test_a_function_that_refuses_the_points_around_cannot_be_told():
    def fussy(point):
        if point[0][0] != 1.0:
            raise ValueError("only here")
        return point[0]

    found = disagreement(
        fussy, lambda direction: 100 * direction[0], [np.ones(1)], tf.float64
    )

    assert found is None


def test_what_is_not_finite_cannot_be_told():
    with np.errstate(all="ignore"):
        found = disagreement(
            lambda point: np.log(point[0]),
            lambda direction: 1e9 * direction[0],
            [np.zeros(1)],
            tf.float64,
        )

    assert found is None


def test_the_source_with_the_wrong_gradient_is_named():
    args = (tf.constant([1.0, 2.0]), tf.constant(3.0))
    call = Call(
        lambda x, y: tf.reduce_sum(x**2) * y, "f", ("x", "y"), args, {}, (0, 1), None
    )
    right = [6 * args[0], tf.constant(5.0)]

    def evaluate(call):
        return [call.output()]

    assert wrong_gradient(call, evaluate, None, right) is None
    index, numbers = wrong_gradient(call, evaluate, None, [right[0], 0 * right[1]])
    assert index == 1
    assert numbers.claimed == 0


def test_variables_are_moved_and_put_back():
    v = tf.Variable([1.0, 2.0])
    call = Call(lambda: tf.reduce_sum(v**2), "f", (), (), {}, (), v)

    index, _ = wrong_gradient(call, lambda call: [call.output()], None, [tf.ones(2)])

    assert index == 0
    assert v.numpy().tolist() == [1.0, 2.0]


def test_the_coarsest_dtype_decides():
    dtypes = [tf.float64, tf.float32, tf.float16, tf.bfloat16]

    assert [
        coarsest([tf.ones(1, d) for d in dtypes[:n]]) for n in (1, 2, 3, 4)
    ] == dtypes


def test_random_tensors_repeat():
    like = [tf.zeros([2, 3]), tf.zeros([], tf.float64)]

    first, again, other = (
        random_like(like),
        random_like(like),
        random_like(like, seed=1),
    )

    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
    assert [part.dtype for part in first] == [tf.float32, tf.float64]
