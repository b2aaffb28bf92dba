"""`tfgrad demo`: derivatives, a minimisation and a run for TensorBoard."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.optimize.history import History

STEPS_BY_HAND = 200
COMPILED_STEPS = 100_000


def run(options: argparse.Namespace) -> int:
    """Print each line as soon as its numbers are there."""
    for line in demo(options.logs):
        print(line, flush=True)
    return 0


def demo(logs: str) -> Iterator[str]:
    """Yield the lines; write a run, with a picture in it, below `logs`."""
    yield "Derivatives, each beside a finite difference"
    yield from _derivatives()
    yield ""
    least = tfgrad.minimize(
        lambda x: (x + 1) ** 2, 0.0, method="sgd", learning_rate=0.1
    )
    yield f"Minimum of (x + 1)²: x = {float(least.x):.6f}, f = {least.fun:.1e}"
    yield ""
    yield "30 steps of gradient descent on x² + x - 1 from 3, rate 0.1"
    x = tf.Variable(tf.constant(3.0))

    @tf.function
    def f_x() -> tf.Tensor:
        return x**2 + x - 1

    result = tfgrad.minimize(
        f_x,
        wrt=x,
        method="sgd",
        learning_rate=0.1,
        steps=30,
        log=Path(logs, "parabola"),
    )
    yield from _columns(result.history)
    yield ""
    yield from _speed()
    yield ""
    assert result.directory is not None
    picture = result.directory / "history.png"
    result.plot().savefig(picture, dpi=150)
    yield f"Run:      {result.directory}"
    yield f"Picture:  {picture}"
    yield f"Watch it: tfgrad board {logs}"


def _derivatives() -> Iterator[str]:
    cases: list[tuple[str, str, Callable[[Any], Any], Any]] = [
        ("x²", "5", lambda x: x * x, 5.0),
        ("x²", "[5, 10, 15.23232]", lambda x: x * x, [5.0, 10.0, 15.23232]),
        ("x² + x - 1", "3", lambda x: x**2 + x - 1, 3.0),
    ]
    for name, where, f, point in cases:
        x = tf.constant(point, tf.float64)
        exact = tfgrad.derivative(f)(x).numpy()
        value, error = tfgrad.finite_difference(f, x, tf.ones_like(x))
        yield (
            f"  {name:<10} at {where:<18} {np.array2string(exact):<28}"
            f" {np.array2string(value.numpy()):<28} ± {np.max(error):.0e}"
        )


def _columns(history: History) -> Iterator[str]:
    rows = [
        f"{step:3d} {x!s:>13} {f!s:>12}"
        for step, x, f in zip(
            history["step"], history["x"], history["fun"], strict=True
        )
    ]
    yield "  " + "   ".join([f"{'':3} {'x':>13} {'f':>12}"] * 3)
    height = -(-len(rows) // 3)
    for i in range(height):
        yield "  " + "   ".join(rows[i::height])


def _speed() -> Iterator[str]:
    x = tf.Variable(tf.constant(3.0))
    optimizer = keras.optimizers.SGD(0.1)

    def step() -> None:
        with tf.GradientTape() as tape:
            y = x**2 + x - 1
        optimizer.apply_gradients([(tape.gradient(y, x), x)])

    result = tfgrad.minimize(
        lambda x: x**2 + x - 1,
        3.0,
        method="sgd",
        learning_rate=0.1,
        steps=COMPILED_STEPS,
    )
    half = result.history["seconds"][COMPILED_STEPS // 2 :]
    ours = (half[-1] - half[0]) / (len(half) - 1)
    yield f"{'One step, in a loop of':<47} {'µs':>9}"
    for name, function in (
        ("Python, tape and apply_gradients by hand", step),
        ("Python, the same step in a tf.function", tf.function(step)),
    ):
        seconds = _seconds_of(function)
        yield f"  {name:<45} {seconds * 1e6:9.2f}   {seconds / ours:9,.0f} x"
    name = f"tfgrad.minimize, {COMPILED_STEPS:,} steps"
    yield f"  {name:<45} {ours * 1e6:9.2f}   {1:9} x"
    counted = result.seconds / COMPILED_STEPS
    yield f"  {'the same, with all compiling counted':<45} {counted * 1e6:9.2f}"


def _seconds_of(step: Callable[[], Any]) -> float:
    step()  # a tf.function is traced at its first call
    began = time.perf_counter()
    for _ in range(STEPS_BY_HAND):
        step()
    return (time.perf_counter() - began) / STEPS_BY_HAND
