"""Methods at work on an objective: what a bound one is offered."""

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.optimize.methods.protocol import Move


class HalfNewton:
    """Half a Newton step each time; H p = g is solved by two steps of CG."""

    name = "half-newton"

    def __init__(self, objective=None):
        self._objective = objective

    def bind(self, objective):
        return HalfNewton(objective)

    def init(self, start):
        return Move(self._ahead(start))

    def update(self, new, old, state):
        return Move(self._ahead(new))

    def _ahead(self, here):
        def body(i, p, r, d):
            hd = self._objective.hvp(here.x, d)
            step = tf.reduce_sum(r * r) / tf.reduce_sum(d * hd)
            rest = r - step * hd
            ratio = tf.reduce_sum(rest * rest) / tf.reduce_sum(r * r)
            return i + 1, p + step * d, rest, rest + ratio * d

        start = (0, tf.zeros_like(here.x), -here.grad, -here.grad)
        _, p, _, _ = tf.while_loop(lambda i, *_: i < 2, body, start)
        return here.x + 0.5 * p


def count_traces(f):
    def counted(*args):
        counted.traces += 1
        return f(*args)

    counted.traces = 0
    return counted


def bowl(p):
    return p["a"] ** 2 + 50 * (p["b"] - 1) ** 2 + p["a"] * p["b"]


MINIMUM = {"a": -50 / 99.5, "b": 100 / 99.5}


@pytest.mark.parametrize("jit", [False, True])
def test_a_bound_method_has_hessian_products_in_its_loops(jit):
    f = count_traces(bowl)
    x0 = {"a": np.float64(3), "b": np.float64(-2)}

    result = tfgrad.minimize(f, x0, method=HalfNewton(), jit=jit, gtol=1e-8)

    assert result.status == "gtol"
    for name, value in MINIMUM.items():
        assert float(result.x[name]) == pytest.approx(value, rel=1e-8)
    np.testing.assert_allclose(result.history["x['a']"][1], (3 + MINIMUM["a"]) / 2)
    assert f.traces == 1


def test_products_are_taken_where_the_method_says_and_variables_end_at_the_point():
    a, b = tf.Variable(3.0, dtype=tf.float64), tf.Variable(-2.0, dtype=tf.float64)
    f = count_traces(lambda: (bowl({"a": a, "b": b}), {"twice": 2 * a}))

    result = tfgrad.minimize(f, method=HalfNewton(), has_aux=True, gtol=1e-8)

    assert result.success
    assert float(a) == pytest.approx(MINIMUM["a"], rel=1e-8)
    assert float(a) == float(result.x[0])
    np.testing.assert_allclose(result.history["twice"][-1], 2 * MINIMUM["a"])
    assert f.traces == 1
