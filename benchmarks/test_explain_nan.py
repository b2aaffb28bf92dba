"""What `ExplainNaN` costs in Keras's `fit` while all is well."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad

STEPS = 128
EPOCHS = 20
layers = keras.layers


def dense():
    hidden = [layers.Dense(256, activation="relu") for _ in range(3)]
    return [keras.Input([64]), *hidden, layers.Dense(10)], [64]


def convolutions():
    net = [keras.Input([16, 16, 1]), layers.Conv2D(16, 3, activation="relu")]
    net += [layers.BatchNormalization(), layers.Conv2D(16, 3, activation="relu")]
    return [*net, layers.Flatten(), layers.Dropout(0.1), layers.Dense(10)], [16, 16, 1]


FORMS = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "32 steps in one execution": {"jit_compile": False, "steps_per_execution": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [dense, convolutions])
def test_a_step_that_is_watched(report, times, case, form):
    rng = np.random.default_rng(0)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trainings, seconds = {}, {"watched": [], "plain": []}
    for name in seconds:
        keras.utils.set_random_seed(0)
        net, shape = case()
        model = keras.Sequential(net)
        model.compile("adam", loss=entropy, **FORMS[form])
        x = rng.normal(size=[32 * STEPS, *shape]).astype("float32")
        y = rng.integers(10, size=32 * STEPS)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32).cache()
        watch = tfgrad.ExplainNaN() if name == "watched" else None
        trainings[name] = _epochs(model, data, watch)
    for _ in range(EPOCHS):
        for name, training in trainings.items():
            seconds[name].append(next(training))

    ours, theirs = (times(each[2:], each[0]) for each in seconds.values())
    report(
        f"a step of fit with ExplainNaN ({case.__name__}, {form}), against without",
        ours * 1e6,
        theirs * 1e6,
        "us",
        "at most 2 % more",
    )


def _epochs(model, data, watch):
    """Yield the CPU time of a step in each epoch of a training, begun once."""
    if watch is not None:
        watch.set_model(model)
        watch.on_train_begin()
    while True:
        began = time.process_time()
        model.fit(data, epochs=1, shuffle=False, verbose=0)
        if watch is not None:
            watch.on_epoch_end(0)
            watch.on_epoch_begin(0)
        yield (time.process_time() - began) / STEPS
