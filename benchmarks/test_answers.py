"""The time from a new function to the answer, tracing and all, against it by hand."""

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
sys.path.insert(0, str(HERE.parent))  # the problems of the tests
from tests.reference import bounded  # noqa: E402  (found by the line above)

REFERENCE = HERE.parent / "tests" / "reference"
mgh = runpy.run_path(str(REFERENCE / "more_garbow_hillstrom.py"))["PROBLEMS"]
nist = runpy.run_path(str(REFERENCE / "nist" / "problems.py"))
TURNS = 3


def in_turns(ours, theirs, repeats=TURNS):
    """Return our time over theirs, the median of some turns after a first one."""
    ratios = []
    for _ in range(repeats + 1):
        times = []
        for call in (ours, theirs):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        ratios.append((times[0] / times[1], times))
    return sorted(ratios[1:])[repeats // 2]


TO_THE_END = {"maxiter": 5000, "maxfun": 9000, "gtol": 1e-6, "ftol": 0}


def by_hand(f, start, bounds=None, options=TO_THE_END):
    """Minimise a new function by SciPy's L-BFGS-B with a gradient compiled by hand."""

    @tf.function(autograph=False)
    def value_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = f(x)
        return value, tape.gradient(value, x, unconnected_gradients="zero")

    def evaluate(x):
        value, gradient = value_and_gradient(tf.constant(x))
        return float(value), gradient.numpy()

    return scipy.optimize.minimize(
        evaluate, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )  # fmt: skip


def fitted_by_hand(residuals, start):
    """Fit by SciPy's least_squares, residuals and Jacobian compiled by hand."""

    @tf.function(autograph=False)
    def compiled(x):
        return residuals(x)

    @tf.function(autograph=False)
    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            r = residuals(x)
        return tape.jacobian(r, x)

    with np.errstate(all="ignore"):
        return scipy.optimize.least_squares(
            lambda x: compiled(tf.constant(x)).numpy(),
            start,
            jac=lambda x: jacobian(tf.constant(x)).numpy(),
            method="lm",
            x_scale="jac",
        )


def summarised(report, question, found, bars):
    ratios = [ratio for ratio, _ in found.values()]
    for name, ratio in zip(
        ("median", "worst"), (np.median(ratios), max(ratios)), strict=True
    ):
        if bars.get(name):
            report(f"{question}: the {name} ratio", ratio, 1.0, "", bars[name])
    for name, (ratio, times) in sorted(found.items(), key=lambda item: -item[1][0]):
        print(f"{name:35} {ratio:6.2f}  {times[0] * 1e3:8.1f} {times[1] * 1e3:8.1f} ms")


@pytest.mark.slow
def test_a_new_function_to_its_answer(report):
    found = {}
    for name, problem in mgh.items():
        start = np.asarray(problem.start, np.float64)

        def new(problem=problem):
            return lambda x: problem.objective(x)

        found[name] = in_turns(
            lambda start=start: tfgrad.minimize(new(), start, steps=5000),
            lambda start=start: by_hand(new(), start),
        )

    question = "38 problems by L-BFGS, against SciPy's with a gradient by hand"
    summarised(report, question, found, {"median": "0.7", "worst": "1.5"})


@pytest.mark.slow
def test_a_new_function_within_bounds_to_its_answer(report):
    found, ours, theirs = {}, [], {"its defaults": [], "all digits": []}
    all_digits = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    for name, problem in bounded.PROBLEMS.items():
        lower, upper = problem.bounds
        start, box = np.clip(problem.start, lower, upper), (lower, upper)

        def new(problem=problem):
            return lambda x: problem.objective(x)

        found[name] = in_turns(
            lambda start=start, box=box: tfgrad.minimize(new(), start, bounds=box),
            lambda start=start, box=box: by_hand(
                new(), start, scipy.optimize.Bounds(*box)
            ),
        )
        ours.append(tfgrad.minimize(new(), start, bounds=box).nfev)
        for options, counts in zip(({}, all_digits), theirs.values(), strict=True):
            result = by_hand(new(), start, scipy.optimize.Bounds(*box), options)
            counts.append(result.nfev)

    question = f"{len(found)} problems within bounds, against SciPy's L-BFGS-B by hand"
    summarised(report, question, found, {"median": "1.0", "worst": "-"})
    for kind, counts in theirs.items():
        asked = f"{question}, to {kind}: evaluations, the median"
        report(asked, np.median(ours), np.median(counts), "", "fewer")


@pytest.mark.slow
def test_a_new_fit_to_its_answer(report):
    found = {}
    for name in nist["MODELS"]:
        start = nist["read"](name).starts[0]

        def new(name=name):
            return nist["residuals"](name, tf)

        found[name] = in_turns(
            lambda start=start: tfgrad.least_squares(new(), start),
            lambda start=start: fitted_by_hand(new(), start),
        )

    question = "27 fits of NIST, against SciPy's with both compiled by hand"
    summarised(report, question, found, {"median": "1.0", "worst": "-"})


def measured(tool, n):
    """Return what a tool measured of 100 steps at n; None if it is not installed."""
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    python = sys.executable if tool == "tfgrad" else python
    module = {"scipy": "scipy, tensorflow"}.get(tool, tool)
    if subprocess.run(
        [python, "-c", f"import {module}"], capture_output=True
    ).returncode:
        return None
    command = [python, str(HERE / "scale_peer.py"), tool, str(n)]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["scipy", "optax"])
@pytest.mark.parametrize("n", [100, 10_000, 1_000_000, 4_000_000])
def test_a_hundred_steps_of_any_size(report, n, tool):
    theirs, ours = measured(tool, n), measured("tfgrad", n)
    if theirs is None:
        pytest.skip(f"{tool} is not installed beside TFGRAD_PEERS")

    question = f"100 steps of L-BFGS, {n:,} variables, all counted, against {tool}"
    report(question, ours["seconds"], theirs["seconds"], "s", "not slower")
    if n >= 1_000_000:
        asked = f"{question}: memory over the start"
        report(asked, ours["vectors"], theirs["vectors"], "vectors", "50")


def test_a_compiled_function_fitted_again(report, interleaved):
    generator = np.random.default_rng(0)
    t = np.linspace(0, 4, 60)
    y = 2.5 * np.exp(-1.3 * t) + 0.5 + 0.02 * generator.normal(size=60)
    data = tf.Variable(y)

    @tf.function
    def residuals(p):
        return p[0] * tf.exp(-p[1] * t) + p[2] - data

    median = interleaved(
        15,
        ours=lambda: tfgrad.least_squares(residuals, np.ones(3)),
        theirs=lambda: scipy.optimize.curve_fit(
            lambda t, a, b, c: a * np.exp(-b * t) + c, t, y, np.ones(3)
        ),
    )

    report(
        "a tf.function fitted again, 3 parameters, 60 points, against curve_fit",
        median["ours"] * 1e3, median["theirs"] * 1e3, "ms", "10 ms",
    )  # fmt: skip
