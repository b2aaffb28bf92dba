"""SciPy's methods behind the loop: iterations, endings, errors."""

import importlib.util
import threading

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError

START = np.array([-1.2, 1.0])


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def running():
    return [t for t in threading.enumerate() if "_work" in t.name]


def test_steps_target_seconds_and_callback_end_it_as_they_do_others():
    method = {"x0": START, "method": "scipy:bfgs"}
    three = tfgrad.minimize(rosenbrock, **method, steps=3)
    target = tfgrad.minimize(rosenbrock, **method, target=1.0)
    timed = tfgrad.minimize(rosenbrock, **method, seconds=0.0)
    asked = tfgrad.minimize(rosenbrock, **method, callback=lambda s: s.step == 2)

    assert (three.status, three.nit, three.success) == ("steps", 3, False)
    assert target.status == "target"
    assert target.fun <= 1.0 < target.history["fun"][-2]
    assert timed.status == "seconds"
    assert (asked.status, asked.nit) == ("callback", 2)
    np.testing.assert_array_equal(three.x, three.history["x"][3])


def test_descend_yields_iterations_and_leaving_it_ends_scipy():
    states = tfgrad.descend(rosenbrock, START, method="SciPy:BFGS", every=2)
    seen = [next(states) for _ in range(3)]
    states.close()

    assert [state.step for state in seen] == [0, 2, 4]
    assert seen[0].fun > seen[1].fun > seen[2].fun
    for thread in running():
        thread.join(timeout=5)
    assert not running()


def test_variables_are_at_the_iterate_whenever_the_callback_looks():
    x = tf.Variable(START)
    seen = []

    tfgrad.minimize(
        lambda: (rosenbrock(x), {"first": x[0]}),
        wrt=x,
        has_aux=True,
        method="scipy:l-bfgs-b",
        callback=lambda state: seen.append(np.array_equal(state.x, x)),
    )

    assert all(seen)
    np.testing.assert_allclose(x, [1, 1], atol=1e-5)  # SciPy's own tolerance


def test_the_objective_is_traced_once_and_evaluations_are_not_wasted():
    def f(x):
        f.traces += 1
        return rosenbrock(x)

    f.traces = 0

    result = tfgrad.minimize(f, START, method="scipy:bfgs")

    assert f.traces == 1
    assert result.nfev < 45  # SciPy alone: 40 until its own rule


def test_an_error_in_f_reaches_the_caller_and_scipy_is_ended():
    def broken(x):
        return tf.debugging.check_numerics(tf.math.log(x[0]), "mine")

    with pytest.raises(tf.errors.InvalidArgumentError, match="mine"):
        tfgrad.minimize(broken, [1.0], method="scipy:bfgs", jit=False)
    for thread in running():
        thread.join(timeout=5)
    assert not running()


def test_a_start_that_is_not_finite_and_a_saddle():
    nan = tfgrad.minimize(lambda x: tf.math.log(x[0]), [-1.0], method="scipy:cg")
    saddle = tfgrad.minimize(
        lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, np.zeros(2), method="scipy:bfgs"
    )

    assert (nan.status, nan.nit) == ("nonfinite", 0)
    assert saddle.success
    assert saddle.fun == pytest.approx(-0.25)


def test_a_start_out_of_bounds_is_moved_in():
    result = tfgrad.minimize(
        lambda x: x[0] - tf.math.log(x[0]), np.array([-3.0]),
        method="scipy:l-bfgs-b", bounds=(1e-3, None),
    )  # fmt: skip

    assert result.history["x"][0] == 1e-3
    assert float(result.x[0]) == pytest.approx(1, abs=1e-5)


def test_a_chain_hands_over_to_scipy_and_its_log_has_a_plain_name(tmp_path):
    result = tfgrad.minimize(
        rosenbrock, START, method=[("adam", 5), "scipy:slsqp"], log=tmp_path
    )

    assert result.success
    assert "adam 5, scipy-slsqp" in result.message
    assert ":" not in result.directory.name


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "scipy:bfsg"}, "scipy:bfgs"),
        ({"method": "slsqp"}, "scipy:slsqp"),
        ({"method": "newton", "bounds": (0, 1)}, "knows no bounds(.|\n)*'lbfgs'"),
        (
            {"method": "scipy:bfgs", "constraints": {"type": "eq", "fun": rosenbrock}},
            "knows no constraints(.|\n)*scipy:slsqp",
        ),
        ({"method": "scipy:tnc", "bounds": 3.0}, "a pair"),
        ({"method": "scipy:tnc", "bounds": (1.0, 0.0)}, "above its upper"),
        ({"method": "scipy:tnc", "bounds": ([0, 0, 0], None)}, r"leaves of shapes \(2"),
        ({"method": "scipy:slsqp", "constraints": rosenbrock}, "SciPy's dicts"),
        ({"method": "scipy:slsqp", "learning_rate": 0.1}, "finds its own step size"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_traced(arguments, match):
    def f(x):
        raise AssertionError("traced")

    with pytest.raises(InvalidArgumentError, match=match):
        tfgrad.minimize(f, START, **arguments)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(InvalidArgumentError, match="pip install 'tfgrad"):
        tfgrad.minimize(rosenbrock, START, method="scipy:bfgs")
