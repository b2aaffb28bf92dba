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
# # What is the slope, and where is the bottom?
#
# tfgrad began as a teaching notebook on TensorFlow's automatic differentiation and optimisation.
# This is that notebook as it reads with tfgrad. It needs nothing but a CPU and runs in seconds.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

from pathlib import Path

import numpy as np
import tensorflow as tf

import tfgrad

# %% [markdown]
# ## Gradients
#
# The gradient of $y = x^2$ at 5. No variable, no tape: a function goes in, its derivative comes out.

# %%
tfgrad.derivative(lambda x: x * x)(5.0)

# %% [markdown]
# The same at a row of numbers, element by element.

# %%
tfgrad.derivative(lambda x: x * x)([[5.0, 10, 15.23232]])

# %% [markdown]
# The gradient of $y = x^2 + x - 1$ at 3.

# %%
tfgrad.grad(lambda x: x**2 + x - 1)(3.0)

# %% [markdown]
# ## Is it right?
#
# Reverse mode computes it; finite differences check it, and say how far off they may be themselves.

# %%
x = tf.constant(3.0, tf.float64)
value, error = tfgrad.finite_difference(lambda x: x**2 + x - 1, x)
print(f"{value:.12f} ± {error:.0e}")

# %% [markdown]
# ## Optimisation
#
# $\min (x + 1)^2$, whose derivative is $2(x + 1)$.

# %%
tfgrad.minimize(lambda x: (x + 1) ** 2, 0.0, method="sgd", learning_rate=0.1, gtol=1e-6)

# %% [markdown]
# Thirty steps of gradient descent on $x^2 + x - 1$ from 3 with rate 0.1, each printed. The variable is
# updated in place; between two states the step runs compiled.

# %%
x = tf.Variable(3.0, trainable=True)


@tf.function
def f_x():
    return x**2 + x - 1


descent = {"method": "sgd", "learning_rate": 0.1, "steps": 30}
states = list(tfgrad.descend(f_x, wrt=x, **descent))
for state in states:
    print("Epoch :", state.step, state.x.numpy(), state.fun)

# %% [markdown]
# The same in one call, with every step, the compute graph and a card of the problem for TensorBoard.

# %%
logs = Path("../logs/founding")
x.assign(3.0)
result = tfgrad.minimize(f_x, wrt=x, log=logs / "parabola", **descent)
result

# %%
result.plot()

# %% [markdown]
# ## The compute graph, in TensorBoard
#
# `show` starts TensorBoard on this machine alone, waits until it answers, and shows it below the cell.
# Open its *Graphs* tab for the step that was run: value and gradient.

# %%
board = tfgrad.show(logs)
board

# %%
import json
import urllib.request

with urllib.request.urlopen(f"{board.url.split('?')[0]}data/runs") as answer:
    served = json.load(answer)
board.close()
served

# %% [markdown]
# ## What must hold

# %%
k = np.arange(31)
np.testing.assert_allclose(result.history["x"], -0.5 + 3.5 * 0.8**k, atol=1e-6)
assert [str(state.fun) for state in states[:4]] == [
    "11.0",
    "6.59",
    "3.7676",
    "1.9612641",
]
assert float(tfgrad.grad(lambda x: x**2 + x - 1)(3.0)) == 7.0
assert abs(value - 7.0) <= error < 1e-9
assert result.x.numpy() == x.numpy()
assert str(result.directory.relative_to(logs)) in served
