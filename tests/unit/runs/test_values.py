import fractions
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.runs.values import check_tag, to_column, to_number, to_step, to_steps


@pytest.mark.parametrize(
    "value",
    [
        2,
        2.0,
        np.float32(2),
        np.int8(2),
        fractions.Fraction(2),
        np.array(2.0),
        tf.constant(2.0),
        tf.constant(2.0, tf.bfloat16),
        tf.Variable(2),
        keras.Variable(2.0),
    ],
)
def test_every_real_number_of_no_dimension_is_a_scalar(value):
    number = to_number(value, "loss")

    assert type(number) is float
    assert number == 2.0


def test_nan_and_infinity_are_numbers():
    assert math.isnan(to_number(float("nan"), "loss"))
    assert to_number(np.float64("-inf"), "loss") == -math.inf


def test_an_integer_larger_than_any_of_numpy_is_a_number():
    assert to_number(2**70, "loss") == 2.0**70


@pytest.mark.parametrize(
    "value",
    [
        "1.0",
        b"1",
        None,
        10**400,
        [1.0],
        np.ones(1),
        tf.ones([1]),
        1j,
        np.complex64(1),
        np.array("2026-11-29", "M8[D]"),
        np.zeros([], [("a", float), ("b", int)]),
        object(),
    ],
)
def test_what_is_no_number_is_named_with_its_tag(value):
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)got: 'loss' is .*try: float\("
    ):
        to_number(value, "loss")


def test_a_symbolic_tensor_is_no_number():
    @tf.function(autograph=False)  # AutoGraph rewraps what is raised
    def f(x):
        to_number(x, "loss")

    with pytest.raises(InvalidArgumentError, match="one real number"):
        f(tf.constant(1.0))


@pytest.mark.parametrize(
    "value", [3, np.int64(3), tf.constant(3), keras.Variable(3, dtype="int64")]
)
def test_every_integer_type_is_a_step(value):
    assert to_step(value, "step") == 3


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, "1", None, True, [1]])
def test_what_is_no_step_is_refused(value):
    with pytest.raises(InvalidArgumentError, match="whole number, 0 or more"):
        to_step(value, "step")


@pytest.mark.parametrize("steps", [range(3), [0, 1, 2], np.arange(3, dtype=np.uint8)])
def test_steps_of_any_integer_type_become_int64(steps):
    np.testing.assert_array_equal(to_steps(steps), [0, 1, 2])
    assert to_steps(steps).dtype == np.int64


def test_no_steps_are_steps():
    assert to_steps([]).shape == (0,)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[0], [1, 2]], "one row of whole numbers"),
        ([0, 2, 1], "step 1 after step 2, in row 2"),
        ([0, 0], "step 0 after step 0, in row 1"),
        ([0.0, 1.0], "row of whole numbers"),
        ([[0, 1]], "row of whole numbers"),
        (3, "row of whole numbers"),
        ([-1, 0], "0 or more"),
        (np.array([0, 2**63], np.uint64), "0 or more"),
        (None, "steps of NoneType"),
    ],
)
def test_steps_that_do_not_grow_are_refused(steps, message):
    with pytest.raises(InvalidArgumentError, match=message):
        to_steps(steps)


@pytest.mark.parametrize(
    "values",
    [[1, 2], (1.0, 2.0), np.array([1, 2], np.float16), tf.constant([1.0, 2.0])],
)
def test_a_column_becomes_float64(values):
    column = to_column(values, "loss", 2)

    np.testing.assert_array_equal(column, [1.0, 2.0])
    assert column.dtype == np.float64


@pytest.mark.parametrize(
    "values", [[1.0], np.ones((2, 1)), ["1", "2"], [1, [2]], [1j, 2], None, 1.0]
)
def test_a_column_of_another_shape_or_kind_is_refused(values):
    with pytest.raises(InvalidArgumentError, match=r"(?s)'loss' is .*for 2 steps"):
        to_column(values, "loss", 2)


@pytest.mark.parametrize("tag", ["loss", "a/b c", "x[0]", "größe", "‖∇f‖"])
def test_a_tag_may_be_any_printable_text(tag):
    check_tag(tag)


def test_the_tags_of_the_hparams_tab_are_its_own():
    with pytest.raises(InvalidArgumentError, match=r"(?s)HParams tab.*try: Run\("):
        check_tag("_hparams_/session_start_info")


@pytest.mark.parametrize("tag", ["", None, 3, "a\nb", "\0", "\ud800"])
def test_a_tag_that_cannot_be_shown_is_refused(tag):
    with pytest.raises(InvalidArgumentError, match="printable"):
        check_tag(tag)
