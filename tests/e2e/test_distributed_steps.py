"""`train_step` on the two replicas of a mirrored strategy, in a process of its own."""

import subprocess
import sys

SCRIPT = """
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
for model in (fitted, run, inside, outside):
    print(f"{largest(alone, model):.1e}")
"""


def test_on_two_replicas_a_step_is_the_step_of_one():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    fitted, run, inside, outside = map(float, done.stdout.split()[-4:])

    assert max(fitted, run) < 1e-6  # sums in another order
    assert (inside, outside) == (0, 0)
