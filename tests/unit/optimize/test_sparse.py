import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.optimize.sparse import rows_summed, summed_for

SLICES = tf.IndexedSlices(tf.ones([2, 1]), tf.constant([3, 3]), tf.constant([5, 1]))


@pytest.mark.parametrize("rows", [[], [3], [2, 2, 2], [3, 0, 3, 1, 0]])
def test_summed_rows_are_the_same_tensor(rows):
    values = np.random.default_rng(0).normal(size=(len(rows), 2))
    shape = tf.constant([5, 2])
    given = tf.IndexedSlices(tf.constant(values), tf.constant(rows, tf.int32), shape)
    summed = rows_summed(given)

    expected = np.zeros([5, 2])
    np.add.at(expected, rows, values)
    np.testing.assert_allclose(tf.convert_to_tensor(summed), expected, atol=1e-15)
    used = summed.indices.numpy()[np.any(summed.values.numpy() != 0, axis=1)]
    assert sorted(used) == sorted(set(rows))


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        (keras.optimizers.SGD(), True),
        (keras.optimizers.SGD(clipnorm=1.0), False),
        (keras.optimizers.SGD(global_clipnorm=1.0), False),
        (keras.optimizers.SGD(clipvalue=1.0), False),
        (keras.optimizers.Adam(), False),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), False),
        (object(), False),
    ],
)
def test_only_what_subtracts_a_multiple_takes_rows_twice(optimizer, kept):
    dense = tf.ones([2])
    first, second, third = summed_for(optimizer, [SLICES, dense, None])

    assert (first is SLICES) == kept
    assert second is dense
    assert third is None
