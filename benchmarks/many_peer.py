"""Fit decay curves with optimistix under vmap and print how long it took as JSON.

    python many_peer.py COUNT

A process of its own: JAX and TensorFlow in one crash it.
"""

from __future__ import annotations

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

jax.config.update("jax_enable_x64", True)

POINTS = np.linspace(0, 5, 50)


def main() -> None:
    count = int(sys.argv[1])
    rng = np.random.default_rng(0)
    ranges = ((1, 3), (0.3, 2), (-0.5, 0.5))
    truth = np.stack([rng.uniform(*between, count) for between in ranges], 1)
    clean = truth[:, :1] * np.exp(-truth[:, 1:2] * POINTS) + truth[:, 2:]
    signals = jnp.asarray(clean + 0.02 * rng.normal(size=clean.shape))
    solver = optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8)
    t = jnp.asarray(POINTS)

    def misfit(p, signal):
        return p[0] * jnp.exp(-p[1] * t) + p[2] - signal

    def fit(signal):
        start = jnp.array([1.0, 1.0, 0.0])
        return optx.least_squares(
            misfit, solver, start, args=signal, max_steps=200, throw=False
        ).value

    fits = jax.jit(jax.vmap(fit))
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        found = jax.block_until_ready(fits(signals))
        seconds.append(time.perf_counter() - began)
    error = float(np.median(np.abs(np.asarray(found) - truth)))
    again = min(seconds[1:])
    print(json.dumps({"first": seconds[0], "again": again, "error": error}))


if __name__ == "__main__":
    main()
