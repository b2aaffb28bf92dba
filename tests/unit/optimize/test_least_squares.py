"""`least_squares` as a user calls it."""

import functools
from collections import OrderedDict

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import curve_fit

import tfgrad
from tfgrad.errors import (
    InvalidArgumentError,
    NoGradientError,
    ScalarObjectiveError,
)
from tfgrad.optimize import residuals as sizes

T = np.linspace(0.0, 3.0, 12)
Y = 2.0 * np.exp(-T) + 0.01 * np.sin(9 * T)
START = np.array([1.0, 0.5])


@tf.function  # so that one trace serves many tests
def decay(p):
    return p[0] * tf.exp(-p[1] * T) - Y


@functools.cache
def fitted():
    return tfgrad.least_squares(decay, START)


def test_covariance_and_standard_errors_are_those_of_curve_fit():
    x, covariance = curve_fit(lambda t, a, b: a * np.exp(-b * t), T, Y, START)

    result = fitted()

    np.testing.assert_allclose(result.x, x, rtol=1e-6)
    # SciPy's Jacobian is one of differences.
    np.testing.assert_allclose(result.covariance, covariance, rtol=1e-5)
    np.testing.assert_allclose(result.stderr, np.sqrt(np.diag(covariance)), rtol=1e-5)
    assert result.degrees_of_freedom == 10
    np.testing.assert_allclose(result.residuals, decay(result.x))
    rss = np.sum(np.asarray(result.residuals) ** 2)
    np.testing.assert_allclose(2 * result.fun, rss)
    np.testing.assert_allclose(result.residual_std, np.sqrt(rss / 10))


def test_weighted_residuals_with_known_errors_give_absolute_covariance():
    sigma = np.linspace(0.01, 0.03, len(T))
    _, covariance = curve_fit(
        lambda t, a, b: a * np.exp(-b * t), T, Y, START, sigma, absolute_sigma=True
    )

    result = tfgrad.least_squares(lambda p: decay(p) / sigma, START)

    absolute = result.covariance / result.residual_std**2
    np.testing.assert_allclose(absolute, covariance, rtol=1e-5)


def test_everything_of_minimize_comes_along():
    result = fitted()

    assert result.success
    assert result.status in ("gtol", "xtol")
    assert result.history["x"].shape == (result.nit + 1, 2)
    assert np.all(np.diff(result.history["fun"]) < 0)
    assert result.history["fun"][-1] == result.fun
    jacobian = tfgrad.jacobian(decay)(result.x).numpy()
    np.testing.assert_allclose(
        result.grad, jacobian.T @ np.asarray(result.residuals), atol=1e-12
    )


def test_it_prints_each_parameter_with_its_error():
    text = repr(fitted())

    assert "x[0]: 2.00" in text
    assert text.count("+-") == 2
    assert "10 degrees of freedom" in text


def test_nests_of_parameters_and_of_residuals():
    def misfit(p):
        both = p["size"] * tf.exp(-p["rate"][:, None] * T) - Y
        return {"first": both[0], "others": (both[1:], p["size"] - 2.0)}

    start = {"rate": np.array([0.5, 1.5]), "size": np.float64(1.0)}
    result = tfgrad.least_squares(misfit, start)

    assert result.covariance.shape == (3, 3)
    assert result.stderr["rate"].shape == (2,)
    errors = np.append(result.stderr["rate"], result.stderr["size"])
    np.testing.assert_allclose(errors, np.sqrt(np.diag(result.covariance)))
    assert result.degrees_of_freedom == 25 - 3
    assert result.residuals["others"][0].shape == (1, 12)
    # The two decays are the same.
    np.testing.assert_allclose(*np.asarray(result.x["rate"]), rtol=1e-6)


def test_variables_are_fitted_in_place_named_or_found():
    p = tf.Variable(START)
    named = tfgrad.least_squares(lambda: decay(p), wrt=p)
    np.testing.assert_array_equal(p, named.x)
    p.assign(START)
    found = tfgrad.least_squares(lambda: decay(p))

    np.testing.assert_array_equal(p, found.x)
    np.testing.assert_allclose(named.x, fitted().x)
    np.testing.assert_allclose(found.stderr, fitted().stderr)


def test_the_residuals_are_traced_once():
    calls = []

    def misfit(p):
        calls.append(p)
        return decay(p)

    tfgrad.least_squares(misfit, START)

    assert len(calls) == 1


def test_the_units_of_a_parameter_make_no_difference():
    scale = np.array([1e-6, 1e7])
    result = tfgrad.least_squares(lambda p: decay(p / scale), START * scale)

    assert result.nfev == fitted().nfev
    np.testing.assert_allclose(result.x / scale, fitted().x, rtol=1e-9)
    np.testing.assert_allclose(result.stderr / scale, fitted().stderr, rtol=1e-7)


def test_the_units_of_the_data_make_no_difference():
    result = tfgrad.least_squares(lambda p: 1e-15 * decay(p), START)

    assert result.success
    np.testing.assert_allclose(result.x, fitted().x, rtol=1e-7)


