"""Value and derivative of a minimiser beside jaxopt's, in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import tfgrad

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # what the peer runs is beside this file
import solution_peer as problems  # noqa: E402  (found by the line above)


@functools.cache
def theirs():
    """Return what jaxopt takes; None if it is not installed."""
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    if subprocess.run([python, "-c", "import jaxopt"], capture_output=True).returncode:
        return None
    run = subprocess.run(
        [python, str(HERE / "solution_peer.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", problems.NAMES)
def test_value_and_derivative(report, times, name, jit):
    found = theirs()
    if found is None:
        pytest.skip("jaxopt is not installed beside TFGRAD_PEERS")
    ops = tf, tf.reduce_sum, tf.linalg.matvec, tf.math.softplus
    f, peer = problems.losses(*ops)[name], found[name]

    def outer(log_penalty):
        w = tfgrad.solution(f, np.zeros(20), log_penalty)
        return tf.reduce_sum(w * w)

    compiled = tfgrad.value_and_grad(outer, jit=jit)
    # A tensor, as JAX takes a plain number: of other numbers we make one, for 0.1 ms.
    ours = problems.measured(
        lambda p: tuple(map(float, compiled(tf.constant(p, tf.float64))))
    )
    np.testing.assert_allclose(ours["slope"], peer["slope"], rtol=1e-8)

    sides = [
        times([s * 1e3 for s in side["seconds"]], first=side["first"] * 1e3)
        for side in (ours, peer)
    ]
    form = "XLA" if jit else "graph"
    report(
        f"{name} of 20 weights, {form}, against jaxopt's L-BFGS",
        *sides,
        "ms",
        "within 1.5 times" if jit else "-",
    )
