"""What `ExplainNaN` costs in Keras's `fit` while all is well."""

import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad

STEPS = 64
EPOCHS = 20
layers = keras.layers


class Epochs(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


def dense():
    hidden = [layers.Dense(256, activation="relu") for _ in range(3)]
    return [keras.Input([64]), *hidden, layers.Dense(10)], [64]


def convolutions():
    net = [keras.Input([16, 16, 1]), layers.Conv2D(16, 3, activation="relu")]
    net += [layers.BatchNormalization(), layers.Conv2D(16, 3, activation="relu")]
    return [*net, layers.Flatten(), layers.Dropout(0.1), layers.Dense(10)], [16, 16, 1]


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("case", [dense, convolutions])
def test_a_step_that_is_watched(report, times, case, jit):
    rng = np.random.default_rng(0)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    models, clocks = {}, {"watched": Epochs(), "plain": Epochs()}
    for name, clock in clocks.items():
        keras.utils.set_random_seed(0)
        net, shape = case()
        model = keras.Sequential(net)
        model.compile("adam", loss=entropy, jit_compile=jit)
        x = rng.normal(size=[32 * STEPS, *shape]).astype("float32")
        y = rng.integers(10, size=32 * STEPS)
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(32).cache()
        watch = tfgrad.ExplainNaN() if name == "watched" else None
        models[name] = model, data, [clock, *([watch] if watch else [])]
    for model, data, _ in models.values():
        model.fit(data, epochs=1, shuffle=False, verbose=0)
    turns = {name: _turns(*parts) for name, parts in models.items()}
    for _ in range(EPOCHS):
        for turn in turns.values():
            next(turn)

    ours, theirs = (
        times(np.array(clocks[name].seconds[2:]) / STEPS) for name in clocks
    )
    form = "xla" if jit else "graph"
    report(
        f"a step of fit with ExplainNaN ({case.__name__}, {form}), against without",
        ours * 1e6,
        theirs * 1e6,
        "us",
        "at most 2 % more",
    )


def _turns(model, data, callbacks):
    """Yield after each epoch of one training, the callbacks begun once."""
    watches = callbacks[1:]
    for watch in watches:
        watch.set_model(model)
        watch.on_train_begin()
    while True:
        model.fit(data, epochs=1, shuffle=False, verbose=0, callbacks=callbacks[:1])
        for watch in watches:
            watch.on_epoch_end(0)
            watch.on_epoch_begin(0)
        yield
