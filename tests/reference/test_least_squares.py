"""`least_squares` on the problems of Moré, Garbow and Hillstrom, as residuals."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tests.reference.more_garbow_hillstrom import PROBLEMS, wood

# The first twenty, which are models fitted to data or hard for other reasons, one with
# a small residual, and the linear ones, of full rank and of rank 1.
NAMES = [
    name for name in PROBLEMS
    if int(name.split()[0]) <= 19 or name in (
        "20 Watson 6", "23 penalty I", "32 linear, full rank", "33 linear, rank 1"
    )
]  # fmt: skip


@functools.cache
def residuals_of(name):
    return tf.function(PROBLEMS[name].residuals)  # traced for all starts


@functools.cache
def solved(name, dtype):
    start = np.array(PROBLEMS[name].start, dtype)
    return tfgrad.least_squares(residuals_of(name), start)


def is_minimum(result, name, tolerance):
    minima = PROBLEMS[name].minima
    return any(abs(2 * result.fun - f) <= tolerance * max(f, tolerance) for f in minima)


@pytest.mark.parametrize("name", NAMES)
def test_float64_ends_at_a_known_minimum_and_says_so(name):
    result = solved(name, np.float64)

    assert is_minimum(result, name, 1e-5), result
    assert result.success
    assert result.status in ("gtol", "xtol", "target")
    assert len(result.history["fun"]) == result.nit + 1
    rounding = 1e-28  # of squares of residuals whose terms are of size 1
    values = result.history["fun"]
    assert np.all(np.diff(values) <= 1e-9 * values[:-1] + rounding)


@pytest.mark.parametrize("name", ["1", "5", "8", "15"])
def test_float32_ends_near_it_without_spinning(name):
    name = next(known for known in PROBLEMS if known.split()[0] == name)

    result = solved(name, np.float32)

    assert is_minimum(result, name, 1e-3), result
    assert result.success
    assert result.nfev < 100


def test_the_median_problem_takes_at_most_35_evaluations():
    counts = [solved(name, np.float64).nfev for name in NAMES]

    assert np.median(counts) <= 35


def test_vector_nest_and_variables_take_the_same_path():
    start = np.array([-3.0, -1, -3, -1])
    vector = solved("14 Wood", np.float64)
    nest = tfgrad.least_squares(
        lambda p: {"one": wood([*tf.unstack(p["a"]), *p["b"]])},
        {"a": start[:2], "b": (start[2], start[3])},
    )
    x = tf.Variable(start)
    variable = tfgrad.least_squares(lambda: wood(x), wrt=x)

    for other in (nest, variable):
        assert other.nfev == vector.nfev
        np.testing.assert_allclose(other.history["fun"], vector.history["fun"])
    assert np.array_equal(variable.x, x)


@pytest.mark.parametrize("name", ["7", "10", "13", "17"])
def test_starts_ten_times_as_far_end_at_the_minimum_too(name):
    name = next(known for known in PROBLEMS if known.split()[0] == name)
    start = 10 * np.array(PROBLEMS[name].start, np.float64)

    result = tfgrad.least_squares(residuals_of(name), start)

    assert is_minimum(result, name, 1e-5), result
    assert result.success
