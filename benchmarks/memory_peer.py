"""Steps of an optimizer of Keras on 13.6 million parameters, by one tool.

    python benchmarks/memory_peer.py tfgrad|loop sgd|adam

prints by how many MB the memory rose at its peak; the parameters fill 52 of them.
"""

from __future__ import annotations

import itertools
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from scale_peer import peak

from tfgrad import minimize

WIDTHS, STEPS = (512, 4096, 2560, 400), 30


def network():
    """Return a loss over batches, its variables, and the batches."""
    generator = np.random.default_rng(0)
    layers = [
        tf.Variable(tf.random.normal(pair, stddev=0.01, seed=0), name=f"layer_{i}")
        for i, pair in enumerate(itertools.pairwise(WIDTHS))
    ]
    x = generator.normal(size=(STEPS, 32, WIDTHS[0])).astype(np.float32)

    def loss(x):
        for layer in layers:
            x = tf.tanh(x @ layer)
        return tf.reduce_mean((x - 0.1) ** 2)

    return loss, layers, tf.data.Dataset.from_tensor_slices(x)


def by_tfgrad(loss, layers, batches, method):
    minimize(loss, wrt=layers, data=batches, method=method)


def by_loop(loss, layers, batches, method):
    optimizer = keras.optimizers.get(method)
    optimizer.build(layers)

    @tf.function
    def run():
        for x in batches:
            with tf.GradientTape() as tape:
                value = loss(x)
            optimizer.apply(tape.gradient(value, layers), layers)

    run()


def main():
    tool, method = sys.argv[1:]
    given = network()
    before = peak()
    {"tfgrad": by_tfgrad, "loop": by_loop}[tool](*given, method)
    print((peak() - before) / 2**20)


if __name__ == "__main__":
    main()
