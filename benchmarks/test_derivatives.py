"""Derivatives against the same, written by hand in TensorFlow, and beside other tools.

Every form by hand is compiled, unless it says eager; the best of several is taken.
`TFGRAD_PEERS=/path/to/python pytest benchmarks/test_derivatives.py` names a Python that
has JAX and PyTorch; they run in processes of their own.
"""

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

HERE = Path(__file__).parent
GENERATOR = np.random.default_rng(0)
X = tf.constant(GENERATOR.normal(size=100), tf.float32)
LONG = tf.constant(GENERATOR.normal(size=100_000), tf.float32)
WEIGHTS = tf.constant(GENERATOR.normal(size=(100, 100)) / 10, tf.float32)


def rosenbrock(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def layer(x):
    return tf.tanh(tf.linalg.matvec(WEIGHTS, x)) * tf.sin(x)


def gradient(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = rosenbrock(x)
    return tape.gradient(y, x)


def rows_by(mapped):
    """Return how to get a Jacobian by pulling back the unit vectors with `mapped`."""

    def form(f):
        def jacobian(x):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(x)
                y = f(x)
            return mapped(lambda u: tape.gradient(y, x, u), tf.eye(100))

        return jacobian

    return form


def by_tape(f):
    def jacobian(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = f(x)
        return tape.jacobian(y, x)

    return jacobian


def columns_vectorised(f):
    def jacobian(x):
        def column(v):
            with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
                y = f(x)
            return accumulator.jvp(y)

        return tf.transpose(tf.vectorized_map(column, tf.eye(100)))

    return jacobian


FORMS = {
    "rows in a vectorised map": rows_by(tf.vectorized_map),
    "rows in a loop": rows_by(tf.map_fn),
    "tape.jacobian": by_tape,
    "columns in a vectorised map": columns_vectorised,
}


def compiled(form, f, jit):
    return tf.function(form(f), jit_compile=jit, autograph=False).get_concrete_function(
        X
    )


def many(call, x, count=20):
    def repeated():
        for _ in range(count):
            answer = call(x)
        tf.nest.map_structure(lambda part: part.numpy(), answer)

    return repeated


@pytest.mark.parametrize("jit", [None, True])
@pytest.mark.parametrize(
    ("what", "f", "ours"),
    [("hessian", gradient, rosenbrock), ("jacobian", layer, layer)],
)
def test_a_matrix_of_a_hundred_rows(report, interleaved, what, f, ours, jit):
    transform = getattr(tfgrad, what)(ours, jit=bool(jit))
    transform(X)
    calls = {name: compiled(form, f, jit) for name, form in FORMS.items()}

    median = interleaved(
        15, ours=many(transform, X), **{n: many(c, X) for n, c in calls.items()}
    )

    best = min(calls, key=median.__getitem__)
    report(
        f"{what}, 100 rows, {'XLA' if jit else 'graph'}, against {best}",
        median["ours"] / 20 * 1e6,
        median[best] / 20 * 1e6,
        "µs",
        "within 1.2 times",
    )


def test_a_hessian_against_the_eager_nested_tape(report, interleaved):
    hessian = tfgrad.hessian(rosenbrock)
    hessian(X)

    median = interleaved(
        3, ours=many(hessian, X), theirs=many(by_tape(gradient), X, count=1)
    )

    report(
        "hessian, 100 rows, against tape.jacobian in eager mode",
        median["ours"] / 20 * 1e3,
        median["theirs"] * 1e3,
        "ms",
        "100 times faster",
    )


@pytest.mark.parametrize("jit", [None, True])
def test_a_hessian_product(report, interleaved, jit):
    @tf.function(jit_compile=jit, autograph=False)
    def by_hand(x, v):
        with tf.GradientTape() as tape:
            tape.watch(x)
            slope = gradient(x)
        return tape.gradient(slope, x, v)

    product = tfgrad.hvp(rosenbrock, jit=bool(jit))
    by_hand(LONG, LONG), product(LONG, LONG)
    concrete = by_hand.get_concrete_function(LONG, LONG)

    median = interleaved(
        40,
        ours=many(lambda x: product(x, x), LONG),
        theirs=many(lambda x: concrete(x, x), LONG),
    )

    report(
        f"hvp of 100,000 elements, {'XLA' if jit else 'graph'}, against it by hand",
        median["ours"] / 20 * 1e6,
        median["theirs"] / 20 * 1e6,
        "µs",
        "within 1.1 times",
    )


def test_what_a_call_costs(report, interleaved):
    def square(x):
        return tf.reduce_sum(x * x)

    @tf.function(autograph=False)
    def by_hand(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = square(x)
        return y, tape.gradient(y, x)

    concrete, ours = by_hand.get_concrete_function(X), tfgrad.value_and_grad(square)
    ours(X), concrete(X)

    median = interleaved(
        400,
        ours=lambda: ours(X),
        theirs=lambda: concrete(X),
        function=lambda: by_hand(X),
    )

    over = median["ours"] - median["theirs"]
    report(
        f"a call of value_and_grad (+ {over * 1e6:.0f} µs), against a ConcreteFunction",
        median["ours"] * 1e6,
        median["theirs"] * 1e6,
        "µs",
        "+ 30 µs",
    )
    report(
        "a call of value_and_grad, against a tf.function by hand",
        median["ours"] * 1e6,
        median["function"] * 1e6,
        "µs",
        "-",
    )


def test_first_calls(report):
    def seconds(call):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def once(transform, **options):
        # A new function each time, so that nothing is compiled yet.
        return seconds(lambda: transform(lambda x: rosenbrock(x), **options)(X))

    def by_hand():
        form = rows_by(tf.vectorized_map)(lambda x: gradient(x))
        return seconds(lambda: compiled(form=lambda f: f, f=form, jit=None)(X))

    rounds = [
        (once(tfgrad.hessian), once(tfgrad.hessian, verify=False), by_hand())
        for _ in range(6)
    ]
    verified, plain, theirs = np.transpose(rounds[1:]) * 1e3

    for name, ours in (("verified", verified), ("verify=False", plain)):
        report(
            f"the first call of a hessian, {name}, against it by hand",
            ours,
            theirs,
            "ms",
            "-",
        )


# Run in a process of its own: what a peak is depends on what has been before.
MEMORY = """
import sys, threading, time
import numpy as np, tensorflow as tf
import tfgrad

generator = np.random.default_rng(0)
x = tf.constant(generator.normal(size=(512, 20)), tf.float32)
y = tf.constant(generator.normal(size=(512, 1)), tf.float32)
shapes = [(20, 32), (32,), (32, 8), (8,), (8, 8), (8,), (8, 1), (1,)]
starts = [generator.normal(size=shape) * 0.3 for shape in shapes]
weights = [tf.Variable(start, dtype=tf.float32) for start in starts]

def loss():
    h = x
    for w, b in zip(weights[:-2:2], weights[1:-2:2]):
        h = tf.tanh(h @ w + b)
    return tf.reduce_mean((h @ weights[-2] + weights[-1] - y) ** 2)

@tf.function
def by_hand():
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as tape:
            value = loss()
        slopes = tape.gradient(value, weights)
        flat = tf.concat([tf.reshape(slope, [-1]) for slope in slopes], axis=0)
    return outer.jacobian(flat, weights)

call = by_hand if sys.argv[1] == "tape" else tfgrad.hessian(loss, wrt=weights)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

peak, running = 0.0, True
def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.001)

loss()
before = resident()
thread = threading.Thread(target=watch)
thread.start()
seconds = []
for _ in range(6):
    began = time.perf_counter()
    tf.nest.map_structure(lambda part: part.numpy(), call())
    seconds.append(time.perf_counter() - began)
running = False
thread.join()
print(peak - before, sorted(seconds)[len(seconds) // 2])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_and_time_of_the_hessian_of_a_network(report):
    def measured(which):
        command = [sys.executable, "-c", MEMORY, which]
        found = subprocess.run(command, capture_output=True, check=True, text=True)
        return [float(word) for word in found.stdout.split()]

    ours, theirs = measured("tfgrad"), measured("tape")

    what = "hessian of 1,017 weights, batch 512, against tape.jacobian compiled"
    report(f"{what}: extra memory", ours[0], theirs[0], "MB", "a quarter")
    report(f"{what}: time", ours[1] * 1e3, theirs[1] * 1e3, "ms", "not slower")


@pytest.mark.parametrize("peer", ["jax", pytest.param("torch", marks=pytest.mark.slow)])
def test_beside_other_tools(report, interleaved, times, peer):
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    probe = subprocess.run([python, "-c", f"import {peer}"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"{peer} is not installed")
    command = [python, str(HERE / "derivatives_peer.py"), peer]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    theirs = json.loads(found.stdout.splitlines()[-1])

    ours = {
        "value_and_grad": (tfgrad.value_and_grad(lambda x: tf.reduce_sum(x * x)), [X]),
        "hessian": (tfgrad.hessian(rosenbrock, jit=True), [X]),
        "jacobian": (tfgrad.jacobian(layer, jit=True), [X]),
        "hvp": (tfgrad.hvp(rosenbrock, jit=True), [LONG, LONG]),
    }
    median = interleaved(
        40,
        **{
            name: lambda call=call, args=args: tf.nest.flatten(call(*args))[0].numpy()
            for name, (call, args) in ours.items()
        },
    )

    for name, (first, *steady) in theirs.items():
        other = times(steady, first) * 1e6
        report(f"{name}, beside {peer}", median[name] * 1e6, other, "µs", "-")
