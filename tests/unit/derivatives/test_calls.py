"""The public edge: what comes in, what comes back, what is refused before tracing."""

import collections
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.calls import Call, transform
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.reverse import grad, value_and_grad
from tfgrad.errors import InvalidArgumentError, NoGradientError

Line = collections.namedtuple("Line", "slope offset")


def product(a, b, c=1.0):
    return tf.reduce_sum(a * b**2 * c)


def never(*args, **kwargs):
    raise AssertionError("f must not be traced")


@pytest.mark.parametrize(
    ("argnums", "expected"),
    [
        *((0, 9.0), (1, 12.0), (-1, 12.0), (-2, 9.0)),
        *(((0, 1), (9.0, 12.0)), (range(2), (9.0, 12.0))),
    ],
)
def test_argnums_choose_the_differentiated_arguments(argnums, expected):
    answer = grad(product, argnums)(2.0, 3.0)

    assert tf.nest.map_structure(float, answer) == expected


def test_the_answer_has_the_structure_of_the_argument():
    def f(p):
        return sum(tf.reduce_sum(leaf**2) for leaf in tf.nest.flatten(p))

    point = {
        "line": Line(1.0, [2.0, 3.0]),
        "pair": (np.ones(2, "f"), [tf.ones(1), 4.0]),
    }
    answer = grad(f)(point)

    assert isinstance(answer["line"], Line)
    assert answer["line"].offset.numpy().tolist() == [4.0, 6.0]
    assert isinstance(answer["pair"][1], list)
    assert float(answer["pair"][1][1]) == 8.0


@pytest.mark.parametrize("transform", [grad, hessian])
def test_a_defaultdict_comes_back_as_one(transform):
    point = collections.defaultdict(float, b=1.0, a=2.0)

    answer = transform(lambda p: p["a"] ** 2 + p["b"])(point)

    assert type(answer) is collections.defaultdict
    assert {*answer} == {"a", "b"}


def test_an_ordered_dict_comes_back_as_one():
    point = collections.OrderedDict(b=1.0, a=2.0)

    answer = grad(lambda p: p["a"] * p["b"])(point)

    assert type(answer) is collections.OrderedDict
    assert {key: float(value) for key, value in answer.items()} == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        (3, tf.float32),
        (3.0, tf.float32),
        (np.float64(3.0), tf.float64),
        (np.array(3.0), tf.float64),
        (tf.constant(3.0, tf.float16), tf.float16),
        (tf.Variable(3.0, dtype=tf.float64), tf.float64),
        (keras.Variable(3.0), tf.float32),
    ],
)
def test_numbers_arrays_tensors_and_variables_are_taken_and_dtypes_kept(x, dtype):
    value, slope = value_and_grad(lambda x: x**2)(x)

    assert (float(value), float(slope)) == (9.0, 6.0)
    assert value.dtype == slope.dtype == dtype


def test_plain_numbers_take_the_dtype_of_the_arrays_beside_them():
    answer = grad(product, (0, 1))(2.0, np.array([3.0, 4.0]))

    assert answer[0].dtype == answer[1].dtype == tf.float64
    assert float(answer[0]) == 25.0


def test_keyword_arguments_are_passed_on_and_do_not_retrace():
    runs = []

    def f(x, *, scale, shift=0):
        runs.append(scale)
        return scale * x**2 + shift

    slope = grad(f)
    answers = [float(slope(3.0, scale=scale)) for scale in (1.0, 2.0, 3.0)]

    assert answers == [6.0, 12.0, 18.0]
    assert len(runs) == 1


def test_other_arguments_may_be_of_any_kind():
    def f(x, rows, name, flags, index):
        assert (name, flags) == ("a", {"on": True})
        return tf.reduce_sum(tf.gather(x, rows)[:index] ** 2)

    answer = grad(f)([1.0, 2.0, 3.0], np.array([2, 0]), "a", {"on": True}, 1)

    assert answer.numpy().tolist() == [0.0, 0.0, 6.0]


def test_variables_are_differentiated_by_wrt():
    v, k = tf.Variable(2.0), keras.Variable(3.0)

    answer = grad(lambda x: x * v**2 * k, wrt={"v": v, "k": k})(5.0)

    assert {key: float(value) for key, value in answer.items()} == {
        "v": 60.0,
        "k": 20.0,
    }
    assert (float(v), float(k)) == (2.0, 3.0)


def test_plain_numbers_take_the_dtype_of_the_variables_that_are_differentiated():
    v = tf.Variable([1.0, 2.0], dtype=tf.float64)

    answer = grad(lambda s: tf.reduce_sum(v**2) * s, wrt=v)(3.0)

    assert answer.dtype == tf.float64
    assert answer.numpy().tolist() == [6.0, 12.0]


def test_a_model_is_differentiated_by_its_trainable_variables():
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])

    answer = grad(lambda x: tf.reduce_sum(model(x)), wrt=model)(np.ones((4, 3), "f"))

    assert [part.shape.as_list() for part in answer] == [[3, 2], [2]]
    assert answer[1].numpy().tolist() == [4.0, 4.0]


