"""Errors of the parameters of a result, and of functions of them."""

import copy
import functools
import gc
import pickle
import weakref

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError, NoGradientError, ScalarObjectiveError
from tfgrad.optimize import uncertainty

T = np.linspace(0.0, 3.0, 12)
Y = 2.0 * np.exp(-T) + 0.01 * np.sin(9 * T)
SPD = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, -1.0], [0.5, -1.0, 5.0]])


def bowl(x):
    return tf.reduce_sum(x * tf.linalg.matvec(SPD, x)) / 2 + x[0]


def likelihood(p):
    z = (Y - p["mean"]) / tf.exp(p["log_sigma"])
    return tf.reduce_sum(z**2 / 2 + p["log_sigma"])


def curve(p):
    return p[0] * tf.exp(-p[1] * T)


@functools.cache
def minimised():
    return tfgrad.minimize(bowl, np.ones(3))


@functools.cache
def fitted():
    return tfgrad.least_squares(lambda p: curve(p) - Y, np.array([1.0, 0.5]))


def test_the_covariance_of_a_minimum_is_the_inverse_of_its_hessian():
    result = minimised()

    np.testing.assert_allclose(result.covariance, np.linalg.inv(SPD), rtol=1e-12)
    np.testing.assert_allclose(result.stderr**2, np.diag(np.linalg.inv(SPD)))


def test_a_normal_likelihood_has_the_errors_of_the_textbook():
    start = {"mean": np.float64(0.0), "log_sigma": np.float64(0.0)}

    result = tfgrad.minimize(likelihood, start)

    n, sigma = len(Y), np.std(Y)
    # In the order of tf.nest: log_sigma, mean.
    expected = np.diag([1 / (2 * n), sigma**2 / n])
    np.testing.assert_allclose(result.covariance, expected, rtol=1e-6, atol=1e-9)
    assert float(result.stderr["mean"]) == pytest.approx(sigma / n**0.5)
    error = result.error_of(lambda p: {"sigma": tf.exp(p["log_sigma"])})
    assert float(error["sigma"]) == pytest.approx(sigma / (2 * n) ** 0.5)


def test_the_units_of_x_and_of_f_make_no_difference():
    unit = np.array([1e-9, 1.0, 1e8])

    result = tfgrad.minimize(lambda x: bowl(x / unit), unit)

    scaled = result.covariance / np.outer(unit, unit)
    np.testing.assert_allclose(scaled, np.linalg.inv(SPD), rtol=1e-7)


def test_at_a_bound_nothing_is_known_and_of_the_others_all():
    bounds = ([None, 0.3, None], None)

    result = tfgrad.minimize(bowl, np.ones(3), bounds=bounds)

    assert float(result.x[1]) == 0.3
    free = np.linalg.inv(SPD[np.ix_([0, 2], [0, 2])])
    np.testing.assert_allclose(result.covariance[np.ix_([0, 2], [0, 2])], free)
    assert np.all(np.isnan(result.covariance[1]))
    np.testing.assert_array_equal(np.isnan(result.stderr), [False, True, False])
    assert np.isnan(result.error_of(lambda x: x[0] * x[1]))
    error = result.error_of(lambda x: x[0] + 2 * x[2])
    assert float(error) == pytest.approx(np.sqrt([1, 2] @ free @ [1, 2]))


def test_a_bound_that_float32_rounds_is_a_bound():
    result = tfgrad.minimize(
        lambda x: tf.reduce_sum((x + 1) ** 2), [3.0, 2.0], bounds=([0.1, None], None)
    )

    np.testing.assert_array_equal(np.isnan(result.stderr), [True, False])


def test_a_parameter_with_equal_bounds_is_no_parameter():
    held = tfgrad.least_squares(
        lambda p: curve(p) - Y, np.array([1.0, 0.5]), bounds=([None, 0.9], [None, 0.9])
    )
    without = tfgrad.least_squares(lambda p: p * np.exp(-0.9 * T) - Y, np.float64(1.0))

    assert held.degrees_of_freedom == without.degrees_of_freedom == 11
    np.testing.assert_allclose(held.x[0], without.x)
    np.testing.assert_allclose(held.stderr[0], without.stderr)
    assert np.isnan(held.stderr[1])


