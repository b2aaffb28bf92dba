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
# # Which penalty predicts best?
#
# A penalty keeps a fit from following noise; too large a one keeps it from following the data. Tried on a grid, one
# penalty takes ten fits, and a penalty for each of ten coefficients ten billion. Here the penalties are tuned by their
# gradient: `tfgrad.solution` gives the fitted coefficients as a differentiable function of the penalties.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

# %% [markdown]
# ## The data
#
# Forty examples of ten features, of which three matter; half of the examples are for the choice of the penalty.

# %%
generator = np.random.default_rng(3)
features = generator.normal(size=(400, 10))
true = np.zeros(10)
true[:3] = [2.0, -1.0, 0.5]
targets = features @ true + generator.normal(size=400)
fit, choose, test = slice(0, 20), slice(20, 40), slice(40, 400)


def error(w, part):
    return tf.reduce_mean((tf.linalg.matvec(features[part], w) - targets[part]) ** 2)


def penalised(w, log_penalty):
    return error(w, fit) + tf.reduce_sum(tf.exp(log_penalty) * w * w)


# %% [markdown]
# ## One penalty
#
# The coefficients w minimise the penalised error on one half of the examples; the penalty minimises the error of w on
# the other half. The derivative of that by the penalty goes through w.


# %%
def coefficients(log_penalty):
    return tfgrad.solution(penalised, np.zeros(10), log_penalty)


def chosen_by(log_penalty):
    return error(coefficients(log_penalty), choose)


one = tfgrad.minimize(chosen_by, np.float64(-3.0))
one

# %%
grid = np.linspace(-7, 3, 60)
gram, side = features[fit].T @ features[fit] / 20, features[fit].T @ targets[fit] / 20
closed = [np.linalg.solve(gram + np.exp(p) * np.eye(10), side) for p in grid]

figure = Picture(figsize=(11, 4), layout="constrained")
left, right = figure.subplots(1, 2)
for part, label in ((fit, "fitted"), (choose, "to choose by"), (test, "never seen")):
    left.plot(grid, [float(error(w, part)) for w in closed], label=label)
left.axvline(float(one.x), color="black", lw=1)
left.set(xlabel="log of the penalty", ylabel="mean squared error", ylim=(0, 6))
_ = left.legend()

# %% [markdown]
# ## A penalty for each coefficient
#
# No grid has ten dimensions; the gradient does not mind. Weak limits keep the penalties within reason.

# %%
ten = tfgrad.minimize(chosen_by, np.full(10, float(one.x)), bounds=(-7.0, 3.0))
place = np.arange(10)
w_one, w_ten = coefficients(one.x).numpy(), coefficients(ten.x).numpy()
right.bar(place - 0.27, true, 0.27, label="true", color="black")
right.bar(place, w_one, 0.27, label="one penalty")
right.bar(place + 0.27, w_ten, 0.27, label="ten penalties")
right.set(xlabel="coefficient", xticks=place)
right.legend()
figure

# %%
for name, w in (("one penalty", w_one), ("ten penalties", w_ten)):
    print(f"{name}: error to choose by {float(error(w, choose)):.3f}")
    print(
        f"    never seen {float(error(w, test)):.3f}, true {float(error(true, test)):.3f}"
    )

# %% [markdown]
# ## What must hold

# %%
w = np.linalg.solve(gram + np.exp(float(one.x)) * np.eye(10), side)
np.testing.assert_allclose(w_one, w, rtol=1e-9)
lowest = min(float(error(w, choose)) for w in closed)
assert one.success
assert float(one.fun) <= lowest + 1e-9
assert float(ten.fun) < float(one.fun)
slope = tfgrad.grad(chosen_by)(np.float64(-1.0))
difference, margin = tfgrad.finite_difference(chosen_by, np.float64(-1.0))
np.testing.assert_allclose(slope, difference, rtol=1e-6)
