"""Levenberg-Marquardt on NIST's regression problems and on large ones."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import tensorflow as tf

import tfgrad

HERE = Path(__file__).parent
NIST = HERE.parent / "tests" / "reference" / "nist" / "problems.py"
nist = runpy.run_path(str(NIST))


def error(x, name):
    with np.errstate(all="ignore"):
        worst = np.max(np.abs(np.asarray(x) / nist["read"](name).certified - 1))
    return worst if np.isfinite(worst) else np.inf


def share(errors):
    """Return how many of the runs found six digits, in per cent."""
    return 100 * np.mean(np.asarray(errors) < 1e-6)


@pytest.fixture(scope="module")
def ours():
    """Return what least_squares makes of all 27 problems from both starts."""
    runs = []
    for name in nist["MODELS"]:
        misfit = nist["residuals"](name, tf)
        for start in nist["read"](name).starts:
            result = tfgrad.least_squares(misfit, start)
            runs.append((name, result))
    return runs


@pytest.mark.slow
def test_nist_beside_scipy(report, ours):
    errors, evaluations = [], []
    for name in nist["MODELS"]:
        misfit = nist["residuals"](name, np)
        for start in nist["read"](name).starts:
            with np.errstate(all="ignore"):
                found = scipy.optimize.least_squares(
                    misfit, start, jac=jacobian(misfit), method="lm", x_scale="jac",
                    xtol=1e-12, ftol=1e-12, gtol=1e-12, max_nfev=5000,
                )  # fmt: skip
            errors.append(error(found.x, name))
            evaluations.append(found.nfev)

    solved = share([error(result.x, name) for name, result in ours])
    claimed = [result.success for _, result in ours]
    counts = [result.nfev for _, result in ours]
    question = "54 runs of NIST StRD: {}, beside SciPy's lm"
    report(question.format("six digits"), solved, share(errors), "%", "not fewer")
    report("the same: of ours, with success", 100 * np.mean(claimed), 100.0, "%", "all")
    report("the same: evaluations", sum(counts), sum(evaluations), "", "not more")


@pytest.mark.slow
def test_nist_beside_optimistix(report, times, ours):
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    probe = subprocess.run([python, "-c", "import optimistix"], capture_output=True)
    if probe.returncode:
        pytest.skip("optimistix is not installed")
    command = [python, str(HERE / "least_squares_peer.py")]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    theirs = json.loads(found.stdout.splitlines()[-1])

    solved = share([error(result.x, name) for name, result in ours])
    question = "54 runs of NIST StRD: {}, beside optimistix"
    report(
        question.format("six digits"),
        solved,
        share([run["error"] for run in theirs]),
        "%",
        "not fewer",
    )
    steps = sum(run["steps"] for run in theirs)
    report("the same: evaluations", sum(r.nfev for _, r in ours), steps, "", "-")
    seconds = times([result.seconds for _, result in ours])
    first = times([run["first"] for run in theirs[::2]])
    report("the same: a fit, tracing counted", seconds * 1e3, first * 1e3, "ms", "1 s")


def test_a_step_beside_scipy(report, times):
    name = "Bennett5"
    start, misfit = nist["read"](name).starts[0], nist["residuals"](name, np)
    result = tfgrad.least_squares(nist["residuals"](name, tf), start)
    seconds = result.history["seconds"]
    ours = times(np.diff(seconds[len(seconds) // 2 :]))
    slopes = jacobian(misfit)
    began = time.perf_counter()
    found = scipy.optimize.least_squares(
        misfit, start, jac=slopes, method="lm", x_scale="jac", max_nfev=5000,
        xtol=1e-12, ftol=1e-12, gtol=1e-12,
    )  # fmt: skip
    theirs = (time.perf_counter() - began) / found.nfev

    report("a step of Bennett5, 154 x 3", ours * 1e6, theirs * 1e6, "µs", "-")


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(2_000, 20), (2_000, 200), (2_000, 1_000)])
def test_larger_problems_beside_scipy(report, m, n):
    generator = np.random.default_rng(0)
    design = generator.normal(size=(m, n)) / n**0.5
    truth = generator.normal(size=n)
    y = np.tanh(design @ truth) + 0.01 * generator.normal(size=m)
    columns = tf.constant(design)

    began = time.perf_counter()
    result = tfgrad.least_squares(
        lambda x: tf.tanh(tf.linalg.matvec(columns, x)) - y, np.zeros(n)
    )
    ours = time.perf_counter() - began
    began = time.perf_counter()
    found = scipy.optimize.least_squares(
        lambda x: np.tanh(design @ x) - y,
        np.zeros(n),
        jac=lambda x: design / np.cosh(design @ x)[:, None] ** 2,
        method="lm" if n <= 500 else "trf",
        tr_solver=None if n <= 500 else "lsmr",
    )
    theirs = time.perf_counter() - began

    assert result.success
    np.testing.assert_allclose(result.x, found.x, atol=1e-4)
    question = f"{m:,} residuals, {n:,} parameters; tracing counted, theirs by hand"
    report(question, ours * 1e3, theirs * 1e3, "ms", "-")


def jacobian(misfit):
    """Return the exact Jacobian for SciPy, by steps into the complex plane."""

    def slopes(x):
        columns = []
        with np.errstate(all="ignore"):
            for i, size in enumerate(np.maximum(np.abs(x), 1e-20) * 1e-30):
                moved = x.astype(complex)
                moved[i] += 1j * size
                columns.append(misfit(moved).imag / size)
        return np.stack(columns, axis=1)

    return slopes
