"""A derivative against differences: no false alarm, and no wrong one let through."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.verification import (
    LARGE,
    Functions,
    coarsest,
    disagreement,
    is_still,
    random_like,
)

DTYPES = [tf.float32, tf.float64]


def rounded(array, dtype):
    """Return the array as if it had been computed in `dtype`."""
    return np.asarray(array, dtype.as_numpy_dtype).astype(np.float64)


def functions(f, slope, x, dtype=tf.float64):
    """Return a function that works element by element, with its claimed slope."""

    def evaluate(direction, t):
        with np.errstate(all="ignore"):
            return [[f(x + t * direction[0])]]

    def slopes(direction, weights):
        with np.errstate(all="ignore"):
            return np.array([np.sum(weights[0][0] * slope * direction[0])])

    return Functions([x], [[f(x)]], evaluate, slopes, dtype)


def cubes(dtype):
    return lambda x: rounded(rounded(x, dtype) ** 3, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, tf.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0])
def test_a_right_derivative_passes(dtype, scale):
    x = scale * np.random.default_rng(0).normal(size=50)

    assert disagreement(functions(cubes(dtype), 3 * x**2, x, dtype)) is None


def test_one_that_is_no_number_at_a_minimum_is_found():
    lost = np.full(3, np.nan)

    assert disagreement(functions(np.square, lost, np.zeros(3))) is not None
    assert disagreement(functions(np.abs, lost, np.zeros(3))) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_one_that_lacks_a_term_is_found(dtype, scale):
    x = scale * np.random.default_rng(0).uniform(1, 2, size=12)
    slope = 3 * x**2
    slope[7] = 0.0

    level, wrong = disagreement(functions(cubes(dtype), slope, x, dtype))

    assert level == 0
    assert "differences" in str(wrong)


@pytest.mark.parametrize("side", [-1.0, 0.0, 1.0])
def test_a_kink_at_the_point_is_no_disagreement(side):
    x = np.array([0.0, 1.0, -1.0])

    assert disagreement(functions(np.abs, np.array([side, 1.0, -1.0]), x)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(20))
def test_rectifiers_at_zero_are_no_disagreement(dtype, seed):
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=30)

    def f(x):
        return rounded(weights * np.maximum(rounded(x, dtype), 0), dtype)

    assert disagreement(functions(f, np.zeros(30), np.zeros(30), dtype)) is None


def test_a_smooth_function_that_is_taken_to_be_flat_at_a_tie_is_wrong():
    def f(x):  # softplus, by way of max and abs
        return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))

    wrong = disagreement(functions(f, np.zeros(3), np.zeros(3)))

    assert wrong is not None
    assert disagreement(functions(f, np.full(3, 0.5), np.zeros(3))) is None


def test_nan_is_wrong_where_both_sides_agree():
    flat, nan = np.zeros_like, np.full(2, np.nan)

    assert disagreement(functions(flat, nan, np.zeros(2))) is not None
    assert disagreement(functions(lambda x: x**4, nan, np.zeros(2))) is not None
    assert disagreement(functions(np.sqrt, nan, np.zeros(2))) is None  # one side only
    assert disagreement(functions(np.abs, nan, np.zeros(2))) is None  # a kink
    assert disagreement(functions(np.cbrt, nan, np.zeros(2))) is None  # no slope


def test_a_random_function_cannot_be_told():
    generator = np.random.default_rng(0)

    def f(x):
        return x * generator.normal()

    assert disagreement(functions(f, 100.0, np.ones(2))) is None


def test_a_function_that_refuses_the_points_around_cannot_be_told():
    def f(x):
        if x[0] != 1.0:
            raise ValueError("only here")
        return x

    assert disagreement(functions(f, 100.0, np.ones(1))) is None


def test_many_kinks_nearby_are_no_disagreement():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(200, 10)), 1e-3 * generator.normal(size=200)

    def f(x):
        return np.array([np.sum(np.abs(a @ x - b))])

    x = 1e-4 * generator.normal(size=10)
    gradient = np.sign(a @ x - b) @ a

    def slopes(direction, weights):
        return np.array([weights[0][0][0] * gradient @ direction[0]])

    right = Functions(
        [x], [[f(x)]], lambda v, t: [[f(x + t * v[0])]], slopes, tf.float32
    )
    assert disagreement(right) is None


def test_only_what_moves_counts():
    x, y = np.array([2.0]), np.array([3.0])

    def evaluate(direction, t):
        return [[(x + t * direction[0]) ** 2 * (y + t * direction[1])]]

    def slopes(direction, weights):  # the slope by y is missing
        return np.array([np.sum(weights[0][0] * 2 * x * y * direction[0])])

    both = Functions([x, y], [[x**2 * y]], evaluate, slopes, tf.float64)
    assert disagreement(both, [0]) is None
    assert disagreement(both, [1])[1].autodiff == 0


@pytest.mark.parametrize("wrong", range(3))
def test_of_large_arrays_the_smallest_moves_and_all_small_ones_do(wrong):
    point = [np.ones(LARGE + 2), np.ones(LARGE + 1), np.full(5, 6.0)]
    slopes = [3 * x[0] ** 2 * (i != wrong) for i, x in enumerate(point)]
    moved = []

    def evaluate(direction, t):
        moved.append([i for i, v in enumerate(direction) if not is_still(v)])
        value = sum(
            np.sum((x + t * v) ** 3) for x, v in zip(point, direction, strict=True)
        )
        return [[np.asarray(value)]]

    def claimed(direction, weights):
        pairs = zip(slopes, direction, strict=True)
        return np.array([weights[0][0] * sum(s * np.sum(v) for s, v in pairs)])

    values = [[np.asarray(sum(np.sum(x**3) for x in point))]]
    found = disagreement(Functions(point, values, evaluate, claimed, tf.float64))

    assert (found is None) == (wrong == 0)
    assert moved[0] == [1, 2]


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
