"""How often the user's function is called by Python: at most twice, log or no log."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.derivatives.matrices import hvp
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import ravel
from tfgrad.optimize.evaluator import JOINED, LARGE, Evaluation, measured
from tfgrad.optimize.methods.keras_optimizer import optimizer_factory
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.solvers.optimizer import OptimizerSolver


def well(x):
    """A saddle at zero."""
    return x[0] ** 2 - x[1] ** 2 + x[1] ** 4


STARTS = {"anywhere": [1.0, 0.3], "a saddle": [0.0, 0.0]}

METHODS = ["lbfgs", "newton", "adam", "scipy:newton-cg", "scipy:trust-exact"]


@pytest.mark.parametrize("is_logged", [False, True], ids=["bare", "logged"])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_function_is_called_once_and_once_more_for_a_log(
    method, start, is_logged, tmp_path
):
    calls = []

    def f(x):
        calls.append(x)
        return well(x)

    log = tmp_path if is_logged else None
    x0 = np.array(STARTS[start])
    result = tfgrad.minimize(f, x0, method=method, steps=20, log=log)

    assert len(calls) == 1 + is_logged
    assert np.isfinite(result.fun)


def matrix():
    return np.random.default_rng(1).normal(size=(4, 3))


NORM = keras.layers.LayerNormalization(dtype="float64")
NORM.build((4, 3))

SMOOTH = {
    "a sum": lambda x: tf.reduce_sum(x**3 * tf.sin(x)),
    "rows": lambda x: tf.reduce_sum(tf.gather(x, [0, 0, 1]) ** 3),
    "a branch": lambda x: tf.cond(x[0, 0] > 0, lambda: x[0, 1] ** 4, lambda: x[0, 2]),
    "a scan": lambda x: tf.reduce_sum(tf.scan(lambda a, e: a * e + e, x)),
    "a function": tf.function(lambda x: tf.reduce_sum(x**4)),
}

REPAIRED = {
    "a normalisation": lambda x: tf.reduce_sum(NORM(x) ** 3),
    "an entropy": lambda x: tf.reduce_sum(
        tf.nn.softmax_cross_entropy_with_logits(tf.nn.softmax(x**2), x)
    ),
}

TRACED_AGAIN = {"a scan", "a function", "an entropy"}  # with its mended formula within


@pytest.mark.parametrize("name", SMOOTH | REPAIRED)
def test_products_made_of_the_gradients_trace_are_those_of_hvp(name):
    f = (SMOOTH | REPAIRED)[name]
    calls = []

    def counted(x):
        calls.append(x)
        return f(x)

    problem = Problem(counted, matrix(), None, has_aux=False)
    v = tf.constant(matrix()[::-1])
    problem.evaluate(problem.x.start())
    before = len(calls)
    assert before == 1 + (name in TRACED_AGAIN)
    product = problem.hvp(ravel(problem.x.start()), ravel([v]))

    product = tf.reshape(product, v.shape)
    np.testing.assert_allclose(product, hvp(f)(matrix(), v), rtol=1e-12, atol=1e-12)
    assert len(calls) == before


def test_a_frozen_layer_is_not_trained_where_variables_are_found():
    layers = [keras.layers.Dense(3), keras.layers.Dense(1)]
    net = keras.Sequential([keras.Input([2]), *layers])
    layers[0].trainable = False
    before = layers[0].get_weights()
    x = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)

    for method in ("lbfgs", "adam"):
        tfgrad.minimize(lambda: tf.reduce_mean((net(x) - 1) ** 2), method=method,
                        steps=5)  # fmt: skip

    for ours, theirs in zip(layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("method", ["lbfgs", "newton", "scipy:bfgs"])
def test_a_constraint_that_a_method_would_drop_is_refused(method):
    w = tf.Variable(1.0, constraint=keras.constraints.NonNeg())

    with pytest.raises(InvalidArgumentError, match=r"bounds=\(0, None\)"):
        tfgrad.minimize(lambda: (w + 1) ** 2, wrt=w, method=method)

    assert float(w) == 1.0


@pytest.mark.parametrize("method", ["lbfgs", "scipy:l-bfgs-b"])
def test_a_constraint_that_bounds_keep_to_is_none_that_is_dropped(method):
    free = tf.Variable(2.0)
    w = keras.Variable([3.0, 1.0])
    w.constraint = keras.constraints.NonNeg()

    def f():
        return tf.reduce_sum((w.value + 1) ** 2) + (free + 3) ** 2

    result = tfgrad.minimize(
        f, wrt=[free, w], method=method, bounds=([None, [0.0, 0.5]], None)
    )

    np.testing.assert_allclose(w, [0, 0.5])
    assert float(free) == pytest.approx(-3, abs=1e-3)
    assert result.success
    with pytest.raises(InvalidArgumentError, match="NonNeg"):
        tfgrad.minimize(f, wrt=[free, w], method=method, bounds=(-1.0, None))


@pytest.mark.parametrize("method", ["lbfgs", "sgd"])
def test_a_function_that_assigns_what_is_minimised_is_refused(method):
    x = tf.Variable(3.0)

    with pytest.raises(InvalidArgumentError, match="assigns to 'Variable"):
        tfgrad.minimize(lambda: x.assign_add(1.0) ** 2, wrt=x, method=method)


@pytest.mark.parametrize("method", ["lbfgs", "newton", "adam", "scipy:bfgs"])
def test_a_function_that_reads_nothing_of_what_is_minimised_is_refused(method):
    v, w = tf.Variable(3.0), tf.Variable(1.0)

    with pytest.raises(InvalidArgumentError, match="reads nothing of `wrt`"):
        tfgrad.minimize(lambda: v * v, wrt=w, method=method)
    with pytest.raises(InvalidArgumentError, match="reads nothing of its argument"):
        tfgrad.minimize(lambda x: v * v, [1.0, 2.0], method=method)
    stopped = r"reads (its argument|`wrt`) only through tf.stop_gradient"
    with pytest.raises(InvalidArgumentError, match=stopped):
        tfgrad.minimize(lambda x: tf.stop_gradient(x) ** 2, 3.0, method=method)
    with pytest.raises(InvalidArgumentError, match=stopped):
        tfgrad.minimize(lambda: tf.stop_gradient(w) ** 2 + v, wrt=w, method=method)

    assert (float(v), float(w)) == (3.0, 1.0)


@pytest.mark.filterwarnings("ignore:.*runs eagerly:RuntimeWarning")
def test_a_branch_of_python_may_be_constant():
    def f(x):  # float() of a tensor: it runs eagerly
        return x**2 if float(x) > 0 else tf.constant(0.0)

    assert float(tfgrad.minimize(f, 1.0).x) <= 0


GRADIENTS = {
    "leaves": ([[1.0, -3.0], 2.0], 3.0),
    "an empty leaf": ([[], [-0.5]], 0.5),
    "one that is not copied": ([[1.0] * JOINED + [-3.0], 2.0], 3.0),
    "NaN": ([[1.0, float("nan")], 2.0], float("nan")),
    "infinite": ([[-float("inf")], 2.0], float("inf")),
}


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_largest_element_of_a_gradient_is_the_same_traced_or_not(name, scale):
    leaves, largest = GRADIENTS[name]
    leaves = [tf.constant(leaf) for leaf in leaves]
    slices = tf.IndexedSlices(leaves[0], tf.range(len(leaves[0])), tf.constant([9]))

    def found(*leaves, is_xla=False):
        evaluation = Evaluation(tf.constant(1.0), list(leaves), (), {})
        return measured(evaluation, scale, is_xla=is_xla).grad_max

    by_xla = tf.function(lambda *leaves: found(*leaves, is_xla=True), jit_compile=True)
    for call in (found, tf.function(found), by_xla):
        for given in (leaves, [slices, leaves[1]]):
            np.testing.assert_array_equal(call(*given), largest / (scale or 1.0))


def test_the_largest_element_is_found_among_leaves_of_all_sizes_and_dtypes():
    leaves = [
        tf.constant(numbers, dtype)
        for dtype in (tf.float32, tf.float64, tf.float16)
        for numbers in ([1.0, -2.0], [0.5] * JOINED + [-3.0], -1.5)
    ]
    leaves[1], leaves[4] = leaves[4], leaves[1]  # tf.float32 equals, and hashes as, 1

    @tf.function
    def largest(leaves):
        value = tf.constant(0.0)
        return measured(Evaluation(value, leaves, (), {})).grad_max

    assert float(largest(leaves)) == 3.0
    assert float(largest([*leaves, tf.constant(-4.0, tf.float64)])) == 4.0
    assert np.isnan(largest([tf.constant([np.nan, 1.0]), *leaves]))


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("size", [4, LARGE])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_the_largest_element_of_a_gradient_is_found_by_its_bits(dtype, size, jit):
    @tf.function(jit_compile=jit)
    def largest(gradient):
        value = tf.zeros([], dtype)
        return measured(Evaluation(value, [gradient], (), {})).grad_max

    def found(*numbers):
        return float(largest(tf.constant(np.resize(numbers, size), dtype)))

    assert found(1e-3, -2.0, -0.0, 1.0) == found(2.0, 0.0, -1.0) == 2.0
    assert (found(-2.0, -3.0), found(0.0, -0.0), found(-0.0)) == (3.0, 0.0, 0.0)
    assert found(1.0, -float("inf")) == found(float("inf"), -1.0) == float("inf")
    for nan in (float("nan"), -float("nan")):
        assert np.isnan([found(1.0, nan, float("inf")), found(nan, -2.0)]).all()


def test_an_optimizer_without_data_calls_the_trace_of_f_itself():
    problem = Problem(lambda x: (x - 1) ** 2, 3.0, None, has_aux=False)
    solver = OptimizerSolver(problem, optimizer_factory(keras.optimizers.SGD, 0.1))

    traced = solver.stepper.compiled
    assert traced is problem.evaluator.evaluate.concrete(problem.given, None)
    state, _ = solver.init()
    assert float(solver.look(state).grad_max) == 4.0
