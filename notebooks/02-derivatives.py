# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which derivatives can go wrong, and what happens then?
#
# TensorFlow computes derivatives well, and says nothing when it does not. Here are the traps, TensorFlow's
# answer beside tfgrad's, and the truth from finite differences.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import keras
import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself


def tape(f, x):
    """What TensorFlow's tape says of the gradient."""
    with tf.GradientTape() as record:
        record.watch(x)
        y = f(x)
    return record.gradient(y, x)


# %% [markdown]
# ## The silent sum
#
# A function of three numbers returns three numbers. A tape adds the three gradients up and says nothing.


# %%
def coupled(x):
    return x * tf.reduce_sum(x)


x = tf.constant([1.0, 2.0, 3.0])
summed = tape(coupled, x)
summed

# %% [markdown]
# `grad` refuses it and names what may be meant: the sum, or one row per output.

# %%
try:
    tfgrad.grad(coupled)(x)
except tfgrad.errors.ScalarObjectiveError as error:
    print(error)
    refused = error

# %%
rows = tfgrad.jacobian(coupled)(x)
rows

# %% [markdown]
# ## None
#
# Where the path is cut, a tape answers `None`.


# %%
def steps(x):
    return tf.reduce_sum(tf.round(x) ** 2)


print(tape(steps, x))

# %%
try:
    tfgrad.grad(steps)(x)
except tfgrad.errors.NoGradientError as error:
    print(error)
    cut = error

# %% [markdown]
# Where the derivative is zero, the answer is zeros: an argument that is not used, the second derivative of a line.

# %%
unused = tfgrad.grad(lambda x, y: 3 * x, argnums=1)(2.0, 5.0)
line = tfgrad.hessian(lambda x: tf.reduce_sum(2 * x))(x)
print(unused.numpy(), line.numpy().tolist())

# %% [markdown]
# Rows that are gathered come back as `IndexedSlices`, in which a row may stand twice; even TensorFlow's own
# norm gets that wrong.

# %%
table = tf.Variable(tf.ones([3, 1]))


def twice():
    return tf.reduce_sum(tf.gather(table, [1, 1]))


with tf.GradientTape() as record:
    y = twice()
slices = record.gradient(y, table)
dense = tfgrad.grad(twice, wrt=table)()
print("TensorFlow:", type(slices).__name__, tf.linalg.global_norm([slices]).numpy())
print("tfgrad:    ", dense.numpy().ravel(), tf.linalg.global_norm([dense]).numpy())

# %% [markdown]
# ## Second derivatives that are wrong
#
# Keras's normalisation layers hold a `stop_gradient` that is harmless in the first derivative and wrong in the second. Nested tapes do
# not notice. The truth is the difference of two gradients.

# %%
keras.utils.set_random_seed(0)
layer = keras.layers.LayerNormalization(dtype="float64")
layer.build((None, 6))
rows_of_numbers = tf.constant(np.random.default_rng(0).normal(size=(5, 6)))
direction = tf.constant(np.random.default_rng(1).normal(size=(5, 6)))


def normalised(x):
    return tf.reduce_sum(tf.sin(layer(x)) ** 3)


with tf.GradientTape() as outer:
    outer.watch(rows_of_numbers)
    slope = tape(normalised, rows_of_numbers)
nested = outer.gradient(slope, rows_of_numbers, direction).numpy()
ours = tfgrad.hvp(normalised)(rows_of_numbers, direction).numpy()
truth, bar = tfgrad.finite_difference(
    tfgrad.grad(normalised), rows_of_numbers, direction
)
truth = truth.numpy()

figure = Picture(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
ends = [truth.min(), truth.max()]
axes.plot(ends, ends, color="0.7", label="the truth")
axes.plot(truth.ravel(), nested.ravel(), "o", color="C3", label="nested tapes")
axes.plot(truth.ravel(), ours.ravel(), ".", color="C0", label="tfgrad")
axes.set(
    xlabel="difference of gradients",
    ylabel="H v",
    title="LayerNormalization, a Hessian product",
)
axes.legend()
figure

# %%
off = np.max(np.abs(nested - truth)) / np.max(np.abs(truth))
print(
    f"nested tapes are off by {off:.0%}, tfgrad by {np.max(np.abs(ours - truth)):.0e}"
)

# %% [markdown]
# ## Zero, where it should be None
#
# NumPy inside a `tf.py_function` cannot be differentiated. TensorFlow returns zero, which looks like an answer.


# %%
def outside(x):
    return tf.ensure_shape(
        tf.py_function(lambda a: np.sin(a.numpy()), [x], x.dtype), []
    )


print(
    "TensorFlow:", tape(outside, tf.constant(0.5)).numpy(), "  the truth:", np.cos(0.5)
)
try:
    tfgrad.grad(outside)(0.5)
except tfgrad.errors.NoGradientError as error:
    print(error)
    hidden = error

# %% [markdown]
# ## Wrong derivatives that are in no table
#
# tfgrad also finds wrong derivatives that it has no repair for: the first Hessian of each trace is compared with
# a difference of gradients, and an error is raised if they disagree.


# %%
def angle(x):
    return tf.math.angle(tf.complex(x[0], x[1]))


point = np.array([1.0, 2.0])
try:
    tfgrad.hessian(angle, jit=True)(point)
except tfgrad.errors.WrongDerivativeError as error:
    print(error)
    withheld = error
right = tfgrad.hessian(angle)(point)
right

# %% [markdown]
# ## What must hold

# %%
np.testing.assert_allclose(summed, rows.numpy().sum(axis=0))
np.testing.assert_allclose(rows, 6 * np.eye(3) + np.outer([1, 2, 3], [1, 1, 1]))
assert "jacobian" in refused.hint
assert "tf.round" in cut.got
assert float(unused) == 0.0
assert not line.numpy().any()
assert dense.numpy().ravel().tolist() == [0.0, 2.0, 0.0]
assert off > 0.01, "TensorFlow has been put right: say so here"
np.testing.assert_allclose(ours, truth, atol=10 * float(tf.reduce_max(bar)) + 1e-9)
assert "tf.py_function" in hidden.got
assert "jit=False" in withheld.hint
np.testing.assert_allclose(right, [[0.16, 0.12], [0.12, -0.16]], rtol=1e-12)
