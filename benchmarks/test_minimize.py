"""The compiled loop against the same loop written by hand."""

import gc
import resource
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad


def parabola_by_hand(steps, show):
    x = tf.Variable(3.0)
    optimizer = keras.optimizers.SGD(0.1)
    for _ in range(steps):
        with tf.GradientTape() as tape:
            y = x**2 + x - 1
        if show:
            (x.numpy(), y.numpy())
        optimizer.apply_gradients([(tape.gradient(y, x), x)])


def parabola(steps, **options):
    return tfgrad.minimize(
        lambda x: x**2 + x - 1,
        3.0,
        method="sgd",
        learning_rate=0.1,
        steps=steps,
        **options,
    )


def steady(result):
    """Return the seconds per step over the second half of a run."""
    seconds = result.history["seconds"]
    half = len(seconds) // 2
    return (seconds[-1] - seconds[half]) / (len(seconds) - 1 - half)


def test_thirty_steps_with_tracing_counted(report, interleaved):
    median = interleaved(
        15, ours=lambda: parabola(30), theirs=lambda: parabola_by_hand(30, show=True)
    )

    report(
        "30 founding steps in all, tracing counted, against eager by hand",
        median["ours"] * 1e3,
        median["theirs"] * 1e3,
        "ms",
        "not slower",
    )


@pytest.mark.parametrize("steps", [10_000, 100_000])
def test_many_steps(report, interleaved, steps):
    by_hand = interleaved(3, eager=lambda: parabola_by_hand(300, show=False))["eager"]
    results = [parabola(steps) for _ in range(4)][1:]
    total = [result.seconds / steps * 1e6 for result in results]
    steadily = [steady(result) * 1e6 for result in results]

    what, by_hand = f"a step of {steps:,}", by_hand / 300 * 1e6
    bar = "1,000 times faster"
    report(f"{what}, once compiled, against eager", steadily, by_hand, "µs", bar)
    report(f"{what}, compiling counted, against eager", total, by_hand, "µs", "-")


def rosenbrock(x):
    return tf.reduce_sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def network(width):
    """Return a loss of about 10 µs a step, and its variables."""
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(64, width)), tf.float32)
    y = tf.constant(generator.normal(size=(64, 1)), tf.float32)
    first = tf.Variable(tf.constant(generator.normal(size=(width, 16)), tf.float32))
    second = tf.Variable(tf.constant(generator.normal(size=(16, 1)), tf.float32))
    return (
        lambda: tf.reduce_mean((tf.tanh(x @ first) @ second - y) ** 2),
        [first, second],
    )


def hand_written(f, variables, steps):
    """Return the seconds of `steps` steps of Adam in a tf.while_loop under XLA."""
    optimizer = keras.optimizers.Adam(1e-3)
    optimizer.build(variables)

    @tf.function(jit_compile=True, autograph=False)
    def loop(count):
        def body(k):
            with tf.GradientTape() as tape:
                y = f()
            optimizer.apply(tape.gradient(y, variables), variables)
            return (k + 1,)

        return tf.while_loop(lambda k: k < count, body, (0,))

    loop(tf.constant(1))
    began = time.perf_counter()
    loop(tf.constant(steps))
    return time.perf_counter() - began


@pytest.mark.slow
def test_a_keras_optimizer_against_the_hand_written_xla_loop(report):
    steps = 100_000
    ours, theirs = [], []
    for _ in range(4):
        f, variables = network(32)
        result = tfgrad.minimize(f, wrt=variables, method="adam", steps=steps, jit=True)
        ours.append(steady(result))
        theirs.append(hand_written(*network(32), steps) / steps)

    report(
        "a step of Adam, history kept, against a hand-written XLA while loop",
        np.multiply(ours[1:], 1e6),
        np.multiply(theirs[1:], 1e6),
        "µs",
        "at least 0.91",
    )


@pytest.mark.slow
def test_logging_every_step(report, tmp_path):
    steps = 200_000
    seconds = {"plain": [], "logged": []}
    for turn in range(5):
        for name, log in (("plain", None), ("logged", tmp_path / str(turn))):
            f, variables = network(32)
            result = tfgrad.minimize(
                f, wrt=variables, method="adam", steps=steps, jit=True, log=log
            )
            seconds[name].append(steady(result))

    report(
        "a logged step, two curves, against the same loop without a log",
        np.multiply(seconds["logged"][1:], 1e6),
        np.multiply(seconds["plain"][1:], 1e6),
        "µs",
        "at least 0.95",
    )


def test_memory_of_logging_does_not_grow(report, tmp_path):
    def peak():
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def write(count):
        with tfgrad.Run(tmp_path / str(count)) as run:
            for first in range(0, count, 10_000):
                steps = np.arange(first, first + 10_000)
                run.log_history({"loss": 1.0 / (1.0 + steps)}, steps)

    write(10_000)
    before = peak()
    write(1_000_000)
    growth = peak() - before

    report(
        "MB more at the peak for 100 times more points", 1 + growth, 1.0, "MB", "< 10"
    )
