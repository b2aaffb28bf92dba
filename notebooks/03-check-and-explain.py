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
# # Can this gradient be trusted?
#
# Two questions, two functions: `explain` says why a gradient is None, zero or NaN, and `check_grads` whether
# one that is there is right.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad import problems
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

# %% [markdown]
# ## A difference with an error bar
#
# A finite difference is wrong in two ways: a large step cuts off terms, a small one drowns in rounding. Here is
# the error of the usual difference of the sine at 1, over the step, and what `finite_difference` makes of it.

# %%
steps = 2.0 ** -np.arange(0, 40)
naive = (np.sin(1 + steps) - np.sin(1)) / steps
value, error = tfgrad.finite_difference(tf.sin, tf.constant(1.0, tf.float64))
off = abs(float(value) - np.cos(1))

figure = Picture(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
axes.loglog(steps, np.abs(naive - np.cos(1)), "o-", ms=3, label="(f(x + h) - f(x)) / h")
axes.axhline(float(error), color="C1", label="the error bar of finite_difference")
axes.axhline(max(off, 1e-16), color="C2", ls="--", label="its actual error")
axes.set(xlabel="step h", ylabel="error", title="sine at 1, float64")
axes.legend()
figure

# %% [markdown]
# ## Is it right?
#
# Beale's function: first and second derivatives, forward and reverse, compiled and eager, each against
# another way to compute it.

# %%
report = tfgrad.check_grads(problems.beale, problems.beale.start)
report

# %% [markdown]
# A custom gradient with a wrong factor for one element. The check finds the element.


# %%
@tf.custom_gradient
def squares(x):
    slope = 2 * x * tf.constant([1.0, 1.0, 0.5, 1.0], x.dtype)
    return x**2, lambda dy: dy * slope


point = np.array([1.0, 2.0, 3.0, 4.0])
try:
    tfgrad.check_grads(squares, point)
except tfgrad.errors.GradientMismatchError as caught:
    print(caught)
    mismatch = caught

# %% [markdown]
# In float32, rounding hides a small slope of a large value. The verdict is then *inconclusive*, with the reason.

# %%
hidden = tfgrad.check_grads(
    lambda x: 1e6 + tf.sin(x), tf.constant(1.0), order=1, raises=False
)
hidden

# %% [markdown]
# ## Why is it not there?
#
# Three inputs of one function: one arrives, one is cut, one is stopped on purpose.


# %%
def score(x, threshold, scale):
    hard = tf.cast(x > threshold, x.dtype)
    return tf.reduce_sum(hard * x * tf.stop_gradient(scale))


why = tfgrad.explain(score, [1.0, 2.0, 3.0], 1.5, 2.0)
why

# %% [markdown]
# A NaN in the gradient of a value that is finite: the branch of `tf.where` that was not taken.


# %%
def entropy(p):
    return -tf.reduce_sum(tf.where(p > 0, p * tf.math.log(p), 0.0))


nan = tfgrad.explain(entropy, [0.0, 0.5, 0.5])
print(entropy(tf.constant([0.0, 0.5, 0.5])).numpy())
nan

# %% [markdown]
# The remedy in the last line of the report: choose the input by `tf.where`, too.


# %%
def safe_entropy(p):
    inside = tf.where(p > 0, p, 1.0)
    return -tf.reduce_sum(tf.where(p > 0, inside * tf.math.log(inside), 0.0))


slopes = tfgrad.grad(safe_entropy)([0.0, 0.5, 0.5])
slopes

# %% [markdown]
# ## What must hold

# %%
assert off <= float(error) < np.min(np.abs(naive - np.cos(1)))
assert report
assert "[2]" in str(mismatch)
assert not hidden
assert not hidden.failures
status = {finding.name: finding.status for finding in why.findings}
assert status == {"x": "connected", "threshold": "cut", "scale": "stopped"}, status
assert nan.findings[0].status == "non-finite"
assert "log" in nan.findings[0].culprit.label
np.testing.assert_allclose(slopes, [0.0, np.log(2) - 1, np.log(2) - 1], rtol=1e-6)
