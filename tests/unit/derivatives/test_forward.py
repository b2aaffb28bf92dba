"""`jvp`: forward mode, out of reverse mode twice."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.elementwise import derivative
from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.reverse import grad, vjp
from tfgrad.errors import InvalidArgumentError, NoGradientError


def looped(x):
    return tf.while_loop(
        lambda i, x: i < 3, lambda i, x: (i + 1, tf.sin(x) * x), (0, x)
    )[1]


def test_value_and_directional_derivative_come_together():
    y, dy = jvp(lambda x: x**2, (3.0,), (10.0,))

    assert (float(y), float(dy)) == (9.0, 60.0)


def test_several_arguments_nests_in_and_nests_out():
    def f(p, q):
        return {"sum": p["a"] + p["b"], "product": p["a"] * q}

    y, dy = jvp(
        f, ({"a": 2.0, "b": 3.0}, [4.0, 5.0]), ({"a": 1.0, "b": 10.0}, [0.0, 1.0])
    )

    assert {key: value.numpy().tolist() for key, value in y.items()} == {
        "sum": 5.0,
        "product": [8.0, 10.0],
    }
    assert float(dy["sum"]) == 11.0
    assert dy["product"].numpy().tolist() == [4.0, 7.0]


def test_outputs_without_a_path_have_derivative_zero():
    _, dy = jvp(lambda x: (x, tf.ones(2), tf.stop_gradient(x)), (3.0,), (1.0,))

    assert [part.numpy().tolist() for part in dy] == [1.0, [0.0, 0.0], 0.0]


def test_it_matches_the_pull_back_through_a_loop():
    x, v = np.linspace(0.5, 1.5, 4), np.array([1.0, -2.0, 0.5, 3.0])

    _, pushed = jvp(looped, (x,), (v,))
    (pulled,) = vjp(looped, x)[1](np.ones(4))

    assert np.sum(pushed) == pytest.approx(np.dot(pulled, v), rel=1e-12)


def test_the_gradient_of_a_directional_derivative_through_a_loop_is_not_zero():
    x = tf.constant(1.2, tf.float64)
    slope = lambda x: jvp(looped, (x,), (tf.ones_like(x),))[1]  # noqa: E731  one line

    step = 1e-6
    expected = (slope(x + step) - slope(x - step)) / (2 * step)

    assert float(grad(slope)(x)) == pytest.approx(float(expected), rel=1e-8)


def test_a_function_is_compiled_once():
    f = tf.function(lambda x: x**3)

    answers = [float(jvp(f, (float(x),), (1.0,))[1]) for x in range(4)]

    assert answers == [0.0, 3.0, 12.0, 27.0]
    assert f.experimental_get_tracing_count() == 1


def test_additional_output():
    y, dy, aux = jvp(lambda x: (x**2, {"twice": 2 * x}), (3.0,), (10.0,), has_aux=True)

    assert (float(y), float(dy), float(aux["twice"])) == (9.0, 60.0, 6.0)


@pytest.mark.parametrize("option", ["has_aux", "verify", "jit"])
def test_options_are_true_or_false(option):
    with pytest.raises(InvalidArgumentError, match=f"`{option}` must be True or False"):
        jvp(tf.sin, (1.0,), (1.0,), **{option: 1})


def test_a_function_in_the_place_of_its_value_is_refused():
    with pytest.raises(InvalidArgumentError, match="first argument is the function"):
        jvp(tf.constant(1.0), (1.0,), (1.0,))


def test_tangents_with_other_keys_are_refused():
    with pytest.raises(InvalidArgumentError, match="other keys"):
        jvp(lambda p: p["a"] + p["b"], ({"a": 1.0, "b": 1.0},), ({"b": 1.0, "z": 0.0},))


def test_gradients_that_divide_by_the_cotangent():
    # They are differentiated at a cotangent of zero.
    norm, sums = tf.math.reduce_euclidean_norm, tf.math.cumulative_logsumexp
    v = np.array([1.0, 2.0])

    slope = jvp(norm, (v,), (v,))[1]
    assert float(slope) == pytest.approx(np.sqrt(5.0), rel=1e-12)
    np.testing.assert_allclose(
        jvp(sums, (v,), (v,))[1], [1.0, 1.0 + 1 / (1 + np.exp(-1.0))], rtol=1e-12
    )


def test_functions_that_cannot_be_hashed_are_taken():
    class Cube:
        __hash__ = None

        def __call__(self, x):
            return x**3

    assert float(jvp(Cube(), (2.0,), (1.0,))[1]) == 12.0
    assert float(vjp(Cube(), 2.0)[1](1.0)[0]) == 12.0


@pytest.mark.parametrize("primals", [3.0, np.ones(2)])
def test_primals_outside_of_a_tuple_are_refused(primals):
    with pytest.raises(InvalidArgumentError, match=r"tfgrad.jvp\(f, \(x,\), \(v,\)\)"):
        jvp(tf.sin, primals, (1.0,))


def test_tangents_that_do_not_match_are_refused():
    with pytest.raises(InvalidArgumentError, match="structure"):
        jvp(tf.multiply, (1.0, 2.0), (1.0,))
    with pytest.raises(InvalidArgumentError, match=r"`tangents\[0\]` of shape \(2,\)"):
        jvp(tf.sin, (1.0,), ([1.0, 2.0],))


def test_a_cut_output_is_refused():
    with pytest.raises(NoGradientError, match=r"tf.round"):
        jvp(lambda x: (x, tf.round(x)), (1.5,), (1.0,))


def test_what_can_be_differentiated_once_only_is_refused_in_words():
    f = tf.recompute_grad(lambda x: tf.sin(x))

    with pytest.raises(NoGradientError, match=r"without tf.recompute_grad"):
        jvp(lambda x: f(x), (1.0,), (1.0,))


def test_a_gradient_in_numpy_is_refused_in_words():
    @tf.custom_gradient
    def f(x):
        def backward(dy):
            return tf.ensure_shape(tf.numpy_function(np.cos, [x], x.dtype), []) * dy

        return tf.sin(x), backward

    assert float(grad(lambda x: f(x))(0.5)) == pytest.approx(np.cos(0.5))
    with pytest.raises(NoGradientError, match="PyFunc"):
        jvp(lambda x: f(x), (0.5,), (1.0,))


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_dtypes_are_kept(dtype):
    x = tf.constant([0.5, 1.0], dtype)

    y, dy = jvp(lambda x: x**3, (x,), (np.array([1.0, 2.0]),))

    assert y.dtype == dy.dtype == dtype
    np.testing.assert_allclose(tf.cast(dy, tf.float64), [0.75, 6.0], rtol=0.02)


def test_rounding_where_all_terms_cancel_is_no_disagreement():
    # Two numbers in each group: normalised, they are 1 and -1 wherever x is.
    layer = keras.layers.GroupNormalization(2, epsilon=0.0, dtype="float64")
    layer.build((None, 4))
    x, v = np.array([[0.3, 1.2, -0.7, 0.4]]), np.array([[1.0, 2.0, -3.0, 0.5]])

    _, pushed = jvp(lambda x: tf.reduce_sum(tf.sin(layer(x))), (x,), (v,))

    assert abs(float(pushed)) < 1e-14


def test_a_function_that_computes_in_single_precision_is_held_to_that():

    def f(x):
        return tf.cast(tf.exp(tf.cast(x, tf.float32)), tf.float64)

    x, v = np.linspace(0.1, 3.0, 7), np.linspace(-1.0, 1.0, 7)

    np.testing.assert_allclose(jvp(f, (x,), (v,))[1], np.exp(x) * v, rtol=1e-6)
    np.testing.assert_allclose(derivative(f, 3)(x), np.exp(x), rtol=1e-6)
