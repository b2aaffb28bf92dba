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
# # How fast does each pixel decay?
#
# A camera takes 40 pictures of a sample after a flash. The light of each pixel decays, with a rate that tells what
# the sample is made of there. That is one small fit for each of 10,000 pixels: `least_squares_many` takes them all at
# once, a row for each. At the end, the same idea with starts in place of pixels: the best of 200 on a function with
# many minima.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

# %% [markdown]
# ## A film of 100 by 100 pixels
#
# Two round cells, in which the light decays faster, on a ground that brightens to the right; noise of 0.05
# everywhere. A hundred pixels missed a picture: there is a NaN.

# %%
rng = np.random.default_rng(0)
t = np.linspace(0.0, 4.0, 40)
down, right = np.mgrid[0:100, 0:100] / 100
cells = [(0.35, 0.3, 0.18), (0.65, 0.65, 0.22)]
rates = np.full((100, 100), 0.6)
for number, (y, x, radius) in enumerate(cells):
    rates[(down - y) ** 2 + (right - x) ** 2 < radius**2] = 1.2 + 0.6 * number
sizes = 1.0 + right
film = sizes[..., None] * np.exp(-rates[..., None] * t) + 0.2
film += 0.05 * rng.normal(size=film.shape)
film[rng.integers(100, size=100), rng.integers(100, size=100), 7] = np.nan

# %% [markdown]
# ## The fit of one pixel, for all of them
#
# The function is that of *one* pixel: its parameters, and its light curve. The curves come as rows; the start has
# none, so it serves all of them. `missing="drop"` leaves out the pictures that a pixel missed.


# %%
def misfit(p, curve):
    return p["size"] * tf.exp(-p["rate"] * t) + p["ground"] - curve


start = {"size": np.float64(1.0), "rate": np.float64(1.0), "ground": np.float64(0.0)}
fits = tfgrad.least_squares_many(
    misfit, start, film.reshape(10_000, 40), missing="drop"
)
fits

# %% [markdown]
# ## Maps of the rates and of their errors
#
# The error is larger where the sample is dark, to the left, and where the light is gone early.

# %%
found = fits.x["rate"].reshape(100, 100)
errors = fits.stderr["rate"].reshape(100, 100)
figure = Picture(figsize=(10, 3), layout="constrained")
panels = figure.subplots(1, 3)
pictures = [
    (np.nan_to_num(film[..., 0]), "the first picture", "gray"),
    (found, "decay rate", "viridis"),
    (errors, "its standard error", "magma"),
]
for panel, (values, title, colors) in zip(panels, pictures, strict=True):
    shown = panel.imshow(values, cmap=colors)
    figure.colorbar(shown, ax=panel)
    panel.set(title=title, xticks=[], yticks=[])
figure

# %% [markdown]
# ## One of them
#
# `fits[i]` is the result that `least_squares` gives for that row.

# %%
fits[6565]

# %% [markdown]
# ## The best of 200 starts
#
# Rastrigin's function has a minimum near each point with whole coordinates; the lowest is 0, at the origin. Without
# arguments, the rows of `x0s` are starts of the same problem.


# %%
def rastrigin(x):
    return tf.reduce_sum(x**2 + 10 - 10 * tf.cos(2 * np.pi * x))


starts = rng.uniform(-3, 3, (200, 2))
runs = tfgrad.minimize_many(rastrigin, starts)
runs

# %%
side = np.linspace(-3, 3, 300)
height = sum(v**2 + 10 - 10 * np.cos(2 * np.pi * v) for v in np.meshgrid(side, side))
figure = Picture(figsize=(5, 4), layout="constrained")
panel = figure.subplots()
panel.contourf(side, side, height, 20, cmap="Blues_r")
panel.scatter(*runs.x.T, c="C1", s=12)
panel.plot(*runs.best.x, "*", color="red", ms=12)
panel.set(title="where 200 starts end, and the best", xlim=(-3, 3), ylim=(-3, 3))
figure

# %% [markdown]
# ## What must hold

# %%
assert fits.success.all()
assert runs.success.all()
assert set(fits.degrees_of_freedom) == {36, 37}
off = (found - rates) / errors  # the errors are what they say
assert abs(np.mean(off)) < 0.1
assert 0.95 < np.std(off) < 1.1
one = np.isfinite(film[65, 65])
alone = tfgrad.least_squares(lambda p: misfit(p, film[65, 65])[one], start)
np.testing.assert_allclose(fits[6565].x["rate"], alone.x["rate"], rtol=1e-7)
assert runs.best.fun < 1e-10
