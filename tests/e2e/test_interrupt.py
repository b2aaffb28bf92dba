"""Ctrl-C, as a real signal to a real process.

`TFGRAD_KILLS=40` interrupts as many logged runs at random moments; by default, two.
"""

import json
import os
import subprocess
import sys

import numpy as np

from tfgrad.runs.reader import read_run

MOMENTS = int(os.environ.get("TFGRAD_KILLS", "2"))

SCRIPT = """
import os, signal, sys, threading
import tensorflow as tf
import tfgrad

def f():
    return x**2 + x - 1

sgd = {"method": "sgd", "learning_rate": 1e-9}
for jit, steps in ((False, 10_000_000), (True, 10**10), ("auto", 90)):
    x, sent = tf.Variable(3.0), []

    def send(state):
        if state.step >= 20 and not sent:
            sent.append(state.step)
            os.kill(os.getpid(), signal.SIGINT)

    result = tfgrad.minimize(
        f, wrt=x, steps=steps, jit=jit, callback=send, log=sys.argv[1], **sgd
    )
    rows = len(result.history["fun"])
    assert result.status == "interrupted", result
    assert rows == result.nit + 1 and 20 <= result.nit < steps, result
    assert result.history["x"][-1] == x.numpy() == result.x.numpy()
    assert result.history["fun"][-1] == result.fun
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(jit)

states = tfgrad.descend(f, wrt=x, steps=10**9, every=10**8, jit=True, **sgd)
first = next(states)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    next(states)
except KeyboardInterrupt:
    print("raised")
"""


def test_ctrl_c_ends_every_compiled_form_with_all_kept_and_raises_in_a_descent(
    tmp_path,
):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "logs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True", "auto", "raised"]


LOGGED_RUNS = """
import os, random, signal, sys, threading
import numpy as np
import tensorflow as tf
import tfgrad

root, moments = sys.argv[1], int(sys.argv[2])
x = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)

def rosenbrock(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

def loss(w, batch):
    return tf.reduce_mean((tf.linalg.matvec(batch, w) - 1) ** 2)

calls = [
    (rosenbrock, {"x0": np.full(4, -1.2)}),
    (rosenbrock, {"x0": np.full(4, -1.2), "method": "scipy:bfgs"}),
    (rosenbrock, {"x0": np.full(4, -1.2), "method": "adam", "steps": 200}),
    (loss, {"x0": np.zeros(3, np.float32), "data": x, "epochs": 5}),
]
chance = random.Random(0)
for moment in range(moments):
    after = chance.uniform(0.0, 1.0)
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
    ended = None
    try:
        while ended != "interrupted":
            for f, options in calls:
                ended = tfgrad.minimize(f, log=root, **options).status
                if ended == "interrupted":
                    break
    except KeyboardInterrupt:
        ended = "KeyboardInterrupt"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    print(ended)
"""

ENDS = "converged", "scipy", "steps", "epochs"


def test_ctrl_c_at_any_moment_of_a_loop_of_logged_runs_ends_it(tmp_path):
    command = [sys.executable, "-c", LOGGED_RUNS, str(tmp_path), str(MOMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    ends = done.stdout.split()
    assert len(ends) == MOMENTS
    assert {*ends} <= {"interrupted", "KeyboardInterrupt"}
    for path in tmp_path.iterdir():  # each can be read, and says how it ended
        status = json.loads((path / "run.json").read_text())["status"]
        assert status in {*ENDS, "interrupted"}, path
        assert np.isfinite(read_run(path).curves["loss"].values).all()
