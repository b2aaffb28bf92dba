"""Levenberg-Marquardt within bounds and with robust losses, beside SciPy's."""

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import tfgrad
from tests.reference import cutest_like
from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.methods import losses

LOSSES = ["linear", "soft_l1", "huber", "cauchy", "arctan"]


class Fit:
    """Residuals with a loss, fitted by ours and by SciPy's `least_squares`."""

    def __init__(self, residuals, loss="linear", f_scale=1.0):
        self.residuals, self.loss = residuals, (loss, f_scale)

    def ours(self, x0, bounds=None):
        loss, f_scale = self.loss
        return tfgrad.least_squares(
            self.residuals, np.array(x0, float), bounds=bounds, loss=loss,
            f_scale=f_scale,
        )  # fmt: skip

    def scipys(self, x0, bounds):
        (loss, f_scale), tight = self.loss, 1e-14

        def jacobian(x):
            with tf.GradientTape() as tape:
                x = tf.constant(x)
                tape.watch(x)
                r = self.residuals(x)
            return tape.jacobian(r, x).numpy()

        return scipy.optimize.least_squares(
            lambda x: self.residuals(tf.constant(x)).numpy(), x0, jacobian, bounds,
            loss=loss, f_scale=f_scale, ftol=tight, xtol=tight, gtol=tight,
        )  # fmt: skip


def rosenbrock(x):
    return tf.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def decay_with_outliers():
    generator = np.random.default_rng(0)
    t = np.linspace(0, 10, 30)
    y = 0.5 + 2 * np.exp(-t) + 0.05 * generator.normal(size=30)
    y[[3, 11, 20]] += [1.5, -2, 1]
    return lambda x: x[0] + x[1] * tf.exp(x[2] * t) - y


