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
# # Can an agent learn to balance a pole?
#
# A cart moves left or right; a pole stands on it, and falls. Nothing is told to the agent but a reward of 1 for each moment
# in which the pole still stands. It is the task of Barto, Sutton and Anderson (1983), without any package for it: the
# physics are ten lines of NumPy. An actor chooses, a critic judges what a state is worth, and each has a `train_step`.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import shutil
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

logs = Path("../logs/pole")
shutil.rmtree(logs, ignore_errors=True)
keras.utils.set_random_seed(0)
random = np.random.default_rng(0)

# %% [markdown]
# ## The physics
#
# Many poles at once: a row for each, of position, velocity, angle (radians) and angular velocity, in SI units. A cart of
# 1 kg, a pole of 0.1 kg and 1 m, a force of 10 N, 20 ms at a time (Barto, Sutton and Anderson, 1983, appendix).


# %%
def moved(state, right):
    _, v, angle, turn = state.T
    force = np.where(right, 10.0, -10.0)
    push = (force + 0.05 * turn**2 * np.sin(angle)) / 1.1
    top = 9.8 * np.sin(angle) - np.cos(angle) * push
    turning = top / (0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1))
    speeding = push - 0.05 * turning * np.cos(angle) / 1.1
    rates = np.stack([v, speeding, turn, turning], axis=1)
    return state + 0.02 * rates


def fallen(state):
    return (abs(state[:, 0]) > 2.4) | (abs(state[:, 2]) > np.pi / 15)


def begun(count):
    return random.uniform(-0.05, 0.05, size=[count, 4])


# %% [markdown]
# ## Actor and critic
#
# The actor's loss (Sutton and Barto, 2018, section 13.5) makes actions likelier that turned out better than the critic
# thought; a little entropy keeps it curious. The critic's loss is the square of its error.


# %%
def network(outputs):
    hidden = [keras.layers.Dense(64, activation="tanh") for _ in range(2)]
    return keras.Sequential([keras.Input([4]), *hidden, keras.layers.Dense(outputs)])


actor, critic = network(2), network(1)


def regret(states, actions, advantages):
    likely = tf.nn.log_softmax(actor(states))
    entropy = -tf.reduce_mean(tf.reduce_sum(tf.exp(likely) * likely, axis=1))
    chosen = tf.gather(likely, actions, batch_dims=1)
    return -tf.reduce_mean(chosen * advantages) - 0.01 * entropy


def error(states, returns):
    return tf.reduce_mean((critic(states)[:, 0] - returns) ** 2)


act = tfgrad.train_step(regret, wrt=actor, learning_rate=1e-3)
judge = tfgrad.train_step(error, wrt=critic, learning_rate=1e-2)

# %% [markdown]
# ## The loop
#
# 32 poles, 32 moments at a time. A pole that falls, or stands for 500 moments (10 s), begins anew.

# %%
POLES, MOMENTS, UPDATES, LONGEST, DISCOUNT = 32, 32, 250, 500, 0.98

probability = tf.function(lambda states: tf.nn.softmax(actor(states))[:, 1])
worth = tf.function(lambda states: critic(states)[:, 0])


def float32(array):
    return tf.constant(array, tf.float32)


state, age = begun(POLES), np.zeros(POLES, int)
lengths = []

with tfgrad.Run(logs / "actor-critic") as run:
    for update in range(UPDATES):
        states, actions, falls = [], [], []
        for _ in range(MOMENTS):
            right = random.random(POLES) < probability(float32(state)).numpy()
            states.append(state)
            actions.append(right)
            state, age = moved(state, right), age + 1
            falls.append(fallen(state))
            end = falls[-1] | (age >= LONGEST)
            lengths += age[end].tolist()
            state[end], age[end] = begun(end.sum()), 0
        after = worth(float32(state)).numpy()
        returns = []
        for fell in reversed(falls):  # what comes after 500 moments is worth as much
            after = 1.0 + DISCOUNT * after * ~fell
            returns.insert(0, after)
        flat = float32(np.concatenate(states))
        returns = float32(np.concatenate(returns))
        advantages = returns - worth(flat)
        advantages /= tf.math.reduce_std(advantages) + 1e-6
        chosen = tf.constant(np.concatenate(actions).astype("int64"))
        values = {"loss/actor": act(flat, chosen, advantages)}
        for _ in range(4):
            values["loss/critic"] = judge(flat, returns)
        if lengths:
            values["return"] = np.mean(lengths[-50:])
        run.log(update, values)

# %% [markdown]
# ## What it has learned
#
# The return of an episode is the number of moments that the pole stood: the mean of the last 50 episodes.

# %%
tfgrad.plot_runs(logs, ["return", "loss/actor", "loss/critic"])

# %% [markdown]
# A hundred new poles, with the likelier action each time: how long do they stand?


# %%
def stands(decide, count=100):
    state, standing = begun(count), np.ones(count, bool)
    moments, track = np.zeros(count, int), []
    for _ in range(LONGEST):
        state = moved(state, decide(state))
        standing &= ~fallen(state)
        moments += standing
        track.append(state[0])
    return moments, np.array(track)


learned, track = stands(lambda state: probability(float32(state)).numpy() > 0.5)
chance, _ = stands(lambda state: random.random(len(state)) < 0.5)
print(
    f"by chance {chance.mean():.0f} moments, learned {learned.mean():.0f} of {LONGEST}"
)

# %%
figure = Picture(figsize=(8, 3), layout="constrained")
axes = figure.subplots()
seconds = 0.02 * np.arange(LONGEST)
axes.plot(seconds, track[:, 0], label="position, m")
axes.plot(seconds, np.degrees(track[:, 2]) / 10, label="angle, tens of degrees")
axes.set(xlabel="seconds", title="the first pole")
axes.legend()
figure

# %% [markdown]
# ## What must hold

# %%
assert chance.mean() < 50
assert learned.mean() > 400
assert np.mean(lengths[-50:]) > 5 * np.mean(lengths[:50])
assert int(judge.optimizer.iterations) == 4 * UPDATES
