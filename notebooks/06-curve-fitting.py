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
# # How well are these parameters known?
#
# A curve through measured points is half of an answer; the other half is how far off its parameters may be.
# The data are Misra's dental research study of 1978, which the US National Institute of Standards and
# Technology keeps as *Misra1a*, with certified answers to eleven digits. This notebook needs SciPy:
# `pip install "tfgrad[scipy]"`.

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow's start-up notes

import numpy as np
import scipy.optimize
import tensorflow as tf

import tfgrad
from tfgrad.runs.plots import Picture  # a matplotlib figure that shows itself

# %%
pressure = np.array([77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8])
pressure = np.append(pressure, [378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0])
volume = np.array([10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02])
volume = np.append(volume, [44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78])
certified = {
    "b1": (2.3894212918e02, 2.7070075241e00),
    "b2": (5.5015643181e-04, 7.2668688436e-06),
}

# %% [markdown]
# ## The fit
#
# $y = b_1 (1 - e^{-b_2 x})$. Write the model and the residuals; the parameters are a nest, so they keep their
# names. The start is the far one of the two that NIST gives.


# %%
def model(p, x):
    return p["b1"] * (1 - tf.exp(-p["b2"] * x))


def residuals(p):
    return model(p, pressure) - volume


start = {"b1": np.float64(500.0), "b2": np.float64(1e-4)}
fit = tfgrad.least_squares(residuals, start)
fit

# %% [markdown]
# Beside the certified values and errors, and beside SciPy's `curve_fit`.

# %%
theirs, covariance = scipy.optimize.curve_fit(
    lambda x, b1, b2: b1 * (1 - np.exp(-b2 * x)), pressure, volume, p0=[500.0, 1e-4]
)
for i, (name, (value, error)) in enumerate(certified.items()):
    print(
        f"{name}  tfgrad     {float(fit.x[name]):.10g} ± {float(fit.stderr[name]):.6g}"
    )
    print(f"    certified  {value:.10g} ± {error:.6g}")
    print(f"    SciPy      {theirs[i]:.10g} ± {covariance[i, i] ** 0.5:.6g}")

# %% [markdown]
# ## The curve and its band
#
# The errors of the parameters become an error of the curve by its Jacobian: $\sigma_y^2 = J C J^T$. The band is
# narrow between the data and widens beyond them.

# %%
x = np.linspace(0, 1500, 120)
y = model(fit.x, x).numpy()
jacobian = tfgrad.jacobian(lambda p: model(p, x))(fit.x)
rows = np.stack([jacobian["b1"], jacobian["b2"]], axis=1)
band = np.sqrt(np.einsum("ni,ij,nj->n", rows, fit.covariance, rows))

figure = Picture(figsize=(11, 4), layout="constrained")
left, right = figure.subplots(1, 2)
left.fill_between(x, y - 10 * band, y + 10 * band, color="C0", alpha=0.3, lw=0)
left.plot(x, y, color="C0", label="fit, with ten times its error")
left.plot(pressure, volume, "o", color="black", ms=4, label="measured")
left.set(xlabel="pressure", ylabel="volume")
left.legend()

# The two parameters are correlated: a smaller b2 is made up for by a larger b1. So b2 is drawn as its distance
# from the value that fits best with b1; the ellipses would be too thin to be told apart otherwise.
b1, b2 = (float(fit.x[name]) for name in ("b1", "b2"))
s1, s2 = np.sqrt(np.diag(fit.covariance))
slope = fit.covariance[0, 1] / s1**2
narrow = np.sqrt(s2**2 - slope**2 * s1**2)
grid1, distance = np.meshgrid(
    np.linspace(b1 - 4 * s1, b1 + 4 * s1, 80), np.linspace(-4 * narrow, 4 * narrow, 80)
)
grid2 = b2 + slope * (grid1 - b1) + distance
misfit = grid1[..., None] * (1 - np.exp(-grid2[..., None] * pressure)) - volume
excess = np.sum(misfit**2, axis=-1) - 2 * float(fit.fun)
right.contourf(grid1, distance, np.log10(excess + 1e-6), 25, cmap="Blues_r")
angle = np.linspace(0, 2 * np.pi, 200)
ellipse = np.linalg.cholesky(fit.covariance) @ [np.cos(angle), np.sin(angle)]
for size, color in ((1, "C1"), (2, "C2"), (3, "C3")):
    across = size * (ellipse[1] - slope * ellipse[0])
    label = f"{size} standard error{'s' * (size > 1)}"
    right.plot(b1 + size * ellipse[0], across, color=color, label=label)
right.plot(b1, 0, "*", color="red", ms=10)
right.set(xlabel="b1", ylabel="b2 - best b2 for this b1", title="sum of squares")
right.legend()
figure

# %%
correlation = fit.covariance[0, 1] / (s1 * s2)
print(f"correlation of b1 and b2: {correlation:.4f}")

# %% [markdown]
# ## What must hold

# %%
for name, (value, error) in certified.items():
    np.testing.assert_allclose(float(fit.x[name]), value, rtol=1e-7)
    np.testing.assert_allclose(float(fit.stderr[name]), error, rtol=1e-5)
np.testing.assert_allclose(float(fit.residual_std), 1.0187876330e-01, rtol=1e-6)
np.testing.assert_allclose(fit.covariance, covariance, rtol=1e-3)
assert fit.success
assert correlation < -0.99
# Near the minimum the ellipses are level lines: at k errors, the sum has grown by k² s².
near = b1 + 0.01 * ellipse[0][:, None], b2 + 0.01 * ellipse[1][:, None]
grown = np.sum((near[0] * (1 - np.exp(-near[1] * pressure)) - volume) ** 2, axis=1)
expected = (0.01 * float(fit.residual_std)) ** 2
np.testing.assert_allclose(grown - 2 * float(fit.fun), expected, rtol=0.01)
