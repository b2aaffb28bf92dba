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
# # Can a net solve a differential equation?
#
# A physics-informed network: no data, only the equation. The loss holds *second derivatives* of the net with
# respect to its input, and is differentiated once more with respect to the weights.
#
# $$u''(x) + u(x) = 0, \quad u(0) = 0, \; u'(0) = 1 \qquad\text{on } [0, 2\pi],$$
#
# whose solution is the sine.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import shutil
from pathlib import Path

import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

logs = Path("../logs/oscillator")
shutil.rmtree(logs, ignore_errors=True)

# %% [markdown]
# ## The net
#
# One hidden layer of twenty units, as a nest of plain arrays in float64. The start is built in:
# $u(x) = x + x^2 N(x)$ has $u(0) = 0$ and $u'(0) = 1$ whatever the net $N$ is.

# %%
generator = np.random.default_rng(0)
width = 20
start = {
    "slopes": generator.normal(size=width),
    "shifts": generator.normal(size=width),
    "weights": generator.normal(size=width) / width,
}


def solution(net, x):
    hidden = tf.tanh(x[:, None] * net["slopes"] + net["shifts"])
    return x + x**2 * tf.linalg.matvec(hidden, net["weights"])


points = tf.constant(np.linspace(0, 2 * np.pi, 60))


def residual(net):
    def u(x):
        return solution(net, x)

    return tfgrad.derivative(u, order=2)(points) + u(points)


def equation(net):
    return tf.reduce_mean(residual(net) ** 2)


# %% [markdown]
# ## Is the derivative of a second derivative right?

# %%
check = tfgrad.check_grads(equation, start, order=1, modes=("reverse", "compiled"))
check

# %% [markdown]
# ## Adam, then L-BFGS
#
# Adam gets near the minimum, L-BFGS takes over from there: one call, one history, one run for TensorBoard.

# %%
result = tfgrad.minimize(
    equation,
    start,
    method=[("adam", 1000), ("lbfgs", 2000)],
    learning_rate=0.01,
    log=logs,
)
result

# %%
x = np.linspace(0, 2 * np.pi, 200)
u = solution(result.x, tf.constant(x)).numpy()
error = np.abs(u - np.sin(x))

figure = Picture(figsize=(11, 3.5), layout="constrained")
left, middle, right = figure.subplots(1, 3)
left.plot(x, np.sin(x), color="0.8", lw=6, label="sine")
left.plot(x, solution(start, tf.constant(x)), color="C1", ls="--", label="start")
left.plot(x, u, color="C0", label="net")
left.set(title="solution", xlabel="x", ylim=(-2, 2))
left.legend()
middle.semilogy(x, error + 1e-12)
middle.set(title="|net - sine|", xlabel="x")
right.loglog(1 + result.history["step"], result.history["fun"])
right.axvline(1001, color="0.6", ls=":")
right.set(title="loss; from the dotted line on, L-BFGS", xlabel="step + 1")
figure

# %% [markdown]
# ## What must hold

# %%
adam_only = result.history["fun"][1000]
print(
    f"loss after Adam {adam_only:.1e}, at the end {result.fun:.1e}; error {error.max():.1e}"
)
assert check
assert result.fun < adam_only / 100
assert error.max() < 1e-2
