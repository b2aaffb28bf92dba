"""Fit NIST's problems with optimistix and print what came out as JSON.

    python least_squares_peer.py

A process of its own: JAX and TensorFlow in one crash it.
"""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx

jax.config.update("jax_enable_x64", True)

NIST = Path(__file__).parents[1] / "tests" / "reference" / "nist" / "problems.py"
nist = runpy.run_path(str(NIST))


def main() -> None:
    solver = optx.LevenbergMarquardt(rtol=1e-10, atol=1e-10)
    runs = []
    for name in nist["MODELS"]:
        problem, misfit = nist["read"](name), nist["residuals"](name, jnp)

        def fit(x0, misfit=misfit):
            solution = optx.least_squares(
                lambda x, _: misfit(x), solver, x0, max_steps=5000, throw=False
            )
            return solution.value, solution.stats["num_steps"]

        fit = jax.jit(fit)
        for start in problem.starts:
            seconds = []
            for _ in range(2):
                began = time.perf_counter()
                found, steps = jax.block_until_ready(fit(jnp.asarray(start)))
                seconds.append(time.perf_counter() - began)
            error = np.max(np.abs(np.asarray(found) / problem.certified - 1))
            run = {"name": name, "error": float(error), "steps": int(steps)}
            runs.append({**run, "first": seconds[0], "again": seconds[1]})
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
