"""Bounds and constraints on one vector: what is allowed."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import Bounds, LinearConstraint, NonlinearConstraint

from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.problem import Problem

POINT = {"a": np.array([1.0, 2.0]), "b": np.float64(3.0)}


def problem(x0=POINT):
    return Problem(lambda p: 0.0, x0, None, has_aux=False)


@pytest.mark.parametrize(
    "bounds",
    [
        ({"a": [0.0, -1.0], "b": None}, {"a": 5.0, "b": 4.0}),
        ([0.0, -1.0, None], [5.0, 5.0, 4.0]),
        Bounds([0, -1, -np.inf], [5, 5, 4]),
        [(0, 5), (-1, 5), (None, 4)],
    ],
)
def test_bounds_in_every_form_are_one_vector(bounds):
    limits = Limits(problem(), bounds, ())

    np.testing.assert_array_equal(limits.lower, [0, -1, -np.inf])
    np.testing.assert_array_equal(limits.upper, [5, 5, 4])
    np.testing.assert_array_equal(limits.clip(np.array([-1, 9, 9.0])), [0, 5, 4])


@pytest.mark.parametrize("bounds", [(0.0, None), Bounds(0), Bounds(0, np.inf)])
def test_one_number_bounds_everything(bounds):
    limits = Limits(problem(), bounds, None)

    np.testing.assert_array_equal(limits.lower, [0, 0, 0])
    assert limits.are_any
    assert not Limits(problem(), None, []).are_any


def test_bounds_that_the_dtype_does_not_have_are_rounded_inwards():
    point = {"x": np.zeros(5, np.float32), "y": np.float64(0)}
    lower, upper = [-0.1, 1e-300, 1e-9, 0.1, -1e99], [2 / 3, 1.0, 1.0, 0.1, -0.0]
    limits = Limits(problem(point), ([*lower, -0.1], [*upper, 2 / 3]), ())

    inner = np.array(limits.bounds, np.float32)
    np.testing.assert_array_equal(inner[:, :5], np.array(limits.bounds)[:, :5])
    np.testing.assert_allclose(inner[0, :4], lower[:4], rtol=1e-7, atol=2e-38)
    np.testing.assert_allclose(inner[1, :5], upper, rtol=1e-7)
    assert np.all(limits.lower[:3] > lower[:3])
    assert limits.lower[4] == np.finfo(np.float32).min
    assert limits.upper[0] < upper[0]
    assert limits.lower[3] == limits.upper[3] == np.float32(0.1)  # none in between
    assert (limits.lower[5], limits.upper[5]) == (-0.1, 2 / 3)


CIRCLE = {"type": "ineq", "fun": lambda p: 25 - tf.reduce_sum(p["a"] ** 2)}


@pytest.mark.parametrize("written_in", ["tensorflow", "numpy", "with its own jac"])
def test_a_constraint_has_a_value_and_a_jacobian_however_it_is_written(written_in):
    constraint = dict(CIRCLE)
    if written_in == "numpy":
        constraint["fun"] = lambda p: 25 - np.sum(np.square(p["a"]))
    if written_in == "with its own jac":
        constraint["jac"] = lambda p: [*(-2 * p["a"].numpy()), 0.0]
    limits = Limits(problem(), None, [constraint])
    x = np.array([3.0, 4.0, 0.0])  # on the circle

    value, slope = limits.functions[0].at(x)

    np.testing.assert_allclose(value, [0], atol=1e-12)
    np.testing.assert_allclose(slope, [[-6, -8, 0]], atol=1e-8)
    assert limits.violation(x) == pytest.approx(0, abs=1e-12)
    assert limits.violation(2 * x) == pytest.approx(75)


def test_scipys_objects_say_what_they_limit():
    linear = LinearConstraint([[1, 1, 1]], 0, 2)
    curved = NonlinearConstraint(lambda p: [p["b"] ** 2, p["a"][0]], [0, 0], [4, 9])
    limits = Limits(problem(), None, [linear, curved])

    assert limits.violation(np.array([1.0, 1, 3])) == pytest.approx(5)  # 9 <= 4
    value, slope = limits.functions[1].at(np.array([1.0, 1, 3]))
    np.testing.assert_allclose(value, [9, 1])
    np.testing.assert_allclose(slope, [[0, 0, 6], [1, 0, 0]])


@pytest.mark.parametrize(
    ("bounds", "constraints", "match"),
    [
        (({"a": 1.0}, None), (), "leaves of shapes"),
        ((2.0, 1.0), (), "element 0: lower 2, upper 1"),
        ("above 0", (), "a pair"),
        (None, {"type": "less", "fun": abs}, "SciPy's dicts"),
        (None, {"type": "eq"}, "SciPy's dicts"),
        ((np.nan, None), (), "must not be NaN"),
        (([0.0, np.nan, 0.0], None), (), "must not be NaN"),
        (("0", None), (), "the lower bound is str '0'"),
        ((None, [True, False, True]), (), "the upper bound is list"),
        ((tf.constant("0"), None), (), "must fit the point"),
        ((np.datetime64("2020-01-01"), None), (), "must fit the point"),
        ((np.inf, None), (), "lower inf, upper inf"),
        ([0, 1, 2], (), "a pair"),
        ([(0, 1, 2), (0, 1), (0, 1)], (), "a pair"),
        (None, LinearConstraint([[1, 1]], 0, 2), r"shape \(m, 3\)"),
        (None, {"type": "eq", "fun": abs, "args": 1.0}, "SciPy's dicts"),
    ],
)
def test_what_does_not_fit_the_point_is_refused(bounds, constraints, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Limits(problem(), bounds, constraints)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda p: None, "returned NoneType None"),
        (lambda p: "above", "returned str 'above'"),
        (lambda p: [p["b"], None], r"returned list \["),
        (lambda p: p["b"] > 1, "bool"),
        (lambda p: [], r"returned list \[\]"),
        (lambda: 1.0, "does not take 1 arguments"),
        (lambda p, a: 1.0, "does not take 1"),
    ],
)
def test_a_constraint_that_is_no_function_to_numbers_is_refused(function, words):
    for constraint in (
        {"type": "ineq", "fun": function}, NonlinearConstraint(function, 0, 1),
    ):  # fmt: skip
        limits = Limits(problem(), None, constraint)
        with pytest.raises(InvalidArgumentError, match=words):
            limits.check(np.ones(3))


@pytest.mark.parametrize(("lower", "upper"), [(1, 0), (np.nan, 1), ([0, 0], [1, 1])])
def test_limits_of_a_constraint_that_cannot_be_kept_are_refused(lower, upper):
    limits = Limits(
        problem(), None, NonlinearConstraint(lambda p: p["b"], lower, upper)
    )

    with pytest.raises(InvalidArgumentError, match="limits of a constraint"):
        limits.check(np.ones(3))


def test_a_jacobian_of_another_shape_is_refused():
    entry = {"type": "eq", "fun": lambda p: p["b"], "jac": lambda p: [1.0, 2.0]}
    limits = Limits(problem(), None, entry)

    with pytest.raises(InvalidArgumentError, match="a row for each value"):
        limits.check(np.ones(3))
