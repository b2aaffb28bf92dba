from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.optimize.compiled import direct


class Pair(NamedTuple):
    first: Any
    rest: Any


ANSWERS = {
    "one": lambda x: x,
    "nest": lambda x: Pair(x, [{"b": 2 * x, "a": (3 * x, None)}, ()]),
    "constant": lambda x: (x, True),
    "sparse": lambda x: [tf.IndexedSlices(x, tf.range(2), tf.constant([5]))],
    "optional": lambda x: (x, tf.experimental.Optional.from_value(x)),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_direct_call_answers_as_the_function_itself_does(name):
    variable = tf.Variable([1.0, 2.0])
    traced = tf.function(lambda x: ANSWERS[name](x + variable), autograph=False)
    concrete = traced.get_concrete_function(tf.TensorSpec([2]))
    call, x = direct(concrete), tf.constant([3.0, 4.0])

    for _ in range(2):
        ours, theirs = call(x), concrete(x)
        tf.nest.assert_same_structure(ours, theirs, expand_composites=True)
        pairs = zip(
            *(tf.nest.flatten(a, expand_composites=True) for a in (ours, theirs)),
            strict=True,
        )
        for a, b in pairs:
            if getattr(a, "dtype", None) != tf.variant:
                np.testing.assert_array_equal(a, b)
        variable.assign([5.0, 6.0])
