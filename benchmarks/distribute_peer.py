"""A step of `descend` and one of a `strategy.run` loop by hand, as JSON, of one worker.

    python distribute_peer.py mirrored | workers

`mirrored` is two virtual devices in one process, `workers` a process of the cluster
that TF_CONFIG names. Each is a process of its own: devices are made once.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import tfgrad

CHUNK, ROUNDS, BATCH = 50, 15, 64


def strategy_of(kind):
    if kind == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy()
    (cpu,) = tf.config.list_physical_devices("CPU")
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def made(strategy):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        hidden = [keras.layers.Dense(64, activation="tanh") for _ in range(6)]
        model = keras.Sequential([keras.Input([64]), *hidden, keras.layers.Dense(1)])
        return model, keras.optimizers.Adam()


def by_hand(strategy, model, optimizer, dataset):
    """The loop that TensorFlow's guide shows, many steps in one call."""
    distributed = iter(strategy.experimental_distribute_dataset(dataset))
    with strategy.scope():
        optimizer.build(model.trainable_variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            errors = (model(x) - y) ** 2
            value = tf.reduce_sum(errors) / BATCH
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(
            zip(gradients, model.trainable_variables, strict=True)
        )
        return value

    @tf.function
    def chunk(iterator):
        value = tf.constant(0.0)
        for _ in tf.range(CHUNK):
            parts = strategy.run(step, args=next(iterator))
            value = strategy.reduce("SUM", parts, axis=None)
        return value

    return lambda: float(chunk(distributed))


def main() -> None:
    strategy = strategy_of(sys.argv[1])
    rng = np.random.default_rng(0)
    x = rng.normal(size=[20 * BATCH, 64]).astype("float32")
    y = np.sin(x @ rng.normal(size=[64, 1])).astype("float32")
    whole = tf.data.Dataset.from_tensor_slices((x, y))
    dataset = whole.batch(BATCH, drop_remainder=True).repeat()
    hand = by_hand(strategy, *made(strategy), dataset)
    model, optimizer = made(strategy)
    states = tfgrad.descend(
        lambda x, y: tf.reduce_mean((model(x) - y) ** 2),
        wrt=model,
        data=dataset,
        method=optimizer,
        steps=(ROUNDS + 3) * CHUNK,
        every=CHUNK,
    )
    next(states)  # the start
    seconds = {"ours": [], "hand": []}
    for _ in range(ROUNDS + 2):
        for name, call in (("ours", lambda: next(states)), ("hand", hand)):
            began = time.perf_counter()
            call()
            seconds[name].append((time.perf_counter() - began) / CHUNK)
    print(json.dumps({n: [t[0], *t[2:]] for n, t in seconds.items()}))
    ours, theirs = (statistics.median(t[2:]) for t in seconds.values())
    print(f"{ours * 1e3:.2f} ms, by hand {theirs * 1e3:.2f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()
