"""How often is a right gradient withheld? Keras models and losses at initialisation.

Two hundred models, drawn from layers, losses, dtypes and inputs that are everyday: zero
inputs, rows that are masked out, zero biases, dropout, one row. And one model of each
kind in `WHOLE`, `BLOCKS` and `OTHER_LOSSES`, in four dtypes or in those that are named.
For each, the gradient by the weights and by the input, and a Hessian times a direction.
Spectral normalisation is refused by its weights, since it assigns to them, and so is
the second derivative of CTC; these are no alarms of the check. Run it by hand:

    python benchmarks/false_alarms.py 200
    python benchmarks/false_alarms.py whole float32 float16
"""

from __future__ import annotations

import collections
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

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

BLOCKS = {
    "three dimensions": lambda: [
        L.Reshape((4, 2, 2, 1)),
        L.Conv3D(2, 2, activation="relu"),
        L.MaxPooling3D(1),
        L.Flatten(),
    ],
    "transposed in one": lambda: [
        L.Reshape((8, 2)),
        L.Conv1DTranspose(3, 3, strides=2, activation="gelu"),
        L.GlobalMaxPooling1D(),
    ],
    "depthwise": lambda: [
        L.Reshape((4, 4, 1)),
        L.DepthwiseConv2D(3, padding="same", activation="relu6"),
        L.MaxPooling2D(3, strides=1, padding="same"),
        L.Flatten(),
    ],
    "dilated": lambda: [
        L.Reshape((8, 2)),
        L.Conv1D(3, 2, dilation_rate=2, padding="causal", activation="relu"),
        L.GlobalAveragePooling1D(),
    ],
    "spectral": lambda: [L.SpectralNormalization(L.Dense(6)), L.ReLU()],
    "constrained": lambda: [
        L.Dense(6, kernel_constraint="non_neg", bias_constraint="max_norm"),
        L.Dense(6, kernel_constraint="unit_norm", activation="relu"),
    ],
    "lasso at zero": lambda: [
        L.Dense(
            6,
            kernel_initializer="zeros",
            kernel_regularizer=keras.regularizers.L1L2(0.01, 0.01),
        ),
        L.Dense(6, kernel_regularizer="l1", activity_regularizer="l2"),
    ],
    "orthogonal": lambda: [
        L.Dense(6, kernel_regularizer="orthogonal_regularizer", activation="tanh")
    ],
    "stacked recurrence": lambda: [
        L.Reshape((4, 4)),
        L.Bidirectional(L.GRU(3, return_sequences=True)),
        L.LSTM(3),
    ],
    "convolutional recurrence": lambda: [
        L.Reshape((2, 4, 2)),
        L.ConvLSTM1D(2, 2),
        L.Flatten(),
    ],
    "distributed": lambda: [
        L.Reshape((4, 4)),
        L.TimeDistributed(L.Dense(3, activation="elu")),
        L.Flatten(),
    ],
    "nested models": lambda: [
        keras.Sequential([L.Dense(6, activation="relu"), L.LayerNormalization()]),
        keras.Sequential([L.Dense(4), keras.Sequential([L.Dense(4), L.ELU()])]),
    ],
    "cut and padded": lambda: [
        L.Reshape((4, 4, 1)),
        L.ZeroPadding2D(1),
        L.Cropping2D(((0, 1), (1, 0))),
        L.AveragePooling2D(2),
        L.Flatten(),
    ],
    "rms": lambda: [L.Dense(6), L.RMSNormalization(), L.Activation("silu")],
    "spatial dropout": lambda: [
        L.Reshape((8, 2)),
        L.Conv1D(3, 3),
        L.SpatialDropout1D(0.5),
        L.AlphaDropout(0.2),
        L.Flatten(),
    ],
    "one large array": lambda: [L.Dense(70_000, activation="relu")],
    "large arrays": lambda: [
        L.Dense(1100, activation="relu"),
        L.Dense(1000, activation="tanh"),
        L.Dense(1200, activation="gelu"),
    ],
    "softmax": lambda: [L.Dense(5), L.Softmax(), L.Dense(6, activation="threshold")],
    "hard": lambda: [
        L.Dense(6, activation="hard_shrink"),
        L.Dense(6, activation="soft_shrink"),
        L.Dense(6, activation="sparse_plus"),
        L.Dense(6, activation="hard_tanh"),
    ],
    "celu": lambda: [
        L.Dense(6, activation="celu"),
        L.Dense(6, activation="squareplus"),
        L.Dense(6, activation="tanh_shrink"),
        L.Dense(6, activation="log_softmax"),
    ],
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

OTHER_LOSSES = {
    "smoothed": lambda y, p: keras.losses.categorical_crossentropy(
        y, p, from_logits=True, label_smoothing=0.1
    ),
    "smoothed signs": lambda y, p: keras.losses.binary_crossentropy(
        y, tf.sigmoid(p), label_smoothing=0.2
    ),
    "focal categories": lambda y, p: keras.losses.categorical_focal_crossentropy(
        y, tf.nn.softmax(p)
    ),
    "squared hinge": lambda y, p: keras.losses.squared_hinge(2 * y - 1, p),
    "categorical hinge": lambda y, p: keras.losses.categorical_hinge(y, p),
    "dice": lambda y, p: keras.losses.dice(y, tf.sigmoid(p)),
    "tversky": lambda y, p: keras.losses.tversky(y, tf.sigmoid(p)),
    "cosine of zero": lambda y, p: keras.losses.cosine_similarity(y, p),
    "huber at its kink": lambda y, p: keras.losses.huber(y, p, delta=1.0),
    "percent": lambda y, p: keras.losses.mean_absolute_percentage_error(y, p),
    "logarithmic": lambda y, p: keras.losses.mean_squared_logarithmic_error(y, p),
    "circle": lambda y, p: keras.losses.Circle()(tf.argmax(y, -1), p + 0.1),
    "weights of zero": lambda y, p: keras.losses.MeanSquaredError()(
        y, p, sample_weight=tf.zeros(len(y))
    ),
    "probabilities as labels": lambda y, p: (
        keras.losses.sparse_categorical_crossentropy(tf.argmax(y, -1), tf.nn.softmax(p))
    ),
    "ctc": lambda y, p: keras.losses.ctc(
        tf.ones([len(y), 1]), tf.stack([p, p + 0.1, p], axis=1)
    ),
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

    return f"{body}, {activation}, {loss}, {kind}, {policy}", withheld(value, model, x)


class Encoder(L.Layer):
    """A block of a transformer over masked words."""

    def __init__(self, words: int = 30) -> None:
        super().__init__()
        self.words = L.Embedding(words, 8, mask_zero=True)
        self.attention = L.MultiHeadAttention(2, 4, dropout=0.1)
        self.norms = [L.LayerNormalization(), L.LayerNormalization()]
        self.dense = [L.Dense(16, activation="gelu"), L.Dense(8)]

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Return one vector for each row of words."""
        words = self.words(x)
        attended = self.attention(words, words, use_causal_mask=True, training=training)
        words = self.norms[0](words + attended)
        words = self.norms[1](words + self.dense[1](self.dense[0](words)))
        return tf.reduce_mean(words, axis=1)


def embedded(words: int, *layers: Any) -> keras.Model:
    """Return a model of words, masked where they are zero."""
    return keras.Sequential([L.Embedding(words, 6, mask_zero=True), *layers])


def of_words(model: Any) -> tuple[Any, Any, Any]:
    """Return a loss, a model, and rows of words that end in padding."""
    x = np.array([[3, 5, 0, 0], [7, 2, 9, 1], [0, 0, 0, 0]])

    def value() -> tf.Tensor:
        return tf.reduce_mean(tf.cast(model(x, training=True), tf.float32) ** 2)

    value()
    return value, model, None


def two_heads() -> tuple[Any, Any, Any]:
    """Return a model with two outputs and a skip."""
    inputs = keras.Input([6])
    hidden = L.Dense(6, activation="relu")(inputs)
    hidden = L.Add()([hidden, inputs])
    heads = [L.Dense(2)(hidden), L.Dense(3, activation="softmax")(hidden)]
    model = keras.Model(inputs, heads)

    def value(x: tf.Tensor) -> tf.Tensor:
        first, second = (tf.cast(head, tf.float32) for head in model(x))
        return tf.reduce_mean(first**2) - tf.reduce_mean(tf.math.log(second + 1e-3))

    return value, model, np.zeros((4, 6), "float32")


def critic() -> tuple[Any, Any, Any]:
    """Return the loss of a critic with a penalty of its gradient."""
    model = keras.Sequential([L.Dense(8), L.LeakyReLU(), L.Dense(1)])

    def value(x: tf.Tensor) -> tf.Tensor:
        slope = tfgrad.grad(lambda x: tf.reduce_sum(tf.cast(model(x), tf.float32)))(x)
        size = tf.sqrt(tf.reduce_sum(slope**2, axis=1) + 1e-12)
        score = tf.reduce_mean(tf.cast(model(x), tf.float32))
        return score + 10 * tf.reduce_mean((size - 1) ** 2)

    model.build((None, 5))
    return value, model, np.ones((3, 5), "float32")


def autoencoder() -> tuple[Any, Any, Any]:
    """Return the loss of a variational autoencoder, its noise from a seed."""
    encode = keras.Sequential([L.Dense(8, activation="relu"), L.Dense(4)])
    decode = keras.Sequential([L.Dense(8, activation="relu"), L.Dense(6)])
    encode.build((None, 6))
    decode.build((None, 2))

    def value(x: tf.Tensor) -> tf.Tensor:
        code = tf.cast(encode(x), tf.float32)
        mean, log = code[:, :2], code[:, 2:]
        noise = tf.random.stateless_normal(tf.shape(mean), [1, 2])
        logits = tf.cast(decode(mean + tf.exp(log / 2) * noise), tf.float32)
        loss = tf.nn.sigmoid_cross_entropy_with_logits(tf.sigmoid(x), logits)
        divergence = tf.reduce_sum(tf.exp(log) + mean**2 - 1 - log, axis=1) / 2
        return tf.reduce_mean(tf.reduce_sum(loss, axis=1) + divergence)

    return value, [encode, decode], np.zeros((2, 6), "float32")


def ragged() -> tuple[Any, Any, Any]:
    """Return a loss over rows of different lengths."""
    model = keras.Sequential([L.Dense(4, activation="relu")])
    model.build((None, 3))

    def value(x: tf.Tensor) -> tf.Tensor:
        rows = tf.RaggedTensor.from_row_lengths(
            tf.cast(model(x), tf.float32), [2, 0, 3]
        )
        return tf.reduce_sum(tf.reduce_sum(rows, axis=1) ** 2)

    return value, model, np.ones((5, 3), "float32")


def contrastive() -> tuple[Any, Any, Any]:
    """Return a loss of normalised vectors, one of them zero."""
    model = keras.Sequential([L.Dense(4, use_bias=False)])
    model.build((None, 3))

    def value(x: tf.Tensor) -> tf.Tensor:
        vectors = tf.math.l2_normalize(tf.cast(model(x), tf.float32), axis=1)
        logits = vectors @ tf.transpose(vectors) / 0.1
        labels = tf.range(4)
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        )

    return value, model, np.eye(4, 3, dtype="float32")


def one_layer() -> list[Any]:
    """Return a dense layer, alone."""
    return [L.Dense(6, activation="relu")]


def built(layers: list[Any], loss: Any, kind: str) -> tuple[Any, Any, Any]:
    """Return a loss of a stack of layers, its regularisers added."""
    generator = np.random.default_rng(len(kind))
    x = inputs_of(kind, generator).astype("float32")
    model = keras.Sequential([*layers, L.Dense(3)])
    model.build((None, 16))
    y = np.eye(3, dtype="float32")[generator.integers(3, size=len(x))]

    def value(x: tf.Tensor) -> tf.Tensor:
        output = tf.cast(model(x, training=True), tf.float32)
        loss_of_output = tf.reduce_mean(tf.cast(loss(y, output), tf.float32))
        return tf.add_n(
            [loss_of_output, *(tf.cast(z, tf.float32) for z in model.losses)]
        )

    return value, model, x


POLICIES = ("float32", "mixed_float16", "mixed_bfloat16", "float16")

WHOLE: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "transformer": lambda: of_words(Encoder()),
    "words, lstm": lambda: of_words(embedded(30, L.LSTM(4))),
    "words, gru both ways": lambda: of_words(embedded(30, L.Bidirectional(L.GRU(3)))),
    "words, pooled": lambda: of_words(embedded(30, L.GlobalAveragePooling1D())),
    "200,000 words": lambda: of_words(embedded(200_000, L.GlobalAveragePooling1D())),
    "200,000 words, lstm": lambda: of_words(embedded(200_000, L.LSTM(3), L.Dense(2))),
    "two heads": two_heads,
    "critic": critic,
    "autoencoder": autoencoder,
    "ragged": ragged,
    "contrastive": contrastive,
}


def whole() -> Iterator[tuple[str, Callable[[], tuple[Any, Any, Any]]]]:
    """Yield what each is, and what makes its loss, its weights and its input."""
    yield from WHOLE.items()
    squares, kinds = LOSSES["squares"], ("zeros", "padded rows", "one row")
    for i, (name, layers) in enumerate(BLOCKS.items()):
        kind = kinds[i % 3]
        yield f"{name}, {kind}", lambda ls=layers, k=kind: built(ls(), squares, k)
    for i, (name, loss) in enumerate(OTHER_LOSSES.items()):
        kind = kinds[i % 3]
        yield f"{name}, {kind}", lambda f=loss, k=kind: built(one_layer(), f, k)


def whole_cases(policies: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield what each model of `whole` is, and what was withheld."""
    for policy in policies or POLICIES:
        for name, make in whole():
            keras.utils.set_random_seed(len(name))
            keras.config.set_dtype_policy(policy)
            yield f"{name}, {policy}", withheld(*make())


def withheld(value: Any, model: Any, x: Any) -> list[tuple[str, str]]:
    """Return which answers a loss does not get, and why."""
    given = () if x is None else (x,)
    roads = {"weights": lambda: tfgrad.value_and_grad(value, wrt=model)(*given)}
    if x is not None:
        roads["input"] = lambda: tfgrad.grad(value)(x)
        roads["hvp"] = lambda: tfgrad.hvp(value)(x, np.ones_like(x))
    found = []
    for name, road in roads.items():
        try:
            road()
        except tfgrad.errors.TfgradError as error:
            found.append((name, f"{type(error).__name__}: {error}"))
        except Exception as error:  # what TensorFlow cannot do is another matter
            found.append((name, f"foreign {type(error).__name__}: {error}"[:300]))
    return found


def main(*arguments: str) -> None:
    """Print what was withheld, and how often."""
    warnings.simplefilter("ignore")
    totals: collections.Counter[str] = collections.Counter()
    start = time.perf_counter()
    if arguments[:1] == ("whole",):
        cases = whole_cases(arguments[1:])
    else:
        count, first = map(int, (*arguments, 0)[:2]) if arguments else (200, 0)
        cases = map(case, range(first, first + count))
    for number, (name, found) in enumerate(cases):
        totals["models"] += 1
        for road, text in found:
            totals[text.split(":")[0]] += 1
            print(f"{number}: {name}: {road}\n    {text}", flush=True)
        keras.backend.clear_session()
    print(dict(totals), f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