@pytest.mark.parametrize("rule", ["gtol", "ftol", "xtol", "target"])
def test_a_rule_of_minimize_takes_the_place_of_our_own(rule):
    result = tfgrad.least_squares(decay, START, **{rule: 1e-2})

    assert result.status == rule
    assert result.nit < fitted().nit


def test_a_rule_that_cannot_be_met_ends_converged():
    result = tfgrad.least_squares(decay, START, gtol=0.0, xtol=0.0)

    assert result.status == "converged"
    assert result.success
    np.testing.assert_allclose(result.x, fitted().x, rtol=1e-9)


def test_steps_callback_and_aux():
    states = []

    def misfit(p):
        return decay(p), {"half_life": np.log(2) / p[1]}

    result = tfgrad.least_squares(
        misfit, START, steps=2, has_aux=True, callback=states.append
    )

    assert (result.status, result.nit, result.success) == ("steps", 2, False)
    assert [state.step for state in states] == [1, 2]
    np.testing.assert_allclose(
        result.history["half_life"], np.log(2) / result.history["x"][:, 1]
    )
    assert np.all(np.isfinite(result.stderr))


def test_a_logged_fit_is_read_back(tmp_path):
    result = tfgrad.least_squares(decay, START, log=tmp_path)

    rows = tfgrad.load_run(result.directory)
    loss = rows[rows["tag"] == "loss"]["value"]
    assert result.directory.name == "levenberg-marquardt"
    np.testing.assert_allclose(loss, result.history["fun"], rtol=1e-6)


def test_a_fit_that_was_stopped_goes_on_to_the_same_last_bit(tmp_path):
    def stop(state):
        if state.step == 2:
            raise KeyError("pulled out")

    with pytest.raises(KeyError):
        tfgrad.least_squares(decay, START, checkpoint=tmp_path, callback=stop)
    result = tfgrad.least_squares(decay, START, checkpoint=tmp_path)

    np.testing.assert_array_equal(result.x, fitted().x)
    np.testing.assert_array_equal(result.covariance, fitted().covariance)
    np.testing.assert_array_equal(result.history["fun"], fitted().history["fun"])


def branches(p):
    return tf.cond(p[1] > 0.0, lambda: decay(p), lambda: 1.0 + tf.abs(decay(p)))


def loops(p):
    total = tf.zeros_like(T)
    for _ in tf.range(3):
        total += p[0] * tf.exp(-p[1] * T) / 3.0
    return total - Y


def masks(p):
    return tf.boolean_mask(decay(p), T >= 0.0)


@pytest.mark.parametrize("f", [branches, loops, masks])
def test_control_flow_and_unknown_shapes(f):
    result = tfgrad.least_squares(f, START)

    np.testing.assert_allclose(result.x, fitted().x, rtol=1e-7)
    np.testing.assert_allclose(result.stderr, fitted().stderr, rtol=1e-6)


def test_a_trial_that_leaves_the_domain_shortens_the_step():
    result = tfgrad.least_squares(
        lambda p: [tf.math.log(p[0]) - 1.0, tf.sqrt(p[1]) - 2.0, 0.1 * p[0] * p[1]],
        np.array([30.0, 0.01]),
    )

    assert result.success
    assert np.all(np.isfinite(result.history["fun"]))


def test_more_parameters_than_residuals():
    result = tfgrad.least_squares(lambda p: [p[0] + p[1] - 3.0], np.array([1.0, 1.0]))

    assert result.success
    np.testing.assert_allclose(np.sum(result.x), 3.0)
    assert result.degrees_of_freedom == -1
    assert np.isnan(result.residual_std)
    assert np.all(np.isinf(result.covariance))


def test_a_parameter_that_the_data_do_not_determine_has_an_infinite_error():
    result = tfgrad.least_squares(
        lambda p: decay(p[:2]) + 0.0 * p[2], np.append(START, 7.0)
    )

    assert result.success
    assert float(result.x[2]) == 7.0
    assert np.isinf(result.stderr[2])
    # One degree of freedom less than without it.
    expected = fitted().stderr.numpy() * (10 / 9) ** 0.5
    np.testing.assert_allclose(result.stderr[:2], expected, rtol=1e-6)


def test_a_start_that_is_the_solution_takes_no_step():
    design = np.stack([np.ones_like(T), T], axis=1)
    solution, *_ = np.linalg.lstsq(design, Y)

    result = tfgrad.least_squares(lambda p: tf.linalg.matvec(design, p) - Y, solution)

    assert (result.nit, result.success, result.status) == (0, True, "gtol")


def test_a_start_where_the_slope_vanishes_is_left():
    result = tfgrad.least_squares(lambda x: [x[0] ** 2 - 4.0, 0.1 * x[0]], [0.0])

    assert abs(abs(float(result.x[0])) - 2.0) < 0.01


def test_a_start_that_is_not_finite_takes_no_step():
    result = tfgrad.least_squares(decay, [np.nan, 1.0])

    assert (result.status, result.nit, result.success) == ("nonfinite", 0, False)
    assert "f is nan" in result.message


