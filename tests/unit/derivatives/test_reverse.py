"""`grad`, `value_and_grad` and `vjp`."""

import types

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.reverse import grad, value_and_grad, vjp
from tfgrad.errors import InvalidArgumentError, NoGradientError, ScalarObjectiveError


def test_the_founding_examples():
    assert float(grad(lambda x: x**2 + x - 1)(3.0)) == 7.0
    assert float(grad(lambda x: tf.reduce_sum(x * x))(5.0)) == 10.0


def test_value_and_gradient_come_together():
    value, slope = value_and_grad(lambda x: x**3)(2.0)

    assert (float(value), float(slope)) == (8.0, 12.0)


def test_aux_comes_back_untouched():
    def f(x):
        return x**2, {"twice": 2 * x, "index": tf.argmax([x, 0.0])}

    slope, aux = grad(f, has_aux=True)(3.0)
    (value, again), other = value_and_grad(f, has_aux=True)(3.0)

    assert (float(slope), float(value), float(other)) == (6.0, 9.0, 6.0)
    assert float(aux["twice"]) == float(again["twice"]) == 6.0
    assert aux["index"].dtype == tf.int64


@pytest.mark.parametrize("returned", [3.0, (1.0, 2.0, 3.0), [1.0, 2.0]])
def test_aux_needs_a_pair(returned):
    with pytest.raises(InvalidArgumentError, match="try: return value, aux"):
        grad(lambda x: returned, has_aux=True)(1.0)


