"""How often the user's function is called by Python: at most twice, log or no log."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.derivatives.matrices import hvp
from tfgrad.optimize.objective import Objective


def well(x):
    """A saddle at zero."""
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


STARTS = {"anywhere": [1.0, 0.3], "a saddle": [0.0, 0.0]}

METHODS = ["lbfgs", "newton", "adam", "scipy:newton-cg", "scipy:trust-exact"]


@pytest.mark.parametrize("is_logged", [False, True], ids=["bare", "logged"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_function_is_called_once_and_once_more_for_a_log(
    method, start, is_logged, tmp_path
):
    calls = []

    def f(x):
        calls.append(x)
        return well(x)

    log = tmp_path if is_logged else None
    x0 = np.array(STARTS[start])
    result = tfgrad.minimize(f, x0, method=method, steps=20, log=log)

    assert len(calls) == 1 + is_logged
    assert np.isfinite(result.fun)


def matrix():
    return np.random.default_rng(1).normal(size=(4, 3))


NORM = keras.layers.LayerNormalization(dtype="float64")
NORM.build((4, 3))

SMOOTH = {
    "a sum": lambda x: tf.reduce_sum(x**3 * tf.sin(x)),
    "rows": lambda x: tf.reduce_sum(tf.gather(x, [0, 0, 1]) ** 3),
    "a branch": lambda x: tf.cond(x[0, 0] > 0, lambda: x[0, 1] ** 4, lambda: x[0, 2]),
    "a scan": lambda x: tf.reduce_sum(tf.scan(lambda a, e: a * e + e, x)),
    "a function": tf.function(lambda x: tf.reduce_sum(x**4)),
}

REPAIRED = {
    "a normalisation": lambda x: tf.reduce_sum(NORM(x) ** 3),
    "an entropy": lambda x: tf.reduce_sum(
        tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(x**2), x)
    ),
}


@pytest.mark.parametrize("name", SMOOTH | REPAIRED)
def test_products_made_of_the_gradients_trace_are_those_of_hvp(name):
    f = (SMOOTH | REPAIRED)[name]
    calls = []

    def counted(x):
        calls.append(x)
        return f(x)

    objective = Objective(counted, matrix(), None, has_aux=False)
    v = tf.constant(matrix()[::-1])
    objective.evaluate()
    before = len(calls)
    assert before == 1 or name in {"a scan", *REPAIRED}
    (product,) = objective.hvp([v])

    np.testing.assert_allclose(product, hvp(f)(matrix(), v), rtol=1e-12, atol=1e-12)
    # The trace of these has wrong second derivatives: f is traced anew, repaired.
    assert (len(calls) > before) == (name in REPAIRED)
