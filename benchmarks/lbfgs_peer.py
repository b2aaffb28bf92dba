"""Time the L-BFGS of another tool and print what it took as JSON.

    python lbfgs_peer.py scipy|tfp|optax|optimistix|torch

Each solves the same problems, in float64, with ten remembered pairs and a strong Wolfe
line search, until no element of the gradient is above 1e-6 or 1000 iterations are over:
one tool per process, since some cannot be imported together.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

GTOL, MOST = 1e-6, 1000
SIZES = {"Rosenbrock 2": 2, "Rosenbrock 100": 100, "Rosenbrock 10,000": 10_000}
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(200, 8))
TARGETS = np.sin(INPUTS.sum(1))
WIDTH = 16
NETWORK = "network of 161 weights"


def start_of(name: str) -> Any:
    """Return where a problem starts."""
    if name in SIZES:
        return np.tile([-1.2, 1.0], SIZES[name] // 2)
    return np.random.default_rng(1).normal(size=8 * WIDTH + 2 * WIDTH + 1) / 3


def rosenbrock(x: Any, total: Callable[[Any], Any]) -> Any:
    """Return the chained Rosenbrock function."""
    return total(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def misfit(x: Any, xp: Any, total: Callable[[Any], Any], data: Any) -> Any:
    """Return the mean squared error of a network of one hidden layer."""
    inputs, targets = data
    first = xp.reshape(x[: 8 * WIDTH], (8, WIDTH))
    bias, last = x[8 * WIDTH : 9 * WIDTH], x[9 * WIDTH : 10 * WIDTH]
    hidden = xp.tanh(xp.matmul(inputs, first) + bias)
    error = total(hidden * last, 1) + x[10 * WIDTH] - targets
    return total(error**2) / len(TARGETS)


def tensorflow_objective(name: str) -> Callable[[Any], Any]:
    """Return the objective as TensorFlow's users write it."""
    import tensorflow as tf

    if name in SIZES:
        return lambda x: rosenbrock(x, tf.reduce_sum)
    data = tf.constant(INPUTS), tf.constant(TARGETS)

    class Ops:
        reshape, tanh, matmul = tf.reshape, tf.tanh, tf.matmul

    return lambda x: misfit(x, Ops, tf.reduce_sum, data)


def jax_objective(name: str) -> Callable[[Any], Any]:
    import jax.numpy as jnp

    if name in SIZES:
        return lambda x: rosenbrock(x, jnp.sum)
    return lambda x: misfit(x, jnp, jnp.sum, (INPUTS, TARGETS))


def compiled(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return value and gradient of a TensorFlow function, compiled."""
    import tensorflow as tf

    @tf.function(autograph=False)
    def value_and_gradient(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = f(x)
        return y, tape.gradient(y, x)

    return value_and_gradient


def scipy(name: str) -> Callable[[], Any]:
    import tensorflow as tf
    from scipy.optimize import minimize

    call = compiled(tensorflow_objective(name))
    options = {"maxiter": MOST, "maxfun": 10**6, "ftol": 0, "gtol": GTOL, "maxcor": 10}

    def value_and_gradient(x: Any) -> Any:
        y, gradient = call(tf.constant(x))
        return float(y), gradient.numpy()

    def solve() -> Any:
        result = minimize(
            value_and_gradient,
            start_of(name),
            jac=True,
            method="L-BFGS-B",
            options=options,
        )
        return result.nit, result.nfev, result.fun

    return solve


def tfp(name: str) -> Callable[[], Any]:
    import tensorflow as tf
    import tensorflow_probability as tfp

    f = compiled(tensorflow_objective(name))

    @tf.function(autograph=False)
    def run(x: Any) -> Any:
        return tfp.optimizer.lbfgs_minimize(
            f,
            x,
            tolerance=GTOL,
            f_relative_tolerance=0,
            x_tolerance=0,
            max_iterations=MOST,
            num_correction_pairs=10,
        )

    def solve() -> Any:
        result = run(tf.constant(start_of(name)))
        return (
            int(result.num_iterations),
            int(result.num_objective_evaluations),
            float(result.objective_value),
        )

    return solve


def optax(name: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import optax

    f = jax_objective(name)
    solver = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(f)

    @jax.jit
    def run(x: Any) -> Any:
        def step(carried: Any) -> Any:
            x, state, evaluations = carried
            value, gradient = value_and_grad(x, state=state)
            updates, state = solver.update(
                gradient, state, x, value=value, grad=gradient, value_fn=f
            )
            searched = state[-1].info.num_linesearch_steps
            return optax.apply_updates(x, updates), state, evaluations + searched

        def goes_on(carried: Any) -> Any:
            state = carried[1]
            count = optax.tree.get(state, "count")
            gradient = optax.tree.get(state, "grad")
            return (count == 0) | (count < MOST) & (jnp.max(jnp.abs(gradient)) > GTOL)

        x, state, evaluations = jax.lax.while_loop(
            goes_on, step, (x, solver.init(x), 1)
        )
        return optax.tree.get(state, "count"), evaluations, f(x)

    def solve() -> Any:
        return [number.item() for number in run(jnp.asarray(start_of(name)))]

    return solve


def optimistix(name: str) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp
    import optimistix

    f = jax_objective(name)

    # Its own rule is about steps; with tolerances this small it goes on to about GTOL.
    solver = optimistix.LBFGS(rtol=1e-10, atol=1e-10, history_length=10)

    @jax.jit
    def run(x: Any) -> Any:
        found = optimistix.minimise(
            lambda x, _: f(x), solver, x, max_steps=MOST, throw=False
        )
        return found.stats["num_steps"], f(found.value)

    def solve() -> Any:
        steps, value = run(jnp.asarray(start_of(name)))
        # One evaluation a step: rejected trials count as steps.
        return int(steps), int(steps), float(value)

    return solve


def torch(name: str) -> Callable[[], Any]:
    import torch

    def total(x: Any, *dim: int) -> Any:
        return torch.sum(x, *dim)

    data = torch.tensor(INPUTS), torch.tensor(TARGETS)

    def solve() -> Any:
        x = torch.tensor(start_of(name), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [x],
            max_iter=MOST,
            max_eval=10**6,
            history_size=10,
            tolerance_grad=GTOL,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Any:
            optimizer.zero_grad()
            y = rosenbrock(x, total) if name in SIZES else misfit(x, torch, total, data)
            y.backward()
            return y

        optimizer.step(closure)
        state = optimizer.state[x]
        return state["n_iter"], state["func_evals"], float(closure())

    return solve


def measured(solve: Callable[[], Any]) -> dict[str, Any]:
    """Return the seconds of a first run and of some others, and what came out."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        iterations, evaluations, value = solve()
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > 60:
            break
    return {
        "seconds": seconds,
        "iterations": iterations,
        "evaluations": evaluations,
        "fun": value,
    }


if __name__ == "__main__":
    tool = sys.argv[1]
    if tool in ("optax", "optimistix"):
        import jax

        jax.config.update("jax_enable_x64", True)
    make = {
        "scipy": scipy,
        "tfp": tfp,
        "optax": optax,
        "optimistix": optimistix,
        "torch": torch,
    }[tool]
    names = [*SIZES, NETWORK]
    print(json.dumps({name: measured(make(name)) for name in names}))
