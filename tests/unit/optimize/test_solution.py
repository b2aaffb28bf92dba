import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tests.reference.more_garbow_hillstrom import PROBLEMS
from tfgrad.errors import (
    ConvergenceError,
    InvalidArgumentError,
    NoGradientError,
    WrongDerivativeError,
)
from tfgrad.optimize.implicit import System, refined
from tfgrad.optimize.methods.bounded import Bounds

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(50, 5))
TARGETS = GENERATOR.normal(size=50)
GRAM, SIDE = INPUTS.T @ INPUTS / 50, INPUTS.T @ TARGETS / 50


@tf.function  # a plain function is traced at each call
def ridge(w, penalty):
    error = tf.linalg.matvec(INPUTS, w) - TARGETS
    return tf.reduce_mean(error * error) / 2 + penalty * tf.reduce_sum(w * w) / 2


def ridge_exactly(penalty):
    """Return w and its first and second derivatives by the penalty."""
    inverse = np.linalg.inv(GRAM + penalty * np.eye(5))
    w = inverse @ SIDE
    return w, -inverse @ w, 2 * inverse @ inverse @ w


def fitted(penalty):
    return tfgrad.solution(ridge, np.zeros(5), penalty)


def length(penalty):
    w = fitted(penalty)
    return tf.reduce_sum(w * w)


def test_the_solution_of_a_ridge_is_the_closed_form():
    w, _, _ = ridge_exactly(0.3)

    np.testing.assert_allclose(fitted(np.float64(0.3)), w, rtol=1e-13)


