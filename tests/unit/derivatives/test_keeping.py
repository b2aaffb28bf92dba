"""A compiled form is used again only where the function must still be the same."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.keeping import kept
from tfgrad.derivatives.matrices import jacobian
from tfgrad.derivatives.reverse import grad, vjp

FACTOR = 2.0


def scaled(x):
    return FACTOR * x


class Model:
    def __init__(self):
        self.factor = 2.0

    def __call__(self, x):
        return self.factor * x


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    values: np.ndarray = dataclasses.field(compare=False)

    def __call__(self, x):
        return tf.reduce_sum(self.values * x)


ROADS = {
    "jvp": lambda f: float(jvp(f, (1.0,), (1.0,))[1]),
    "vjp": lambda f: float(vjp(f, 1.0)[1](1.0)[0]),
}


@pytest.mark.parametrize("road", ROADS)
def test_what_a_function_reads_may_change(road, monkeypatch):
    model, factor = Model(), 2.0
    answers = [ROADS[road](f) for f in (model, model.__call__, lambda x: factor * x)]
    answers.append(ROADS[road](scaled))

    model.factor = factor = 5.0
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    again = [ROADS[road](f) for f in (model, model.__call__, lambda x: factor * x)]
    again.append(ROADS[road](scaled))

    assert (answers, again) == ([2.0] * 4, [5.0] * 4)


def test_a_closure_may_change():
    factor = 2.0
    f = lambda x: factor * x  # noqa: E731  one object whose closure changes

    first = ROADS["jvp"](f)
    factor = 5.0

    assert (first, ROADS["jvp"](f)) == (2.0, 5.0)


def test_functions_that_are_equal_may_differ():
    one, other = Row("a", np.array(2.0)), Row("a", np.array(5.0))

    assert one == other
    assert (ROADS["jvp"](one), ROADS["jvp"](other)) == (2.0, 5.0)


def test_static_arguments_that_are_equal_may_differ():
    slope = grad(lambda x, row: row(x))

    assert [float(slope(1.0, Row("a", np.array(k)))) for k in (2.0, 5.0)] == [2.0, 5.0]


def test_what_cannot_change_is_kept():
    variable, number = tf.Variable(2.0), 3

    def f(x):
        return tf.sin(number * x) * variable * scaled(x) * np.pi

    assert kept(lambda f: object(), f) is not kept(lambda f: object(), f)
    make = lambda f, *options: object()  # noqa: E731  one maker for both
    assert kept(make, f) is kept(make, f)
    assert kept(make, tf.sin) is kept(make, tf.sin)
    assert kept(make, f, True) is not kept(make, f, False)
    assert kept(make, jacobian) is kept(make, jacobian)
