"""`minimize(f, result)`: a run that ended goes on, to the last bit."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.solvers import optimizer, pure

START = np.full(4, -1.2)


@tf.function  # so that one trace serves many tests
def rosenbrock(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def never(x):
    raise AssertionError


def assert_same(result, expected):
    """Assert that two runs agree in every bit but the clock's."""
    for name in ("x", "grad", "fun"):
        pair = (tf.nest.flatten(getattr(r, name)) for r in (result, expected))
        for ours, theirs in zip(*pair, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert result.history.keys() == expected.history.keys()
    for name in result.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(result.history[name], expected.history[name])
    for name in ("nit", "nfev", "status", "message", "success"):
        assert getattr(result, name) == getattr(expected, name)


@pytest.mark.parametrize(
    ("method", "first", "rest"),
    [
        ("adam", 300, 700),
        ("adam", 40, 80),  # single steps, then compiled ones
        ("lbfgs", 10, 990),
        ([("adam", 150), "lbfgs"], 7, 100),
        (keras.optimizers.SGD(1e-4, momentum=0.9, use_ema=True), 60, 60),
        (
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 200)),
            110,
            110,
        ),
    ],
    ids=["adam", "adam, few", "lbfgs", "chain", "averaged", "scheduled"],
)
def test_steps_and_more_steps_are_all_of_them_at_once(method, first, rest):
    f = rosenbrock.python_function  # plain: each call traces it anew
    begun = tfgrad.minimize(f, START, method=method, steps=first)
    result = tfgrad.minimize(f, begun, steps=rest)

    whole = tfgrad.minimize(f, START, method=method, steps=first + rest)
    assert_same(result, whole)
    assert np.all(np.diff(result.history["seconds"]) >= 0)
    assert result.seconds >= begun.seconds


@pytest.mark.parametrize(
    ("method", "cuts"), [("adam", [110, 150]), ("lbfgs", [40, 110, 150])]
)
def test_it_does_not_matter_where_a_run_is_cut_for_xla(method, cuts, monkeypatch):
    monkeypatch.setattr(optimizer, "XLA_STEPS", 110)
    monkeypatch.setattr(optimizer, "XLA_STEPS_PER_OP", 0)
    monkeypatch.setattr(pure, "COMPILATION", (0.022, 0.0))

    def run(start, steps):
        options = {"method": method, "steps": steps, "gtol": 0.0}
        return tfgrad.minimize(rosenbrock, start, **options)

    start = np.linspace(-2, 2, 100)
    whole = run(start, 170)

    assert whole.nit == 170
    for first in cuts:
        assert_same(run(run(start, first), 170 - first), whole)


def test_the_kernels_that_tensorflow_fuses_do_not_tell_few_steps_from_many():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 10)).astype(np.float32)
    start = {"w": generator.normal(size=(10, 20)).astype(np.float32), "b": np.ones(20)}
    start["b"] = start["b"].astype(np.float32)

    def loss(p):
        return tf.reduce_mean(tf.tanh(tf.nn.bias_add(x @ p["w"], p["b"])) ** 2)

    begun = tfgrad.minimize(loss, start, method="adam", steps=40)
    result = tfgrad.minimize(loss, begun, steps=80)

    assert_same(result, tfgrad.minimize(loss, start, method="adam", steps=120))


@pytest.mark.parametrize(
    ("rules", "status"),
    [({"gtol": 0.0}, "converged"), ({"ftol": 1e-3}, "ftol"), ({"xtol": 1e-2}, "xtol")],
)
def test_a_run_that_ended_by_itself_ends_there_again(rules, status):
    def f(x):
        return tf.reduce_sum(tf.exp(x) - 0.1 * x)

    begun = tfgrad.minimize(f, START, **rules)
    result = tfgrad.minimize(f, begun, **rules)

    assert begun.status == status
    assert_same(result, begun)


@pytest.mark.parametrize("budget", ["steps", "epochs"])
def test_steps_over_data_go_on_with_the_batch_that_comes_next(budget):
    x = np.linspace(-1, 1, 40).astype(np.float32)

    def loss(p, x, y):
        return tf.reduce_mean((p * x - y) ** 2)

    def run(start, count):
        options = {"data": (x, 2 * x), "batch_size": 16, budget: count}
        return tfgrad.minimize(loss, start, method="sgd", **options)

    result, whole = run(run(0.0, 4), 3), run(0.0, 7)

    assert_same(result, whole)
    np.testing.assert_array_equal(result.history["step"], np.arange(whole.nit + 1))
    np.testing.assert_array_equal(result.epochs["fun"], whole.epochs["fun"])


def test_a_result_is_not_changed_by_going_on_from_it():
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=20)
    kept = pickle.dumps((begun.x, begun.history))

    runs = [tfgrad.minimize(rosenbrock, begun, steps=20) for _ in range(2)]

    assert pickle.dumps((begun.x, begun.history)) == kept
    assert_same(*runs)


def test_a_result_goes_on_after_a_pickle():
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=20)
    again = pickle.loads(pickle.dumps(begun))

    assert_same(
        tfgrad.minimize(rosenbrock, again, steps=20),
        tfgrad.minimize(rosenbrock, begun, steps=20),
    )


