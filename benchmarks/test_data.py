"""The loop over batches against Keras's `fit`: one model, batches and optimizer."""

import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

import tfgrad

EPOCHS = 20
REPEATS = 5
WORDS, WIDTH, LOOKUPS, STEPS = 200_000, 64, 128, 200

digits = load_digits()
IMAGES = (digits.images[..., None] / 16).astype(np.float32)
BATCHES = -(-len(IMAGES) // 32)
entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense():
    return [keras.layers.Flatten(), keras.layers.Dense(32, activation="relu")]


def convolutions():
    return [
        keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
        keras.layers.MaxPooling2D(),
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.Flatten(),
    ]


def model_of(layers):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.layers.Input([8, 8, 1]), *layers(), keras.layers.Dense(10)]
    )


def batches():
    return tf.data.Dataset.from_tensor_slices((IMAGES, digits.target)).batch(32).cache()


def fitted(layers, steps_per_execution):
    """Return the seconds of a first epoch, and of a step after it."""
    model = model_of(layers)
    model.compile("adam", loss=entropy, steps_per_execution=steps_per_execution)
    began = time.perf_counter()
    model.fit(batches(), verbose=0, shuffle=False)
    first = time.perf_counter() - began
    began = time.perf_counter()
    model.fit(batches(), epochs=EPOCHS, verbose=0, shuffle=False)
    return first, (time.perf_counter() - began) / (EPOCHS * BATCHES)


def minimised(layers):
    """Return the same for `minimize`."""
    model = model_of(layers)
    seconds = tfgrad.minimize(
        lambda x, y: entropy(y, model(x, training=True)),
        wrt=model,
        data=batches(),
        epochs=EPOCHS + 1,
    ).history["seconds"]
    first = seconds[BATCHES - 1]
    return first, (seconds[-2] - first) / (EPOCHS * BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [dense, convolutions])
def test_a_step_of_training(report, times, layers):
    calls = {
        "ours": lambda: minimised(layers),
        "fit": lambda: fitted(layers, 1),
        "fit with steps_per_execution": lambda: fitted(layers, BATCHES),
    }
    measured = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            measured[name].append(call())

    firsts, steps = (
        {name: [pair[i] for pair in pairs] for name, pairs in measured.items()}
        for i in (0, 1)
    )
    ours = times(steps.pop("ours"), np.median(firsts["ours"]))
    for name, seconds in steps.items():
        theirs = times(seconds, np.median(firsts[name]))
        report(
            f"a step of a digits net ({layers.__name__}), against {name}",
            ours * 1e3,
            theirs * 1e3,
            "ms",
            "not slower",
        )


def variable():
    table = tf.Variable(tf.random.normal([WORDS, WIDTH], seed=0))
    return lambda words: tf.gather(table, words), [table]


def layer():
    layer = keras.layers.Embedding(WORDS, WIDTH)
    layer.build()
    return layer, layer.trainable_variables


def sentences():
    words = np.random.default_rng(0).integers(WORDS, size=(STEPS, LOOKUPS))
    return tf.data.Dataset.from_tensor_slices(words).cache()


def embedded_by_hand(table):
    """Return the seconds of a step of SGD in a compiled loop, after a first epoch."""
    lookup, owners = table()
    variables = [v.value if isinstance(v, keras.Variable) else v for v in owners]
    optimizer, data = keras.optimizers.SGD(0.1), sentences()
    optimizer.build(owners)

    @tf.function
    def epoch():
        for words in data:
            with tf.GradientTape() as tape:
                value = tf.reduce_mean((lookup(words) - 1) ** 2)
            optimizer.apply(tape.gradient(value, variables), owners)

    epoch()
    began = time.perf_counter()
    epoch()
    return (time.perf_counter() - began) / STEPS


def embedded(table):
    """Return the same for `minimize`."""
    lookup, owners = table()
    seconds = tfgrad.minimize(
        lambda words: tf.reduce_mean((lookup(words) - 1) ** 2),
        wrt=owners, data=sentences(), epochs=2, method="sgd", learning_rate=0.1,
    ).history["seconds"]  # fmt: skip
    return (seconds[-2] - seconds[STEPS - 1]) / (STEPS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("table", [variable, layer])
def test_a_step_over_an_embedding(report, table):
    ours, theirs = [], []
    for _ in range(REPEATS):
        ours.append(embedded(table))
        theirs.append(embedded_by_hand(table))

    report(
        f"SGD on {WORDS:,} x {WIDTH}, a {table.__name__}, against a compiled loop",
        np.multiply(ours, 1e3), np.multiply(theirs, 1e3), "ms", "within 1.5 times",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_memory_of_training(report, method):
    peer = str(Path(__file__).parent / "memory_peer.py")
    rose = {}
    for tool in ("tfgrad", "loop"):
        command = [sys.executable, peer, tool, method]
        found = subprocess.run(command, capture_output=True, check=True, text=True)
        rose[tool] = float(found.stdout)

    report(
        f"13.6 million parameters, {method}: memory over the start",
        rose["tfgrad"], rose["loop"], "MB", "+ 100 MB",
    )  # fmt: skip
