from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.optimize import chunks, compiled
from tfgrad.optimize.compiled import (
    IN_SEQUENCE,
    OfVariables,
    direct,
    in_one_kernel,
)


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


def founding_loop(f, optimizer, steps):
    x = tf.Variable([3.0, 4.0])
    for _ in range(steps):
        with tf.GradientTape() as tape:
            value = f(x)
        optimizer.apply_gradients([(tape.gradient(value, x), x)])
    return x.numpy()


@pytest.mark.parametrize("kind", [keras.optimizers.SGD, keras.optimizers.Adam])
def test_an_update_of_an_optimizer_is_traced_for_the_first_run_alone(kind, monkeypatch):
    traced = []

    def concrete_for(function, *nests, **options):
        traced.append(function)
        return real(function, *nests, **options)

    real = compiled.concrete_for
    monkeypatch.setattr(compiled, "concrete_for", concrete_for)
    clipped = [0.7, 0.7, 0.2, 0.7]  # a norm that no other test takes
    for run, (norm, rate) in enumerate(zip(clipped, [0.1, 0.2, 0.1, 0.3], strict=True)):

        def f(x, run=run):
            return tf.reduce_sum((x - run) ** 2)

        optimizer = kind(rate, clipnorm=norm)
        found = tfgrad.minimize(f, [3.0, 4.0], method=optimizer, steps=9)
        theirs = founding_loop(f, kind(rate, clipnorm=norm), 9)
        np.testing.assert_array_equal(found.x, theirs)

    assert len(traced) == 2  # for each norm, not for each function or rate


def test_variables_that_an_update_has_served_are_left_alone():
    first = tf.Variable([3.0, 4.0])
    tfgrad.minimize(lambda: tf.reduce_sum(first**2), wrt=first, method="sgd", steps=5)
    before = first.numpy()

    second = tf.Variable([1.0, 2.0])
    tfgrad.minimize(lambda: tf.reduce_sum(second**2), wrt=second, method="sgd", steps=5)

    np.testing.assert_array_equal(first, before)
    np.testing.assert_allclose(second, tf.constant([1.0, 2.0]) * 0.98**5, rtol=1e-6)


def test_an_update_by_rows_is_not_that_of_whole_tables():
    tables = [tf.Variable(np.ones((rows, 2), np.float32)) for rows in (5, 5, 7, 5)]
    for table, rows in zip(
        tables, ([0, 1, 2, 3, 4], [0, 2, 2], [6, 6, 1], [0, 0, 1]), strict=True
    ):

        def f(table=table, rows=rows):
            return tf.reduce_sum(
                (table if len(rows) == 5 else tf.gather(table, rows)) ** 2
            )

        tfgrad.minimize(f, wrt=table, method="adagrad", learning_rate=0.1, steps=3)

        theirs = tf.Variable(tf.ones_like(table))
        optimizer = keras.optimizers.Adagrad(0.1)
        for _ in range(3):
            with tf.GradientTape() as tape:
                value = f(theirs)
            gradient = tf.convert_to_tensor(tape.gradient(value, theirs))
            optimizer.apply_gradients([(gradient, theirs)])
        np.testing.assert_allclose(table, theirs, rtol=1e-6)


def looped(x):
    return tf.while_loop(lambda i, _: i < 3, lambda i, x: (i + 1, 2 * x), (0, x))[1]


COUNT = tf.Variable(3.0)

SHORT = {
    "no loop": (lambda x: 3 * x + x**2, IN_SEQUENCE),
    "a loop": (looped, ""),
    "a call": (tf.function(looped), ""),
    "a variable": (lambda x: x + COUNT, ""),
}


@pytest.mark.parametrize("name", SHORT)
def test_an_executor_in_sequence_is_for_short_ops_alone(name):
    f, executor = SHORT[name]
    x = tf.constant([3.0, 4.0])
    tf.function(f)(x)

    made = OfVariables.traced(f, [x], [], in_sequence=True)

    assert made.executor == executor
    np.testing.assert_array_equal(made.own(x), f(x))
    default = OfVariables.traced(f, [x], [], in_sequence=False)
    np.testing.assert_array_equal(default.own(x), f(x))


@pytest.mark.parametrize("dtype", [tf.float64, tf.float32, tf.bfloat16])
def test_what_is_in_one_kernel_is_one_for_xla_and_answers_as_before(dtype):
    def several(nest):
        (x, count), flag = nest
        for _ in range(3):  # sums in a row, which XLA puts in a kernel each
            x /= tf.reduce_sum(tf.abs(x))
            x -= tf.reduce_max(x)
        return [x, count + 1, ~flag]

    def whole(*nest):
        return in_one_kernel(several, nest)

    nest = (tf.cast([1.0, -2.0, 5.0], dtype), tf.constant(2)), tf.constant(True)
    call = tf.function(whole, jit_compile=True)

    text = call.experimental_get_compiler_ir(*nest)(stage="optimized_hlo")

    entry = text[text.index("ENTRY") :]
    assert entry.count(" call(") == 1
    assert 'xla_cpu_small_call="true"' in entry
    assert " fusion(" not in entry
    for found, expected in zip(call(*nest), several(nest), strict=True):
        assert found.dtype == expected.dtype
        close = 1e-12 if dtype == tf.float64 else 1e-6 if dtype == tf.float32 else 1e-2
        np.testing.assert_allclose(
            tf.cast(found, tf.float64), tf.cast(expected, tf.float64), rtol=close
        )


@pytest.mark.parametrize("what", ["unused", "complex", "captured", "unknown"])
def test_what_xla_could_not_put_in_one_kernel_is_left_to_it(what):
    x, z, kept = tf.constant([1.0, 2.0]), tf.constant([1j]), tf.Variable(3.0)

    def function(nest):
        y = nest[0] * (kept if what == "captured" else 3.0)
        return [y, nest[1] if what == "complex" else y[:1]]

    def whole(x, z):
        return in_one_kernel(function, [x, z] if what in ("unused", "complex") else [x])

    size = None if what == "unknown" else 2
    specs = tf.TensorSpec([size], x.dtype), tf.TensorSpec([1], z.dtype)
    call = tf.function(whole, jit_compile=True, input_signature=specs)

    text = call.experimental_get_compiler_ir(x, z)(stage="optimized_hlo")

    assert "xla_cpu_small_call" not in text
    assert call(x, z)[0].numpy().tolist() == [3, 6]


@pytest.mark.parametrize("bounds", [None, (-2.0, 0.5)])
def test_a_turn_of_lbfgs_is_one_kernel_beside_those_of_f(bounds, monkeypatch):
    calls = []

    def counted(function, nest):
        results = in_one_kernel(function, nest)
        calls.append(results[0].op.type)
        return results

    monkeypatch.setattr(chunks, "in_one_kernel", counted)
    start = np.linspace(-1, 0.4, 12)

    def f(x):
        return tf.reduce_sum((x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    result = tfgrad.minimize(f, start, bounds=bounds, jit=True)
    plain = tfgrad.minimize(f, start, bounds=bounds, jit=False)

    assert calls == ["XlaCallModule"]
    assert result.success
    assert plain.success
    np.testing.assert_allclose(result.x, plain.x, rtol=1e-6)