def test_variables_are_put_where_the_result_ended():
    x = tf.Variable(START)

    def f():
        return rosenbrock(x)

    begun = tfgrad.minimize(f, method="adam", steps=30)  # which finds x
    x.assign(7 * START)
    result = tfgrad.minimize(f, begun, steps=30)

    whole = tfgrad.minimize(rosenbrock, START, method="adam", steps=60)
    np.testing.assert_array_equal(result.x, whole.x)
    np.testing.assert_array_equal(x, whole.x)


def test_seeds_and_averages_of_a_model_go_on_too():
    data = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)

    def trained(*parts):
        keras.utils.set_random_seed(1)
        layers = [
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
        model = keras.Sequential([keras.Input([4]), *layers])

        def loss():
            return tf.reduce_mean((model(data, training=True) - data[:, :1]) ** 2)

        result = None
        for steps in parts:
            result = tfgrad.minimize(
                loss, result, wrt=model, method="adam", steps=steps
            )
        return result, model.get_weights()

    result, weights = trained(30, 90)

    whole, expected = trained(120)
    assert_same(result, whole)
    for ours, theirs in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_method_takes_over_as_in_a_chain():
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=150)
    result = tfgrad.minimize(rosenbrock, begun, method="lbfgs")

    chain = tfgrad.minimize(rosenbrock, START, method=[("adam", 150), "lbfgs"])
    np.testing.assert_array_equal(result.x, chain.x)
    np.testing.assert_array_equal(result.history["fun"], chain.history["fun"])
    assert (result.nit, result.nfev) == (chain.nit, chain.nfev)


def test_a_chain_that_was_left_goes_on_in_the_stage_where_it_was():
    method = [("adam", 120), "lbfgs"]
    begun = tfgrad.minimize(
        rosenbrock, START, method=method, callback=lambda state: state.step == 1
    )
    result = tfgrad.minimize(rosenbrock, begun)

    assert_same(result, tfgrad.minimize(rosenbrock, START, method=method))


def test_a_solution_goes_on_when_the_rule_is_tightened():
    begun = tfgrad.minimize(rosenbrock, START, gtol=1.0)
    same = tfgrad.minimize(rosenbrock, begun, gtol=1.0)
    result = tfgrad.minimize(rosenbrock, begun, gtol=1e-9)

    assert (same.nit, same.status) == (begun.nit, "gtol")
    assert_same(result, tfgrad.minimize(rosenbrock, START, gtol=1e-9))


def test_seconds_are_counted_from_the_result():
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=5)
    result = tfgrad.minimize(rosenbrock, begun, seconds=0.0)

    assert (result.status, result.nit) == ("seconds", 5)


def test_a_descent_goes_on_from_a_result_as_well():
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=5)
    steps = [state.step for state in tfgrad.descend(rosenbrock, begun, steps=3)]

    assert steps == [5, 6, 7, 8]


def test_a_log_of_what_goes_on_has_the_whole_history(tmp_path):
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=20, log=tmp_path)
    result = tfgrad.minimize(rosenbrock, begun, steps=20, log=tmp_path)

    assert result.directory == tmp_path / "adam-002"
    frame = tfgrad.load_run(result.directory, wide=True)
    np.testing.assert_array_equal(frame["step"], result.history["step"])
    np.testing.assert_array_equal(frame["loss"], np.float32(result.history["fun"]))
    assert frame["step/length"].notna().sum() == 40


def test_a_result_of_another_problem_is_refused_by_name():
    begun = tfgrad.minimize(rosenbrock, START, steps=3)
    x = tf.Variable(np.zeros(5))

    with pytest.raises(InvalidArgumentError, match="Either `x0` holds the values"):
        tfgrad.minimize(never, begun, wrt=x)
    with pytest.raises(InvalidArgumentError, match=r"f = .* where it was .*"):
        tfgrad.minimize(lambda x: rosenbrock(x) + 1, begun)
    held = tfgrad.minimize(lambda: tf.reduce_sum(x**2), wrt=x, steps=1)
    other = tf.Variable(np.float32([1.0, 2.0]))
    with pytest.raises(
        InvalidArgumentError, match=r"shape \(5,\), float64 before.*\(2,\), float32 now"
    ):
        tfgrad.minimize(never, held, wrt=other)
    with pytest.raises(InvalidArgumentError, match="has_aux: False before, True now"):
        tfgrad.minimize(lambda x: (rosenbrock(x), {"twice": 2.0}), begun, has_aux=True)


@pytest.mark.parametrize("method", ["sgd", "lbfgs"])
def test_a_function_that_draws_goes_on_though_it_has_another_value(method):
    def f(x):  # no op of it has "Random" in its name
        index = tf.random.categorical(tf.zeros([1, 10**6]), 1)[0, 0]
        return (x - tf.cast(index, tf.float32)) ** 2

    begun = tfgrad.minimize(f, 3.0, method=method, steps=4)
    result = tfgrad.minimize(f, begun, method=method, steps=5)

    assert result.nit >= begun.nit


