"""`least_squares` on NIST's nonlinear regression problems, against certified values.

The whole set, 27 problems from two starts each, is in benchmarks/test_least_squares.py.
"""

import functools
import runpy
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfgrad

nist = runpy.run_path(str(Path(__file__).parent / "nist" / "problems.py"))

# From the start far away (0) or near (1): those of NIST's higher level of difficulty,
# those that others fail on, and one of each kind of model.
HARD = [
    ("Bennett5", 0), ("BoxBOD", 0), ("ENSO", 0), ("Lanczos1", 1), ("MGH09", 0),
    ("MGH10", 0), ("MGH17", 0), ("Misra1a", 0), ("Nelson", 0), ("Thurber", 0),
]  # fmt: skip

NAMES = sorted(path.stem for path in (Path(__file__).parent / "nist").glob("*.dat"))

SINGLE = ["BoxBOD", "Chwirut2", "DanWood", "Eckerle4", "Rat42"]


@functools.cache
def residuals_of(name, dtype=np.float64):
    return tf.function(nist["residuals"](name, tf, dtype))  # traced for both starts


@functools.cache
def fitted(name, start, dtype=np.float64):
    x0 = nist["read"](name).starts[start].astype(dtype)
    return tfgrad.least_squares(residuals_of(name, dtype), x0)


@pytest.mark.parametrize(("name", "start"), HARD)
def test_certified_parameters_and_their_standard_deviations(name, start):
    truth = nist["read"](name)

    result = fitted(name, start)

    assert result.success, result
    assert result.status in ("gtol", "xtol")
    np.testing.assert_allclose(result.x, truth.certified, rtol=1e-6)
    # Lanczos1 has residuals of 1e-13: they are known to two or three digits.
    rtol = 1e-2 if name == "Lanczos1" else 1e-6
    np.testing.assert_allclose(result.stderr, truth.stderr, rtol=rtol)
    np.testing.assert_allclose(result.residual_std, truth.residual_std, rtol=rtol)
    assert result.degrees_of_freedom == len(truth.y) - len(truth.certified)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "Lanczos1"])
def test_certified_standard_errors_to_four_digits(name):
    truth = nist["read"](name)

    result = fitted(name, 1)

    np.testing.assert_allclose(result.stderr, truth.stderr, rtol=1e-4)


def test_the_errors_of_lanczos1_are_certified_but_for_the_size_of_its_residuals():
    truth = nist["read"]("Lanczos1")

    result = fitted("Lanczos1", 1)

    # Arithmetic of 60 digits confirms NIST's numbers. In float64 the residuals of 1e-13
    # are differences of numbers of 1, and their size is known to three digits.
    ours = result.stderr / result.residual_std
    np.testing.assert_allclose(ours, truth.stderr / truth.residual_std, rtol=1e-6)
    np.testing.assert_allclose(result.stderr, truth.stderr, rtol=1e-3)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("bounds", [None, (0.0, None)])
def test_minimize_finds_the_end_of_the_flat_valley_of_mgh09(start, bounds):
    truth, residuals = nist["read"]("MGH09"), residuals_of("MGH09")

    result = tfgrad.minimize(
        lambda p: tf.reduce_sum(residuals(p) ** 2) / 2, truth.starts[start],
        bounds=bounds,
    )  # fmt: skip

    assert (result.status, result.success) == ("converged", True)
    np.testing.assert_allclose(result.x, truth.certified, rtol=1e-5)


@pytest.mark.parametrize("name", SINGLE)
def test_float32_finds_three_digits_and_says_how(name):
    truth = nist["read"](name)

    result = fitted(name, 1, np.float32)

    assert result.status in ("gtol", "xtol", "converged"), result
    np.testing.assert_allclose(result.x, truth.certified, rtol=1e-3)
    assert result.x.dtype == tf.float32
    assert result.covariance.dtype == np.float32


@pytest.mark.parametrize("name", ["Bennett5", "MGH10"])
def test_float32_claims_nothing_where_it_cannot_resolve_the_valley(name):
    result = fitted(name, 0, np.float32)

    assert not result.success
    assert result.nfev < 1000


@pytest.mark.parametrize(("name", "start"), [("BoxBOD", 0), ("Hahn1", 0), ("MGH09", 0)])
def test_rows_of_starts_reach_the_certified_parameters(name, start):
    truth = nist["read"](name)
    x0 = truth.starts[start]
    x0s = x0 * (1 + 0.01 * np.random.default_rng(0).uniform(-1, 1, (8, len(x0))))

    result = tfgrad.least_squares_many(nist["residuals"](name, tf), x0s)

    assert result.success.all()
    certified = np.broadcast_to(truth.certified, x0s.shape)
    np.testing.assert_allclose(result.x, certified, rtol=1e-6)
    np.testing.assert_allclose(result.stderr[0], truth.stderr, rtol=1e-6)


@pytest.mark.parametrize("name", ["MGH10", "MGH17", "Rat43"])
def test_rows_far_away_arrive_where_each_does_alone(name):
    truth, residuals = nist["read"](name), tf.function(nist["residuals"](name, tf))
    x0 = truth.starts[0]
    x0s = x0 * (1 + 0.1 * np.random.default_rng(0).uniform(-1, 1, (50, len(x0))))

    result = tfgrad.least_squares_many(residuals, x0s)

    assert result.success.all()
    certified = np.broadcast_to(truth.certified, x0s.shape)
    np.testing.assert_allclose(result.x, certified, rtol=1e-6)


def test_rows_that_end_elsewhere_end_at_minima_too():
    truth, residuals = nist["read"]("ENSO"), nist["residuals"]("ENSO", tf)
    x0 = truth.starts[1]
    x0s = x0 * (1 + 0.1 * np.random.default_rng(0).uniform(-1, 1, (50, len(x0))))

    result = tfgrad.least_squares_many(residuals, x0s)
    is_elsewhere = np.any(~np.isclose(result.x, truth.certified, rtol=1e-5), axis=1)
    found = result.x[result.success & is_elsewhere]
    bend = tfgrad.hessian(lambda p: tf.reduce_sum(residuals(p) ** 2) / 2)

    assert len(found)
    for x in found:
        matrix = bend(tf.constant(x)).numpy()
        sizes = np.sqrt(np.diag(matrix))
        assert np.linalg.eigvalsh(matrix / sizes / sizes[:, None])[0] > 0.01
