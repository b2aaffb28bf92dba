"""Packing of nests into few tensors."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.optimize.packing import GROUP, Packing


def mixed_nest():
    numbers = [tf.constant(float(i)) for i in range(GROUP + 3)]
    flags = (tf.constant(True), tf.constant(7), tf.constant(2.5, tf.float64))
    return {"numbers": numbers, "x": tf.ones([2, 3]), "flags": flags, "none": ()}


def test_unpacking_returns_the_leaves_that_were_packed_in_their_places():
    nest = mixed_nest()
    packing = Packing(nest)

    again = packing.unpack(packing.pack(nest))

    tf.nest.assert_same_structure(nest, again)
    pairs = list(zip(tf.nest.flatten(nest), tf.nest.flatten(again), strict=True))
    assert all(a.dtype == b.dtype for a, b in pairs)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_scalars_travel_together_by_dtype_in_groups():
    nest = mixed_nest()

    packed = Packing(nest).pack(nest)

    shapes = sorted((t.dtype.name, tuple(t.shape)) for t in packed)
    assert shapes == [
        ("bool", (1,)), ("float32", (2, 3)), ("float32", (3,)), ("float32", (GROUP,)),
        ("float64", (1,)), ("int32", (1,)),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_python_numbers_take_part_in_a_compiled_function(dtype):
    packing = Packing((0, tf.constant(1.5, dtype)))

    @tf.function(jit_compile=True)
    def doubled(packed):
        count, value = packing.unpack(packed)
        return packing.pack((count + 1, 2 * value))

    count, value = packing.unpack(doubled(packing.pack((4, tf.constant(2.5, dtype)))))

    assert (int(count), float(value)) == (5, 5.0)