def test_where_all_is_held_nothing_is_known():
    held = tfgrad.least_squares(lambda p: p - 2.0, np.ones(2), bounds=(0.0, 1.0))
    minimum = tfgrad.minimize(bowl, np.ones(3), bounds=(2.0, 2.0))

    assert np.all(np.isnan(held.covariance))
    assert np.all(np.isnan(minimum.stderr))
    assert float(held.error_of(lambda p: 0.0 * p[0])) == 0.0


def test_variables_have_errors_and_stay_where_they_are():
    x, shift = tf.Variable(np.ones(3)), tf.Variable(np.zeros(2))
    result = tfgrad.minimize(
        lambda: bowl(x) + tf.reduce_sum((shift - 1) ** 2), wrt={"x": x, "shift": shift}
    )
    x.assign([7.0, 8.0, 9.0])

    errors = result.stderr
    by_values = result.error_of(lambda p: p["x"][0] * p["shift"])
    by_variables = result.error_of(lambda: x[0] * shift)

    np.testing.assert_allclose(errors["shift"], [0.5**0.5] * 2)
    np.testing.assert_allclose(errors["x"], minimised().stderr)
    np.testing.assert_array_equal(x, [7.0, 8.0, 9.0])
    np.testing.assert_allclose(by_values, by_variables)
    a, b = np.linalg.inv(SPD)[0, 0], float(result.x["x"][0])
    np.testing.assert_allclose(by_values, np.sqrt([a + b**2 / 2] * 2), rtol=1e-6)


def test_the_band_of_a_curve_is_that_of_the_whole_matrix():
    fit = fitted()

    band = fit.error_of(curve)

    rows = tfgrad.jacobian(curve)(fit.x).numpy()
    expected = np.sqrt(np.einsum("ni,ij,nj->n", rows, fit.covariance, rows))
    np.testing.assert_allclose(band, expected)


def test_what_the_data_determine_has_an_error_though_its_parts_have_none():
    fit = tfgrad.least_squares(
        lambda p: (p[0] + 1e6 * p[1]) * tf.exp(-T) - Y, np.array([1.0, 1e-6])
    )

    assert np.all(np.isinf(fit.stderr))
    assert np.isinf(fit.error_of(lambda p: p[0] - 1e6 * p[1]))
    alone = tfgrad.least_squares(lambda p: p * tf.exp(-T) - Y, np.float64(1.0))
    ratio = float(alone.residual_std / fit.residual_std)
    known = float(fit.error_of(lambda p: p[0] + 1e6 * p[1]))
    assert known * ratio == pytest.approx(float(alone.stderr), rel=1e-6)


@pytest.mark.parametrize("most", [uncertainty.MOST_ELEMENTS, 1000])
def test_a_large_fit_has_errors_by_its_jacobian_and_by_products(monkeypatch, most):
    n = 30
    monkeypatch.setattr("tfgrad.optimize.residuals.MOST_PARAMETERS", 5)
    monkeypatch.setattr(uncertainty, "MOST_ELEMENTS", most)
    design = np.random.default_rng(0).normal(size=(50, n)) * np.arange(1, n + 1)
    y = np.sin(np.arange(50.0))

    fit = tfgrad.least_squares(lambda p: tf.linalg.matvec(design, p) - y, np.zeros(n))

    _, rss, *_ = np.linalg.lstsq(design, y)
    expected = rss / 20 * np.linalg.inv(design.T @ design)
    np.testing.assert_allclose(fit.covariance, expected, rtol=1e-5, atol=1e-12)
    band = np.sqrt(np.einsum("ni,ij,nj->n", design, expected, design))
    np.testing.assert_allclose(
        fit.error_of(lambda p: tf.linalg.matvec(design, p)), band, rtol=1e-6
    )


def test_a_hessian_that_is_not_positive_is_refused_with_its_least_eigenvalue():
    saddle = tfgrad.minimize(lambda x: x[0] ** 2 - x[1] ** 2, [1.0, 0.3], steps=1)
    valley = tfgrad.minimize(lambda x: (x[0] + x[1] - 3) ** 2, np.zeros(2))

    with pytest.raises(InvalidArgumentError, match="smallest eigenvalue is -2"):
        saddle.covariance  # noqa: B018
    with pytest.raises(InvalidArgumentError, match="hold, by bounds"):
        valley.stderr  # noqa: B018


