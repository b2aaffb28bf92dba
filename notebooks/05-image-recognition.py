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
# # Which digit is this?
#
# The 1,797 images of scikit-learn's digits, eight pixels by eight, and a convolutional net of two layers.
# First Adam, from far away; then L-BFGS, for the last digits of the loss. Both are one call, both are in
# TensorBoard. This notebook needs `pip install "tfgrad[pandas]" scikit-learn`.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import shutil
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

logs = Path("../logs/digits")
shutil.rmtree(logs, ignore_errors=True)

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = tf.constant(digits.images[order, :, :, None] / 16, tf.float32)
labels = tf.constant(digits.target[order])
train, test = slice(0, 1200), slice(1200, None)

figure = Picture(figsize=(8, 2), layout="constrained")
for axes, image, label in zip(
    figure.subplots(1, 8), images, labels.numpy(), strict=False
):
    axes.imshow(image[:, :, 0], cmap="gray_r")
    axes.set_title(str(label))
    axes.set_axis_off()
figure

# %% [markdown]
# ## The net and its loss
#
# The loss is a plain function that reads the model: cross entropy, and a little weight decay.

# %%
keras.utils.set_random_seed(1)
model = keras.Sequential(
    [
        keras.Input([8, 8, 1]),
        keras.layers.Conv2D(8, 3, activation="gelu"),
        keras.layers.Conv2D(16, 3, strides=2, activation="gelu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
start = model.get_weights()


def loss_of(images, labels):
    entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(images))
    decay = sum(tf.reduce_sum(w.value**2) for w in model.trainable_weights)
    return tf.reduce_mean(entropy) + 1e-4 * decay


def loss():
    return loss_of(images[train], labels[train])


def accuracy():
    guess = tf.argmax(model(images[test]), axis=1).numpy()
    return np.mean(guess == labels[test].numpy())


# %% [markdown]
# Is its gradient right? One line checks it, before an hour of training.

# %%
check = tfgrad.check_grads(loss, wrt=model, order=1, modes=("reverse",))
check

# %% [markdown]
# ## Down, with random batches
#
# The loss of a batch, the data, and how often to go through them; `validation` is called after each epoch.

# %%
accuracies, results = {}, {}
results["adam, batches"] = tfgrad.minimize(
    loss_of,
    wrt=model,
    data=(images[train], labels[train]),
    batch_size=60,
    epochs=12,
    method="adam",
    learning_rate=5e-3,
    validation=accuracy,
    log=logs / "batches",
)
accuracies["adam, batches"] = accuracy()
results["adam, batches"]

# %% [markdown]
# ## Down, with all images in each step
#
# Then the loss is smooth, and L-BFGS, which is made for smooth functions, gets lower than Adam.

# %%
runs = {
    "adam": {"method": "adam", "learning_rate": 5e-3, "steps": 200},
    "adam, lbfgs": {"method": [("adam", 100), ("lbfgs", 100)], "learning_rate": 5e-3},
}
for name, options in runs.items():
    model.set_weights(start)
    results[name] = tfgrad.minimize(loss, wrt=model, log=logs, **options)
    accuracies[name] = accuracy()
for name, share in accuracies.items():
    print(f"{name:14} {share:.1%} of the unseen images are recognised")

# %%
figure = Picture(figsize=(8, 4), layout="constrained")
axes = figure.subplots()
for name, result in results.items():
    axes.semilogy(result.history["step"], result.history["fun"], label=name)
axes.set(xlabel="step", ylabel="loss", title="loss of the images of a step")
axes.legend()
figure

# %% [markdown]
# ## Which digits are confused

# %%
guess = tf.argmax(model(images[test]), axis=1).numpy()
truth = labels[test].numpy()
confusion = np.zeros((10, 10), int)
np.add.at(confusion, (truth, guess), 1)

picture = Picture(figsize=(5, 4.5), layout="constrained")
axes = picture.subplots()
axes.imshow(confusion, cmap="Blues", norm="symlog")
for row, column in np.ndindex(10, 10):
    if confusion[row, column]:
        color = "white" if row == column else "black"
        axes.text(
            column, row, confusion[row, column], ha="center", va="center", color=color
        )
axes.set(xlabel="predicted", ylabel="true digit", xticks=range(10), yticks=range(10))
axes.set_title(f"{len(truth)} unseen images, {accuracies[name]:.1%} recognised")
picture

# %% [markdown]
# The first images that are read wrongly, each with the true digit and the prediction.

# %%
wrong = np.flatnonzero(guess != truth)[:8]
figure = Picture(figsize=(8, 1.8), layout="constrained")
for axes in figure.subplots(1, 8):
    axes.set_axis_off()
for axes, index in zip(figure.axes, wrong, strict=False):
    axes.imshow(images[test][index, :, :, 0], cmap="gray_r")
    axes.set_title(f"a {truth[index]}, read as {guess[index]}", fontsize=9)
figure

# %% [markdown]
# ## In TensorBoard
#
# `tfgrad board ../logs/digits` shows the runs side by side: loss, gradient, histograms of the weights,
# graph and settings. Here they are without a browser.

# %%
with tfgrad.Run(logs / "confusion") as run:
    run.image("confusion", picture)
tfgrad.plot_runs(logs, ["loss", "gradient/max_norm"])

# %% [markdown]
# ## What must hold

# %%
assert check
assert all(value > 0.94 for value in accuracies.values()), accuracies
assert results["adam, lbfgs"].fun < results["adam"].fun
assert confusion.sum() == len(truth) == 597
frame = tfgrad.load_runs(logs)
assert {"batches/adam", "adam", "adam+lbfgs"} <= set(frame.run)
