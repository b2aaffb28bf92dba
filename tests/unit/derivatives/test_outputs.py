"""What a function may return."""

import collections

import keras
import pytest
import tensorflow as tf

from tfgrad.derivatives.outputs import (
    aux_pair,
    float_outputs,
    scalar_output,
)
from tfgrad.errors import InvalidArgumentError, ScalarObjectiveError

Pair = collections.namedtuple("Pair", "left right")


def test_variables_are_read():
    assert float(scalar_output(tf.Variable(2.0), "f")) == 2.0
    assert isinstance(scalar_output(keras.Variable(2.0), "f"), tf.Tensor)


def test_nests_keep_their_structure():
    nest = {"pair": Pair(tf.ones(1), tf.Variable(2.0)), "list": [tf.ones(2)]}

    outputs = float_outputs(nest, "f")

    assert isinstance(outputs["pair"], Pair)
    tf.nest.assert_same_structure(outputs, nest)


@pytest.mark.parametrize("empty", [(), [], {}])
def test_an_empty_nest_is_refused(empty):
    with pytest.raises(ScalarObjectiveError, match="`f` returned"):
        float_outputs(empty, "f")


def test_a_named_tuple_of_two_is_a_pair():
    assert aux_pair(Pair(1.0, "aux"), "f") == (1.0, "aux")


@pytest.mark.parametrize("returned", [1.0, [1.0, 2.0], (1.0,)])
def test_anything_else_is_no_pair(returned):
    with pytest.raises(InvalidArgumentError, match=r"\(value, aux\)"):
        aux_pair(returned, "f")
