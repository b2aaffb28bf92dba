"""`train_step` on the two replicas of a mirrored strategy, in a process of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import contextlib

import keras
import numpy as np
import tensorflow as tf
import tfgrad
import tfgrad.errors

cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
y = x.sum(axis=1, keepdims=True)
options = {"optimizer": "adam", "learning_rate": 0.01}


class Model(keras.Model):
    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
        self.net = keras.Sequential([keras.Input([4]), *layers])
        self.step = tfgrad.train_step(self.loss_of, wrt=self.net, **options)

    def call(self, x):
        return self.net(x)

    def loss_of(self, x, y):
        return tf.reduce_mean((self.net(x) - y) ** 2)

    def train_step(self, data):
        return {"value": self.step(*data)}


def largest(one, other):
    pairs = zip(one.get_weights(), other.get_weights(), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


alone = Model()
for _ in range(5):
    alone.step(x, y)

with strategy.scope():
    fitted, run, inside, outside = (Model() for _ in range(4))
    fitted.compile(jit_compile=False)
    fitted.fit(x, y, batch_size=32, epochs=5, shuffle=False, verbose=0)
    for _ in range(5):
        inside.step(x, y)
step = tfgrad.train_step(outside.loss_of, wrt=outside.net, **options)
for _ in range(5):
    step(x, y)
batches = tf.data.Dataset.from_tensors((x, y)).repeat(5)
for batch in strategy.experimental_distribute_dataset(batches.unbatch().batch(32)):
    tf.function(lambda batch: strategy.run(run.step, args=batch))(batch)
batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
y_huge = np.where(np.arange(8)[:, None] == 1, np.float32(1e38), y[:8])
O = keras.optimizers
settings = {
    "clipped": lambda: O.Adam(0.01, global_clipnorm=0.1),
    "averaged": lambda: O.SGD(0.1, use_ema=True, ema_overwrite_frequency=2),
    "accumulated": lambda: O.Adam(0.01, gradient_accumulation_steps=2),
    "scaled": lambda: O.LossScaleOptimizer(O.Adam(0.01)),
    "overflow": lambda: O.LossScaleOptimizer(O.Adam(0.01)),
    "sparse": lambda: O.Adam(0.01),
}


def trained(name, scope):
    with scope:
        keras.utils.set_random_seed(0)
        layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([4]), *layers])
        table = keras.Variable(np.ones([3, 1], "float32"))
        optimizer = settings[name]()

    def loss(x, y):
        rows = tf.gather(table.value, tf.cast(x[:, 0] > 0, tf.int32))
        return tf.reduce_mean(tf.abs(model(x) * rows - y) ** 1.5)

    wrt = [*model.trainable_variables, table]
    step = tfgrad.train_step(loss, wrt=wrt, optimizer=optimizer)
    run = tf.function(lambda *parts: strategy.run(step, args=parts))
    huge = [(x[:8], y_huge)] if name == "overflow" else []
    for batch in [*batches, *huge, *batches]:
        if strategy.extended.variable_created_in_scope(table.value):
            cut = [np.split(part, 2) for part in batch]
            parts = [
                strategy.experimental_distribute_values_from_function(
                    lambda context, both=both: tf.constant(
                        both[context.replica_id_in_sync_group]
                    )
                )
                for both in cut
            ]
            run(*parts)
        else:
            step(*batch)
    scale = getattr(optimizer, "dynamic_scale", None)
    numbers = [np.ravel(v) for v in model.get_weights()] + [np.ravel(table)]
    return np.concatenate(numbers), None if scale is None else float(scale.numpy())


for name in settings:
    (one, scale), (both, other) = (
        trained(name, scope)
        for scope in (contextlib.nullcontext(), strategy.scope())
    )
    assert scale == other, (name, scale, other)
    print(name, np.abs(one - both).max())
try:
    strategy.run(run.step, args=(x, y))
except tfgrad.errors.InvalidArgumentError as error:
    assert "part of a compiled function" in error.rule
else:
    raise AssertionError
with strategy.scope():
    mirrored, mirroring = tf.Variable(1.0), keras.optimizers.SGD()
for wrt, optimizer in (
    (mirrored, keras.optimizers.SGD()), (tf.Variable(1.0), mirroring)
):
    try:
        tfgrad.train_step(lambda: wrt * 1.0, wrt=wrt, optimizer=optimizer)
    except tfgrad.errors.InvalidArgumentError as error:
        assert "must be of one strategy" in error.rule
    else:
        raise AssertionError
keras.config.set_dtype_policy("float64")
x, y = x.astype("float64"), y.astype("float64")
BETWEEN = {
    "uneven": lambda: keras.layers.Activation("linear"),
    "synchronized": lambda: keras.layers.BatchNormalization(synchronized=True),
    "averages": lambda: keras.layers.BatchNormalization(),
    "dropout": lambda: keras.layers.Dropout(0.3, seed=5),
}


def uneven(kind, scope):  # five rows and one in turn: a replica has fewer, or none
    with scope:
        keras.utils.set_random_seed(0)
        hidden = keras.layers.Dense(8, activation="tanh")
        layers = [hidden, BETWEEN[kind](), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input([4]), *layers])
        optimizer = O.Adam(0.01, clipnorm=0.1)

    def loss(x, y):
        return tf.reduce_mean((model(x, training=True) - y) ** 2)

    step = tfgrad.train_step(loss, wrt=model, optimizer=optimizer)
    whole = lambda *both: strategy.run(step, args=both)
    run = tf.function(whole, reduce_retracing=True)

    def cut(part):
        def of(context):
            index = context.replica_id_in_sync_group
            return tf.constant(np.array_split(part, 2)[1 - index])

        return strategy.experimental_distribute_values_from_function(of)

    for k in range(6):
        rows = slice(5 * k, 5 * k + (5 if k % 2 else 1))
        if optimizer._distribution_strategy is strategy:
            value = run(cut(x[rows]), cut(y[rows]))
            first, second = strategy.experimental_local_results(value)
            assert float(first) == float(second)  # that of all
            for v in model.variables:
                a, b = strategy.experimental_local_results(v.value)
                np.testing.assert_array_equal(a, b)
        else:
            value = first = step(x[rows], y[rows])
    weights = np.concatenate([np.ravel(v) for v in model.get_weights()])
    assert np.all(np.isfinite(weights.astype(float)))
    return weights.astype(float), float(first)


for kind in BETWEEN:
    one, other = uneven(kind, contextlib.nullcontext()), uneven(kind, strategy.scope())
    print(kind, np.abs(one[0] - other[0]).max(), abs(one[1] - other[1]))
with strategy.scope():
    w = tf.Variable(1.0)
    step = tfgrad.train_step(lambda x: w * x, wrt=w, optimizer="sgd", learning_rate=0.5)
    tf.function(lambda x: step(x))(2.0)
assert float(w.numpy()) == 0.0
tfgrad.train_step(lambda: w * w, wrt=w, optimizer="sgd", jit=True)()
with strategy.scope():
    late = keras.Sequential([keras.layers.Dense(1)])
    try:
        tfgrad.train_step(lambda x: tf.reduce_sum(late(x)), wrt=late)(x)
    except tfgrad.errors.InvalidArgumentError as error:
        assert "a model is built before its step" in error.rule
    else:
        raise AssertionError
for model in (fitted, run, inside, outside):
    print(f"{largest(alone, model):.1e}")
"""


@pytest.fixture(scope="module")
def printed():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_on_two_replicas_a_step_is_the_step_of_one(printed):
    fitted, run, inside, outside = map(float, printed[-4:])

    assert max(fitted, run) < 1e-6  # sums in another order
    assert (inside, outside) == (0, 0)


SETTINGS = "clipped", "averaged", "accumulated", "scaled", "overflow", "sparse"


@pytest.mark.parametrize("name", SETTINGS)
def test_in_replicas_an_optimizer_does_what_it_does_in_one_process(printed, name):
    (difference,) = (line.split()[1] for line in printed if line.startswith(name))

    assert float(difference) < 1e-5  # in float32; Adam magnifies what rounds otherwise


@pytest.mark.parametrize("kind", ["uneven", "synchronized", "averages", "dropout"])
def test_replicas_with_other_numbers_of_rows_take_the_step_of_one(printed, kind):
    (line,) = (line for line in printed if line.startswith(kind))
    weights, value = map(float, line.split()[1:])

    if kind in ("averages", "dropout"):  # by the rows, and masks, of each replica
        assert weights > 1e-3
    else:
        assert max(weights, value) < 1e-12
