"""Ctrl-C, as a real signal to a real process."""

import signal
import subprocess
import sys
import textwrap

SCRIPT = """
import os, signal, time
import numpy as np
import tensorflow as tf
import tfgrad

x = tf.Variable(3.0)
sent = []

def send(state):
    if state.step >= {after} and not sent:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

result = tfgrad.minimize(
    lambda: x**2 + x - 1, wrt=x, method="sgd", learning_rate=1e-9, steps={steps},
    jit={jit}, callback=send, log={log!r},
)
took = time.perf_counter() - sent[0]
rows = len(result.history["fun"])
assert result.status == "interrupted", result
assert rows == result.nit + 1 and {after} <= result.nit < {steps}, result
assert result.history["x"][-1] == x.numpy() == result.x.numpy()
assert result.history["fun"][-1] == result.fun
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
print("took", took, "nit", result.nit, result.directory)
"""


def run(tmp_path, **options):
    script = textwrap.dedent(SCRIPT).format(log=str(tmp_path / "logs"), **options)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_ctrl_c_ends_every_compiled_form_with_everything_kept(tmp_path):
    for jit, steps in (("False", 10_000_000), ("True", 10**10), ("'auto'", 90)):
        out = run(tmp_path, jit=jit, steps=steps, after=20)

        assert int(out[3]) < steps


def test_ctrl_c_in_a_descent_raises_with_the_variables_at_a_whole_step():
    script = """
    import os, signal, threading
    import tensorflow as tf
    import tfgrad

    x = tf.Variable(3.0)
    states = tfgrad.descend(
        lambda: x**2 + x - 1, wrt=x, method="sgd", learning_rate=1e-9,
        steps=10**9, every=10**8, jit=True,
    )
    first = next(states)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        next(states)
    except KeyboardInterrupt:
        print("interrupted")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.stdout.split() == ["interrupted"], done.stderr
    assert done.returncode != -signal.SIGINT
