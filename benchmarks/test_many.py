"""Many problems at once: decay curves beside optimistix, starts of Rosenbrock."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfgrad

PEER = Path(__file__).parent / "many_peer.py"
T = np.linspace(0, 5, 50)


@tf.function
def misfit(p, signal):
    return p[0] * tf.exp(-p[1] * T) + p[2] - signal


def signals(count):
    """Return the curves that the peer fits, too."""
    rng = np.random.default_rng(0)
    ranges = ((1, 3), (0.3, 2), (-0.5, 0.5))
    truth = np.stack([rng.uniform(*between, count) for between in ranges], 1)
    clean = truth[:, :1] * np.exp(-truth[:, 1:2] * T) + truth[:, 2:]
    return clean + 0.02 * rng.normal(size=clean.shape)


def seconds_of(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def peer(count):
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    probe = subprocess.run([python, "-c", "import optimistix"], capture_output=True)
    if probe.returncode:
        pytest.skip("optimistix is not installed")
    return process([python, str(PEER), str(count)])


def process(command):
    """Return the JSON that a process of its own prints last."""
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def fit(count):
    """Return the seconds of a call; what it imports is not part of them."""
    fits, curves = tfgrad.least_squares_many, signals(count)
    start = np.array([1.0, 1.0, 0.0])
    return seconds_of(lambda: fits(misfit, start, curves))


@pytest.mark.slow
def test_decay_curves_beside_optimistix(report):
    # Each in a process of its own. A collection of the garbage of what was imported, of
    # a fifth of a second, may still fall into the call.
    first = process([sys.executable, __file__, "10000"])
    theirs = peer(10_000)
    question = "10,000 fits of 3 parameters to 50 points, compiling counted"
    report(question, first, theirs["first"], "s", "not slower than optimistix's vmap")

    fit(100_000)
    again = [fit(100_000) for _ in range(3)]
    theirs = peer(100_000)
    each = [1e6 * min(again) / 100_000, 1e6 * theirs["again"] / 100_000]
    report("100,000 of them, warm, each", *each, "µs", "a fifth of optimistix's vmap")


def test_starts_of_rosenbrock(report):
    @tf.function
    def rosenbrock(x):
        return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    starts = np.random.default_rng(0).normal(size=(64, 10))
    tfgrad.minimize_many(rosenbrock, starts)
    many = min(
        seconds_of(lambda: tfgrad.minimize_many(rosenbrock, starts)) for _ in range(5)
    )
    tfgrad.minimize(rosenbrock, starts[0])
    one = min(
        seconds_of(lambda: tfgrad.minimize(rosenbrock, starts[0])) for _ in range(5)
    )
    question = "64 starts of Rosenbrock-10 by L-BFGS, warm; beside one `minimize`"
    report(question, 1e3 * many, 1e3 * one, "ms", "under 50 ms on a quiet machine")


if __name__ == "__main__":
    print(json.dumps(fit(int(sys.argv[1]))))