def test_errors_are_refused_where_f_has_none():
    x = np.arange(8.0, dtype=np.float32)
    scale = tf.Variable(1.0)
    drawn = tfgrad.minimize(
        lambda p: (p - tf.random.normal([])) ** 2, 1.0, method="sgd", steps=2
    )
    trained = tfgrad.minimize(
        lambda p, x: tf.reduce_mean((p - x) ** 2), 1.0, data=x, batch_size=4, epochs=1
    )
    held = tfgrad.minimize(
        lambda p: p**2, 1.0, method="scipy:slsqp",
        constraints={"type": "ineq", "fun": lambda p: p - 1},
    )  # fmt: skip
    changed = tfgrad.minimize(lambda p: scale * ((p - 1) ** 2 + 1), 3.0)
    scale.assign(2.0)

    for result, words in [
        (drawn, "draws random"), (trained, "over `data=`"),
        (held, "constraints"), (changed, "has changed"),
    ]:  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=words):
            result.stderr  # noqa: B018


def test_a_pickle_of_a_fit_knows_errors_and_one_of_a_minimum_says_why_not():
    fit = pickle.loads(pickle.dumps(fitted()))
    minimum = pickle.loads(pickle.dumps(minimised()))

    np.testing.assert_array_equal(fit.covariance, fitted().covariance)
    np.testing.assert_array_equal(fit.error_of(curve), fitted().error_of(curve))
    assert "+-" in repr(fit)
    with pytest.raises(InvalidArgumentError, match="pickle"):
        minimum.covariance  # noqa: B018
    assert repr(minimum) == repr(minimised())
    np.testing.assert_array_equal(copy.copy(minimised()).stderr, minimised().stderr)


def test_nothing_is_computed_or_traced_before_it_is_asked_for():
    calls = []

    def f(x):
        calls.append(x)
        return bowl(x)

    result = tfgrad.minimize(f, np.ones(3))
    before = len(calls)
    repr(result)

    assert (before, len(calls)) == (1, 1)
    assert result.covariance.shape == (3, 3)
    after = len(calls)
    assert result.stderr.shape == (3,)
    assert len(calls) == after > before


def test_a_result_holds_no_trace_of_its_function():
    made = []

    def f(x):
        made.append(weakref.ref(tf.compat.v1.get_default_graph()))
        return bowl(x)

    result = tfgrad.minimize(f, np.ones(3))
    gc.collect()

    assert all(graph() is None for graph in made)
    assert result.success


def test_a_function_with_aux_values_and_one_that_was_traced_already():
    with_aux = tfgrad.minimize(
        lambda x: (bowl(x), {"first": x[0]}), np.ones(3), has_aux=True
    )
    traced = tfgrad.minimize(tf.function(bowl), np.ones(3))

    for result in (with_aux, traced):
        np.testing.assert_allclose(result.stderr, minimised().stderr)


def test_a_function_of_the_parameters_that_has_no_derivative_is_refused():
    with pytest.raises(NoGradientError, match="round"):
        fitted().error_of(tf.round)
    with pytest.raises(ScalarObjectiveError, match="float"):
        fitted().error_of(lambda p: "a word")


def test_float32_keeps_its_dtype():
    result = tfgrad.minimize(lambda x: tf.reduce_sum((x - 1) ** 2), [3.0, 2.0])

    assert result.covariance.dtype == np.float32
    assert result.stderr.dtype == tf.float32
    assert result.error_of(lambda x: tf.cast(x, tf.float64)).dtype == tf.float64
    np.testing.assert_allclose(result.stderr, 0.5**0.5, rtol=1e-6)


@pytest.mark.parametrize("g", [lambda: 3.0, lambda a, b: a, 3], ids=["0", "2", "none"])
def test_what_does_not_take_the_parameters_is_refused(g):
    with pytest.raises(InvalidArgumentError, match="a function of the parameters"):
        minimised().error_of(g)


def test_errors_within_a_graph_are_refused_with_what_to_do():
    result = minimised()

    with pytest.raises(InvalidArgumentError, match="before it is called"):
        tf.function(lambda: result.error_of(lambda x: x[0]))()


def test_empty_leaves_and_empty_answers_have_no_errors():
    start = {"none": np.zeros(0), "some": np.ones(2)}
    result = tfgrad.minimize(
        lambda p: tf.reduce_sum(p["some"] ** 2) / 2 + tf.reduce_sum(p["none"]), start
    )

    assert result.stderr["none"].shape == (0,)
    np.testing.assert_allclose(result.stderr["some"], [1, 1])
    assert result.error_of(lambda p: p["some"][:0]).shape == (0,)
