"""Value and derivative of a minimiser beside jaxopt's, in a process of its own."""

from __future__ import annotations

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

ROUNDS = 8
"""How often both sides are measured, in turns."""


@pytest.fixture(scope="module")
def theirs():
    """Return the function that measures jaxopt's."""
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    if subprocess.run([python, "-c", "import jaxopt"], capture_output=True).returncode:
        pytest.skip("jaxopt is not installed beside TFGRAD_PEERS")
    command = [python, str(HERE / "solution_peer.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:

        def measured(name):
            print(name, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield measured


@pytest.mark.slow
@pytest.mark.parametrize("name", problems.NAMES)
def test_value_and_derivative(report, times, theirs, name):
    ops = tf, tf.reduce_sum, tf.linalg.matvec, tf.math.softplus
    f = problems.losses(*ops)[name]

    def outer(log_penalty):
        w = tfgrad.solution(f, np.zeros(20), log_penalty)
        return tf.reduce_sum(w * w)

    def ours(jit):
        compiled = tfgrad.value_and_grad(outer, jit=jit)
        # A tensor, as JAX takes a plain number: of other numbers we make one, for
        # 0.1 ms.
        call = lambda p: tuple(map(float, compiled(tf.constant(p, tf.float64))))  # noqa: E731
        return lambda: problems.measured(call)

    sides = {"graph": ours(False), "XLA": ours(True), "": lambda: theirs(name)}
    rounds = [{form: side() for form, side in sides.items()} for _ in range(ROUNDS)]
    exact = np.array([problems.exactly(name, p) for p in problems.PENALTIES])
    taken, errors = {}, {}
    for form in sides:
        seconds = np.array([each[form]["seconds"] for each in rounds])
        taken[form] = times(seconds[:, 1:].ravel() * 1e3, first=seconds[0, 0] * 1e3)
        errors[form] = np.max(np.abs(rounds[0][form]["slopes"] / exact - 1))

    for form, bar in (("graph", "-"), ("XLA", "within 1.5 times")):
        question = f"{name} of 20 weights, {form}, against jaxopt's L-BFGS"
        report(question, taken[form], taken[""], "ms", bar)
    question = f"{name} of 20 weights: the largest error of the derivative"
    report(question, errors["XLA"], errors[""], "", "not larger")
