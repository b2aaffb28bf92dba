"""L-BFGS beside that of other tools: the same problems, a process for each tool."""

from __future__ import annotations

import functools
import json
import os
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
sys.path.insert(0, str(HERE))  # what the peers run is beside this file
import lbfgs_peer as problems  # noqa: E402  (found by the line above)

TOOLS = ("scipy", "tfp", "optax", "optimistix", "torch")
NAMES = (*problems.SIZES, problems.NETWORK)
BARS = {
    ("Rosenbrock 100", "optax"): "not slower",
    ("Rosenbrock 100", "optimistix"): "not slower",
    ("Rosenbrock 100", "tfp"): "3 times faster",
    ("Rosenbrock 10,000", "optax"): "1.5 times faster",
    ("Rosenbrock 10,000", "optimistix"): "1.5 times faster",
}


@functools.cache
def ours(name):
    """Return the result and the seconds of a first run, and of evaluations compiled.

    As for the others, the loop is compiled once, here with its tf.function.
    """
    f, start = problems.tensorflow_objective(name), problems.start_of(name)
    began = time.perf_counter()
    result = tfgrad.minimize(f, start, steps=problems.MOST)
    first, steady, f = time.perf_counter() - began, [], tf.function(f, autograph=False)
    for _ in range(6):
        again = tfgrad.minimize(f, start, steps=problems.MOST, jit=True)
        seconds = again.history["seconds"]
        half = len(seconds) // 2
        step = (seconds[-1] - seconds[half]) / (len(seconds) - 1 - half)
        steady.append(step * again.nit / again.nfev)
    return result, first, steady[1:]


@functools.cache
def theirs(tool):
    """Return what a tool measured of each problem, or None if it is not installed."""
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    modules = {"tfp": "tensorflow_probability"}
    have = subprocess.run(
        [python, "-c", f"import {modules.get(tool, tool)}"], capture_output=True
    )
    if have.returncode:
        return None
    run = subprocess.run(
        [python, str(HERE / "lbfgs_peer.py"), tool],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_by_lbfgs(report, times, name, tool):
    found = theirs(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed beside TFGRAD_PEERS")
    result, first, steady = ours(name)
    peer = found[name]
    count = peer["evaluations"]
    outcomes = (
        f"{result.nfev} evaluations to {result.fun:.3g}",
        f"{peer['evaluations']} to {peer['fun']:.3g}",
    )

    report(
        f"{name}, against {tool} ({', against '.join(outcomes)})",
        times([s * 1e6 for s in steady], first=first * 1e6),
        times(
            [s / count * 1e6 for s in peer["seconds"][1:]],
            first=peer["seconds"][0] * 1e6,
        ),
        "µs",
        BARS.get((name, tool), "-"),
    )


@pytest.mark.slow
def test_an_iteration_within_bounds(report, times):
    f, n = problems.tensorflow_objective("Rosenbrock 100"), 100
    lower, upper = np.full(n, -2.0), np.append(np.full(n - 1, 2.0), 0.5)
    start = np.clip(problems.start_of("Rosenbrock 100"), lower, upper)
    call, steps = problems.compiled(f), 300

    def value_and_gradient(x):
        y, gradient = call(tf.constant(x))
        return float(y), gradient.numpy()

    ours, theirs = [], []
    for _ in range(6):  # in turns
        began = time.perf_counter()
        peer = scipy.optimize.minimize(
            value_and_gradient, start, jac=True, method="L-BFGS-B",
            bounds=scipy.optimize.Bounds(lower, upper),
            options={"maxiter": steps, "maxfun": 10**6, "ftol": 0, "gtol": 0},
        )  # fmt: skip
        theirs.append((time.perf_counter() - began) / peer.nit * 1e6)
        result = tfgrad.minimize(f, start, bounds=(lower, upper), steps=steps, jit=True)
        seconds = result.history["seconds"]
        half = len(seconds) // 2
        spent = (seconds[-1] - seconds[half]) / (len(seconds) - 1 - half)
        ours.append(spent * 1e6)

    report(
        "Rosenbrock 100 within bounds, against SciPy with a gradient by hand",
        times(ours[1:]), times(theirs[1:]), "µs", "20 times faster",
    )  # fmt: skip


def test_the_first_call_on_a_small_problem(report):
    f, start = problems.tensorflow_objective("Rosenbrock 2"), [-1.2, 1.0]
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        assert tfgrad.minimize(f, start).success
        seconds.append(time.perf_counter() - began)

    report("Rosenbrock 2, tracing and all, in all", seconds[1:], 1.0, "s", "under 1 s")
