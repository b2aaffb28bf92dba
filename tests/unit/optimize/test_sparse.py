import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.optimize.solvers.backup import Backup
from tfgrad.optimize.update import rows_summed, summed_for

SLICES = tf.IndexedSlices(tf.ones([2, 1]), tf.constant([3, 3]), tf.constant([5, 1]))


@pytest.mark.parametrize("rows", [[], [3], [2, 2, 2], [3, 0, 3, 1, 0]])
def test_summed_rows_are_the_same_tensor(rows):
    values = np.random.default_rng(0).normal(size=(len(rows), 2))
    shape = tf.constant([5, 2])
    given = tf.IndexedSlices(tf.constant(values), tf.constant(rows, tf.int32), shape)
    summed = rows_summed(given, 5)

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
    first, second, third = summed_for(
        optimizer, [SLICES, dense, None], [tf.zeros([5, 1])] * 3
    )

    assert (first is SLICES) == kept
    assert second is dense
    assert third is None


TABLE = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5}, {"weight_decay": 0.1}],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("constraint", [None, "non_neg"])
def test_a_table_goes_back_to_all_of_the_last_finite_point(options, constraint):
    """Also to what a callback has put there, in rows that no batch reads."""
    rows = np.array([[0, 1], [1, 1], [3, 0], [2, 2], [0, 4]])

    def trained(steps, last):
        kept_to = constraint and keras.constraints.get(constraint)
        table = keras.Variable(TABLE, constraint=kept_to)

        def put(state):
            if state.step == 2:
                table.value[5].assign([7.0, 8.0])

        factors = np.array([1, 1, 1, 1, last], np.float32)
        result = tfgrad.minimize(
            lambda rows, by: by * tf.reduce_sum(tf.gather(table.value, rows) ** 2),
            wrt=table, data=list(zip(rows, factors, strict=True)), callback=put,
            method=keras.optimizers.SGD(0.1, **options), steps=steps,
        )  # fmt: skip
        return result, table.numpy()

    bad, there = trained(5, np.nan)
    _, before = trained(3, 1.0)

    assert (bad.status, bad.nit) == ("nonfinite", 3)
    np.testing.assert_array_equal(there, before)
    np.testing.assert_array_equal(there[5], bad.x[5])


def test_a_step_on_few_rows_copies_no_table():
    table = tf.Variable(TABLE)
    backup = Backup([table], [table], keras.optimizers.SGD(0.1))

    for rows in ([0, 3], [3, 5, 1], [2]):
        before = table.numpy()
        slices = tf.IndexedSlices(tf.ones([len(rows), 2]), tf.constant(rows), None)
        backup.keep([slices])
        table.scatter_sub(slices)
        np.testing.assert_array_equal(backup.variables[0], before)
    table.assign(-table)  # what nobody tells of is not noticed: no table is copied
    backup.keep([slices])

    assert np.sum(backup.variables[0].numpy() != table.numpy()) > 2
    backup.forget()
    backup.keep([slices])
    np.testing.assert_array_equal(backup.variables[0], table)
