"""Time the derivatives of one framework and print the seconds as JSON.

    python derivatives_peer.py jax|torch

One framework per process: importing several of them into one crashes it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=100).astype("float32")
LONG = GENERATOR.normal(size=100_000).astype("float32")
WEIGHTS = (GENERATOR.normal(size=(100, 100)) / 10).astype("float32")


def jax() -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp

    def rosenbrock(x: Any) -> Any:
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    def layer(x: Any) -> Any:
        return jnp.tanh(WEIGHTS @ x) * jnp.sin(x)

    product = jax.jit(lambda x: jax.jvp(jax.grad(rosenbrock), (x,), (x,))[1])
    square = jax.jit(jax.value_and_grad(lambda x: jnp.sum(x * x)))
    hessian, jacobian = jax.jit(jax.hessian(rosenbrock)), jax.jit(jax.jacrev(layer))
    x, long = jnp.asarray(X), jnp.asarray(LONG)
    return {
        "value_and_grad": lambda: jax.block_until_ready(square(x)),
        "hessian": lambda: hessian(x).block_until_ready(),
        "jacobian": lambda: jacobian(x).block_until_ready(),
        "hvp": lambda: product(long).block_until_ready(),
    }


def torch() -> dict[str, Callable[[], Any]]:
    import torch
    from torch.func import grad, grad_and_value, hessian, jacrev, jvp

    weights = torch.tensor(WEIGHTS)

    def rosenbrock(x: Any) -> Any:
        return torch.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    def layer(x: Any) -> Any:
        return torch.tanh(weights @ x) * torch.sin(x)

    x, long = torch.tensor(X), torch.tensor(LONG)
    return {
        "value_and_grad": lambda: grad_and_value(lambda x: torch.sum(x * x))(x),
        "hessian": lambda: hessian(rosenbrock)(x),
        "jacobian": lambda: jacrev(layer)(x),
        "hvp": lambda: jvp(grad(rosenbrock), (long,), (long,))[1],
    }


def measured(call: Callable[[], Any]) -> list[float]:
    """Return the seconds of some calls: the first one, then 50 in the steady state."""
    seconds = []
    for _ in range(60):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return [seconds[0], *seconds[10:]]


if __name__ == "__main__":
    calls = {"jax": jax, "torch": torch}[sys.argv[1]]()
    print(json.dumps({name: measured(call) for name, call in calls.items()}))
