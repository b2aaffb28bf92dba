"""Evaluations over all data, batch by batch: equal to one of all rows at once."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError, NoGradientError
from tfgrad.optimize.data import source_of
from tfgrad.optimize.problem import Problem

RNG = np.random.default_rng(0)
X = RNG.normal(size=(103, 4))
Y = np.tanh(X @ RNG.normal(size=4)) + 0.1 * RNG.normal(size=103)


def loss(w, x, y):
    return tf.reduce_mean((tf.tanh(tf.linalg.matvec(x, w)) - y) ** 2)


def batches():
    for first in range(0, 103, 16):  # the last has 7 rows
        yield X[first : first + 16], Y[first : first + 16]


SOURCES = {
    "arrays": {"data": (X, Y), "batch_size": 16},
    "a data set": {"data": tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)},
    "a list": {"data": list(batches())},
    "a function": {"data": batches},
}


@pytest.mark.parametrize("source", SOURCES)
def test_lbfgs_over_batches_is_lbfgs_over_all_rows_at_once(source):
    over = tfgrad.minimize(loss, np.zeros(4), method="lbfgs", **SOURCES[source])
    at_once = tfgrad.minimize(lambda w: loss(w, X, Y), np.zeros(4), method="lbfgs")

    assert (over.nit, over.nfev, over.status) == (
        at_once.nit,
        at_once.nfev,
        "converged",
    )
    np.testing.assert_allclose(over.x, at_once.x, rtol=1e-12)
    np.testing.assert_allclose(over.history["fun"], at_once.history["fun"], rtol=1e-12)


@pytest.mark.parametrize("method", ["newton", "scipy:newton-cg", "scipy:nelder-mead"])
def test_other_methods_take_all_rows_as_well(method):
    if method.startswith("scipy"):
        pytest.importorskip("scipy")
    over = tfgrad.minimize(
        loss, np.zeros(4), method=method, data=(X, Y), batch_size=16, steps=60
    )
    at_once = tfgrad.minimize(
        lambda w: loss(w, X, Y), np.zeros(4), method=method, steps=60
    )

    np.testing.assert_allclose(over.x, at_once.x, rtol=1e-6)


def test_variables_are_moved_found_or_named():
    at_once = tfgrad.minimize(lambda w: loss(w, X, Y), np.zeros(4))
    for named in (True, False):
        w = tf.Variable(np.zeros(4))
        wrt = w if named else None
        tfgrad.minimize(
            lambda x, y, w=w: loss(w, x, y), wrt=wrt, method="lbfgs", data=(X, Y)
        )
        np.testing.assert_allclose(w.numpy(), at_once.x, rtol=1e-12)


def test_numbers_of_half_precision_are_added_up_in_float32():
    # In float16, 100,000 ones have no finite sum.
    problem = Problem(
        lambda w, x: tf.reduce_mean((w - x) ** 2),
        tf.constant(0, tf.float16),
        None,
        has_aux=False,
    )
    problem.go_through(source_of(np.ones(100_000, np.float16), 1000))
    problem.find()

    evaluation = problem.evaluate([tf.constant(0, tf.float16)])

    assert evaluation.value.dtype == tf.float16
    assert float(evaluation.value) == 1
    # Each batch rounds 1 / 1000 itself.
    assert float(evaluation.gradient[0]) == pytest.approx(-2, rel=1e-2)


def test_aux_floats_are_means_over_rows_and_counts_are_sums():
    def value(w, x):
        hits = tf.math.count_nonzero(x > 0, dtype=tf.int32)
        return tf.reduce_mean((w - x) ** 2), {"mean": tf.reduce_mean(x), "hits": hits}

    x = X[:, 0]
    result = tfgrad.minimize(
        value, np.float64(0), data=x, batch_size=16, method="lbfgs", has_aux=True
    )

    assert result.history["hits"][0] == np.sum(x > 0)
    np.testing.assert_allclose(result.history["mean"], np.mean(x), rtol=1e-13)


def test_a_loss_that_draws_random_numbers_is_refused_with_its_line():
    w = tf.Variable(np.zeros(4))
    model = keras.layers.Dropout(0.5, dtype="float64")

    with pytest.raises(InvalidArgumentError, match=r"draws random numbers: .*Random"):
        tfgrad.minimize(
            lambda x, y: loss(w, model(x, training=True), y),
            wrt=w,
            data=(X, Y),
            method="lbfgs",
        )
    np.testing.assert_array_equal(w, np.zeros(4))


def test_a_cut_gradient_is_explained():
    with pytest.raises(NoGradientError, match=r"tf\.round"):
        tfgrad.minimize(
            lambda w, x: tf.reduce_mean((tf.round(w) - x) ** 2),
            np.float64(3),
            data=X[:, 0],
            method="lbfgs",
        )


def test_what_a_generator_raises_is_raised():
    calls = []

    def failing():
        calls.append(1)
        yield X[:16], Y[:16]
        if len(calls) > 2:
            raise ValueError("the user's own")

    with pytest.raises(ValueError, match="the user's own"):
        tfgrad.minimize(loss, np.zeros(4), data=failing, method="lbfgs")


def test_a_run_over_all_data_goes_on_from_its_checkpoint_to_the_last_bit(tmp_path):
    call = {"data": (X, Y), "batch_size": 16, "method": "lbfgs"}
    whole = tfgrad.minimize(loss, np.zeros(4), **call)
    directory = tmp_path / "checkpoint"
    tfgrad.minimize(loss, np.zeros(4), steps=3, checkpoint=directory, **call)

    resumed = tfgrad.minimize(loss, np.zeros(4), checkpoint=directory, **call)

    np.testing.assert_array_equal(resumed.x, whole.x)
    assert resumed.nit == whole.nit


def test_jit_compiles_the_evaluation_of_a_batch():
    plain = tfgrad.minimize(loss, np.zeros(4), data=(X, Y), method="lbfgs")
    compiled = tfgrad.minimize(loss, np.zeros(4), data=(X, Y), method="lbfgs", jit=True)

    np.testing.assert_allclose(compiled.x, plain.x, rtol=1e-6)


def curve(p, x, y):
    return p["size"] * tf.exp(-p["rate"] * x) - y


@pytest.mark.parametrize("loss", ["linear", "soft_l1"])
def test_a_fit_over_batches_is_the_fit_of_all_rows(loss):
    x = RNG.uniform(0, 4, size=1003)
    y = 5 * np.exp(-0.5 * x) + 0.1 * RNG.normal(size=1003)
    start = {"size": np.float64(1), "rate": np.float64(1)}
    over = tfgrad.least_squares(curve, start, data=(x, y), batch_size=64, loss=loss)
    at_once = tfgrad.least_squares(lambda p: curve(p, x, y), start, loss=loss)

    assert over.residuals is None
    assert over.degrees_of_freedom == at_once.degrees_of_freedom == 1001
    assert over.nit == at_once.nit
    for name in start:
        np.testing.assert_allclose(over.x[name], at_once.x[name], rtol=1e-10)
        np.testing.assert_allclose(over.stderr[name], at_once.stderr[name], rtol=1e-8)
    np.testing.assert_allclose(over.residual_std, at_once.residual_std, rtol=1e-12)


def test_a_fit_over_batches_keeps_all_digits_of_an_ill_conditioned_jacobian():
    # The condition of J is 1e9: J'J would know nothing of the second parameter.
    x = RNG.normal(size=403)
    y = RNG.normal(size=403)

    def nearly_one_line(p, x, y):
        return p[0] * x + p[1] * x * (1 + 1e-9 * y) - (3 * x + 1e-9 * x * y)

    result = tfgrad.least_squares(
        nearly_one_line, np.zeros(2), data=(x, y), batch_size=64
    )

    np.testing.assert_allclose(result.x, [2, 1], rtol=1e-5)


def test_a_fit_of_many_parameters_adds_up_products():
    n = 120
    x = RNG.normal(size=(403, n))
    y = x @ np.arange(n) + 0.1 * RNG.normal(size=403)

    def misfit(w, x, y):
        return tf.linalg.matvec(x, w) - y

    result = tfgrad.least_squares(misfit, np.zeros(n), data=(x, y), batch_size=64)
    exact, *_ = np.linalg.lstsq(x, y, rcond=None)
    at_once = tfgrad.least_squares(lambda w: misfit(w, x, y), np.zeros(n))

    np.testing.assert_allclose(result.x, exact, rtol=1e-8)
    np.testing.assert_allclose(result.stderr, at_once.stderr, rtol=1e-6)
