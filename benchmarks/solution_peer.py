"""Time jaxopt's implicit differentiation and print what it took as JSON.

    python solution_peer.py

The examples are those of jaxopt's documentation: the penalty of a ridge regression and
of a logistic regression, in float64.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(200, 20))
TARGETS = INPUTS @ GENERATOR.normal(size=20) + GENERATOR.normal(size=200)
LABELS = (TARGETS > 0) * 2.0 - 1
NAMES = ("ridge", "logistic")
REPEATS = 30


def losses(xp: Any, total: Any, matvec: Any, softplus: Any) -> dict[str, Any]:
    """Return the inner objectives, of weights and the log of a penalty."""

    def ridge(w: Any, log_penalty: Any) -> Any:
        error = matvec(INPUTS, w) - TARGETS
        return total(error * error) / 400 + xp.exp(log_penalty) * total(w * w) / 2

    def logistic(w: Any, log_penalty: Any) -> Any:
        margin = LABELS * matvec(INPUTS, w)
        return total(softplus(-margin)) / 200 + xp.exp(log_penalty) * total(w * w) / 2

    return {"ridge": ridge, "logistic": logistic}


def measured(call: Any) -> dict[str, Any]:
    """Return the seconds of a first call and of others, and what the first found."""
    began = time.perf_counter()
    value, slope = call(-1.0)
    first, seconds = time.perf_counter() - began, []
    for penalty in np.linspace(-2, 0, REPEATS):
        began = time.perf_counter()
        call(float(penalty))
        seconds.append(time.perf_counter() - began)
    return {"first": first, "seconds": seconds, "value": value, "slope": slope}


def peer(name: str) -> Any:
    """Return value and derivative by jaxopt, compiled."""
    import jax
    import jax.numpy as jnp
    import jaxopt

    f = losses(jnp, jnp.sum, jnp.matmul, jax.nn.softplus)[name]
    solver = jaxopt.LBFGS(f, tol=1e-10, maxiter=1000)

    def outer(log_penalty: Any) -> Any:
        w = solver.run(jnp.zeros(20), log_penalty).params
        return jnp.sum(w * w)

    compiled = jax.jit(jax.value_and_grad(outer))
    return lambda penalty: tuple(map(float, compiled(penalty)))


if __name__ == "__main__":
    import jax

    jax.config.update("jax_enable_x64", True)
    print(json.dumps({name: measured(peer(name)) for name in NAMES}))
