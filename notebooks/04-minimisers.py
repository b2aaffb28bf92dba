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
# # Which minimiser gets down the valley?
#
# Rosenbrock's function has a curved, narrow valley: easy to find, hard to follow. Every method starts at
# (-1.2, 1); the minimum is at (1, 1). Comparing the runs needs pandas:
# `pip install "tfgrad[pandas]"`.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import shutil
from pathlib import Path

import numpy as np

import tfgrad
from tfgrad import problems
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

logs = Path("../logs/minimisers")
shutil.rmtree(logs, ignore_errors=True)

# %% [markdown]
# ## The same line for every method

# %%
methods = {
    "sgd": {"method": "sgd", "learning_rate": 2e-3, "steps": 2000},
    "adam": {"method": "adam", "learning_rate": 0.02, "steps": 2000},
    "lbfgs": {"method": "lbfgs"},
    "adam, lbfgs": {"method": [("adam", 100), "lbfgs"], "learning_rate": 0.02},
}
results = {
    name: tfgrad.minimize(
        problems.rosenbrock, problems.rosenbrock.start, log=logs, **options
    )
    for name, options in methods.items()
}
results["lbfgs"]

# %%
for name, result in results.items():
    print(f"{name:12} {result.status:9} {result.nit:5} steps   f = {result.fun:.1e}")

# %% [markdown]
# ## The paths
#
# The height is drawn as a logarithm. Gradient descent reaches the valley soon and then takes tiny steps along
# it; Adam's are larger; L-BFGS takes long ones, since it has learned the curvature.

# %%
a, b = np.meshgrid(np.linspace(-1.6, 1.6, 200), np.linspace(-0.5, 1.6, 200))
height = np.log10(100 * (b - a**2) ** 2 + (1 - a) ** 2 + 1e-4)
figure = Picture(figsize=(10, 7.5), layout="constrained")
charts = figure.subplots(2, 2).flat
for axes, (name, result) in zip(charts, results.items(), strict=True):
    axes.contourf(a, b, height, 25, cmap="Blues_r")
    path = result.history["x"]
    axes.plot(path[:, 0], path[:, 1], ".-", color="C1", lw=1, ms=3)
    axes.plot(*path[0], "o", color="black")
    axes.plot(1, 1, "*", color="red", ms=12)
    axes.set(title=f"{name}: {result.nit} steps", xlabel="x[0]", ylabel="x[1]")
figure

# %% [markdown]
# ## How fast

# %%
figure = Picture(figsize=(8, 4), layout="constrained")
axes = figure.subplots()
for name, result in results.items():
    gap = np.maximum(result.history["fun"], 1e-20)
    axes.loglog(1 + result.history["step"], gap, label=name)
axes.set(xlabel="step + 1", ylabel="f - minimum", title="Rosenbrock")
axes.legend()
figure

# %% [markdown]
# The same by `plot_path`, which draws any result of one or two parameters. For the Images tab of TensorBoard,
# give the picture to `run.image`.

# %%
tfgrad.plot_path(problems.rosenbrock, results["lbfgs"])

# %% [markdown]
# ## In TensorBoard
#
# Each step was logged, with the graph of the step and the settings of each run.

# %%
frame = tfgrad.load_runs(logs)
table = frame[frame.tag == "loss"].groupby("run", observed=True)["value"]
table.agg(["count", "min"])

# %% [markdown]
# ## A harder one: four minima
#
# Himmelblau's function has four minima of the same depth. Which one is found depends on the start; L-BFGS
# finds one of them from everywhere.

# %%
generator = np.random.default_rng(0)
starts = generator.uniform(-5, 5, size=(12, 2))
ends = np.array([tfgrad.minimize(problems.himmelblau, start).x for start in starts])
distances = np.linalg.norm(ends[:, None] - problems.himmelblau.minima, axis=2)
found = distances.argmin(axis=1)
print(np.bincount(found, minlength=4), "starts end in the four minima")

# %% [markdown]
# ## What must hold

# %%
assert results["lbfgs"].success
assert results["lbfgs"].nit < 50
np.testing.assert_allclose(results["lbfgs"].x, [1, 1], atol=1e-6)
assert results["adam, lbfgs"].success
assert results["sgd"].status == "steps"
assert not results["sgd"].success
assert results["sgd"].fun > results["adam"].fun > results["lbfgs"].fun
assert sorted(frame.run.unique())[0] == "adam"
assert frame.run.nunique() == 4
assert distances.min(axis=1).max() < 1e-4
