"""SciPy's methods through `minimize`, against closed forms and SciPy called directly.

HS71: Hock and Schittkowski (1981), Test Examples for Nonlinear Programming Codes.
"""

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import tfgrad
from tfgrad.optimize.methods.scipy import SCIPY

START = np.array([-1.2, 1.0])
# COBYLA's planes crawl along the valley: thousands of iterations, directly as well.
SMOOTH = sorted(SCIPY.keys() - {"scipy:cobyla"})
BOUNDED = sorted(name for name, m in SCIPY.items() if m.bounds)
CONSTRAINED = sorted(name for name, m in SCIPY.items() if m.constraints)


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def bowl(x):
    return (x[0] - 3) ** 2 + 2 * (x[1] + 1) ** 2 + x[0] * x[1]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_method_finds_the_minimum_by_its_own_rule(name, dtype):
    result = tfgrad.minimize(rosenbrock, START.astype(dtype), method=name)

    assert result.status == "scipy"
    assert result.message.startswith("SciPy ended: ")
    # SciPy's tolerances are for float64; in float32 it says what it could not reach.
    assert result.success or dtype == "float32"
    assert result.x.dtype == dtype
    atol = 2e-2 if dtype == "float32" else 5e-4  # what SciPy's defaults leave
    np.testing.assert_allclose(result.x, [1, 1], atol=atol)
    assert list(result.history["step"]) == list(range(result.nit + 1))
    np.testing.assert_array_equal(result.history["x"][0], START.astype(dtype))


@pytest.mark.parametrize(
    "name", ["bfgs", "cg", "l-bfgs-b", "nelder-mead", "trust-ncg", "trust-exact"]
)
def test_the_iterates_are_those_of_scipy_called_directly(name):
    visited = [START]
    method = SCIPY[f"scipy:{name}"]
    hess = {"hess": scipy.optimize.rosen_hess} if method.second else {}
    direct = scipy.optimize.minimize(
        scipy.optimize.rosen,
        START,
        method=name,
        jac=scipy.optimize.rosen_der if method.gradient else None,
        callback=lambda x: visited.append(np.array(x)),
        **hess,
    )

    result = tfgrad.minimize(rosenbrock, START, method=f"scipy:{name}")

    count = min(len(visited), result.nit, 20)
    np.testing.assert_allclose(result.history["x"][:count], visited[:count], rtol=1e-6)
    assert result.nfev <= 1.1 * direct.nfev + (80 if name == "nelder-mead" else 3)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_that_is_active_at_the_solution(name):
    # On x[1] >= 0 the least is at x[0] = 3: the slope along x[1] is 4 + 3.
    start = np.array([1.0, 2.0])

    result = tfgrad.minimize(bowl, start, method=name, bounds=(0.0, None))

    assert (result.status, result.success) == ("scipy", True)
    np.testing.assert_allclose(result.x, [3, 0], atol=2e-4)
    np.testing.assert_allclose(result.grad[1], 7, atol=1e-3)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_hs71(name):
    result = tfgrad.minimize(
        lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        np.array([1.0, 5, 5, 1]),
        method=name,
        bounds=(1.0, 5.0),
        constraints=[
            {"type": "ineq", "fun": lambda x: tf.reduce_prod(x) - 25},
            {"type": "eq", "fun": lambda x: tf.reduce_sum(x**2) - 40},
        ],
    )

    assert result.success, result
    assert result.fun == pytest.approx(17.0140173, abs=2e-5)
    np.testing.assert_allclose(
        result.x, [1, 4.7429994, 3.8211503, 1.3794082], atol=1e-4
    )


@pytest.mark.parametrize("name", CONSTRAINED)
def test_rosenbrock_in_a_disk(name):
    disk = scipy.optimize.NonlinearConstraint(
        lambda x: x[0] ** 2 + x[1] ** 2, -np.inf, 1.0
    )

    result = tfgrad.minimize(rosenbrock, np.zeros(2), method=name, constraints=disk)

    assert result.success, result
    np.testing.assert_allclose(result.x, [0.7864151542, 0.6176983125], atol=1e-4)


