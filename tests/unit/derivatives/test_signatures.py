"""Which calls share a compiled function."""

import tensorflow as tf

from tfgrad.derivatives.signatures import is_dynamic, signature


def test_values_of_tensors_do_not_matter_and_specs_do():
    same = {signature(tf.constant(x)) for x in (1.0, 2.0)}
    others = {signature(tf.constant([1.0])), signature(tf.constant(1.0, tf.float64))}

    assert len(same) == 1
    assert not same & others


def test_static_values_and_their_types_matter():
    keys = [signature((value,)) for value in (0, False, 0.0, None, "0", (0,), [0])]

    assert len(set(keys)) == len(keys)


def test_dicts_are_told_apart_by_their_keys_and_not_by_their_order():
    one = {"a": tf.ones(2), "b": tf.ones(3)}
    turned = {"b": tf.ones(3), "a": tf.ones(2)}

    assert signature(one) == signature(turned)
    assert signature(one) != signature({"a": tf.ones(2), "c": tf.ones(3)})


def test_variables_are_told_apart_by_identity():
    v, w = tf.Variable(1.0), tf.Variable(1.0)

    assert signature(v) == signature(v)
    assert signature(v) != signature(w)


def test_an_unhashable_value_is_told_apart_by_identity():
    values = [{1}, {1}]

    assert len({signature(value) for value in values}) == 2


def test_only_tensors_are_inputs_of_a_compiled_function():
    leaves = [tf.ones(1), tf.ragged.constant([[1.0]]), tf.Variable(1.0), 1.0, "a"]

    assert [is_dynamic(leaf) for leaf in leaves] == [True, True, False, False, False]
