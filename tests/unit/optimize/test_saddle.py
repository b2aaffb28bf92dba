"""Maxima and saddles: nobody is told that they are minima."""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tests.reference import more_garbow_hillstrom
from tfgrad.optimize import saddle as saddle_module
from tfgrad.optimize.saddle import PRODUCTS, curvatures, lower_points


def saddle(x):
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


def bounded_monkey(x):
    return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + tf.reduce_sum(x**4)


STATIONARY = {
    "a saddle": (saddle, [0, 0], -0.25),
    "a monkey saddle": (bounded_monkey, [0, 0], -0.52734375),
    "a flat maximum": (lambda x: 1 - x[0] ** 4 + x[0] ** 6, [0], 1 - 4 / 27),
}


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
@pytest.mark.parametrize("name", STATIONARY)
def test_a_start_is_left_that_is(name, method):
    f, start, least = STATIONARY[name]

    result = tfgrad.minimize(f, np.array(start, float), method=method)

    assert result.success
    assert result.fun == pytest.approx(least, abs=1e-6)
    assert result.history["fun"][0] == f(np.array(start, float))
    assert np.all(np.diff(result.history["fun"]) <= 1e-15)  # rounding, at the end
    assert list(result.history["step"]) == list(range(result.nit + 1))


WITHIN = {
    "a maximum": (lambda x: -tf.reduce_sum(x**2), [0, 0], (-1, 1), -2),
    "a saddle": (lambda x: x[0] ** 2 - x[1] ** 2, [0.5, 0], (-1, 1), -1),
    "a corner": (lambda x: -tf.reduce_sum(x**2), [0, 0], (0, 1), -2),
    "one of two bounds": (lambda x: x[0] - x[1] ** 2, [1, 0], (0, 1), -1),
    "held": (lambda x: x[0] ** 2 - x[1] ** 2, [1, 0], ([-1, 0], [1, 0]), 0),
    "a minimum": (lambda x: tf.reduce_sum(x**2), [0, 0], (0, 1), 0),
    "a lower one far off": (lambda x: valley(x[0]) + valley(x[1]), [0, 0], (0, 3), 0),
}


def valley(x):
    return (x - x**2) ** 2 - x**3 / 100


@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", ["lbfgs", "scipy:l-bfgs-b", "many"])
def test_what_is_stationary_within_bounds_is_left_and_no_bound_passed(
    name, dtype, method
):
    f, start, bounds, least = WITHIN[name]
    lower, upper = (np.broadcast_to(b, 2).astype(dtype) for b in bounds)

    def watched(x):
        inside = tf.reduce_all((x >= lower) & (x <= upper))
        return tf.where(inside, f(x), np.nan)

    if method == "many":
        starts = np.array([start, [0.9, 0.3]], dtype)
        result = tfgrad.minimize_many(watched, starts, bounds=(lower, upper))
        assert result.success[0]
        assert result.fun[0] == pytest.approx(least, abs=1e-6)
        return
    result = tfgrad.minimize(
        watched, np.array(start, dtype), bounds=(lower, upper), method=method
    )

    assert result.success
    assert result.fun == pytest.approx(least, abs=1e-6)
    assert np.all(np.isfinite(result.history["fun"]))


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
def test_a_maximum_without_end_is_unbounded(method):
    result = tfgrad.minimize(lambda x: -(x**2), np.float64(0), method=method)

    assert result.status == "unbounded"


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
@pytest.mark.parametrize(
    ("f", "start"), [(lambda x: 0 * x + 7, 3.0), (lambda x: x**4, 0.0)]
)
def test_a_start_at_a_minimum_is_kept(f, start, method):
    result = tfgrad.minimize(f, start, method=method)

    assert result.status == "converged"
    assert float(result.x) == start
    assert result.nit == 0


def rotated(f, angle):
    def g(x):
        c, s = np.cos(angle), np.sin(angle)
        return f([c * x[0] + s * x[1], c * x[1] - s * x[0]])

    return g


@pytest.mark.parametrize("angle", [0, np.pi / 4, 0.4, 2.0])
def test_lbfgs_does_not_end_at_a_saddle_that_a_ridge_leads_to(angle):
    ridge = np.array([np.cos(angle), np.sin(angle)])

    result = tfgrad.minimize(rotated(saddle, angle), ridge)

    assert result.success
    assert result.fun == pytest.approx(-0.25, abs=1e-12)


def test_a_saddle_of_many_parameters_is_left_that_symmetry_leads_to():
    def f(x):  # all equal, all stay equal
        return (
            tf.reduce_sum((x - 1) ** 4)
            - 200 * tf.math.reduce_variance(x)
            + tf.reduce_sum(x**4)
        )

    result = tfgrad.minimize(f, np.full(12, 3.0))

    assert result.success
    assert np.ptp(result.x) > 0.1


