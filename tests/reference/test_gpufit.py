"""`least_squares_many` on the examples and tests of Gpufit, to the digits it asks for.

The true parameters, the starts, the grids and the tolerances are those of Gpufit 1.2
(github.com/gpufit/Gpufit: Gpufit/tests/Gauss_Fit_1D.cpp, Gauss_Fit_2D.cpp,
Gauss_Fit_2D_Rotated.cpp, the examples of docs/examples.rst and of
Gpufit/matlab/examples/gauss2d_constrained.m), which computes in float32.
"""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad

DTYPES = [np.float32, np.float64]


def gauss_1d(xp, p, x):
    return p[0] * xp.exp(-((x - p[1]) ** 2) / (2 * p[2] ** 2)) + p[3]


def gauss_2d(xp, p, x, y):
    square = (x - p[1]) ** 2 + (y - p[2]) ** 2
    return p[0] * xp.exp(-square / (2 * p[3] ** 2)) + p[4]


def gauss_2d_rotated(xp, p, x, y):
    along = (x - p[1]) * xp.cos(p[6]) - (y - p[2]) * xp.sin(p[6])
    across = (x - p[1]) * xp.sin(p[6]) + (y - p[2]) * xp.cos(p[6])
    return p[0] * xp.exp(-((along / p[3]) ** 2 + (across / p[4]) ** 2) / 2) + p[5]


def grid(size):
    y, x = np.mgrid[0:size, 0:size].astype(float)
    return x.ravel(), y.ravel()


# Model, places, true parameters, start.
SINGLE = {
    "1D": (gauss_1d, (np.arange(5.0),), [4, 2, 0.5, 1], [2, 1.5, 0.3, 0]),
    "2D": (gauss_2d, grid(5), [4, 2, 2, 0.5, 1], [3, 1.8, 2.2, 0.4, 0]),
    "2D of 50 by 50": (gauss_2d, grid(50), [4, 24.5, 24.5, 5, 1], [3, 24, 25, 4, 0]),
    "2D rotated": (
        gauss_2d_rotated, grid(8), [10, 3.5, 3.5, 0.4, 0.5, 1, np.pi / 16],
        [8, 3.4, 3.6, 0.4, 0.5, 2, 0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SINGLE)
def test_exact_peaks_are_found_to_the_digits_of_gpufit(name, dtype):
    model, places, true, start = SINGLE[name]
    places, true = [np.array(a, dtype) for a in places], np.array(true, dtype)
    signal = model(np, true, *places)

    result = tfgrad.least_squares_many(
        lambda p, signal: model(tf.math, p, *places) - signal,
        np.array(start, dtype),
        signal[None],
    )

    assert result.success.all()
    assert result.x.dtype == dtype
    assert 2 * result.fun[0] < 1e-6
    # A last digit of 24.5 or 10 in float32 is more than 1e-6.
    rtol = 0 if dtype == np.float64 else 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(result.x[0], true, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_fit_may_have_places_of_its_own(dtype):
    places = np.array([np.linspace(-1, 1, 5), np.linspace(0, 1, 5)], dtype)
    true = np.array([[4, 0, 0.25, 1], [6, 0.5, 0.15, 2]], dtype)
    starts = np.array([[2, 0.25, 0.15, 0], [8, 0.75, 0.2, 3]], dtype)
    signals = np.stack([gauss_1d(np, p, x) for p, x in zip(true, places, strict=True)])

    result = tfgrad.least_squares_many(
        lambda p, x, signal: gauss_1d(tf.math, p, x) - signal, starts, places, signals
    )

    assert result.success.all()
    np.testing.assert_allclose(result.x, true, rtol=0, atol=1e-6)


def test_linear_regression_is_the_closed_form():
    rng, x = np.random.default_rng(0), 2.0 ** np.arange(20)
    true = np.array([5.0, 2.0])
    starts = true * rng.uniform(0.8, 1.2, (1000, 2))
    signals = true[0] + true[1] * x + rng.normal(size=(1000, 20))

    result = tfgrad.least_squares_many(
        lambda p, signal: p[0] + p[1] * x - signal, starts, signals
    )

    design = np.stack([np.ones(20), x], 1)
    closed = np.linalg.lstsq(design, signals.T)[0].T
    assert result.success.all()
    # The places reach to 2**19, so six digits are lost of the offset.
    np.testing.assert_allclose(result.x, closed, rtol=1e-8)
    inverse = np.linalg.inv(design.T @ design)
    errors = result.residual_std[:, None] * np.sqrt(np.diag(inverse))
    np.testing.assert_allclose(result.stderr, errors, rtol=1e-7)


PEAK = np.array([2.0, 9.5, 9.5, 3.0, 10.0])
SIDES = ([0, -np.inf, -np.inf, 2.9, 0], [np.inf, np.inf, np.inf, 3.1, np.inf])


def noisy_peaks(count):
    """Return starts, places and peaks on a ground that is noisier than they are high.

    The starts are some 20 % off, the places by 20 % of the width.
    """
    rng, (x, y) = np.random.default_rng(0), grid(20)
    starts = np.tile(PEAK, (count, 1))
    starts[:, 1:3] += PEAK[3] * rng.uniform(-0.2, 0.2, (count, 2))
    starts[:, [0, 3, 4]] *= rng.uniform(0.8, 1.2, (count, 3))
    clean = gauss_2d(np, PEAK, x, y)
    return starts, (x, y), clean + np.sqrt(clean) * rng.normal(size=(count, 400))


def test_noisy_peaks_within_bounds_are_those_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    starts, places, signals = noisy_peaks(200)

    def misfit(p, signal):
        return gauss_2d(tf.math, p, *places) - signal

    held = tfgrad.least_squares_many(misfit, starts, signals, bounds=SIDES)

    # Of a peak that noise has hidden, the place may run away.
    assert np.mean(held.success) > 0.99
    assert np.all((held.x >= SIDES[0]) & (held.x <= SIDES[1]))
    for i in range(10):
        alone = optimize.least_squares(
            lambda p, i=i: gauss_2d(np, p, *places) - signals[i],
            np.clip(starts[i], *SIDES), bounds=SIDES, xtol=1e-12, ftol=1e-14,
        )  # fmt: skip
        assert held.fun[i] <= alone.cost * (1 + 1e-9)
        np.testing.assert_allclose(held.x[i], alone.x, rtol=1e-4)