REFUSED = {
    "a vector": (lambda x: tf.stack([x, x]), r"shape \(2,\)", "tfgrad.jacobian"),
    "an array of one": (lambda x: x[None], r"shape \(1,\)", "tfgrad.derivative"),
    "nothing": (lambda x: None, "None", "is a `return` missing"),
    "a list": (lambda x: [x, x], "list", "tfgrad.jacobian"),
    "a Python number": (lambda x: 3.0, "float 3.0", r"tf\.\*"),
    "a NumPy number": (lambda x: np.float32(3.0), "float32", r"tf\.\*"),
    "an integer": (lambda x: tf.cast(x, tf.int32), "int32", "before anything is round"),
    "a complex number": (lambda x: tf.complex(x, x), "complex64", "tf.math.real"),
    "text": (lambda x: "text", "'text'", "return the tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_float_number_is_refused_with_its_shape(name):
    f, got, hint = REFUSED[name]

    with pytest.raises(ScalarObjectiveError, match=f"{got}(.|\n)*{hint}"):
        grad(f)(1.0)


def test_a_value_of_unknown_shape_is_taken_if_it_is_one_number():
    f = tf.function(
        lambda x: tf.reduce_sum(x**2), input_signature=[tf.TensorSpec(None)]
    )

    assert grad(f)([1.0, 2.0]).numpy().tolist() == [2.0, 4.0]


def test_no_path_gives_zeros():
    def f(x, y):
        return 3 * x + tf.reduce_sum(tf.stop_gradient(y)) + tf.cast(tf.size(y), x.dtype)

    answer = grad(f, (0, 1))(1.0, [2.0, 3.0])

    assert float(answer[0]) == 3.0
    assert answer[1].numpy().tolist() == [0.0, 0.0]


def test_the_gradient_of_a_gather_is_dense_and_adds_repeated_rows():
    table = tf.Variable(tf.ones([4, 2]))
    rows = np.array([1, 1, 3])

    answer = grad(lambda: tf.reduce_sum(tf.gather(table, rows)), wrt=table)()

    assert isinstance(answer, tf.Tensor)
    assert answer.numpy().tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


def test_a_cut_path_is_refused_by_the_name_of_the_argument():
    for cut in (tf.round, tf.floor, lambda x: tf.cast(tf.cast(x, tf.int32), x.dtype)):
        with pytest.raises(NoGradientError, match="with respect to `height` is cut"):
            grad(lambda width, height, cut=cut: width * cut(height), 1)(1.0, 2.5)


def test_a_cut_variable_is_refused_by_its_name():
    weights = tf.Variable(1.5, name="weights")

    with pytest.raises(NoGradientError, match="weights"):
        grad(lambda: tf.round(weights), wrt=weights)()


def test_piecewise_constant_parts_beside_the_path_are_fine():
    cases = {
        3.7: (lambda x: x - tf.floor(x), 1.0),
        2.0: (lambda x: tf.gather([x, 5 * x], tf.argmax([x, -x])), 1.0),
        3.0: (lambda x: tf.cond(x > 1, lambda: x**2, lambda: x), 6.0),
        4.0: (lambda x: tf.where(x > 1, x**2, x) * tf.cast(x > 0, x.dtype), 8.0),
    }

    for x, (f, expected) in cases.items():
        assert float(grad(f)(x)) == expected


def test_an_inner_gradient_is_a_function_like_any_other():
    fourth = lambda x: x**4  # noqa: E731  one line is the point

    assert float(grad(grad(fourth))(2.0)) == 48.0
    assert float(grad(grad(grad(fourth)))(2.0)) == 48.0


def test_inside_of_a_users_function_and_under_a_users_tape():
    f = lambda x: tf.sin(x)  # noqa: E731  one line is the point
    x = tf.constant(0.5)

    @tf.function
    def step(x):
        return x - grad(f)(x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        slope = grad(f)(x)

    assert float(step(x)) == pytest.approx(0.5 - np.cos(0.5))
    assert float(tape.gradient(slope, x)) == pytest.approx(-np.sin(0.5))


def test_a_pull_back_is_linear_and_can_be_repeated():
    y, pullback = vjp(lambda x, w: {"a": x * w, "b": w**2}, [1.0, 2.0], [3.0, 4.0])

    first = pullback({"a": [1.0, 10.0], "b": [0.0, 0.0]})
    second = pullback({"a": [0.0, 0.0], "b": [1.0, 1.0]})

    assert y["b"].numpy().tolist() == [9.0, 16.0]
    assert [part.numpy().tolist() for part in first] == [[3.0, 40.0], [1.0, 20.0]]
    assert [part.numpy().tolist() for part in second] == [[0.0, 0.0], [6.0, 8.0]]


def test_a_pull_back_belongs_to_the_point_it_was_made_at():
    v = tf.Variable(2.0)
    _, pullback = vjp(lambda x: v * x**2, 3.0)

    v.assign(100.0)

    assert float(pullback(1.0)[0]) == 12.0


def test_one_primal_gives_a_tuple_of_one():
    answer = vjp(lambda x: x**2, 3.0)[1](1.0)

    assert isinstance(answer, tuple)
    assert [float(part) for part in answer] == [6.0]


def test_a_cotangent_of_another_shape_is_refused():
    _, pullback = vjp(lambda x: x**2, [1.0, 2.0])

    with pytest.raises(InvalidArgumentError, match=r"`cotangent` of shape \(3,\)"):
        pullback([1.0, 2.0, 3.0])


def test_a_loss_without_second_derivatives_has_a_pull_back():
    """Its gradient is a function that TensorFlow cannot go back through."""

    def f(x):
        return tf.nn.ctc_loss([[1, 2]], x, [2], [4], logits_time_major=False)

    x = np.random.default_rng(0).normal(size=(1, 4, 3)).astype("float32")

    _, pullback = vjp(f, x)

    expected = grad(lambda x: f(x)[0])(x)
    np.testing.assert_allclose(pullback([2.0])[0], 2 * expected, rtol=1e-5)


def test_a_function_is_compiled_once_for_all_its_pull_backs():
    f = tf.function(lambda x: x**2)

    answers = [float(vjp(f, float(x))[1](1.0)[0]) for x in range(5)]

    assert answers == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert f.experimental_get_tracing_count() == 1


def test_additional_output_of_a_pull_back():
    y, pullback, aux = vjp(lambda x: (x**2, {"twice": 2 * x}), 3.0, has_aux=True)

    assert (float(y), float(pullback(1.0)[0]), float(aux["twice"])) == (9.0, 6.0, 6.0)


def test_a_pull_back_under_xla():
    y, pullback = vjp(tf.sin, 0.5, jit=True)

    assert float(y) == pytest.approx(np.sin(0.5), rel=1e-6)
    assert float(pullback(2.0)[0]) == pytest.approx(2 * np.cos(0.5), rel=1e-6)


def test_the_first_argument_is_the_function():
    with pytest.raises(InvalidArgumentError, match="first argument is the function"):
        vjp(tf.constant(1.0), tf.sin)


@pytest.mark.parametrize("transform", [grad, value_and_grad])
@pytest.mark.parametrize("option", ["has_aux", "verify", "jit"])
def test_options_are_true_or_false(transform, option):
    with pytest.raises(InvalidArgumentError, match=f"`{option}` must be True or False"):
        transform(tf.sin, **{option: "yes"})


def test_a_position_is_anything_with_an_index():
    assert float(grad(lambda x, y: x * y**2, argnums=np.int64(1))(1.0, 3.0)) == 6.0


def test_keys_that_have_no_order_are_refused():
    with pytest.raises(InvalidArgumentError, match="keys of type int and str"):
        grad(lambda p: p[1] * p["a"])({1: 3.0, "a": 2.0})
    with pytest.raises(InvalidArgumentError, match="mappingproxy"):
        grad(lambda p: p["a"] ** 2)(types.MappingProxyType({"a": 2.0}))


def test_a_dimension_that_varies_is_left_open_after_the_second_shape():
    w, runs = tf.Variable([1.0, 2.0]), []

    def loss(rows):
        runs.append(rows.shape)
        return tf.reduce_sum(rows * w)

    both = value_and_grad(loss, wrt=w)
    for count in (3, 5, 4, 7, 3):
        value, slope = both(tf.ones((count, 2)))
        assert float(value) == 3.0 * count
        np.testing.assert_allclose(slope, [count, count])

    assert runs == [(3, 2), (None, 2)]


def test_a_function_that_has_to_know_its_shapes_is_traced_for_each():
    mean = grad(lambda x: tf.reduce_sum(x) / x.shape[0])

    for count in (2, 3, 4):
        np.testing.assert_allclose(mean(np.ones(count)), np.full(count, 1 / count))


def test_a_cut_output_is_refused_even_beside_one_that_is_not():
    with pytest.raises(NoGradientError, match=r"tf.round"):
        vjp(lambda x: (x**2, tf.round(x)), 1.5)