@pytest.mark.parametrize("power", [2, 4, 6])
def test_a_minimum_is_not_left_however_flat(power):
    result = tfgrad.minimize(lambda x: tf.reduce_sum(x**power), np.array([1.0, 2.0]))

    assert result.success
    assert result.nit < 100


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_newton_does_not_end_at_a_saddle_that_its_steps_lead_to(dtype):
    # On this line the gradient has no part along the descent.
    result = tfgrad.minimize(saddle, np.array([1, 0], dtype), method="newton")

    assert result.success
    assert result.fun == pytest.approx(-0.25, abs=1e-3 if dtype == "float32" else 1e-6)
    # The saddle is in the history, but it was not the end.
    assert np.any(np.all(np.abs(result.history["x"]) < 1e-6, axis=1))


@pytest.mark.parametrize("method", ["newton", "lbfgs"])
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_an_inflection_that_the_steps_lead_to_is_left(level, method):
    def f(x):
        return x[0] ** 3 + x[1] ** 2 + level

    result = tfgrad.minimize(f, np.ones(2), method=method)

    assert result.status == "unbounded"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_flat_inflection_is_left_where_its_rounding_hides_it(dtype):
    result = tfgrad.minimize(lambda x: x**7 + 2, np.array(0, dtype))

    assert result.status == "unbounded"


def test_gradients_that_underflow_are_no_minimum():
    result = tfgrad.minimize(lambda x: -tf.math.log(1 + x**2), np.float32(1))

    assert not result.success
    assert result.fun < -88


WATSON = more_garbow_hillstrom.PROBLEMS["20 Watson 12"]


@pytest.mark.parametrize("units", [(1, 1), (1e-12, 1), (1, 1e6), (1, 1e-6)])
def test_what_a_flat_direction_hides_is_found_in_any_units(units):
    of_f, of_x = units

    def f(x):
        return of_f * WATSON.objective(x / of_x)

    result = tfgrad.minimize(f, of_x * np.array(WATSON.start, float))

    # Rounding ends the searches; from 2.7e-9 on, only second derivatives see the way.
    assert result.fun / of_f == pytest.approx(WATSON.minima[0], rel=1e-5)
    assert result.success


def test_the_users_own_rule_is_not_gone_beyond():
    result = tfgrad.minimize(lambda x: tf.reduce_sum(x**4) + 1, np.ones(3), gtol=0.1)

    assert result.status == "gtol"
    assert result.fun > 1 + 1e-4


def test_variables_end_where_the_result_says():
    x = tf.Variable([0.0, 0.0], dtype=tf.float64)

    result = tfgrad.minimize(lambda: saddle(x), wrt=x, method="newton")

    assert np.array_equal(x, result.x)
    assert abs(float(x[1])) == pytest.approx(0.5**0.5)


def test_a_function_without_second_derivative_is_left_alone():
    @tf.custom_gradient
    def once(x):
        def grad(upstream):
            def refuse(_):
                raise NotImplementedError("no second derivative")

            return tf.custom_gradient(lambda u: (2 * x * u, refuse))(upstream)

        return x**2, grad

    assert tfgrad.minimize(once, 0.0).status == "converged"


def lower_point(x, fun, grad, *, product, value, epsilon):
    def products(directions):
        return product(directions[0])[None]

    points, is_lower = lower_points(
        x[None], np.array([fun]), grad[None], np.ones(1),
        curvatures(products, (1, len(x)), epsilon, PRODUCTS),
        value=lambda points: np.array([value(points[0])]), epsilon=epsilon,
    )  # fmt: skip
    return points[0] if is_lower[0] else None


def quadratic(matrix):
    return {
        "product": lambda v: matrix @ v,
        "value": lambda x: float(x @ matrix @ x / 2),
        "epsilon": 2.0**-52,
    }


def test_one_negative_eigenvalue_among_many_is_found():
    generator = np.random.default_rng(4)
    q, _ = np.linalg.qr(generator.normal(size=(200, 200)))
    matrix = q @ np.diag([-1, *np.linspace(0.1, 10, 199)]) @ q.T

    lower = lower_point(np.zeros(200), 0.0, np.zeros(200), **quadratic(matrix))

    assert lower @ matrix @ lower < -0.5 * lower @ lower


@pytest.mark.parametrize("beyond", [np.nan, np.inf, -np.inf])
def test_a_way_down_beside_the_end_of_the_domain_is_found(beyond):
    ways = quadratic(np.array([[-1.0]]))
    ways["value"] = lambda x: beyond if x[0] > 0 else float(-(x[0] ** 2))

    lower = lower_point(np.zeros(1), 0.0, np.zeros(1), **ways)

    assert lower is not None
    assert lower[0] < 0


def test_millions_of_parameters_take_no_more_memory_than_a_few_vectors(monkeypatch):
    monkeypatch.setattr(saddle_module, "MOST_NUMBERS", 30)
    taken = []

    def product(v):
        taken.append(v)
        return -v * np.arange(len(v))

    ways = quadratic(np.eye(10)) | {"product": product}
    lower_point(np.zeros(10), 0.0, np.zeros(10), **ways)
    assert len(taken) == 3
    assert lower_point(np.zeros(20), 0.0, np.zeros(20), **ways) is None
    assert len(taken) == 3


def test_a_definite_matrix_and_one_that_is_not_finite_have_no_way_down():
    x = np.zeros(3)

    for matrix in (np.diag([1.0, 2, 3]), np.diag([1.0, np.nan, 3]), np.eye(3)):
        assert lower_point(x, 0.0, x, **quadratic(matrix)) is None
