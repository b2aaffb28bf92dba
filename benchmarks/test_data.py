"""The loop over batches against Keras's `fit`: one model, batches and optimizer."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

import tfgrad

EPOCHS = 20
REPEATS = 5

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