def test_one_tensor_passed_twice_counts_twice():
    x = tf.constant(3.0)

    answer = grad(lambda a, b: a * b**2, (0, 1))(x, x)

    assert list(map(float, answer)) == [9.0, 18.0]


def test_methods_partials_and_callable_objects_are_functions_too():
    class Power:
        def __init__(self, power):
            self.power = power

        def __call__(self, x):
            return x**self.power

        def cubed(self, x):
            return x**3

    functions = [Power(2), Power(2).cubed, functools.partial(pow, exp=2), tf.square]

    assert [float(grad(f)(3.0)) for f in functions] == [6.0, 27.0, 6.0, 6.0]


def test_a_transform_keeps_the_name_and_the_doc_of_f():
    def f(x):
        """Of mine."""
        return x

    assert (grad(f).__name__, grad(f).__doc__) == ("f", "Of mine.")


@pytest.mark.parametrize(
    ("argnums", "got"),
    [
        (2, "argnums=2, and `never` was called with 2"),
        (-3, "argnums=-3"),
        ((0, 0), r"argnums=\(0, 0\)"),
    ],
)
def test_positions_that_are_not_there_are_refused(argnums, got):
    with pytest.raises(InvalidArgumentError, match=got):
        grad(never, argnums)(1.0, 2.0)


@pytest.mark.parametrize("argnums", [1.0, "x", (), True, None])
def test_argnums_of_another_kind_are_refused_at_once(argnums):
    with pytest.raises(InvalidArgumentError, match=r"argnums=0, or argnums=\(0, 1\)"):
        grad(never, argnums)


def test_argnums_and_wrt_together_are_refused_at_once():
    with pytest.raises(InvalidArgumentError, match="Either `argnums` or `wrt`"):
        grad(never, 1, wrt=tf.Variable(1.0))


def test_a_point_in_place_of_the_function_is_refused_at_once():
    with pytest.raises(InvalidArgumentError, match=r"tfgrad.grad\(f\)\(x\)"):
        grad(3.0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.array([1, 2]),
            r"`x` has shape \(2,\), int64(.|\n)*tf.cast\(x, tf.float32\)",
        ),
        ({"a": tf.constant(1)}, r"`x\['a'\]` has shape \(\), int32"),
        ("text", "`x` is of type str"),
        (None, "`x` is missing"),
        (1j, "`x` is of type complex"),
        (np.array([1j]), "must be real(.|\n)*real and imaginary parts"),
        ([[1.0], [1.0, 2.0]], "rows of 1 and 2 numbers"),
    ],
)
def test_arguments_that_cannot_be_differentiated_are_refused_by_name(x, message):
    def f(x):
        never()

    with pytest.raises(InvalidArgumentError, match=message):
        grad(f)(x)


@pytest.mark.parametrize(
    ("v", "message"),
    [
        ([1.0], r"`v` of shape \(1,\)"),
        (([1.0, 2.0], 1.0), "structure"),
        ("text", "`v` is of type str"),
        (np.ones(2, int), "integers have no derivative"),
    ],
)
def test_a_direction_of_another_shape_is_refused(v, message):
    with pytest.raises(InvalidArgumentError, match=message):
        hvp(never)([1.0, 2.0], v)


def test_a_missing_direction_is_refused():
    with pytest.raises(InvalidArgumentError, match="The last positional argument"):
        hvp(never)()


def test_a_direction_takes_the_dtypes_of_the_point():
    product = hvp(lambda x: tf.reduce_sum(x**3))(tf.ones(2), np.array([1.0, 2.0]))

    assert product.dtype == tf.float32
    assert product.numpy().tolist() == [6.0, 12.0]


def test_a_call_names_what_is_differentiated():
    call = Call(
        never, "f", ("p", "q"), ({"a": 1.0, "b": (2.0, 3.0)}, 4.0), {}, (1, 0), None
    )

    assert call.names == ["q", "p['a']", "p['b'][0]", "p['b'][1]"]


def test_a_body_inside_of_another_trace_adds_no_call():
    slope = transform(lambda x: x**2, lambda call: (call.output(), []))

    traced = tf.function(lambda x: slope(x)).get_concrete_function(tf.TensorSpec([]))

    types = {op.type for op in traced.graph.get_operations()}
    assert not types & {"PartitionedCall", "StatefulPartitionedCall"}


def test_an_error_keeps_its_class_in_a_function_that_autograph_converts():
    @tf.function
    def slope(x):
        if x > 0:  # converted to tf.cond
            return grad(tf.round)(x)
        return x

    with pytest.raises(NoGradientError, match=r"round"):
        slope(tf.constant(1.0))


@pytest.mark.parametrize("transform", [grad, value_and_grad, hessian, jacobian])
def test_a_list_without_numbers_is_refused_in_words_where_f_needs_an_array(transform):
    with pytest.raises(InvalidArgumentError, match=r"np.zeros\(0\)") as caught:
        transform(lambda x: tf.reduce_sum((x - 1) ** 2))([])
    assert "list [], which holds none" in caught.value.got
    assert grad(lambda x: tf.constant(1.0))([]) == []
