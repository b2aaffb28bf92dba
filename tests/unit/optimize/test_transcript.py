"""SciPy's methods go on to the last bit: they are told again what they were told."""

import pickle

import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tests.unit.optimize.test_checkpoint import assert_same
from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize import checkpoint as checkpoint_module
from tfgrad.optimize import transcript as transcript_module

START = np.array([-1.2, 1.0, 0.8])


def rosenbrock(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


SPHERE = {"type": "ineq", "fun": lambda x: 2 - tf.reduce_sum(x**2)}
PLANE = {"type": "eq", "fun": lambda x: x[0] + x[1] - 1}

FAR = {"type": "eq", "fun": lambda x: x[0] + x[1] + x[2] - 9}

RUNS = {
    "l-bfgs-b": {"bounds": (-2.0, 0.9)},
    "slsqp": {"constraints": [SPHERE, PLANE]},
    "infeasible": {"method": "scipy:slsqp", "constraints": [SPHERE, FAR]},
    "trust-constr": {"constraints": [SPHERE], "steps": 25},
    "cobyqa": {"constraints": [PLANE], "steps": 30},
    "nelder-mead": {"steps": 60},
    "powell": {},
    "trust-ncg": {},
    "trust-krylov": {},
    "trust-exact": {},
    "tnc": {"steps": 30},
    "chain": {"method": [("adam", 12), "scipy:l-bfgs-b", "lbfgs"]},
}


def minimized(name, f=rosenbrock, x0=START, **options):
    method = {"method": f"scipy:{name}"}
    return tfgrad.minimize(f, x0, **{**method, **RUNS[name], **options})


def left_at(step, name, **options):
    """Leave a run after a step, by an error of the callback's."""

    def leave(state):
        if state.step == step:
            raise KeyError

    with pytest.raises(KeyError):
        minimized(name, callback=leave, **options)


@pytest.fixture(scope="module")
def whole():
    runs = {}

    def run(name):
        if name not in runs:
            runs[name] = minimized(name)
        return runs[name]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_left_goes_on_to_the_last_bit(tmp_path, whole, name):
    expected = whole(name)
    for step in (expected.nit // 2, expected.nit - 1):
        left_at(step, name, checkpoint=tmp_path)
    result = minimized(name, checkpoint=tmp_path)

    assert expected.nit > 4
    assert_same(result, expected)
    again = minimized(name, checkpoint=tmp_path)
    assert_same(again, expected)


@pytest.mark.parametrize("name", ["l-bfgs-b", "slsqp", "nelder-mead", "trust-ncg"])
def test_steps_and_more_steps_are_all_of_them_at_once(whole, name):
    begun = minimized(name, steps=4)
    left_out = {key: value for key, value in RUNS[name].items() if key == "constraints"}
    result = tfgrad.minimize(rosenbrock, begun, steps=3, **left_out)
    pickled = pickle.loads(pickle.dumps(begun))

    assert_same(result, minimized(name, steps=7))
    assert_same(tfgrad.minimize(rosenbrock, pickled, steps=3, **left_out), result)


def test_single_precision_goes_on_as_well(tmp_path):
    options = {"x0": np.float32(START), "steps": 40}
    left_at(7, "l-bfgs-b", checkpoint=tmp_path, **options)

    result = minimized("l-bfgs-b", checkpoint=tmp_path, **options)
    assert_same(result, minimized("l-bfgs-b", **options))


def test_what_scipy_was_told_is_not_evaluated_again(tmp_path):
    def counted(x):
        tf.py_function(lambda: seen.append(1), [], [])
        return rosenbrock(x)

    seen = []
    expected = minimized("tnc", counted)
    evaluations = len(seen)
    left_at(expected.nit - 1, "tnc", f=counted, checkpoint=tmp_path)
    seen.clear()
    result = minimized("tnc", counted, checkpoint=tmp_path)

    assert_same(result, expected)
    assert len(seen) < evaluations / 2


def test_a_saddle_that_was_left_begins_a_new_session(tmp_path):
    def f(x):
        return x[0] ** 2 - x[1] ** 2 + x[1] ** 4

    def run(**options):
        return tfgrad.minimize(f, np.zeros(2), method="scipy:bfgs", **options)

    for steps in (1, 2, 3):
        run(steps=steps, checkpoint=tmp_path)

    expected = run()
    assert expected.nit == 4
    assert_same(run(checkpoint=tmp_path), expected)
    assert_same(tfgrad.minimize(f, run(steps=3)), expected)


def test_a_run_that_scipy_ended_stays_ended():
    begun = minimized("slsqp", gtol=0.0)
    again = tfgrad.minimize(rosenbrock, begun, gtol=0.0, **RUNS["slsqp"])

    assert begun.status == "scipy"
    assert_same(again, begun)


def test_another_method_takes_over_from_scipy():
    begun = minimized("l-bfgs-b", steps=4)
    result = tfgrad.minimize(rosenbrock, begun, method="lbfgs")

    assert result.success
    np.testing.assert_array_equal(result.history["fun"][:5], begun.history["fun"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (-2.0, 0.8)}, r"bounds: -2.0, 0.9 before, -2.0, 0.8 now"),
        ({"bounds": None}, "bounds: .* before, none now"),
        ({"method": "scipy:tnc"}, "method: scipy:l-bfgs-b.* before, scipy:tnc"),
    ],
)
def test_a_checkpoint_of_other_limits_is_refused_by_name(tmp_path, options, message):
    left_at(2, "l-bfgs-b", checkpoint=tmp_path)

    with pytest.raises(InvalidArgumentError, match=message):
        minimized("l-bfgs-b", checkpoint=tmp_path, **options)


def test_other_constraints_are_refused_by_name():
    begun = minimized("slsqp", steps=2)

    with pytest.raises(InvalidArgumentError, match=r"constraints: ineq .* none now"):
        tfgrad.minimize(rosenbrock, begun)


def test_a_scipy_that_asks_for_something_else_is_refused(tmp_path):
    begun = minimized("slsqp", steps=4)
    other = {"type": "eq", "fun": lambda x: x[0] + x[1] - 1.5}

    with pytest.raises(InvalidArgumentError, match="told again what they were told"):
        tfgrad.minimize(rosenbrock, begun, constraints=[SPHERE, other])


def test_what_would_be_too_much_to_tell_is_forgotten_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(transcript_module, "MOST_NUMBERS", 40)
    monkeypatch.setattr(checkpoint_module, "LEAST_SECONDS", 0)
    monkeypatch.setattr(checkpoint_module, "LEAST_RATIO", 0)
    with pytest.warns(RuntimeWarning, match="last checkpoint stays"):
        result = minimized("trust-ncg", checkpoint=tmp_path)

    assert result.state is None
    with pytest.warns(RuntimeWarning, match="last checkpoint stays"):
        assert_same(minimized("trust-ncg", checkpoint=tmp_path), result)
