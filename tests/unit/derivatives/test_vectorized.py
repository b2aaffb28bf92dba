"""Rows of a Jacobian: many at a time where that is safe, one by one where it is not."""

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives import vectorized
from tfgrad.derivatives.matrices import hessian, jacobian
from tfgrad.derivatives.vectorized import rows, static_size


def linear(weights):
    """Return the arguments of `rows` for a linear function, traced."""
    x = tf.zeros(weights.shape[1], weights.dtype)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = tf.linalg.matvec(weights, x)
    operations = tf.compat.v1.get_default_graph().get_operations()
    return lambda u: [tape.gradient(y, x, u[0])], [y], [x], operations


@pytest.fixture
def spies(monkeypatch):
    """Return the names of the ways that are taken, in order."""
    taken = []
    for name in ("_one_by_one", "_in_chunks"):
        way = getattr(vectorized, name)

        def spy(*args, name=name, way=way):
            taken.append(name)
            return way(*args)

        monkeypatch.setattr(vectorized, name, spy)
    return taken


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 5])
def test_all_rows_come_back_in_order(chunk_size):
    weights = np.random.default_rng(0).normal(size=(5, 3))

    @tf.function
    def answer():
        return rows(*linear(weights), chunk_size)[0][0]

    np.testing.assert_allclose(answer(), weights)


def test_straight_code_is_vectorised(spies):
    jacobian(lambda x: tf.sin(x) * x)([1.0, 2.0])

    assert spies == ["_in_chunks"]


def test_calls_are_vectorised_if_what_they_call_is_straight(spies):
    jacobian(tf.function(lambda x: tf.sin(x) * x))([1.0, 2.0])

    assert spies == ["_in_chunks"]


@pytest.mark.parametrize("kind", ["while", "cond", "inner", "expm"])
def test_control_flow_is_taken_row_by_row(spies, kind):
    functions = {
        "while": lambda x: tf.while_loop(
            lambda i, x: i < 2, lambda i, x: (i + 1, x**2), (0, x)
        )[1],
        "cond": lambda x: tf.cond(x[0] > 0, lambda: x**2, lambda: x),
        "inner": tf.function(lambda x: tf.map_fn(lambda a: a**2, x)),
        "expm": lambda x: tf.linalg.expm(tf.linalg.diag(x)),
    }

    jacobian(functions[kind], mode="reverse")([1.0, 2.0])

    assert spies == ["_one_by_one"]


def test_what_the_vectoriser_refuses_is_taken_row_by_row_in_silence(
    spies, monkeypatch, caplog, capfd
):
    monkeypatch.setattr(vectorized, "_NOT_VECTORISED", ())
    monkeypatch.setattr(vectorized, "FEW", 0)

    answer = hessian(lambda x: tf.reduce_sum(tf.scan(lambda a, b: a * b, x)))(
        [2.0, 3.0]
    )

    assert spies == ["_in_chunks", "_one_by_one"]
    np.testing.assert_allclose(answer, [[0.0, 1.0], [1.0, 0.0]])
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_the_chunk_fits_into_the_working_memory(monkeypatch):
    sizes = []
    way = vectorized._in_chunks

    def spy(pull, outputs, sources, total, chunk):
        sizes.append(chunk)
        return way(pull, outputs, sources, total, chunk)

    monkeypatch.setattr(vectorized, "_in_chunks", spy)
    monkeypatch.setattr(vectorized, "WORKING_MEMORY", 50_000)
    jacobian(lambda x: tf.sin(x) * x)(tf.ones(100))

    (chunk,) = sizes
    assert 1 < chunk < 100


def test_sizes_that_are_not_known_are_none():
    unknown = tf.function(
        lambda x: static_size([x, x]), input_signature=[tf.TensorSpec([None])]
    )

    assert static_size([tf.ones([2, 3]), tf.ones([])]) == 7
    assert unknown(tf.ones(2)) is None


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_no_rows_or_no_columns_give_an_empty_matrix(mode, jit):

    def f(x):
        return {"none": x[:0] ** 2, "some": tf.reduce_sum(x) + tf.ones(2)}

    def shapes(n):
        answer = jacobian(f, mode=mode, jit=jit)(tf.ones(n))
        return {key: tuple(part.shape) for key, part in answer.items()}

    assert shapes(3) == {"none": (0, 3), "some": (2, 3)}
    assert shapes(0) == {"none": (0, 0), "some": (2, 0)}


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("shape", [[None], None])
def test_inside_of_a_users_function_shapes_may_be_unknown(mode, shape):
    cubes = tf.function(
        jacobian(lambda x: x**3, mode=mode),
        input_signature=[tf.TensorSpec(shape, tf.float64)],
    )

    for n in (2, 1, 0):
        x = np.arange(1.0, n + 1)
        np.testing.assert_allclose(cubes(x), np.diag(3 * x**2))