def test_many_parameters_are_fitted_without_a_matrix(monkeypatch):
    monkeypatch.setattr(sizes, "MOST_PARAMETERS", 1)
    calls = []

    def misfit(p):
        calls.append(p)
        return decay(p)

    result = tfgrad.least_squares(misfit, START)

    assert result.success
    np.testing.assert_allclose(result.x, fitted().x, rtol=1e-4)
    assert "degrees of freedom" in repr(result)
    assert "+-" not in repr(result)
    assert len(calls) == 2


def test_eigenvalues_and_singular_values_take_the_same_path(monkeypatch):
    from tfgrad.optimize import compiled, residuals
    from tfgrad.optimize.methods import levenberg_marquardt

    # What is kept was compiled for triangles.
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())
    monkeypatch.setattr(levenberg_marquardt, "MOST_FOR_QR", 1)
    monkeypatch.setattr(residuals, "MOST_FOR_QR", 1)
    result = tfgrad.least_squares(lambda p: decay(p), START)

    assert result.nfev == fitted().nfev
    np.testing.assert_allclose(result.history["x"], fitted().history["x"], rtol=1e-6)


def test_xla_takes_the_same_path():
    result = tfgrad.least_squares(decay, START, jit=True)

    assert result.nfev == fitted().nfev
    np.testing.assert_allclose(result.x, fitted().x)


REFUSED = {
    "one number": (lambda p: tf.reduce_sum(decay(p) ** 2), "squares and sums"),
    "no residual": (lambda p: p[:0], "at least one residual"),
    "another dtype": (lambda p: tf.cast(decay(p), tf.float32), "share one dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_residuals_are_refused_with_what_came(name):
    f, words = REFUSED[name]

    with pytest.raises(InvalidArgumentError, match=words):
        tfgrad.least_squares(f, START)


NOT_FLOAT = {
    "complex": lambda p: tf.complex(p, p),
    "whole": lambda p: tf.cast(p, tf.int32),
    "nothing": lambda p: None,
}


@pytest.mark.parametrize("kind", NOT_FLOAT)
def test_what_is_no_real_float_is_refused(kind):
    with pytest.raises(ScalarObjectiveError, match="real float tensor"):
        tfgrad.least_squares(NOT_FLOAT[kind], START)


def test_a_residual_that_is_cut_is_named_though_others_are_not():
    with pytest.raises(NoGradientError, match="round"):
        tfgrad.least_squares(lambda p: [decay(p), tf.round(p)], START)


@pytest.mark.parametrize(
    ("x0", "options", "words"),
    [
        (tf.constant([1.0, 2.0], tf.float16), {}, "float32 or float64"),
        ((np.float32(1), np.float64(2)), {}, "one dtype"),
        (START, {"gtol": -1.0}, "must not be negative"),
        (START, {"steps": 0}, "whole number"),
        (START, {"callback": 3}, "is a function of a"),
        (START, {"wrt": 3}, "Either `x0`"),
    ],
)
def test_bad_arguments_are_refused_before_a_trace(x0, options, words):
    def misfit(p):
        raise AssertionError("traced")

    with pytest.raises(InvalidArgumentError, match=words):
        tfgrad.least_squares(misfit, x0, **options)


@pytest.mark.parametrize("start", [0.0, 2.0, 7.0])
def test_a_fit_whose_parameters_are_all_at_bounds_is_a_solution(start):
    y = np.arange(10.0)

    for bounds, expected in (((None, 2.0), 2.0), ((6.0, None), 6.0), ((3, 3), 3.0)):
        result = tfgrad.least_squares(lambda p: p - y, np.float64(start), bounds=bounds)
        assert result.success, result.message
        assert float(result.x) == expected
    many = tfgrad.least_squares_many(
        lambda p: p[0] - y, np.full((2, 1), start), bounds=(None, 2.0)
    )
    assert np.all(many.success)


def test_a_model_that_says_nothing_at_its_bound_is_no_solution():
    t = np.arange(1.0, 5.0)

    def fitted(lower):
        return tfgrad.least_squares(
            lambda p: tf.exp(-p * t) - 1.0, np.float64(1e4), bounds=(lower, 1e4)
        )

    assert not fitted(1e3).success  # f does not change at all
    assert fitted(0).fun == 0  # beside the other bound it does, and was looked at there


def test_a_fit_goes_on_within_the_bounds_that_it_began_with():
    t = np.linspace(0, 1, 20)
    y = np.exp(-2 * t)

    def residuals(p):
        return p[0] * tf.exp(-p[1] * t) - y

    start, bounds = np.array([0.1, 0.2]), (0.0, [0.8, 5.0])
    whole = tfgrad.least_squares(residuals, start, bounds=bounds)
    begun = tfgrad.least_squares(residuals, start, bounds=bounds, steps=2)
    ended = tfgrad.least_squares(residuals, begun, steps=100)

    assert float(ended.x[0]) == 0.8
    np.testing.assert_array_equal(ended.x, whole.x)