def test_a_refused_result_leaves_the_variables_alone():
    x = tf.Variable(START)
    begun = tfgrad.minimize(lambda: rosenbrock(x), wrt=x, steps=3)
    x.assign(2 * START)

    with pytest.raises(InvalidArgumentError, match="the function that it began with"):
        tfgrad.minimize(lambda: rosenbrock(x) + 1, begun)

    np.testing.assert_array_equal(x, 2 * START)


def test_an_optimizer_that_does_not_tell_its_state_starts_anew():
    class Plain:
        def apply_gradients(self, pairs):
            for gradient, variable in pairs:
                variable.assign_sub(1e-4 * gradient)

    begun = tfgrad.minimize(rosenbrock, START, method=Plain(), steps=3)

    assert begun.state is None
    with pytest.raises(InvalidArgumentError, match=r"try: minimize\(f, result.x\)"):
        tfgrad.minimize(never, begun)


T = np.linspace(0.0, 3.0, 12)
Y = 2.5 * np.exp(-1.3 * T) + 0.4 + 0.01 * np.cos(7 * T)


@tf.function
def misfit(p):
    return p[0] * tf.exp(-p[1] * T) + p[2] - Y


def fit(x0, f=misfit, **options):
    return tfgrad.least_squares(f, x0, **options)


FIRST = np.array([9.0, 4.0, -3.0])


def test_steps_of_a_fit_and_more_steps_are_all_of_them_at_once():
    result = fit(begun := fit(FIRST, steps=3), steps=2)
    ended = fit(result)

    assert (begun.status, result.nit) == ("steps", 5)
    for ours, theirs in ((result, fit(FIRST, steps=5)), (ended, fit(FIRST))):
        assert_same(ours, theirs)
        np.testing.assert_array_equal(ours.covariance, theirs.covariance)
        np.testing.assert_array_equal(ours.residuals, theirs.residuals)
    assert ended.success


def test_a_fit_of_variables_goes_on_after_a_pickle_and_with_another_rule():
    p = tf.Variable(FIRST)
    begun = tfgrad.least_squares(lambda: misfit(p), steps=3)
    again = pickle.loads(pickle.dumps(fit(FIRST, steps=3)))
    p.assign(7 * FIRST)

    whole = fit(FIRST, gtol=1e-7)
    assert_same(fit(again, gtol=1e-7), whole)
    tfgrad.least_squares(lambda: misfit(p), begun, gtol=1e-7)
    np.testing.assert_array_equal(p, whole.x)


def test_a_fit_goes_on_from_where_another_method_ended():
    begun = tfgrad.minimize(
        lambda p: tf.reduce_sum(misfit(p) ** 2) / 2, FIRST, method="adam", steps=20
    )
    result = fit(begun)

    assert result.success
    assert result.nit > 20
    np.testing.assert_array_equal(result.history["fun"][:21], begun.history["fun"])


def test_a_fit_of_other_residuals_is_refused_by_name():
    begun = fit(FIRST, steps=2)

    with pytest.raises(InvalidArgumentError, match=r"f = .* where it was"):
        fit(begun, lambda p: 2 * misfit(p))
    with pytest.raises(InvalidArgumentError, match="has_aux: False before, True now"):
        fit(begun, never, has_aux=True)
    with pytest.raises(InvalidArgumentError, match="try: least_squares"):
        tfgrad.minimize(never, begun)
    with pytest.raises(InvalidArgumentError, match="Either `x0` holds the values"):
        fit(begun, never, wrt=tf.Variable(FIRST))


def test_a_number_as_rate_that_becomes_a_variable_is_refused_with_what_to_do():
    result = tfgrad.minimize(rosenbrock, START, method="adam", steps=2)

    with pytest.raises(InvalidArgumentError, match="a number stays one") as caught:
        tfgrad.minimize(rosenbrock, result, learning_rate=tf.Variable(0.1), steps=2)
    assert caught.value.got == "6 tensors there, 5 here"


@pytest.mark.parametrize("method", ["sgd", "lbfgs"])
def test_going_on_without_the_data_says_that_it_is_given_again(method):
    def loss(x, batch):
        return tf.reduce_mean((x - batch) ** 2)

    budget = {"epochs": 1} if method == "sgd" else {"steps": 1}
    result = tfgrad.minimize(loss, 3.0, data=np.ones(8, "f"), method=method, **budget)

    with pytest.raises(InvalidArgumentError, match=r"given again.*\n.*loss\(x, b"):
        tfgrad.minimize(loss, result)


def test_a_run_goes_on_within_the_bounds_that_are_given_now():
    start = np.array([-1.2, 1.0])
    begun = tfgrad.minimize(rosenbrock, start, bounds=(-2, 0.5), steps=4)

    same = tfgrad.minimize(rosenbrock, begun, bounds=(-2, 0.5))
    wider = tfgrad.minimize(rosenbrock, begun, bounds=(-2, 0.8))

    whole = tfgrad.minimize(rosenbrock, start, bounds=(-2, 0.5))
    np.testing.assert_array_equal(same.x, whole.x)
    assert same.nfev == whole.nfev
    np.testing.assert_allclose(wider.x, [0.8, 0.64])
