"""The problems are at their minima where they say so."""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad import problems


@pytest.mark.parametrize("problem", problems.ALL, ids=lambda p: p.__name__)
def test_the_known_minima_are_minima(problem):
    for minimum in problem.minima:
        slope = tfgrad.grad(problem)(minimum)
        value = float(problem(minimum))

        assert value == pytest.approx(problem.minimum, abs=1e-20)
        np.testing.assert_allclose(slope, np.zeros_like(minimum), atol=1e-12)
        assert float(problem(minimum + 0.01)) > value


@pytest.mark.parametrize("problem", problems.ALL, ids=lambda p: p.__name__)
def test_the_start_leads_to_one_of_them_in_both_dtypes(problem):
    for dtype, atol in ((np.float64, 1e-4), (np.float32, 5e-2)):  # flat valleys
        result = tfgrad.minimize(problem, problem.start.astype(dtype))

        assert result.success
        assert result.x.dtype == tf.as_dtype(dtype)
        distances = np.abs(problem.minima - result.x.numpy())
        assert distances.reshape(len(problem.minima), -1).max(axis=1).min() < atol


def test_a_problem_looks_like_the_function_it_is():
    assert problems.rosenbrock.__name__ == "rosenbrock"
    assert problems.rosenbrock.__doc__.startswith("A curved valley")
    assert repr(problems.beale) == "tfgrad.problems.beale"