def test_a_tape_finds_the_derivative_eagerly_and_so_does_a_second_one():
    w, first, second = ridge_exactly(0.3)
    penalty = tf.constant(0.3, tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(penalty)
        with tf.GradientTape() as inner:
            inner.watch(penalty)
            value = length(penalty)
        slope = inner.gradient(value, penalty)
    curvature = outer.gradient(slope, penalty)

    np.testing.assert_allclose(slope, 2 * w @ first, rtol=1e-12)
    expected = 2 * first @ first + 2 * w @ second
    np.testing.assert_allclose(curvature, expected, rtol=1e-10)


def test_a_transform_and_a_tf_function_find_it():
    w, first, _ = ridge_exactly(0.3)
    value, slope = tfgrad.value_and_grad(length)(np.float64(0.3))
    compiled = tf.function(lambda penalty: tfgrad.grad(length)(penalty))

    np.testing.assert_allclose(value, w @ w, rtol=1e-12)
    np.testing.assert_allclose(slope, 2 * w @ first, rtol=1e-12)
    np.testing.assert_allclose(compiled(tf.constant(0.3, tf.float64)), slope)


def test_rows_of_a_jacobian_are_those_of_the_inverse():
    scales = np.array([1.0, 2.0, 5.0])
    jacobian = tfgrad.jacobian(
        lambda c: tfgrad.solution(
            lambda x, c: (
                tf.reduce_sum(scales * x * x) / 2 + x[0] * x[1] - tf.tensordot(c, x, 1)
            ),
            np.zeros(3),
            c,
        ),
        mode="reverse",
    )(np.ones(3))

    matrix = np.diag(scales) + np.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(jacobian, np.linalg.inv(matrix), atol=1e-12)


def test_it_is_right_by_check_grads():
    assert tfgrad.check_grads(length, np.float64(0.3), order=1)


def test_variables_that_f_reads_count_as_arguments():
    shift = tf.Variable(2.0, dtype=tf.float64)

    def f(x):
        return (x - shift) ** 2 + x**4

    with tf.GradientTape() as tape:
        x = tfgrad.solution(f, np.float64(0.0))
    expected = 2 / (2 + 12 * x.numpy() ** 2)
    by_transform = tfgrad.grad(lambda: tfgrad.solution(f, np.float64(0)), wrt=shift)()

    np.testing.assert_allclose(tape.gradient(x, shift), expected, rtol=1e-12)
    np.testing.assert_allclose(by_transform, expected, rtol=1e-12)


def test_a_trace_that_nobody_needs_goes():
    def bend():
        def f(x, a):
            return (x - a) ** 2

        squared = tfgrad.hessian(lambda a: tfgrad.solution(f, np.float64(0), a) ** 2)
        return squared(np.float64(3)), weakref.ref(f)

    found, f = bend()
    gc.collect()

    assert found == 2.0
    assert f() is None


def test_nests_in_and_out():
    def f(p, q):
        return (p["a"] - q["shift"]) ** 2 + tf.reduce_sum(
            (p["b"] - p["a"] * q["scale"]) ** 2
        )

    start = {"a": np.float64(0), "b": np.zeros(2)}
    given = {"shift": np.float64(3), "scale": np.array([1.0, 2.0])}
    x, pullback = tfgrad.vjp(lambda q: tfgrad.solution(f, start, q), given)
    (slopes,) = pullback({"a": 0.0, "b": [0.0, 1.0]})

    np.testing.assert_allclose(x["b"], [3.0, 6.0], rtol=1e-12)
    np.testing.assert_allclose(slopes["shift"], 2.0, rtol=1e-12)
    np.testing.assert_allclose(slopes["scale"], [0.0, 3.0], atol=1e-12)


def test_at_active_bounds_the_derivative_is_that_of_the_free_part():
    def f(x, c):
        return tf.reduce_sum((x - c) ** 2) + x[0] * x[1]

    def held(c):
        return tfgrad.solution(f, np.ones(2), c, bounds=(0.0, None))

    x = held(np.array([1.0, -2.0]))
    jacobian = tfgrad.jacobian(held, mode="reverse")(np.array([1.0, -2.0]))

    np.testing.assert_allclose(x, [1.0, 0.0], atol=1e-14)
    np.testing.assert_allclose(jacobian, [[1.0, 0.0], [0.0, 0.0]], atol=1e-12)


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_residuals_take_the_second_order_term_unless_told_not_to(gauss_newton):
    # r = (x**2 - a, 1): f' = 2 x (x**2 - a) + ..., at a residual that does not vanish.
    def residuals(x, a):
        return tf.stack([x * x - a, x - 3.0])

    def at(a):
        return tfgrad.solution(
            residuals, np.float64(2), a, residuals=True, gauss_newton=gauss_newton
        )

    x = float(at(np.float64(2.0)))
    slope = tfgrad.grad(at, verify=not gauss_newton)(np.float64(2.0))

    assert abs(2 * x * (x * x - 2) + x - 3) < 1e-12
    bend = 4 * x * x + 1 + (0 if gauss_newton else 2 * (x * x - 2))
    np.testing.assert_allclose(slope, 2 * x / bend, rtol=1e-8)


# By Cholesky's factor, and by conjugate gradients.
@pytest.mark.parametrize("n", [60, 300])
def test_many_variables(n):
    scales = np.linspace(1.0, 10.0, n)

    def at(a):
        def f(x, a):
            return tf.reduce_sum(scales * (x - a) ** 2) + tf.reduce_sum(x**4)

        return tfgrad.solution(f, np.zeros(n), a)

    x, pullback = tfgrad.vjp(at, np.ones(n))
    (slope,) = pullback(np.ones(n))

    # Newton's steps end where the next would be shorter than epsilon**0.75 of x.
    np.testing.assert_allclose(2 * scales * (1 - x), 4 * x**3, rtol=1e-9)
    expected = 2 * scales / (2 * scales + 12 * x**2)
    np.testing.assert_allclose(slope, expected, rtol=1e-8)


def test_a_variable_that_a_newton_step_brings_to_its_bound_is_held_there():
    one = tf.ones([1], tf.float64)  # of (x + 1)**2, from almost at the bound
    minimum = refined(
        System(
            value=lambda x, args: tf.reduce_sum((x + 1) ** 2),
            gradient=lambda x, args: 2 * (x + 1),
            product=lambda x, v, args: 2 * v,
            matrix=lambda x, args: 2 * one[:, None],
            outside=[],
            bounds=Bounds(0 * one, 9 * one),
        ),
        1e-30 * one,
        one,
        [],
    )

    assert minimum.x == 0
    assert minimum.inverse.free == 0


def test_a_second_tape_finds_the_derivative_within_bounds():
    def f(x, a):
        return tf.reduce_sum((x - a**3) ** 2)

    a = tf.constant(1.5, tf.float64)
    with tf.GradientTape() as outer:
        outer.watch(a)
        with tf.GradientTape() as tape:
            tape.watch(a)
            x = tfgrad.solution(f, np.ones(2), a, bounds=([0.0, 0.0], [2.0, 9.0]))
            y = tf.reduce_sum(x)  # 2 + a**3
        slope = tape.gradient(y, a)

    np.testing.assert_allclose(slope, 3 * 1.5**2, rtol=1e-12)
    np.testing.assert_allclose(outer.gradient(slope, a), 6 * 1.5, rtol=1e-10)


def test_float32_has_half_of_its_digits():
    def total(penalty):
        def f(w, p):
            return tf.reduce_sum((w - 3.0) ** 2) + p * tf.reduce_sum(w * w)

        return tf.reduce_sum(tfgrad.solution(f, [0.0, 0.0], penalty))

    slope = tfgrad.grad(total)(1.0)

    assert slope.dtype == tf.float32
    np.testing.assert_allclose(slope, -1.5, rtol=3e-4)


def test_a_problem_that_was_not_solved_is_an_error_eagerly():
    def valley(x):
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    with pytest.raises(ConvergenceError, match="3 steps"):
        tfgrad.solution(valley, np.array([-1.2, 1.0]), steps=3)


@pytest.mark.parametrize(
    ("f", "match"),
    [
        (lambda x: -tf.reduce_sum(x), r"got: an end after .*'unbounded'"),
        (lambda x: tf.reduce_sum(tf.math.log(x - 5)), r"got: an end .*'nonfinite'"),
    ],
)
def test_an_f_without_a_minimum_is_an_error_with_the_status(f, match):
    with pytest.raises(ConvergenceError, match=match):
        tfgrad.solution(f, np.zeros(2))


def test_a_saddle_is_an_error_with_its_curvature():
    with pytest.raises(ConvergenceError, match="least curvature of -1"):
        tfgrad.solution(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, np.array([1.0, 0]))


def test_in_a_trace_both_are_nan_and_explain_names_them():
    def one_of_many(a):
        def f(x, a):
            return (x[0] + x[1] - a) ** 2

        return tfgrad.solution(f, np.array([1.0, 0.5]), a)[0]

    found = tfgrad.explain(one_of_many, np.float64(1.0)).findings

    assert np.isnan(tfgrad.grad(one_of_many)(np.float64(1.0)))
    assert any(each.culprit and "positive" in each.culprit.reason for each in found)


def test_a_cut_is_refused():
    def rounded(a):
        def f(x, a):
            return (x - tf.round(a)) ** 2

        return tfgrad.solution(f, np.float64(0), a)

    with pytest.raises(NoGradientError, match="test_solution"):
        tfgrad.grad(rounded)(np.float64(1.2))


def test_a_penalty_is_tuned_by_minimize():
    def misfit(log_penalty):
        def f(w, p):
            return tf.reduce_sum((w - 1) ** 2) + tf.exp(p) * tf.reduce_sum(w * w)

        w = tfgrad.solution(f, np.zeros(2), log_penalty)
        return tf.reduce_sum((w - 0.25) ** 2)

    result = tfgrad.minimize(misfit, np.float64(0.0))

    assert result.success
    np.testing.assert_allclose(result.x, np.log(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "adam"}, "pure function"),
        ({"method": ["lbfgs", "newton"]}, "pure function"),
        ({"method": "lbgfs"}, "(?s)pure function.*'lbgfs'.*\"newton\""),
        ({"gauss_newton": True}, "residuals"),
        ({"residuals": True, "method": "newton"}, "Levenberg"),
        ({"steps": 0}, "steps"),
        ({"residuals": 1}, "residuals"),
        ({"verify": "no"}, "verify"),
        ({"method": "newton", "bounds": (0, 1)}, "bounds"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_traced(options, match):
    def untouched(x):
        raise AssertionError

    with pytest.raises(InvalidArgumentError, match=match):
        tfgrad.solution(untouched, np.zeros(2), **options)


@pytest.mark.parametrize("x0", [(), {}, np.zeros(0)])
def test_a_start_without_numbers_is_refused_as_minimize_does(x0):
    with pytest.raises(InvalidArgumentError, match="at least one number") as raised:
        tfgrad.solution(tf.reduce_sum, x0)

    assert "dtype" not in str(raised.value).splitlines()[0]


def test_the_residuals_of_a_solution_are_not_summed_by_the_function():
    with pytest.raises(InvalidArgumentError, match="squares and sums") as raised:
        tfgrad.solution(tf.reduce_sum, np.ones(2), residuals=True)

    assert "least_squares" not in str(raised.value)


@pytest.mark.parametrize("run", [tfgrad.minimize, tfgrad.descend])
def test_minimize_in_a_transform_names_solution(run):
    def through(a):
        return run(lambda x: (x - a) ** 2, np.float64(0)).x

    with pytest.raises(InvalidArgumentError, match=r"tfgrad\.solution"):
        tfgrad.grad(through)(np.float64(1))


def watching(run):
    """Return what running in the block of a tape that watches a raises or returns."""
    a = tf.constant(2.0, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(a)
        return run(a)


@pytest.mark.parametrize(
    "run",
    [
        lambda a: tfgrad.minimize(lambda x: (x - a) ** 2, np.float64(0)),
        lambda a: next(tfgrad.descend(lambda x: (x - a) ** 2, np.float64(0))),
        lambda a: tfgrad.least_squares(lambda x: x - [a, a], np.zeros(2)),
    ],
    ids=["minimize", "descend", "least_squares"],
)
def test_a_minimisation_of_what_a_tape_watches_names_solution(run):
    with pytest.raises(InvalidArgumentError, match=r"tfgrad\.solution"):
        watching(run)


def test_a_variable_that_a_tape_would_watch_counts_and_an_accumulator_too():
    shift = tf.Variable(2.0, dtype=tf.float64)
    tangent = tf.constant(1.0, tf.float64)

    def run():
        return tfgrad.minimize(lambda x: (x - shift) ** 2, np.float64(0))

    with tf.GradientTape(), pytest.raises(InvalidArgumentError, match="variable"):
        run()
    with (
        tf.autodiff.ForwardAccumulator(shift, tangent),
        pytest.raises(InvalidArgumentError, match="variable"),
    ):
        run()
    with tf.GradientTape(watch_accessed_variables=False):
        assert run().success


def test_a_tape_that_watches_nothing_of_it_sees_no_minimisation():
    weights = tf.Variable([3.0, 4.0])
    with tf.GradientTape() as tape:
        result = tfgrad.minimize(
            lambda: tf.reduce_sum((weights - 1.0) ** 2), wrt=weights
        )
        value = tf.reduce_sum(weights * weights)

    assert result.success
    np.testing.assert_allclose(tape.gradient(value, weights), [2.0, 2.0], rtol=1e-5)


def test_a_gaussian_process_has_its_length_tuned_through_its_mode():
    place = np.linspace(0, 1, 12)
    counts = np.round(5 * np.exp(np.sin(5 * place)))

    def evidence(log_length):
        """Return minus Laplace's log evidence of Poisson counts."""
        gap = (place[:, None] - place) / tf.exp(log_length)
        kernel = tf.exp(-gap * gap / 2) + 1e-3 * np.eye(12)
        triangle = tf.linalg.cholesky(kernel)

        def energy(v, triangle):
            latent = tf.linalg.matvec(triangle, v)
            return tf.reduce_sum(tf.exp(latent) - counts * latent + v * v / 2)

        v = tfgrad.solution(energy, np.zeros(12), triangle)
        rates = tf.exp(tf.linalg.matvec(triangle, v))
        inner = tf.matmul(triangle * rates[:, None], triangle, transpose_a=True)
        return energy(v, triangle) + tf.linalg.logdet(inner + np.eye(12)) / 2

    result = tfgrad.minimize(evidence, np.float64(-1.0))
    around = [float(evidence(tf.constant(result.x + d))) for d in (-1e-3, 1e-3)]

    assert result.success
    assert float(result.fun) < min(around)


def test_a_deep_equilibrium_layer_is_trained_inside_a_keras_model():
    class Equilibrium(keras.layers.Layer):
        def build(self, shape):
            self.inner = self.add_weight(shape=(4, 4), initializer="zeros")
            self.outer = self.add_weight(shape=(shape[-1], 4), initializer="ones")

        def call(self, x):
            def misfit(z, x):
                through = tf.matmul(z, self.inner) + tf.matmul(x, self.outer)
                return tf.reduce_sum(tf.square(z - tf.tanh(through)))

            return tfgrad.solution(misfit, tf.zeros([tf.shape(x)[0], 4]), x)

    keras.utils.set_random_seed(0)
    x = GENERATOR.normal(size=(64, 2)).astype(np.float32)
    layer = Equilibrium()
    model = keras.Sequential([keras.Input((2,)), layer, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.05), "mse", jit_compile=False)
    losses = model.fit(x, np.tanh(x[:, :1]), epochs=6, verbose=0).history["loss"]

    z = layer(x)
    through = tf.matmul(z, layer.inner) + tf.matmul(x, layer.outer)
    np.testing.assert_allclose(z, tf.tanh(through), atol=1e-4)
    assert losses[-1] < losses[0] / 2
    assert np.any(layer.inner.numpy())  # which the implicit derivative has moved


@pytest.mark.parametrize("in_trace", [False, True])
def test_a_warm_start_may_be_held_in_a_variable(in_trace):
    warm = tf.Variable(np.zeros(5))

    def step(penalty):
        with tf.GradientTape() as tape:
            tape.watch(penalty)
            w = tfgrad.solution(ridge, warm, penalty)
        warm.assign(w)
        return w, tape.gradient(w, [penalty, warm])

    run = tf.function(step) if in_trace else step
    for penalty in (0.3, 0.31):
        w, (slope, by_start) = run(tf.constant(penalty, tf.float64))
        expected, first, _ = ridge_exactly(penalty)
        np.testing.assert_allclose(w, expected, rtol=1e-12)
        np.testing.assert_allclose(slope, np.sum(first), rtol=1e-10)
        np.testing.assert_allclose(warm, expected, rtol=1e-12)
        assert by_start is None or not np.any(by_start)


def root(a):  # of x**3 + x = a
    return tfgrad.solution(lambda x, a: (x**3 + x - a) ** 2, np.float64(1), a)


def test_roots_written_as_minima():
    x, slope = root(np.float64(10.0)), tfgrad.grad(root)(np.float64(10.0))

    np.testing.assert_allclose(x, 2.0, rtol=1e-13)
    np.testing.assert_allclose(slope, 1 / 13, rtol=1e-8)


def bounded(c):
    def f(x, c):
        return tf.reduce_sum((x - c) ** 2) + x[0] * x[1]

    return tfgrad.solution(f, np.ones(2), c, bounds=(0.0, None))


def residual(a):
    def f(x, a):
        return tf.stack([x * x - a, x - 3.0])

    return tfgrad.solution(f, np.float64(2), a, residuals=True)


@pytest.mark.parametrize(
    ("f", "at"),
    [
        (root, 10.0),
        (bounded, [1.0, -2.0]),
        (residual, 2.0),
    ],
)
def test_check_grads_passes_on_each_kind(f, at):
    assert tfgrad.check_grads(f, np.array(at), order=1, modes=["reverse"])


@pytest.mark.parametrize("place", [1.0, 1.5])  # at 1, an element of x is zero
def test_second_derivatives_are_right_where_those_of_tensorflow_are_not(place):
    # The third derivative of x**2 at zero is NaN in TensorFlow.
    def squares(x, a):
        return tf.reduce_sum(tf.exp(x) - x * a) + tf.reduce_sum(x**2) * a[0]

    def products(x, a):
        return tf.reduce_sum(tf.exp(x) - x * a) + tf.reduce_sum(x * x) * a[0]

    def total(f):
        return lambda a: tf.reduce_sum(tfgrad.solution(f, np.zeros(2), a) ** 2)

    a, v = np.array([place, 2.0]), np.array([1.0, -1.0])
    found, expected = (tfgrad.hvp(total(f))(a, v) for f in (squares, products))

    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_wrong_derivative_of_f_is_refused():
    def f(w, a):  # Cholesky reads one triangle only; TensorFlow's gradient, both
        matrix = [[3.0 * w[0], w[1]], [0.3 * a, 2.0 * w[1]]]
        bowl = tf.reduce_sum((w - 1.0) ** 2)
        return 10 * bowl + tf.reduce_sum(tf.linalg.cholesky(matrix))

    with pytest.raises(WrongDerivativeError, match="of `f` is wrong"):
        tfgrad.solution(f, [1.0, 2.0], 1.0)
    assert tfgrad.solution(f, [1.0, 2.0], 1.0, verify=False).shape == (2,)


def test_an_argument_without_derivative_is_none_of_the_solution():
    def f(x, a, k):
        return (x - tf.round(a)) ** 2 + tf.cast(k, x.dtype)

    np.testing.assert_allclose(tfgrad.solution(f, 0.0, 1.2, 3), 1.0, rtol=1e-6)


def test_the_hessian_is_that_of_the_solution_where_the_last_step_does_not_tell():
    # Along the last steps, of x[0] alone, f is a parabola; the curvature of x[1] moves.
    def f(x, a):
        moves = tf.exp(10 * x[0]) * x[1] ** 2 / 2 - a * x[1]
        return (x[0] - 1.3) ** 2 / 2 + moves

    start = np.array([1.3 + 1e-3, 0.0])
    slope = tfgrad.jacobian(lambda a: tfgrad.solution(f, start, a))(np.float64(0.0))
    np.testing.assert_allclose(slope, [0, np.exp(-13)], rtol=1e-11, atol=1e-14)


# Of Powell's singular function, the Hessian vanishes in two directions at the solution.
@pytest.mark.parametrize(
    "name",
    ["3 Powell badly scaled", "10 Meyer", "13 Powell singular", "24 penalty II"],
)
def test_the_method_goes_on_where_newton_steps_do_not_arrive_from_where_it_ended(name):
    problem = PROBLEMS[name]
    start, (least, *_) = np.array(problem.start, float), problem.minima

    def f(x, a):
        return a * tf.reduce_sum(problem.residuals(x) ** 2)

    x = tfgrad.solution(f, start, np.float64(1.0))
    np.testing.assert_allclose(f(x, 1.0), least, rtol=3e-6, atol=1e-20)  # six digits


def test_a_tf_function_outlives_the_one_that_it_was_traced_in():
    @tf.function(autograph=False)
    def inner(a):
        return tfgrad.solution(lambda x, a: (x - a) ** 2, np.float64(0.0), a)

    tf.function(lambda a: inner(a), autograph=False)(tf.constant(2.0, tf.float64))
    gc.collect()  # the one around it
    assert float(tfgrad.grad(inner)(np.float64(2.0))) == pytest.approx(1.0)