@pytest.mark.parametrize("loss", LOSSES)
def test_costs_and_weights_are_scipys(loss):
    r, jacobian = np.array([0.01, -0.4, 2.0, -30.0]), np.arange(8.0).reshape(4, 2) - 3

    with tf.GradientTape() as tape:
        x = tf.zeros(2, tf.float64)
        tape.watch(x)
        f = losses.cost(r + tf.linalg.matvec(jacobian, x), loss, 0.7)
    weighted, weights = losses.weighted(tf.constant(r), loss, 0.7)

    scipys = scipy.optimize.least_squares(
        lambda x: r + jacobian @ x, np.zeros(2), loss=loss, f_scale=0.7, max_nfev=1
    )
    assert float(f) == pytest.approx(scipys.cost, rel=1e-12)
    gradient = jacobian.T @ (weights.numpy() * weighted.numpy())
    np.testing.assert_allclose(gradient, tape.gradient(f, x), rtol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_fits_with_outliers_end_where_scipys_do(loss):
    fit = Fit(decay_with_outliers(), loss, 0.1)

    end = fit.ours([1.0, 1.0, 0.0])

    scipys = fit.scipys([1.0, 1.0, 0.0], (-np.inf, np.inf))
    assert end.fun <= scipys.cost * (1 + 1e-9)
    np.testing.assert_allclose(end.x, scipys.x, rtol=1e-5)


BOUNDED = {
    # The documented example of SciPy's least_squares.
    "Rosenbrock": (rosenbrock, [2.0, 2.0], [-np.inf, 1.5], [np.inf, np.inf]),
    "decay": (decay_with_outliers(), [0.6, 1.0, -0.5], [0.55, 0, -0.8], [1, 1.5, 0]),
    "decay, all held": (
        decay_with_outliers(), [0.8, 0.5, -0.1], [0.7, 0, -0.3], [1, 1, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_fits_within_bounds_end_where_scipys_do(name, loss):
    residuals, x0, lower, upper = BOUNDED[name]
    fit = Fit(residuals, loss)

    end = fit.ours(x0, (np.array(lower), np.array(upper)))

    scipys = fit.scipys(x0, (lower, upper))
    assert end.fun <= scipys.cost * (1 + 1e-7)
    np.testing.assert_allclose(end.x, scipys.x, rtol=1e-4)
    path = end.history["x"]
    assert np.all((path >= lower) & (path <= upper))
    held = (end.x.numpy() == lower) | (end.x.numpy() == upper)
    np.testing.assert_array_equal(np.isnan(end.stderr), held)


def test_a_step_that_bounds_cut_short_is_no_sign_of_a_solution():
    lower, upper = [-2, 1.5], [0.5, 3]
    fit = Fit(rosenbrock, "cauchy", 0.1)

    end = fit.ours([-1.0, 2.0], (np.array(lower), np.array(upper)))

    scipys = fit.scipys([-1.0, 2.0], (lower, upper))
    assert end.success
    np.testing.assert_allclose(end.x, scipys.x, rtol=1e-6)
    assert end.x[1] == 1.5


@pytest.mark.parametrize("seed", [101, 102, 103, 104, 105])
@pytest.mark.parametrize("loss", ["soft_l1", "cauchy"])
def test_columns_of_other_sizes_leave_nobody_short_of_the_solution(loss, seed):
    generator = np.random.default_rng(seed)
    columns = generator.normal(size=(12, 5)) * 10 ** generator.uniform(-2, 2, 5)
    y = 3 * generator.normal(size=12)
    upper = 10 ** generator.uniform(-1, 1, 5)
    fit = Fit(lambda x: tf.linalg.matvec(columns, x) - y, loss)

    end = fit.ours(upper / 2, (np.zeros(5), upper))

    inside = np.clip(end.x, 1e-12 * upper, (1 - 1e-12) * upper)
    scipys = fit.scipys(inside, (np.zeros(5), upper))
    assert end.success
    assert end.fun <= scipys.cost * (1 + 1e-8)
    assert end.nfev < 100


@pytest.mark.parametrize("n", [60, 120])  # by QR, and by J'J
def test_many_parameters_at_their_bounds_take_a_few_steps(n):
    generator = np.random.default_rng(n)
    columns = generator.normal(size=(2 * n, n))
    y = columns @ generator.normal(size=n) + generator.normal(size=2 * n)

    end = Fit(lambda x: tf.linalg.matvec(columns, x) - y).ours(np.ones(n), (0.0, None))

    x, length = scipy.optimize.nnls(columns, y)
    assert end.success
    assert end.nfev < 10
    assert end.fun == pytest.approx(length**2 / 2, rel=1e-9)
    np.testing.assert_allclose(end.x, x, atol=1e-6)


def test_residuals_that_are_infinitely_steep_at_a_bound_are_not_claimed():
    def residuals(x):  # least at (0, 2), where there is no Jacobian
        return tf.stack([tf.sqrt(x[0]) + 1, x[1] - 2 + x[0]])

    for start in ([1.0, 1.0], [0.0, 1.0]):
        end = Fit(residuals).ours(start, (0.0, None))

        assert not end.success or end.fun == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["MGH09", "Misra1a", "Kirby2"])
def test_bounds_that_never_matter_change_nothing(name):
    truth = cutest_like.nist["read"](name)
    residuals = cutest_like.nist["residuals"](name, tf)
    n = len(truth.certified)
    bounds = np.full(n, -1e9), np.full(n, 1e9)

    end = Fit(residuals).ours(truth.starts[1], bounds)

    np.testing.assert_allclose(end.x, truth.certified, rtol=1e-6)


def test_errors_with_a_loss_are_those_of_curve_fit():
    residuals = decay_with_outliers()
    fit = Fit(residuals, "soft_l1", 0.1)

    end = fit.ours([1.0, 1.0, 0.0])

    _, covariance = scipy.optimize.curve_fit(
        lambda t, *p: residuals(tf.constant(p, tf.float64)).numpy(), np.arange(30.0),
        np.zeros(30), p0=end.x.numpy(), method="trf", loss="soft_l1", f_scale=0.1,
        ftol=1e-14, xtol=1e-14, gtol=1e-14,
    )  # fmt: skip
    np.testing.assert_allclose(end.covariance, covariance, rtol=2e-3, atol=1e-9)


def test_errors_beside_a_bound_are_those_of_a_fit_with_the_others_fixed():
    residuals = decay_with_outliers()
    bounded = tfgrad.least_squares(
        residuals, np.array([0.6, 1.0, -0.5]), bounds=([None, None, -0.8], None)
    )
    fixed = tfgrad.least_squares(
        lambda p: residuals(tf.concat([p, [-0.8]], 0)), np.array([0.6, 1.0])
    )

    assert float(bounded.x[2]) == -0.8
    assert np.isnan(bounded.stderr[2])
    # The degrees of freedom differ by the parameter that is held.
    ratio = bounded.residual_std / fixed.residual_std
    np.testing.assert_allclose(bounded.stderr[:2], ratio * fixed.stderr, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss": "l1"}, "'soft_l1', 'huber'"),
        ({"f_scale": 0.0}, "positive number"),
        ({"f_scale": 1e60, "loss": "huber"}, "whose square float32 holds"),
        ({"f_scale": 1e-60, "loss": "huber"}, "whose square float32 holds"),
        ({"bounds": (1.0, 0.0)}, "above its upper"),
        ({"bounds": (np.nan, None)}, "must not be NaN"),
    ],
)
def test_a_loss_and_bounds_that_cannot_be_are_refused(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        tfgrad.least_squares(lambda p: p - 1.0, [0.0, 0.0], **options)
