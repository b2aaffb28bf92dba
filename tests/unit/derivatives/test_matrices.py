"""`jacobian`, `hessian`, `hvp`: shapes, structures, options, refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives import matrices
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.replicas import Replica
from tfgrad.derivatives.reverse import grad, value_and_grad
from tfgrad.errors import (
    InvalidArgumentError,
    NoGradientError,
    ScalarObjectiveError,
    WrongDerivativeError,
)

A = np.arange(6.0).reshape(2, 3)
MODES = ["auto", "reverse", "forward"]


def saddle(x):
    return x[0] ** 2 * x[1]


@pytest.mark.parametrize("mode", MODES)
def test_the_jacobian_of_a_matrix_is_the_matrix(mode):
    answer = jacobian(lambda x: tf.linalg.matvec(A, x), mode=mode)(np.ones(3))

    np.testing.assert_allclose(answer, A)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape_in", [(), (2,), (2, 1, 3)])
@pytest.mark.parametrize("shape_out", [(), (4,), (2, 2)])
def test_the_shape_is_that_of_the_output_then_that_of_the_input(
    mode, shape_in, shape_out
):
    weights = np.random.default_rng(0).normal(size=(*shape_out, *shape_in))
    f = lambda x: tf.tensordot(weights, x, len(shape_in))  # noqa: E731  one line

    answer = jacobian(f, mode=mode)(np.ones(shape_in))

    assert answer.shape == shape_out + shape_in
    np.testing.assert_allclose(answer, weights)


@pytest.mark.parametrize("mode", MODES)
def test_nests_in_and_nests_out(mode):
    def f(p, scale):
        return {"sum": p["a"] + 3 * p["b"], "all": (tf.stack([p["a"], p["b"] ** 2]),)}

    answer = jacobian(f, argnums=(0,), mode=mode)({"a": 1.0, "b": 2.0}, 1.0)
    plain = tf.nest.map_structure(lambda part: part.numpy().tolist(), answer)

    assert plain == {
        "sum": ({"a": 1.0, "b": 3.0},),
        "all": (({"a": [1.0, 0.0], "b": [0.0, 4.0]},),),
    }


def test_variables_and_models():
    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])

    answer = jacobian(lambda x: model(x), wrt=model)(np.ones((5, 3), "f"))

    assert [part.shape for part in answer] == [(5, 2, 3, 2), (5, 2, 2)]
    np.testing.assert_array_equal(answer[1][0], np.eye(2))


def test_aux_comes_back_untouched():
    answer, aux = jacobian(lambda x: (x**2, {"x": x}), has_aux=True)([1.0, 2.0])

    assert answer.numpy().tolist() == [[2.0, 0.0], [0.0, 4.0]]
    assert aux["x"].numpy().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 10, 1000])
def test_chunks_change_nothing(mode, chunk_size):
    weights = np.random.default_rng(0).normal(size=(10, 10))
    f = lambda x: tf.tanh(tf.linalg.matvec(weights, x))  # noqa: E731  one line
    x = np.linspace(-1, 1, 10)

    answer = jacobian(f, mode=mode, chunk_size=chunk_size)(x)

    expected = (1 - np.tanh(weights @ x) ** 2)[:, None] * weights
    np.testing.assert_allclose(answer, expected, rtol=1e-12)


def test_an_output_whose_size_depends_on_values():
    answer = jacobian(lambda x: tf.boolean_mask(x, x > 0) ** 2)([1.0, -1.0, 3.0])

    assert answer.numpy().tolist() == [[2.0, 0.0, 0.0], [0.0, 0.0, 6.0]]


@pytest.mark.parametrize("mode", MODES)
def test_empty_outputs_and_inputs(mode):
    assert jacobian(lambda x: x[:0], mode=mode)(np.ones(3)).shape == (0, 3)
    assert jacobian(lambda x: tf.reduce_sum(x), mode=mode)(np.ones(0)).shape == (0,)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_dtypes_are_kept(dtype):
    x = tf.constant([1.0, 2.0], dtype)
    f = lambda x: tf.reduce_sum(x**3)  # noqa: E731  one line

    answers = [jacobian(tf.square)(x), hessian(f)(x), hvp(f)(x, x)]

    assert {answer.dtype for answer in answers} == {dtype}
    np.testing.assert_allclose(tf.cast(answers[1], tf.float64), np.diag([6.0, 12.0]))


def test_two_dtypes_in_one_nest():
    def f(p):
        return tf.cast(p["single"], tf.float64) ** 2 * p["double"]

    point = {"single": tf.constant(3.0), "double": tf.constant(5.0, tf.float64)}
    answer = hessian(f)(point)

    assert answer["single"]["double"].dtype == tf.float64
    assert answer["double"]["single"].dtype == tf.float32
    assert float(answer["single"]["single"]) == 10.0
    assert float(answer["double"]["single"]) == 6.0


@pytest.mark.parametrize("jit", [False, True])
def test_the_hessian_of_a_saddle(jit):
    assert hessian(saddle, jit=jit)([3.0, 5.0]).numpy().tolist() == [
        [10.0, 6.0],
        [6.0, 0.0],
    ]
    assert hvp(saddle, jit=jit)([3.0, 5.0], [1.0, 10.0]).numpy().tolist() == [70.0, 6.0]


def test_the_hessian_of_a_nest_is_a_nest_of_blocks():
    answer = hessian(lambda p: p["a"] ** 2 * tf.reduce_sum(p["b"] ** 3))(
        {"a": 3.0, "b": [1.0, 2.0]}
    )

    assert float(answer["a"]["a"]) == 18.0
    assert answer["a"]["b"].numpy().tolist() == [18.0, 72.0]
    assert answer["b"]["a"].numpy().tolist() == [18.0, 72.0]
    assert answer["b"]["b"].numpy().tolist() == [[54.0, 0.0], [0.0, 108.0]]


def test_the_hessian_of_several_arguments_is_a_tuple_of_tuples():
    answer = hessian(lambda x, y: x**2 * y, (0, 1))(3.0, 5.0)

    assert tf.nest.map_structure(float, answer) == ((10.0, 6.0), (6.0, 0.0))


def test_the_hessian_of_something_linear_or_absent_is_zero():
    assert not np.any(hessian(lambda x: tf.reduce_sum(3 * x))([1.0, 2.0]))
    assert not np.any(hessian(lambda x, y: x**2, 1)(1.0, [1.0, 2.0]))
    assert not np.any(hvp(lambda x: tf.reduce_sum(3 * x))([1.0, 2.0], [1.0, 1.0]))


def test_a_hessian_times_a_direction_of_variables():
    v, w = tf.Variable([1.0, 2.0]), tf.Variable(3.0)

    answer = hvp(lambda: w**2 * tf.reduce_sum(v**3), wrt={"v": v, "w": w})(
        {"v": [1.0, 0.0], "w": 10.0}
    )

    assert answer["v"].numpy().tolist() == [54.0 + 180.0, 720.0]
    assert float(answer["w"]) == 18.0 + 180.0


def test_verification_leaves_variables_as_one_call_does():
    counter, v = tf.Variable(0.0), tf.Variable([1.0, 2.0])

    def f():
        counter.assign_add(1.0)
        return tf.reduce_sum(v**3)

    answer = hessian(f, wrt=v)()

    np.testing.assert_allclose(answer, np.diag([6.0, 12.0]))
    assert v.numpy().tolist() == [1.0, 2.0]
    assert float(counter) == 1.0


def evaluations(monkeypatch):
    """Return a list that grows with each evaluation that a verification asks for."""
    calls = []
    run = Replica.__call__

    def counted(self, *args):
        calls.append(args)
        return run(self, *args)

    monkeypatch.setattr(Replica, "__call__", counted)
    return calls


def test_verification_happens_once_for_each_trace(monkeypatch):
    calls = evaluations(monkeypatch)
    second = hessian(lambda x: tf.reduce_sum(x**3))

    second([1.0, 2.0])
    second([3.0, 4.0])

    assert len(calls) == 2


@pytest.mark.parametrize("transform", [grad, value_and_grad, jacobian, hessian])
def test_verification_can_be_left_out(monkeypatch, transform):
    calls = evaluations(monkeypatch)

    transform(lambda x: tf.reduce_sum(x**3), verify=False)([1.0, 2.0])

    assert not calls


def test_what_a_function_does_besides_computing_is_not_done_twice(capfd):
    def f(x):
        tf.print("seen")
        return tf.reduce_sum(x**3)

    hessian(f)([1.0, 2.0])

    assert "seen" in (seen := capfd.readouterr().err)
    assert seen.count("seen") == 1


@pytest.mark.parametrize("transform", [hessian, jacobian])
def test_what_does_not_fit_into_memory_is_refused_at_once(transform):
    def f(x):
        return x * tf.reduce_sum(x) if transform is jacobian else tf.reduce_sum(x**2)

    with pytest.raises(InvalidArgumentError, match=r"GiB(.|\n)*tfgrad\.(hvp|vjp)"):
        transform(f)(np.ones(1_000_000, "float32"))


def test_additional_output():
    def f(x):
        return tf.reduce_sum(x**3), {"largest": tf.reduce_max(x)}

    matrix, first = hessian(f, has_aux=True)([1.0, 2.0])
    product, second = hvp(f, has_aux=True)([1.0, 2.0], [1.0, 10.0])

    np.testing.assert_allclose(matrix, np.diag([6.0, 12.0]))
    np.testing.assert_allclose(product, [6.0, 120.0])
    assert float(first["largest"]) == float(second["largest"]) == 2.0


@pytest.mark.parametrize("option", ["has_aux", "verify", "jit"])
@pytest.mark.parametrize("transform", [jacobian, hessian, hvp])
def test_options_are_true_or_false(transform, option):
    with pytest.raises(InvalidArgumentError, match=f"`{option}` must be True or False"):
        transform(tf.sin, **{option: "yes"})


def test_a_wrong_hessian_is_withheld_each_time():
    # XLA negates the second derivative of the angle.
    angle = lambda x: tf.math.angle(tf.complex(x[0], x[1]))  # noqa: E731  one line
    wrong = hessian(angle, jit=True)

    for _ in range(2):
        with pytest.raises(WrongDerivativeError, match=r"`x`(.|\n)*Angle(.|\n)*XLA"):
            wrong([1.0, 2.0])
    right = hessian(angle)([1.0, 2.0])
    np.testing.assert_allclose(right, [[0.16, 0.12], [0.12, -0.16]], rtol=1e-6)


def test_what_a_user_redefines_is_no_wrong_derivative():
    @tf.custom_gradient
    def straight_through(x):
        return tf.round(x), lambda dy: dy

    stopped = hessian(lambda x: x**2 * tf.stop_gradient(x))(3.0)
    through = hessian(lambda x: straight_through(x) ** 2)(3.2)

    assert (float(stopped), float(through)) == (6.0, 2.0)


def test_under_xla_square_jacobians_of_straight_code_are_taken_by_columns(monkeypatch):
    taken = []
    way = matrices._by_columns
    monkeypatch.setattr(
        matrices,
        "_by_columns",
        lambda *args, **options: taken.append("columns") or way(*args, **options),
    )
    straight = lambda x: tf.sin(x) * x[::-1]  # noqa: E731  one line
    looped = lambda x: tf.map_fn(lambda a: a**3, x)  # noqa: E731  one line
    x = np.array([1.0, 2.0])

    np.testing.assert_allclose(
        jacobian(straight, jit=True)(x), jacobian(straight)(x), rtol=1e-12
    )
    np.testing.assert_allclose(jacobian(looped, jit=True)(x), np.diag(3 * x**2))

    assert taken == ["columns"]


@pytest.mark.parametrize("mode", MODES)
def test_of_nothing_there_is_nothing(mode):
    f = lambda p, x: x**2  # noqa: E731  one line

    assert jacobian(f, mode=mode)({}, 3.0) == hessian(f)({}, 3.0) == {}
    assert hvp(f)((), 3.0, ()) == ()


def test_random_functions_are_not_held_to_their_differences():
    x = tf.ones(4)

    answer = hvp(lambda x: tf.reduce_sum(x**2 * tf.random.uniform([4])))(x, x)

    assert np.all((answer >= 0) & (answer < 2))


@pytest.mark.parametrize("transform", [jacobian, hessian])
@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, True, "all"])
def test_a_chunk_size_that_is_no_positive_integer_is_refused(transform, chunk_size):
    with pytest.raises(InvalidArgumentError, match="at least 1, or None"):
        transform(saddle, chunk_size=chunk_size)


def test_an_unknown_mode_is_refused():
    with pytest.raises(InvalidArgumentError, match="mode='backward'"):
        jacobian(saddle, mode="backward")


def test_a_hessian_needs_one_number():
    with pytest.raises(ScalarObjectiveError, match=r"tfgrad.jacobian"):
        hessian(tf.square)([1.0, 2.0])
    with pytest.raises(ScalarObjectiveError, match=r"returned shape \(2,\)"):
        hvp(tf.square)([1.0, 2.0], [1.0, 1.0])


def test_a_jacobian_names_the_output_that_is_no_tensor():
    with pytest.raises(ScalarObjectiveError, match=r"int32 at \['count'\]"):
        jacobian(lambda x: {"x": x, "count": tf.size(x)})([1.0])


def test_one_cut_output_among_others_is_refused():
    with pytest.raises(NoGradientError, match=r"tf.round"):
        jacobian(lambda x: (x**2, tf.round(x)))(1.5)


@pytest.mark.parametrize("mode", MODES)
def test_jacobians_of_jacobians(mode):
    cube = lambda x: x**3  # noqa: E731  one line

    answer = jacobian(jacobian(cube, mode=mode), mode=mode)([1.0, 2.0])

    expected = np.zeros((2, 2, 2))
    expected[0, 0, 0], expected[1, 1, 1] = 6.0, 12.0
    np.testing.assert_allclose(answer, expected)


def test_the_gradient_of_a_hessian_product_is_the_third_derivative():
    f = lambda x: tf.reduce_sum(x**4)  # noqa: E731  one line
    v = tf.constant([1.0, 2.0])

    third = grad(lambda x: tf.reduce_sum(v * hvp(f)(x, v)))([3.0, 5.0])

    np.testing.assert_allclose(third, [72.0, 480.0])


def test_inside_of_a_users_function():
    @tf.function
    def newton_step(x):
        return x - tf.linalg.solve(hessian(f)(x), grad(f)(x)[:, None])[:, 0]

    f = lambda x: tf.reduce_sum((x - 3.0) ** 2 * [1.0, 10.0])  # noqa: E731  one line

    np.testing.assert_allclose(newton_step(tf.constant([7.0, -4.0])), [3.0, 3.0])
