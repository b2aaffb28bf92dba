"""One call of `train_step` against the step by hand, and a step of Keras's `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad

STEPS = 20
REPEATS = 15

rng = np.random.default_rng(0)
images = tf.constant(rng.normal(size=[64, 28, 28, 1]), tf.float32)
rows = tf.constant(rng.normal(size=[64, 64]), tf.float32)
numbers = tf.constant(rng.normal(size=[64, 1]), tf.float32)
classes = tf.constant(rng.integers(10, size=64))
words = tf.constant(rng.integers(20_000, size=[64, 40]))
layers = keras.layers
squares = keras.losses.MeanSquaredError()
entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense():
    hidden = [layers.Dense(64, activation="relu") for _ in range(2)]
    return [keras.Input([64]), *hidden, layers.Dense(1)], squares, rows, numbers


def convolutions():
    net = [
        keras.Input([28, 28, 1]),
        layers.Conv2D(16, 3, activation="relu", strides=2),
        layers.Conv2D(32, 3, activation="relu", strides=2),
        layers.Flatten(),
        layers.Dense(10),
    ]
    return net, entropy, images, classes


def recurrent():
    net = [keras.Input([40], dtype="int64"), layers.Embedding(100, 16)]
    return [*net, layers.GRU(32), layers.Dense(10)], entropy, words % 100, classes


def embedding():
    net = [keras.Input([40], dtype="int64"), layers.Embedding(20_000, 64)]
    net += [layers.GlobalAveragePooling1D(), layers.Dense(10)]
    return net, entropy, words, classes


def large():
    hidden = [layers.Dense(2_500, activation="relu") for _ in range(3)]
    return [keras.Input([64]), *hidden, layers.Dense(1)], squares, rows, numbers


def made(case):
    keras.utils.set_random_seed(0)
    net, loss, x, y = case()
    return keras.Sequential(net), loss, (x, y)


def by_hand(model, loss, optimizer):
    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return value

    return step


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adam", "sgd"])
@pytest.mark.parametrize("case", [dense, convolutions, recurrent, embedding, large])
def test_a_step(report, interleaved, case, method):
    model, loss, batch = made(case)
    ours = tfgrad.train_step(
        lambda x, y: loss(y, model(x, training=True)), wrt=model, optimizer=method
    )
    other, loss, batch = made(case)
    hand = by_hand(other, loss, keras.optimizers.get(method))
    fitted, loss, batch = made(case)
    fitted.compile(method, loss=loss)
    data = tf.data.Dataset.from_tensors(batch).repeat(STEPS).prefetch(2)
    steps = STEPS if case is not large else STEPS // 4

    def repeated(step):
        for _ in range(steps):
            value = step(*batch)
        return value.numpy()

    times = interleaved(
        REPEATS,
        ours=lambda: repeated(ours),
        hand=lambda: repeated(hand),
        fit=lambda: fitted.fit(data.take(steps), shuffle=False, verbose=0),
    )
    for name, theirs in (("by hand", "hand"), ("in Keras's fit", "fit")):
        report(
            f"a step of {method} ({case.__name__}), against one {name}",
            times["ours"] / steps * 1e3,
            times[theirs] / steps * 1e3,
            "ms",
            "at most 10 % more",
        )
