"""The derivatives of solutions: closed forms, high precision, jaxopt's numbers."""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad

ROW, COLUMN = np.mgrid[0:12, 0:4]
INPUTS = np.sin(1.0 + ROW * (COLUMN + 1))
TARGETS = np.cos(3.0 * np.arange(12))
LABELS = np.where(TARGETS > 0, 1.0, -1.0)
FIT, CHOOSE = slice(0, 8), slice(8, 12)


@tf.function  # a plain function is traced at each call
def ridge(w, penalty):
    error = tf.linalg.matvec(INPUTS[FIT], w) - TARGETS[FIT]
    return tf.reduce_mean(error**2) + penalty * tf.reduce_sum(w * w) / 2


@tf.function
def logistic(w, penalty):
    margin = LABELS * tf.linalg.matvec(INPUTS, w)
    return (
        tf.reduce_mean(tf.math.softplus(-margin)) + penalty * tf.reduce_sum(w * w) / 2
    )


def fitted(f):
    return lambda penalty: tfgrad.solution(f, np.zeros(4), penalty)


def chosen_by(penalty):
    error = tf.linalg.matvec(INPUTS[CHOOSE], fitted(ridge)(penalty)) - TARGETS[CHOOSE]
    return tf.reduce_mean(error**2)


# By jaxopt 0.8.5 in float64, jaxopt.LBFGS(f, tol=1e-14).run(jnp.zeros(4), penalty) and
# jax.jacrev of that, at a penalty of 0.1: its documented examples of implicit
# differentiation (docs/implicit_diff.rst), on data of our own.
JAXOPT = {
    ridge: (
        [-0.07379682601087727, -0.0049218429610464, 1.3020981775857112,
         -0.10608607694623118],
        [0.20178900009130973, 0.1912305596634047, -2.1383172229046106,
         0.5633926406587185],
    ),
    logistic: (
        [0.04521540110688656, 0.25019893856988384, 0.6038513082700857,
         0.23316759260029898],
        [-0.16283354907825148, -1.7082493584612315, -3.9026427517362614,
         -1.263502815147537],
    ),
}  # fmt: skip


@pytest.mark.parametrize("f", JAXOPT, ids=["ridge", "logistic"])
def test_the_numbers_of_jaxopt(f):
    w, slope = JAXOPT[f]

    np.testing.assert_allclose(fitted(f)(np.float64(0.1)), w, rtol=1e-12)
    found = tfgrad.jacobian(fitted(f))(np.float64(0.1))
    np.testing.assert_allclose(found, slope, rtol=1e-10)


def test_the_error_of_jaxopts_ridge_on_other_data_and_its_slope():
    value, slope = tfgrad.value_and_grad(chosen_by)(np.float64(0.1))

    np.testing.assert_allclose(value, 0.4698270726359317, rtol=1e-12)
    np.testing.assert_allclose(slope, -1.1763196121516872, rtol=1e-10)


def solved(matrix, side):
    """Return the solution of linear equations, by Gauss, in the dtype of the matrix."""
    both = np.concatenate([matrix, side[:, None]], 1)
    for k in range(len(both)):
        pivot = k + int(np.argmax(np.abs(both[k:, k])))
        both[[k, pivot]] = both[[pivot, k]]
        both[k] /= both[k, k]
        others = np.arange(len(both)) != k
        both[others] -= both[others, k : k + 1] * both[k]
    return both[:, -1]


def logistic_precisely(penalty):
    """Return the weights in extended precision, by Newton's method."""
    x, labels = INPUTS.astype(np.longdouble), LABELS.astype(np.longdouble)
    w = np.zeros(4, np.longdouble)
    for _ in range(30):
        part = 1 / (1 + np.exp(labels * (x @ w)))
        gradient = -(labels * part) @ x / 12 + penalty * w
        curved = (x.T * (part * (1 - part))) @ x / 12
        w -= solved(curved + penalty * np.eye(4, dtype=np.longdouble), gradient)
    return w


def test_logistic_regression_against_central_differences_in_high_precision():
    step = np.longdouble(2) ** -14
    ahead, behind = (logistic_precisely(np.longdouble(0.1) + k * step) for k in (1, -1))
    far_ahead, far_behind = (
        logistic_precisely(np.longdouble(0.1) + 2 * k * step) for k in (1, -1)
    )
    # Central differences, extrapolated: the error is of the fourth order.
    slope = (8 * (ahead - behind) - (far_ahead - far_behind)) / (12 * step)

    found = tfgrad.jacobian(fitted(logistic))(np.float64(0.1))

    np.testing.assert_allclose(found, slope.astype(np.float64), rtol=1e-11)


def test_a_quadratic_program_moves_as_the_inverse_says():
    matrix = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 2.0]])

    def quadratic(x, b):
        return tf.tensordot(x, tf.linalg.matvec(matrix, x), 1) / 2 - tf.tensordot(
            b, x, 1
        )

    b = np.array([1.0, -2.0, 3.0])

    def at(b):
        return tfgrad.solution(quadratic, np.zeros(3), b)

    np.testing.assert_allclose(at(b), np.linalg.solve(matrix, b), rtol=1e-13)
    for mode in ("reverse", "auto"):
        found = tfgrad.jacobian(at, mode=mode)(b)
        np.testing.assert_allclose(found, np.linalg.inv(matrix), rtol=1e-12)


@pytest.mark.parametrize("f", JAXOPT, ids=["ridge", "logistic"])
def test_check_grads_passes_on_closed_forms(f):
    assert tfgrad.check_grads(fitted(f), np.float64(0.1), order=1)


def test_the_hessian_of_a_solution_is_that_of_the_closed_form():
    # x = (c + d) / (2 + c**2), of two arguments at once.
    def f(x, a):
        return x * x * (1 + a[0] ** 2 / 2) - (a[0] + a[1]) * x

    def exactly(a):
        return (a[0] + a[1]) / (2 + a[0] ** 2)

    a = np.array([1.0, 2.0])
    found = tfgrad.hessian(lambda a: tfgrad.solution(f, np.float64(0), a))(a)

    np.testing.assert_allclose(found, tfgrad.hessian(exactly)(a), atol=1e-12)
