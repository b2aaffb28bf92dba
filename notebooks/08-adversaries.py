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
# # Can two nets learn to draw digits?
#
# A generative adversarial network (Goodfellow et al., 2014): a generator draws, a discriminator tells drawn digits from
# the 1,797 of scikit-learn, and each learns from the other. Two losses and two networks in turn: a loop of one's own,
# with two `train_step`s. Both networks are told which digit it should be (Mirza and Osindero, 2014).
# This notebook needs `pip install "tfgrad[pandas]" scikit-learn`.

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

logs = Path("../logs/gan")
shutil.rmtree(logs, ignore_errors=True)
keras.utils.set_random_seed(0)

# %%
digits = load_digits()
images = (digits.data / 16).astype("float32")
labels = digits.target
NOISE, BATCH, STEPS = 16, 64, 4000

# %% [markdown]
# ## Two networks


# %%
def network(inputs, outputs, activation=None):
    hidden = [keras.layers.Dense(128, activation="leaky_relu") for _ in range(2)]
    last = keras.layers.Dense(outputs, activation=activation)
    return keras.Sequential([keras.Input([inputs]), *hidden, last])


generator = network(NOISE + 10, 64, "sigmoid")
discriminator = network(64 + 10, 1)


def draw(noise, wanted):
    return generator(tf.concat([noise, wanted], axis=1))


def judged(pictures, wanted):
    return discriminator(tf.concat([pictures, wanted], axis=1))


# %% [markdown]
# ## Two losses, two steps
#
# Each step moves the network that its `wrt` names, by an optimizer of its own. The generator's loss hands its drawings on,
# so that the discriminator does not draw them again.

# %%
binary = keras.losses.BinaryCrossentropy(from_logits=True)


def fool(noise, wanted):
    drawn = draw(noise, wanted)
    score = judged(drawn, wanted)
    return binary(tf.ones_like(score), score), drawn


def tell(real, drawn, wanted):
    true, false = judged(real, wanted), judged(drawn, wanted)
    return binary(tf.ones_like(true) * 0.9, true) + binary(tf.zeros_like(false), false)


adam = {"learning_rate": 1e-3}
generate = tfgrad.train_step(fool, wrt=generator, has_aux=True, **adam)
discriminate = tfgrad.train_step(tell, wrt=discriminator, **adam)

# %% [markdown]
# ## The loop
#
# Batches, noise, and every 20 steps the two losses; now and then ten drawings, as images in TensorBoard.

# %%
random = np.random.default_rng(0)
one_hot = np.eye(10, dtype="float32")
samples = random.normal(size=[10, NOISE]).astype("float32")
shown = {}

with tfgrad.Run(logs / "digits") as run:
    for step in range(STEPS + 1):
        rows = random.integers(len(images), size=BATCH)
        real, wanted = images[rows], one_hot[labels[rows]]
        noise = random.normal(size=[BATCH, NOISE]).astype("float32")
        fooling, drawn = generate(noise, wanted)
        telling = discriminate(real, drawn, wanted)
        if step % 20 == 0:
            run.log(step, {"loss/generator": fooling, "loss/discriminator": telling})
        if step in (0, 200, 1000, STEPS):
            shown[step] = draw(samples, one_hot).numpy().reshape(10, 8, 8)
            run.image("drawn", shown[step][..., None], step)

# %% [markdown]
# ## What it draws

# %%
figure = Picture(figsize=(8, 3.6), layout="constrained")
grid = figure.subplots(len(shown), 10)
for row, (step, pictures) in zip(grid, shown.items(), strict=True):
    for axes, picture in zip(row, pictures, strict=True):
        axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"step {step}")
figure

# %%
tfgrad.plot_runs(logs, ["loss/generator", "loss/discriminator"])

# %% [markdown]
# ## Are these digits?
#
# Of 500 drawings, how many have as their nearest neighbour a real image of the digit that was asked for? Of the real
# images themselves, each without itself, 99 %.


# %%
def nearest(pictures, without_itself=False):
    distances = ((pictures[:, None] - images[None]) ** 2).sum(axis=-1)
    if without_itself:
        np.fill_diagonal(distances, np.inf)
    return labels[distances.argmin(axis=1)], np.sqrt(distances.min(axis=1))


asked = np.arange(500) % 10
noise = random.normal(size=[500, NOISE]).astype("float32")
drawings = draw(noise, one_hot[asked]).numpy()
found, distance = nearest(drawings)
usual_found, usual = nearest(images, without_itself=True)
right, usual_right = np.mean(found == asked), np.mean(usual_found == labels)
spread = np.mean([drawings[asked == k].std(axis=0).mean() for k in range(10)])
usual_spread = np.mean([images[labels == k].std(axis=0).mean() for k in range(10)])
print(f"nearest is the digit asked for: {right:.1%}, of real images {usual_right:.1%}")
print(f"distance to it: {distance.mean():.2f}, of real images {usual.mean():.2f}")
print(f"spread within a digit: {spread:.2f}, of real images {usual_spread:.2f}")

# %% [markdown]
# ## What must hold

# %%
assert right > 0.8
assert distance.mean() < 1.5 * usual.mean()
assert spread > 0.5 * usual_spread  # not one drawing for each digit
assert len(tfgrad.load_run(logs / "digits", wide=True)) == STEPS // 20 + 1
assert int(generate.optimizer.iterations) == STEPS + 1
