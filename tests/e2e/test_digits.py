"""A convolution net that learns to read digits, as in the documentation."""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import tfgrad


def test_a_small_net_reads_97_of_100_digits_that_it_has_not_seen():
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, held_out = order[:1437], order[1437:]

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input([8, 8, 1]),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10),
        ]
    )

    def share_of_hits(y, logits):
        hits = tf.equal(tf.argmax(logits, axis=1), y)
        return tf.reduce_mean(tf.cast(hits, tf.float32))

    def loss(x, y):
        logits = model(x, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        return tf.reduce_mean(losses), {"accuracy": share_of_hits(y, logits)}

    def validation():
        logits = model(images[held_out])
        return {"accuracy": share_of_hits(digits.target[held_out], logits)}

    result = tfgrad.minimize(
        loss,
        wrt=model,
        data=(images[train], digits.target[train]),
        epochs=6,
        learning_rate=2e-3,
        has_aux=True,
        validation=validation,
    )

    epochs = result.epochs
    assert epochs["validation_accuracy"][-1] >= 0.97
    assert result.nit == 6 * 45
    assert np.all(np.diff(epochs["fun"]) < 0)
    assert epochs["accuracy"][-1] > 0.94
