"""100 steps of L-BFGS on Rosenbrock's function of n variables, by one tool.

    python benchmarks/scale_peer.py tfgrad|scipy|optax n

prints the seconds, all counted, and by how many vectors of n the memory rose.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

STEPS, PAIRS = 100, 10


def peak():
    """Return the most memory that the process had, in bytes.

    Linux's own number: `ru_maxrss` begins with that of the process which started this.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def rosenbrock(x, total):
    return total(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def by_tfgrad(start):
    import tensorflow as tf

    from tfgrad import minimize  # the others import what they run, too

    def f(x):
        return rosenbrock(x, tf.reduce_sum)

    return lambda: float(minimize(f, start, steps=STEPS, gtol=0.0).fun)


def by_scipy(start):
    import scipy.optimize
    import tensorflow as tf

    @tf.function(autograph=False)
    def compiled(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = rosenbrock(x, tf.reduce_sum)
        return value, tape.gradient(value, x)

    def evaluate(x):
        value, gradient = compiled(tf.constant(x))
        return float(value), gradient.numpy()

    return lambda: float(
        scipy.optimize.minimize(
            evaluate, start, jac=True, method="L-BFGS-B",
            options={
                "maxiter": STEPS, "maxcor": PAIRS, "gtol": 0, "ftol": 0,
                "maxfun": 9999,
            },
        ).fun
    )  # fmt: skip


def by_optax(start):
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)

    def f(x):
        return rosenbrock(x, jax.numpy.sum)

    optimizer = optax.lbfgs(memory_size=PAIRS)
    value_and_gradient = optax.value_and_grad_from_state(f)

    @jax.jit
    def run(x):
        def step(carried, _):
            x, state = carried
            value, gradient = value_and_gradient(x, state=state)
            update, state = optimizer.update(
                gradient, state, x, value=value, grad=gradient, value_fn=f
            )
            return (optax.apply_updates(x, update), state), value

        start = x, optimizer.init(x)
        return jax.lax.scan(step, start, None, length=STEPS)[1][-1]

    return lambda: float(run(jax.numpy.asarray(start)))


def main():
    tool, n = sys.argv[1], int(sys.argv[2])
    run = {"tfgrad": by_tfgrad, "scipy": by_scipy, "optax": by_optax}[tool](
        np.tile([-1.2, 1.0], n // 2)
    )
    before, began = peak(), time.perf_counter()
    fun = run()
    seconds = time.perf_counter() - began
    vectors = (peak() - before) / (8 * n)
    print(json.dumps({"fun": fun, "seconds": seconds, "vectors": vectors}))


if __name__ == "__main__":
    main()
