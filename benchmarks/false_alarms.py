"""How often is a right gradient withheld? Keras models and losses at initialisation.

Two hundred models, drawn from layers, losses, dtypes and inputs that are everyday: zero
inputs, rows that are masked out, zero biases, dropout, one row. For each, the gradient
by the weights and by the input, and a Hessian times a direction. Run it by hand:

    python benchmarks/false_alarms.py 200
"""

from __future__ import annotations

import collections
import sys
import time
import warnings

import keras
import numpy as np
import tensorflow as tf

import tfgrad

L = keras.layers

BODIES = {
    "dense": lambda a: [L.Dense(8, activation=a), L.Dense(6, activation=a)],
    "normalised": lambda a: [L.Dense(8), L.LayerNormalization(), L.Activation(a)],
    "batch norm": lambda a: [L.Dense(8), L.BatchNormalization(), L.Activation(a)],
    "dropout": lambda a: [L.Dense(8, activation=a), L.Dropout(0.5)],
    "noise": lambda a: [L.GaussianNoise(0.1), L.Dense(8, activation=a)],
    "convolution": lambda a: [
        L.Reshape((4, 4, 1)),
        L.Conv2D(4, 3, activation=a, padding="same"),
        L.MaxPooling2D(),
        L.Flatten(),
    ],
    "average pooling": lambda a: [
        L.Reshape((4, 4, 1)),
        L.Conv2D(4, 3, activation=a),
        L.GlobalAveragePooling2D(),
    ],
    "depthwise": lambda a: [
        L.Reshape((4, 4, 1)),
        L.SeparableConv2D(4, 3, activation=a),
        L.GroupNormalization(2),
        L.Flatten(),
    ],
    "one-dimensional": lambda a: [
        L.Reshape((8, 2)),
        L.Conv1D(4, 3, activation=a),
        L.MaxPooling1D(),
        L.Flatten(),
    ],
    "lstm": lambda a: [L.Reshape((4, 4)), L.LSTM(4)],
    "gru": lambda a: [L.Reshape((4, 4)), L.GRU(4)],
    "simple recurrence": lambda a: [L.Reshape((4, 4)), L.SimpleRNN(4, activation=a)],
    "bidirectional": lambda a: [L.Reshape((4, 4)), L.Bidirectional(L.LSTM(3))],
    "global max": lambda a: [
        L.Reshape((8, 2)),
        L.Dense(4, activation=a),
        L.GlobalMaxPooling1D(),
    ],
    "transposed": lambda a: [
        L.Reshape((4, 4, 1)),
        L.Conv2DTranspose(2, 3, activation=a),
        L.Flatten(),
    ],
    "upsampled": lambda a: [
        L.Reshape((4, 4, 1)),
        L.UpSampling2D(interpolation="bilinear"),
        L.Conv2D(2, 3, activation=a),
        L.Flatten(),
    ],
    "unit": lambda a: [L.Dense(8, activation=a), L.UnitNormalization()],
    "prelu": lambda a: [L.Dense(8), L.PReLU(), L.Dense(4), L.LeakyReLU()],
}

ACTIVATIONS = (
    *("relu", "elu", "selu", "gelu", "tanh", "sigmoid", "softplus", "swish", "relu6"),
    *("leaky_relu", "mish", "hard_sigmoid", "hard_swish", "softsign", "linear"),
)

LOSSES = {
    "squares": lambda y, p: keras.losses.mean_squared_error(y, p),
    "absolute": lambda y, p: keras.losses.mean_absolute_error(y, p),
    "huber": lambda y, p: keras.losses.huber(y, p),
    "log cosh": lambda y, p: keras.losses.log_cosh(y, p),
    "hinge": lambda y, p: keras.losses.hinge(2 * y - 1, p),
    "cross entropy": lambda y, p: tf.nn.softmax_cross_entropy_with_logits(y, p),
    "categories": lambda y, p: keras.losses.categorical_crossentropy(
        y, p, from_logits=True
    ),
    "probabilities": lambda y, p: keras.losses.categorical_crossentropy(
        y, tf.nn.softmax(p)
    ),
    "labels": lambda y, p: keras.losses.sparse_categorical_crossentropy(
        tf.argmax(y, -1), p, from_logits=True
    ),
    "binary": lambda y, p: keras.losses.binary_crossentropy(y, p, from_logits=True),
    "sigmoids": lambda y, p: keras.losses.binary_crossentropy(y, tf.sigmoid(p)),
    "focal": lambda y, p: keras.losses.binary_focal_crossentropy(y, tf.sigmoid(p)),
    "divergence": lambda y, p: keras.losses.kl_divergence(
        tf.nn.softmax(y), tf.nn.softmax(p)
    ),
    "poisson": lambda y, p: keras.losses.poisson(y, tf.nn.softplus(p)),
    "cosine": lambda y, p: keras.losses.cosine_similarity(y, p + 0.1),
}

INPUTS = ("normal", "zeros", "padded rows", "one row", "one row of zeros", "ones")


def inputs_of(kind: str, generator: np.random.Generator) -> np.ndarray:
    """Return a batch."""
    x = generator.normal(size=(1 if kind.startswith("one row") else 6, 16))
    if kind == "zeros" or kind == "one row of zeros":
        x[:] = 0.0
    elif kind == "padded rows":
        x[3:] = 0.0
    elif kind == "ones":
        x[:] = 1.0
    return x


def case(number: int) -> tuple[str, list[tuple[str, str]]]:
    """Return what one model is, and what was withheld."""
    generator = np.random.default_rng(number)
    keras.utils.set_random_seed(number)
    policy = ("float32", "float32", "mixed_float16", "float16")[number % 4]
    keras.config.set_dtype_policy(policy)
    body, activation, loss, kind = (
        generator.choice(list(names)) for names in (BODIES, ACTIVATIONS, LOSSES, INPUTS)
    )
    x = inputs_of(kind, generator).astype("float32")
    masked = kind == "padded rows" and bool(generator.integers(2))
    model = keras.Sequential([*BODIES[body](str(activation)), L.Dense(3)])
    model.build((None, 16))
    y = np.eye(3, dtype="float32")[generator.integers(3, size=len(x))]
    if masked:
        y[3:] = 0.0

    def value(x: tf.Tensor) -> tf.Tensor:
        output = tf.cast(model(x, training=True), tf.float32)
        return tf.reduce_mean(tf.cast(LOSSES[loss](y, output), tf.float32))

    roads = {
        "weights": lambda: tfgrad.value_and_grad(value, wrt=model)(x),
        "input": lambda: tfgrad.grad(value)(x),
        "hvp": lambda: tfgrad.hvp(value)(x, np.ones_like(x)),
    }
    withheld = []
    for name, road in roads.items():
        try:
            road()
        except tfgrad.errors.TfgradError as error:
            withheld.append((name, f"{type(error).__name__}: {error}"))
        except Exception as error:  # what TensorFlow cannot do is another matter
            withheld.append((name, f"foreign {type(error).__name__}: {error}"[:300]))
    return f"{body}, {activation}, {loss}, {kind}, {policy}", withheld


def main(count: int, first: int = 0) -> None:
    """Print what was withheld, and how often."""
    warnings.simplefilter("ignore")
    totals: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    for number in range(first, first + count):
        name, withheld = case(number)
        totals["models"] += 1
        totals["answers"] += 3
        for road, text in withheld:
            totals[text.split(":")[0]] += 1
            print(f"{number}: {name}: {road}\n    {text}", flush=True)
        keras.backend.clear_session()
    print(dict(totals), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:] or ["200"]))
