"""What tells functions apart without calling them."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.optimize.fingerprint import fingerprint

SCALE = 2.0


def scaled(x):
    return SCALE * x**2


def power_of(n):
    return lambda x, offset=0.0: x**n + offset


def test_the_same_code_with_the_same_numbers_has_the_same():
    assert fingerprint(power_of(2)) == fingerprint(power_of(2))
    assert fingerprint(tf.function(scaled)) == fingerprint(scaled)


OTHERS = {
    "number": power_of(3),
    "dtype of a number": power_of(2.0),
    "array": power_of(np.array([2.0, 2.0])),
    "body": lambda x, offset=0.0: x**2 - offset,
    "default": lambda x, offset=1.0: x**2 + offset,
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_tells_apart_another(name):
    assert fingerprint(OTHERS[name]) != fingerprint(power_of(2))


def test_a_global_number_that_changed_is_another(monkeypatch):
    before = fingerprint(scaled)
    monkeypatch.setitem(globals(), "SCALE", 3.0)

    assert fingerprint(scaled) != before


def test_words_are_compared_as_such():
    words, same = (np.array(["a", b"b" * n], object) for n in (3, 3))
    assert fingerprint(power_of(words)) == fingerprint(power_of(same))
    other = np.array(["a", b"b"], object)
    assert fingerprint(power_of(words)) != fingerprint(power_of(other))


def test_a_variable_may_change_and_what_is_not_python_says_nothing():
    x = tf.Variable(1.0)
    before = fingerprint(lambda: x**2)
    x.assign(5.0)

    assert fingerprint(lambda: x**2) == before
    assert fingerprint(np.exp) == ""
    assert fingerprint(tf.keras.losses.MeanSquaredError()) == ""