def test_nests_variables_and_numpy_constraints_agree():
    def f(p):
        return (p["a"] - 1) ** 2 + (p["b"] - 2) ** 2

    a, b = tf.Variable(0.0, dtype=tf.float64), tf.Variable(0.0, dtype=tf.float64)
    results = [
        tfgrad.minimize(
            f,
            {"a": np.float64(0), "b": np.float64(0)},
            method="scipy:slsqp",
            bounds=({"a": 0.0, "b": None}, {"a": None, "b": 1.2}),
            constraints={"type": "ineq", "fun": lambda p: 2 - p["a"] - p["b"]},
        ),
        tfgrad.minimize(
            f,
            {"a": np.float64(0), "b": np.float64(0)},
            method="scipy:slsqp",
            bounds=scipy.optimize.Bounds([0, -np.inf], [np.inf, 1.2]),
            constraints=scipy.optimize.LinearConstraint([[1, 1]], -np.inf, 2),
        ),
        tfgrad.minimize(
            f,
            {"a": np.float64(0), "b": np.float64(0)},
            method="scipy:slsqp",
            bounds=[(0, None), (None, 1.2)],
            constraints={"type": "ineq", "fun": lambda p: 2 - np.add(p["a"], p["b"])},
        ),
        tfgrad.minimize(
            lambda: f({"a": a, "b": b}),
            wrt={"a": a, "b": b},
            method="scipy:slsqp",
            bounds=(None, {"a": 9.0, "b": 1.2}),
            constraints={"type": "ineq", "fun": lambda: 2 - a - b},
        ),
    ]

    for result in results:
        assert result.success, result
        assert float(result.x["a"]) == pytest.approx(0.8, abs=1e-6)
        assert float(result.x["b"]) == pytest.approx(1.2, abs=1e-6)
    assert (float(a), float(b)) == (results[-1].x["a"], results[-1].x["b"])


def test_a_constraint_that_cannot_be_kept_is_no_success():
    for second in (lambda x: x[0] + 1, lambda x: x[0] + x[1] - 4):
        result = tfgrad.minimize(
            lambda x: x[0] ** 2 + x[1],
            np.array([0.3, -0.1]),
            method="scipy:slsqp",
            constraints=[
                {"type": "eq", "fun": lambda x: x[0] ** 2 + x[1] ** 2 - 0.5},
                {"type": "eq", "fun": second},
            ],
        )

        assert (result.status, result.success) == ("infeasible", False)
        assert "A limit is broken by" in result.message
        # SciPy by itself, told the derivatives, strays until its limit of 100.
        assert result.nit <= 75


def test_a_kink_is_a_minimum_for_a_method_without_gradients():
    result = tfgrad.minimize(
        lambda x: tf.abs(x[0] - 1) + 0.3 * x[0], np.array([9.0]),
        method="scipy:nelder-mead",
    )  # fmt: skip

    assert (result.status, result.success) == ("scipy", True)
    assert "terminated successfully" in result.message
    assert float(result.x[0]) == pytest.approx(1)


@pytest.mark.parametrize("method", ["scipy:l-bfgs-b", "scipy:cobyqa"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_method_backs_off_where_f_has_no_value_and_arrives(bad, method):
    y = np.array([1.1, 0.2, 0.7, 1.9, 1.4])

    def likelihood(p):  # of a normal distribution, NaN at sigma = 0
        z = (y - p["mean"]) / p["sigma"]
        value = tf.reduce_mean(z**2) / 2 + tf.math.log(p["sigma"])
        return tf.where(tf.math.is_finite(value), value, bad)

    result = tfgrad.minimize(
        likelihood,
        {"mean": np.float64(30.0), "sigma": np.float64(0.05)},
        method=method,
        bounds=({"mean": None, "sigma": 0.0}, None),
    )

    assert result.success
    assert float(result.x["mean"]) == pytest.approx(np.mean(y), abs=1e-4)
    assert float(result.x["sigma"]) == pytest.approx(np.std(y), abs=1e-4)


Y = np.random.default_rng(0).normal(3.0, 0.5, 40)


def normal(p):  # minus the log likelihood, NaN for a negative sigma
    return tf.reduce_mean(tf.math.log(p[1]) + ((Y - p[0]) / p[1]) ** 2 / 2)


def test_slsqp_comes_back_from_points_without_a_value():
    result = tfgrad.minimize(normal, np.array([3.0, 30.0]), method="scipy:slsqp")

    assert result.success
    np.testing.assert_allclose(result.x, [Y.mean(), Y.std()], rtol=1e-3)
    assert "terminated successfully" not in result.message  # it met a NaN


def test_no_word_of_convergence_at_a_short_step_back_from_a_nan():
    result = tfgrad.minimize(
        normal, np.array([3.0, 3000.0]), method="scipy:l-bfgs-b",
        bounds=([-np.inf, 0.0], [np.inf, np.inf]),
    )  # fmt: skip

    is_there = result.fun < np.log(Y.std()) + 0.5 + 1e-6
    assert result.success == is_there
    assert "CONVERGENCE" not in result.message


def test_the_verdict_of_a_run_before_a_saddle_is_not_that_of_the_next():
    result = tfgrad.minimize(normal, np.array([3.0, 3000.0]), method="scipy:slsqp")

    assert not (result.status == "nonfinite" and result.success)
