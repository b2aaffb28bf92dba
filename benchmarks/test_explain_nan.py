"""What `ExplainNaN` costs in Keras's `fit` while all is well.

A step is a call of the model's `train_function`, without what `fit` does around it. The
CPU time of some steps with the callback is compared with that of as many without, in
turns, in one process: on a loaded machine, too, the median of many such ratios is good
to one per cent, as the ratio of two models without it shows.
"""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad

STEPS = 32
TURNS = 150
IN_EPOCH = 16  # turns
layers = keras.layers


def small():
    hidden = layers.Dense(32, activation="relu")
    return [keras.Input([64]), hidden, layers.Dense(10)], [64]


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
@pytest.mark.parametrize("case", [small, dense, convolutions])
def test_a_step_that_is_watched(report, times, case, form):
    is_slow = case is convolutions and form == "xla"  # 30 ms a step
    names = "watched", "plain", "plain too"
    trainings = {name: turns(*made(case, form), is_watched=name == "watched")
                 for name in names}  # fmt: skip
    seconds = {name: [] for name in names}
    for turn in range(TURNS // 10 if is_slow else TURNS):
        for i in range(3):  # each of them is the first one in turn
            name = names[(i + turn) % 3]
            seconds[name].append(next(trainings[name]))

    plain = np.array(seconds["plain"][2:]) * 1e6
    for name, what in (("watched", "with ExplainNaN"), ("plain too", "without it")):
        ratios = np.array(seconds[name][2:]) * 1e6 / plain
        report(
            f"a step of fit {what} ({case.__name__}, {form}), against one without",
            times(ratios * np.median(plain)),
            times(plain),
            "us",
            "at most 2 % more" if name == "watched" else "as many: the error",
        )


def made(case, form):
    """Return a compiled model, and its data."""
    keras.utils.set_random_seed(0)
    net, shape = case()
    model = keras.Sequential(net)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss=entropy, **FORMS[form])
    rng = np.random.default_rng(0)
    x = rng.normal(size=[32 * 64, *shape]).astype("float32")
    y = rng.integers(10, size=32 * 64)
    return model, tf.data.Dataset.from_tensor_slices((x, y)).batch(32).cache().repeat()


def turns(model, data, *, is_watched):
    """Yield the CPU time of a step, the mean of some."""
    watch = tfgrad.ExplainNaN() if is_watched else keras.callbacks.Callback()
    watch.set_model(model)
    model.make_train_function()
    watch.on_train_begin()
    iterator, turn = iter(data), 0
    while True:
        began, turn = time.process_time(), turn + 1
        for _ in range(STEPS // model.steps_per_execution):
            float(model.train_function(iterator)["loss"])
        if turn % IN_EPOCH == 0:
            watch.on_epoch_end(0)
            watch.on_epoch_begin(0)
        yield (time.process_time() - began) / STEPS
