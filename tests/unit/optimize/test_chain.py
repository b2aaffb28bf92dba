"""Chains: several methods one after the other in one run."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.methods.lbfgs import LBFGS
from tfgrad.optimize.options import Options

START = np.full(4, -1.2)


def rosenbrock(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def minimized(method, **options):
    return tfgrad.minimize(rosenbrock, START, method=method, **options)


def test_adam_then_lbfgs_is_each_of_them_in_turn():
    chain = minimized([("adam", 150), "lbfgs"], learning_rate=0.01)

    adam = minimized("adam", learning_rate=0.01, steps=150)
    lbfgs = tfgrad.minimize(rosenbrock, adam.x)
    both = [*adam.history["fun"], *lbfgs.history["fun"][1:]]
    np.testing.assert_array_equal(chain.history["fun"], both)
    np.testing.assert_array_equal(chain.history["step"], np.arange(chain.nit + 1))
    assert np.all(np.diff(chain.history["seconds"]) >= 0)
    assert (chain.status, chain.success) == ("converged", True)
    assert chain.nit == 150 + lbfgs.nit
    assert chain.nfev == adam.nfev + lbfgs.nfev
    assert f"Steps: adam 150, lbfgs {lbfgs.nit}." in chain.message


def test_a_chain_traces_its_function_once():
    calls = []

    def counted(x):
        calls.append(x)
        return rosenbrock(x)

    stages = [("adam", 150), ("sgd", 5), "lbfgs"]
    tfgrad.minimize(counted, START, method=stages, learning_rate=1e-4)

    assert len(calls) == 1


def test_entries_without_a_number_share_the_steps():
    result = minimized(["lbfgs", ("adam", 7), "nadam"], steps=60)

    assert result.nit == 60 + 7
    assert result.status == "steps"


@pytest.mark.parametrize(("gtol", "nit"), [(None, 300), (1e-6, 200)])
def test_a_rule_of_the_users_ends_the_run_and_a_methods_own_its_stage(gtol, nit):
    result = minimized(["lbfgs", ("sgd", 100)], learning_rate=1e-9, gtol=gtol)

    alone = minimized("lbfgs", gtol=gtol)
    assert result.nit == alone.nit + (nit - 200)
    assert result.status == ("steps" if gtol is None else "gtol")


def test_a_stage_that_can_do_no_better_hands_over():
    def kinked(x):
        return tf.abs(x - 1.0) + 0.1 * x**2

    chain = tfgrad.minimize(kinked, np.float64(3.0), method=["lbfgs", ("sgd", 20)])

    assert chain.status == "steps"
    assert "sgd 20" in chain.message


def test_what_is_not_finite_ends_the_whole_run():
    result = tfgrad.minimize(
        tf.math.log, 3.0, method=[("sgd", 500), "lbfgs"], learning_rate=0.5
    )

    assert result.status == "nonfinite"
    assert "lbfgs" not in result.message


def test_a_callback_and_the_time_end_the_whole_run():
    stopped = minimized([("sgd", 5), "lbfgs"], callback=lambda state: state.step == 3)
    timed = minimized([("sgd", 5), "lbfgs"], seconds=0.0)

    assert (stopped.status, stopped.nit) == ("callback", 3)
    assert (timed.status, timed.nit) == ("seconds", 0)


def test_instances_keep_their_own_learning_rate_in_a_chain():
    kept = keras.optimizers.SGD(1e-4)
    chain = minimized([(kept, 10), ("sgd", 10)], learning_rate=1e-5)

    first = minimized(kept, steps=10)
    second = tfgrad.minimize(
        rosenbrock, first.x, method="sgd", learning_rate=1e-5, steps=10
    )
    np.testing.assert_array_equal(chain.x, second.x)


def test_a_log_is_one_run_named_after_the_chain(tmp_path):
    result = minimized([("sgd", 5), "lbfgs"], learning_rate=1e-4, log=tmp_path)

    assert result.directory == tmp_path / "sgd+lbfgs"
    frame = tfgrad.load_run(result.directory, wide=True)
    np.testing.assert_array_equal(
        frame["loss"].dropna(), np.float32(result.history["fun"])
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ([], "A chain is a list"),
        (("adam", 1000), 'try: method=\\[\\("adam", 1000\\), "lbfgs"\\]'),
        ([["adam"]], "A chain is a list"),
        ([("adam", 1, 2)], "A chain is a list"),
        ([("adam", 0), "lbfgs"], "steps=0"),
        ([("adam", "10"), "lbfgs"], "steps='10'"),
        ([("adam", 10), "lbfg"], "'lbfgs'"),
        ([3], "an optimizer with `apply_gradients`"),
    ],
    ids=str,
)
def test_a_bad_chain_is_refused_before_anything_is_traced(method, message):
    def never(x):
        raise AssertionError

    with pytest.raises(InvalidArgumentError, match=message):
        tfgrad.minimize(never, START, method=method)


def test_a_learning_rate_needs_a_stage_that_takes_it():
    with pytest.raises(InvalidArgumentError, match="by name in a chain"):
        minimized(["lbfgs", keras.optimizers.SGD()], learning_rate=0.1)


def test_minimize_and_descend_have_the_same_options():
    minimize = dict(inspect.signature(tfgrad.minimize).parameters)
    options = inspect.signature(Options).parameters  # what `descend` takes

    assert minimize.keys() - options.keys() == {"f", "x0", "callback", "unknown"}
    for name, option in options.items():
        assert minimize[name].default == option.default


def test_the_class_of_an_optimizer_is_the_optimizer_of_that_name():
    by_name = minimized("adam", learning_rate=0.01, steps=3)
    by_class = minimized(keras.optimizers.Adam, learning_rate=0.01, steps=3)

    np.testing.assert_array_equal(by_class.history["fun"], by_name.history["fun"])


@pytest.mark.parametrize("memory", [0, -1, 1.5, "10"])
def test_a_memory_of_lbfgs_that_is_no_count_is_refused(memory):
    with pytest.raises(InvalidArgumentError, match=r"at least 1[\s\S]*memory=10"):
        LBFGS(memory)
