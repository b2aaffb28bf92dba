"""The answers of transforms are verified, and nothing of the user's is touched."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.derivatives.certificates import inner, verify
from tfgrad.derivatives.forward import jvp
from tfgrad.derivatives.matrices import hessian, hvp, jacobian
from tfgrad.derivatives.replicas import Replica
from tfgrad.derivatives.reverse import grad, value_and_grad, vjp
from tfgrad.errors import WrongDerivativeError


def by_eigenvectors(x):
    """Return a weighted sum of exp(x) of a symmetric matrix, by eigenvectors."""
    values, vectors = tf.linalg.eigh((x + tf.transpose(x)) / 2)
    return tf.reduce_sum((vectors * tf.exp(values)) @ tf.transpose(vectors) * ROWS)


ROWS = np.arange(9.0).reshape(3, 3) ** 2
REPEATED = np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 3]])
SINGLE = np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 5]])

MANY = np.zeros(10_000)

ROADS = {
    "grad": lambda f, x: grad(f)(x),
    "value_and_grad": lambda f, x: value_and_grad(f)(x)[1],
    "jacobian": lambda f, x: jacobian(f)(x),
    "vjp": lambda f, x: vjp(f, x)[1](1.0)[0],
    "jvp": lambda f, x: jvp(f, (x,), (np.ones((3, 3)),))[1],
    "hessian": lambda f, x: hessian(f)(x),
    "hvp": lambda f, x: hvp(f)(x, np.ones((3, 3))),
    "hvp of many": lambda f, x: hvp(
        lambda x, b: f(x) + tf.reduce_sum(b**2), argnums=(0, 1)
    )(x, MANY, (np.ones((3, 3)), MANY))[0],
    "a transform of a transform": lambda f, x: jacobian(grad(f))(x),
}


@pytest.mark.parametrize("road", ROADS)
def test_a_wrong_derivative_is_withheld_on_every_road(road):
    with pytest.raises(WrongDerivativeError, match=r"SelfAdjointEigV2|derivative of"):
        ROADS[road](by_eigenvectors, REPEATED)
    assert np.all(np.isfinite(ROADS[road](by_eigenvectors, SINGLE)))


def by_bits(x):
    return tf.bitcast(tf.bitcast(x, tf.int32), tf.float32)


@pytest.mark.parametrize("road", ROADS)
def test_a_check_of_what_is_right_evaluates_at_most_eight_times(monkeypatch, road):
    evaluations, run = [], Replica.__call__

    def counted(self, *arguments):
        evaluations.append(self)
        return run(self, *arguments)

    monkeypatch.setattr(Replica, "__call__", counted)
    ROADS[road](lambda x: tf.reduce_sum(tf.exp(x) * ROWS), SINGLE)

    assert 1 <= len(evaluations) <= 8


def test_a_road_that_is_lost_in_bits_is_withheld():
    def f(x):
        return x**2 + by_bits(x)

    with pytest.raises(WrongDerivativeError, match="Bitcast"):
        grad(f)(0.7)


def test_the_spread_of_one_row_is_withheld():
    with pytest.raises(WrongDerivativeError, match="nan"):
        grad(lambda x: tf.reduce_sum(tf.math.reduce_std(x, 0)))([[1.0, 2.0]])


@pytest.mark.parametrize("road", [hvp, hessian])
def test_a_first_derivative_that_is_no_number_is_withheld_at_the_second_order(road):
    def f(x):
        return tf.sqrt(tf.reduce_sum(x**2)) ** 2

    direction = (np.ones(2),) if road is hvp else ()
    with pytest.raises(WrongDerivativeError, match="nan"):
        road(f)(np.zeros(2), *direction)


def test_the_source_is_named():
    def f(a, x):
        return tf.reduce_sum(a) + by_eigenvectors(x)

    with pytest.raises(WrongDerivativeError, match=r"by `x`"):
        grad(f, argnums=(0, 1))([1.0], REPEATED)


def test_variables_are_never_assigned_to():
    v, counter = tf.Variable([1.0, 2.0]), tf.Variable(0.0)
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(tuple(v.numpy().tolist()))

    thread = threading.Thread(target=watch)
    thread.start()

    def f():
        counter.assign_add(1.0)
        return tf.reduce_sum(v**3)

    try:
        np.testing.assert_allclose(hessian(f, wrt=v)(), np.diag([6.0, 12.0]))
        np.testing.assert_allclose(grad(f, wrt=v)(), [3.0, 12.0])
    finally:
        done.set()
        thread.join()

    assert seen == {(1.0, 2.0)}
    assert float(counter) == 2.0


def test_a_wrong_gradient_by_a_variable_is_withheld():
    v = tf.Variable(REPEATED)

    with pytest.raises(WrongDerivativeError, match=r"by `wrt"):
        grad(lambda: by_eigenvectors(v), wrt=v)()
    np.testing.assert_array_equal(v, REPEATED)


def test_what_a_user_redefines_is_no_wrong_derivative():
    @tf.custom_gradient
    def straight_through(x):
        return tf.round(x), lambda dy: dy

    def stopped(x):
        return tf.reduce_sum(x * tf.stop_gradient(x))

    quantized = tf.quantization.fake_quant_with_min_max_args
    assert float(grad(lambda x: straight_through(x))(1.3)) == 1.0
    np.testing.assert_allclose(grad(stopped)([1.0, 2.0]), [1.0, 2.0])
    np.testing.assert_allclose(grad(lambda x: tf.reduce_sum(quantized(x)))([1.3]), [1])


def test_the_slope_of_a_distribution_is_not_that_of_its_sampler():
    """The mean of a gamma distribution is its shape, so the mean slope is one."""

    def mean(shape):
        draws = tf.random.stateless_gamma([20_000], [1, 2], shape, dtype=tf.float64)
        return tf.reduce_mean(draws)

    assert float(grad(mean)(np.float64(2.0))) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("draw", [tf.random.normal, tf.random.uniform])
def test_random_functions_are_not_compared(draw):
    def f(x):
        return tf.reduce_sum(x**2 * draw([3]))

    assert np.all(np.isfinite(grad(f)([1.0, 2.0, 3.0])))


def test_dropout_is_not_compared():
    layer = keras.layers.Dropout(0.5, seed=0)

    slope = grad(lambda x: tf.reduce_sum(layer(x, training=True) ** 2))(
        np.ones(20, "f")
    )

    assert set(slope.numpy().tolist()) == {0.0, 8.0}


def test_the_gradient_that_a_user_wrote_has_to_fit():
    wrong = tf.custom_gradient(lambda x: (tf.reduce_sum(2 * x), lambda dy: dy))

    with pytest.raises(WrongDerivativeError, match=r"shape \(\)(.|\n)*shape \(2,\)"):
        grad(lambda x: wrong(x))([1.0, 2.0])


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_function_that_was_compiled_elsewhere(factor):
    v, steps = tf.Variable([1.0, 2.0]), tf.Variable(0)

    @tf.function(autograph=False)
    def evaluate(scale):
        steps.assign_add(1)
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(scale * v**3)
        return value, factor * tape.gradient(value, v)

    concrete, scale = (
        evaluate.get_concrete_function(tf.TensorSpec([])),
        tf.constant(2.0),
    )
    value, gradient = concrete(scale)

    def verified():
        verify(
            concrete,
            [scale],
            (value, gradient),
            variables=[v],
            outputs=lambda answer: [answer[0]],
            slope=lambda direction, w: float(w[0]) * inner([gradient], direction),
            name="f",
            names=["x0"],
        )

    if factor == 1.0:
        verified()
    else:
        with pytest.raises(WrongDerivativeError, match="by `x0`"):
            verified()
    assert v.numpy().tolist() == [1.0, 2.0]
    assert int(steps) == 1


@pytest.mark.parametrize("road", ["grad", "hessian", "hvp", "jvp"])
def test_ops_that_read_one_triangle_have_a_gradient_for_both(road):
    def log_determinant(x):
        return 2 * tf.reduce_sum(
            tf.math.log(tf.linalg.diag_part(tf.linalg.cholesky(x)))
        )

    assert np.all(np.isfinite(ROADS[road](log_determinant, SINGLE)))
    np.testing.assert_allclose(grad(log_determinant)(SINGLE), np.linalg.inv(SINGLE))


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_a_single_number_of_16_bits_is_verified(dtype):
    x = tf.constant(3.0, dtype)

    assert float(grad(lambda x: x**2)(x)) == 6.0
    assert float(hessian(lambda x: x**2)(x)) == 2.0


def test_a_stop_that_tensorflow_puts_into_a_gradient_switches_nothing_off():
    """The gradient of average pooling stops that of a shape."""

    def f(x):
        pooled = tf.nn.avg_pool1d(x[tf.newaxis, :, tf.newaxis], 2, 2, "VALID")
        return tf.reduce_sum(pooled**2) + by_bits(x[0])

    with pytest.raises(WrongDerivativeError, match="Bitcast"):
        hvp(f)([1.0, 2.0], [1.0, 1.0])
