"""The loop: packing, rules and methods of one's own, and what is compiled how often."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.optimize import chunks, compiled, stopping
from tfgrad.optimize.chunks import GROUP, Packing
from tfgrad.optimize.methods import lbfgs
from tfgrad.optimize.methods.lbfgs import LBFGS
from tfgrad.optimize.methods.protocol import Move, Point
from tfgrad.optimize.solvers import pure
from tfgrad.optimize.stopping import Rule


def rosenbrock(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def test_a_nest_is_packed_in_few_tensors_and_comes_back():
    nest = {
        "numbers": [tf.constant(float(i)) for i in range(GROUP + 2)],
        "flag": tf.constant(True),
        "vector": tf.range(5.0),
        "empty": (),
    }
    packing = Packing(nest)

    packed = packing.pack(nest)
    again = packing.unpack(packed)

    assert len(packed) == 4  # two groups of numbers, the flag, the vector
    tf.nest.assert_same_structure(again, nest)
    for ours, theirs in zip(tf.nest.flatten(again), tf.nest.flatten(nest), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


class SteepestDescent:
    """A method of one's own, with a step of its own length."""

    name = "steepest"

    def __init__(self, rate):
        self.rate = rate

    def init(self, start):
        return Move(start.x - self.rate * start.grad)

    def update(self, new, old, state):
        return Move(new.x - self.rate * new.grad)


@pytest.mark.parametrize("bounds", [None, (-np.ones(2), np.ones(2))])
def test_a_turn_chooses_between_numbers_without_broadcasting(bounds):
    method, x = LBFGS(bounds=bounds), tf.constant([0.5, 1.0], tf.float64)
    point = Point(x, tf.reduce_sum(x**2), 2 * x)
    turn = tf.function(method.update, autograph=False)

    graph = turn.get_concrete_function(point, point, method.init(point).state).graph

    choices = [op for op in graph.get_operations() if op.type == "SelectV2"]
    assert all(op.outputs[0].shape.rank for op in choices)


def test_a_rule_and_a_method_of_ones_own_need_no_other_line(monkeypatch):
    half = Rule(
        "halved",
        "f has fallen to half of what it was, after {step} steps.",
        lambda step: step.fun <= step.first / 2,
        is_solution=True,
    )
    monkeypatch.setattr(stopping, "RULES", (*stopping.RULES, half))

    result = tfgrad.minimize(
        lambda x: tf.reduce_sum(x**2), np.ones(3), method=SteepestDescent(0.05)
    )

    assert (result.status, result.success) == ("halved", True)
    assert (
        result.message
        == f"f has fallen to half of what it was, after {result.nit} steps."
    )
    assert result.history["fun"][-1] <= 1.5 < result.history["fun"][-2]
    np.testing.assert_allclose(result.history["x"][1], 0.9)


def test_two_methods_of_one_class_do_not_share_what_is_compiled():
    slow, fast = (
        tfgrad.minimize(rosenbrock, np.zeros(2), method=SteepestDescent(rate), steps=1)
        for rate in (1e-3, 1e-4)
    )

    np.testing.assert_allclose(slow.x, 10 * np.asarray(fast.x))


def test_the_update_of_a_method_is_compiled_once_for_all_functions(monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())
    start = np.array([-1.2, 1.0])

    first = tfgrad.minimize(lambda x: rosenbrock(x), start)
    kept = dict(compiled.KEPT)
    second = tfgrad.minimize(lambda x: rosenbrock(x), start)
    tfgrad.minimize(lambda x: tf.reduce_sum((x - 3) ** 2), start)

    assert len(kept) == 3  # the first move, the rules at the start, the others
    assert kept == compiled.KEPT
    np.testing.assert_array_equal(first.history["fun"], second.history["fun"])


def test_the_update_of_lbfgs_is_compiled_once_for_any_number_of_parameters(monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())

    for n in (2, 3, 12, 41, 64):
        result = tfgrad.minimize(rosenbrock, np.full(n, 0.5), jit=False)

        np.testing.assert_allclose(result.x, np.ones(n), rtol=1e-5)
        points = result.history.get("x")  # up to ten numbers are kept
        assert points.shape == (result.nit + 1, n) if n <= 10 else points is None

    assert len([key for key in compiled.KEPT if key[0] == "turn"]) == 1


def test_the_update_of_a_fit_is_compiled_once_for_any_number_of_residuals(monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())

    def fitted(count):
        t = np.linspace(0.0, 2.0, count)
        y = 3.0 * np.exp(-t)
        return tfgrad.least_squares(lambda p: p[0] * tf.exp(-p[1] * t) - y, [1.0, 2.0])

    first = fitted(5)
    kept = dict(compiled.KEPT)
    second = fitted(9)

    assert kept == compiled.KEPT
    for result in (first, second):
        np.testing.assert_allclose(result.x, [3.0, 1.0], rtol=1e-6)


def test_a_tf_function_is_traced_once_for_all_runs_and_a_plain_one_for_each():
    traces = {"plain": 0, "tf": 0}
    factor = 1.0

    def plain(x):
        traces["plain"] += 1
        return factor * tf.reduce_sum((x - 1) ** 2)

    @tf.function
    def compiled(x):
        traces["tf"] += 1
        return tf.reduce_sum((x - 1) ** 2)

    for method in ("lbfgs", "adam", "lbfgs"):
        for f in (plain, compiled):
            tfgrad.minimize(f, np.zeros(2), method=method, steps=5)
    tfgrad.minimize(compiled, np.zeros(3), steps=5)  # another shape

    assert traces == {"plain": 3, "tf": 2}


def test_a_plain_function_is_never_answered_by_an_old_trace():
    class Model:
        centre = 1.0

        def f(self, x):
            return tf.reduce_sum((x - self.centre) ** 2)

    model = Model()
    tfgrad.minimize(model.f, [0.0])
    model.centre = 5.0

    np.testing.assert_allclose(tfgrad.minimize(model.f, [0.0]).x, [5.0], rtol=1e-5)


@tf.function
def with_slices(x):
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@tf.function
def residuals(x):
    return tf.concat([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]], axis=0)


def calls_with_slices(x):
    return with_slices(x) + tf.reduce_sum(x[:1] * 0)


COUNTING = """
import pathlib, sys
import numpy as np
import tensorflow as tf
import tfgrad
from tests_of_loop import FUNCTIONS, residuals

dump = pathlib.Path(sys.argv[1])
def count(label, name, solve, f, **options):
    counts = [len(list(dump.glob("*before_optimizations.txt")))]
    for _ in range(1 + (name == "tf.function")):
        result = solve(f, np.full(4, -1.2), steps=300, jit=True, **options)
        counts.append(len(list(dump.glob("*before_optimizations.txt"))))
    print(label, name, *np.diff(counts), result.nit)

for name, f in FUNCTIONS.items():
    for method in ("lbfgs", "newton", "sgd", "adam"):
        count(method, name, tfgrad.minimize, f, method=method)
    count("bounds", name, tfgrad.minimize, f, bounds=(-2.0, 2.0))
count("fit", "tf.function", tfgrad.least_squares, residuals)
"""

FUNCTIONS = {
    "plain": rosenbrock,
    "tf.function": with_slices,
    "calls": calls_with_slices,
}


def test_xla_compiles_the_loop_once_for_every_method(tmp_path):
    here = Path(__file__)
    (tmp_path / "tests_of_loop.py").write_text(here.read_text())
    dump = tmp_path / "xla"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    environment = {**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "3"}
    root = here.parents[3]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(tmp_path)])
    command = [sys.executable, "-c", COUNTING, str(dump)]

    run = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )

    counts = [line.split() for line in run.stdout.splitlines()]
    assert len(counts) == 16
    for method, name, first, *second, steps in counts:
        assert int(first) == 1, (method, name)
        assert int(steps) > 2
        for count in second:  # of a tf.function: what is compiled may be kept
            assert int(count) == (method in ("sgd", "adam")), method
    assert sum(len(count) == 5 for count in counts) == 6


def test_xla_sees_an_element_of_the_gradient_that_is_no_number():
    """The maximum of floats that it computes skips NaN."""

    def f(x):  # the slope at 0 of the second term is infinite times 0
        return x[0] ** 2 + tf.sqrt((x[1] - 0.25) ** 2)

    options = {"method": "sgd", "learning_rate": 0.125, "steps": 50}
    graph, xla = (
        tfgrad.minimize(f, [1.0, 0.5], jit=jit, **options) for jit in (False, True)
    )

    assert graph.status == xla.status == "nonfinite"
    assert graph.message == xla.message
    assert graph.nit == xla.nit == 1


def test_a_loop_is_compiled_once_for_all_runs_of_a_tf_function(monkeypatch):
    compilations = []
    compile_chunk = chunks.compile_chunk

    def counted(ruled, state, *, is_xla):
        compilations.append(is_xla)
        return compile_chunk(ruled, state, is_xla=is_xla)

    monkeypatch.setattr(chunks, "compile_chunk", counted)
    f = tf.function(lambda x: tf.reduce_sum((x - 1) ** 4))

    results = [tfgrad.minimize(f, np.full(3, x), jit=True) for x in (2.0, 3.0)]

    assert all(result.nit > 5 for result in results)  # in more chunks than one
    assert compilations == [True]


def test_a_run_begins_at_the_pace_of_the_run_before():
    pace = chunks.Pace()
    pace.recall(np.inf)
    assert pace.length == 1

    pace.recall(chunks.CHUNK_SECONDS / 32)
    assert pace.length == 32

    pace.took(32, chunks.CHUNK_SECONDS / 2)
    pace.recall(1.0)  # what this run has measured itself counts
    assert pace.length == 64


@pytest.mark.parametrize(
    "assertion",
    [
        lambda x: tf.debugging.assert_greater(x, 2.5),
        lambda x: tf.debugging.check_numerics(tf.math.log(x - 2.5), "below 2.5"),
    ],
    ids=["assert_greater", "check_numerics"],
)
def test_an_assertion_of_the_users_is_heeded_however_long_the_run(assertion):
    def f(x):
        with tf.control_dependencies([assertion(x)]):
            return x * x

    with pytest.raises(tf.errors.InvalidArgumentError):
        tfgrad.minimize(f, 3.0, method="sgd", learning_rate=1e-4, steps=5000)


def test_what_the_user_assigns_between_two_states_counts_in_the_next_step():
    target = tf.Variable(1.0)
    seen = []
    states = tfgrad.descend(
        lambda x: (x - target) ** 2, 0.0, method="sgd", learning_rate=0.1, steps=3
    )
    for state in states:
        seen.append(float(state.x))
        if state.step == 1:
            target.assign(11.0)

    np.testing.assert_allclose(seen, [0.0, 0.2, 2.36, 4.088], rtol=1e-6)


def test_a_pure_method_begins_anew_where_the_user_has_changed_the_function():
    target = tf.Variable([1.0, 2.0])

    def callback(state):
        if state.step == 2:
            target.assign([-5.0, 7.0])

    result = tfgrad.minimize(
        lambda x: tf.reduce_sum((x - target) ** 4), [0.0, 0.5], callback=callback
    )

    np.testing.assert_allclose(result.x, [-5.0, 7.0], atol=0.05)


@pytest.mark.parametrize("logged", [False, True])
def test_a_log_does_not_change_what_is_computed(logged, tmp_path):
    count = tf.Variable(0)

    def f(x):
        count.assign_add(1)
        return tf.reduce_sum(x**2)

    log = tmp_path if logged else None
    tfgrad.minimize(f, [3.0, 1.0], method="sgd", learning_rate=0.1, steps=30, log=log)

    assert int(count) == 30


def test_a_random_loss_goes_on_by_its_own_gradient():
    def first(x):
        return (x - 1) ** 2 + 0 * tf.random.uniform([])

    def second(x):
        return (x + 10) ** 2 + 0 * tf.random.uniform([])

    options = {"method": "sgd", "learning_rate": 0.1, "steps": 1}
    begun = tfgrad.minimize(first, 0.0, **options)
    result = tfgrad.minimize(second, begun, steps=1)

    assert float(result.x) == pytest.approx(0.2 - 0.1 * 2 * 10.2)


def test_going_on_over_data_with_another_rate_counts_epochs_right():
    x = np.linspace(-1, 1, 40).astype(np.float32)

    def loss(p, batch):
        return tf.reduce_mean((p * batch - 2 * batch) ** 2)

    begun = tfgrad.minimize(loss, 0.0, data=x, epochs=3)
    result = tfgrad.minimize(loss, begun, data=x, epochs=3, learning_rate=1e-6)

    assert list(result.epochs["epoch"]) == [1, 2, 3, 4, 5, 6]
    assert result.nit == len(result.history["fun"]) - 1 == 2 * begun.nit
    assert float(result.x) == pytest.approx(float(begun.x), abs=1e-4)


def test_rows_of_an_embedding_stay_sparse_and_are_those_of_the_dense_gradient():
    table = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    rows = np.array([[1, 1, 7], [7, 30, 1]])

    def trained(lookup):
        weights = keras.Variable(table)

        def loss(batch):
            return tf.reduce_sum(lookup(weights.value, batch) ** 2)

        tfgrad.minimize(
            loss, wrt=weights, data=[rows[:1], rows[1:]], method="sgd", epochs=3,
            learning_rate=0.1,
        )  # fmt: skip
        return weights.numpy()

    sparse = trained(tf.gather)
    dense = trained(lambda w, i: tf.tensordot(tf.one_hot(i, 50), w, 1))

    np.testing.assert_allclose(sparse, dense, rtol=1e-5)


@pytest.mark.parametrize("jit", [True, False])
def test_large_states_are_written_in_place_and_what_was_read_of_them_stays(
    monkeypatch, jit
):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())
    monkeypatch.setattr(lbfgs, "LONG", 1)  # the same sums, whatever is known of sizes
    start = np.tile([-1.2, 1.0], 2)
    plain = tfgrad.minimize(rosenbrock, start, jit=jit)
    monkeypatch.setattr(chunks, "LARGE", 1)

    states = list(tfgrad.descend(rosenbrock, start, jit=jit))
    result = tfgrad.minimize(rosenbrock, start, jit=jit)
    more = tfgrad.minimize(rosenbrock, result, steps=5, jit=jit)

    np.testing.assert_array_equal(result.history["fun"], plain.history["fun"])
    np.testing.assert_array_equal(
        [state.x for state in states], plain.history["x"][: len(states)]
    )
    np.testing.assert_array_equal(result.x, plain.x)
    assert more.nit >= result.nit


def test_a_step_by_single_calls_writes_one_pair_of_a_large_state_in_place(monkeypatch):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())
    monkeypatch.setattr(chunks, "LARGE", 8)

    tfgrad.minimize(rosenbrock, np.zeros(8), steps=2, jit=False)

    turns = [made for key, (_, made) in _turns()]
    (operations,) = [turn.concrete.graph.get_operations() for turn in turns]
    (written,) = [op for op in operations if op.type == "InplaceUpdate"]
    copied = [op for op in operations if op.type == "TensorScatterUpdate"]
    assert written.inputs[0].op.type == "Placeholder"
    assert [op for op in copied if op.outputs[0].consumers()] == []


def _turns():
    return [(key, made) for key, made in compiled.KEPT.items() if key[0] == "turn"]


def _by_numpy(x):
    """Rosenbrock's function in NumPy: XLA compiles no such thing."""

    def value(x):
        return np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    def gradient(x):
        rest, grad = x[1:] - x[:-1] ** 2, np.zeros_like(x)
        grad[:-1] = -400 * x[:-1] * rest - 2 * (1 - x[:-1])
        grad[1:] += 200 * rest
        return grad

    @tf.custom_gradient
    def f(x):
        fun = tf.ensure_shape(tf.numpy_function(value, [x], x.dtype), [])
        slopes = tf.numpy_function(gradient, [x], x.dtype)
        return fun, lambda weight: weight * tf.ensure_shape(slopes, x.shape)

    return f(x)


@pytest.mark.parametrize("bounds", [None, (-2.0, 0.5)])
@pytest.mark.parametrize(
    ("f", "jit"),
    [(rosenbrock, True), (rosenbrock, False), (rosenbrock, "auto"), (_by_numpy, False)],
)
def test_a_result_with_a_large_state_goes_on_twice_as_the_whole_run(
    monkeypatch, f, jit, bounds
):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())
    monkeypatch.setattr(chunks, "LARGE", 1)
    options = {"jit": jit, "gtol": 0.0}
    start = np.tile([-1.2, 1.0], 4)

    whole = tfgrad.minimize(f, start, steps=30, bounds=bounds, **options)
    half = tfgrad.minimize(f, start, steps=13, bounds=bounds, **options)
    again = [tfgrad.minimize(f, half, steps=17, **options) for _ in range(2)]

    for result in again:
        np.testing.assert_array_equal(result.x, whole.x)
        np.testing.assert_array_equal(result.history["fun"], whole.history["fun"])


def test_after_an_error_in_a_large_step_the_run_goes_on_from_the_step_before(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(compiled, "KEPT", OrderedDict())
    monkeypatch.setattr(chunks, "LARGE", 1)
    calls = {"count": 0, "most": 25}

    def fail():
        calls["count"] += 1
        if calls["count"] > calls["most"]:
            raise ValueError("the disk is full")
        return np.int32(0)

    def f(x):
        with tf.control_dependencies([tf.numpy_function(fail, [], tf.int32)]):
            return rosenbrock(tf.identity(x))

    start, options = np.tile([-1.2, 1.0], 4), {"steps": 40, "gtol": 0.0}
    with pytest.raises(Exception, match="the disk is full"):
        tfgrad.minimize(f, start, checkpoint=tmp_path, **options)
    calls["most"] = np.inf
    resumed = tfgrad.minimize(f, start, checkpoint=tmp_path, **options)
    whole = tfgrad.minimize(f, start, **options)

    np.testing.assert_array_equal(resumed.x, whole.x)
    np.testing.assert_array_equal(resumed.history["fun"], whole.history["fun"])


@pytest.mark.parametrize("jit", [True, False, "auto"])
def test_a_run_of_really_many_numbers_gives_what_scipy_gives(jit):
    optimize = pytest.importorskip("scipy.optimize")
    n = chunks.LARGE
    scales = np.linspace(1.0, 10.0, n)

    def f(x):
        return tf.reduce_sum(scales * (x - 1) ** 2 + (x - 1) ** 4)

    def by_numpy(x):
        d = x - 1
        return np.sum(scales * d**2 + d**4), 2 * scales * d + 4 * d**3

    half = tfgrad.minimize(f, np.zeros(n), jit=jit, steps=12)
    result = tfgrad.minimize(f, half, jit=jit, steps=12)

    options = {"jac": True, "method": "L-BFGS-B", "options": {"ftol": 0, "gtol": 1e-9}}
    theirs = optimize.minimize(by_numpy, np.zeros(n), **options)
    np.testing.assert_allclose(result.x, theirs.x, atol=1e-4)
    assert result.fun < half.fun


@pytest.mark.parametrize("large", [1, chunks.LARGE])
def test_where_xla_disagrees_the_run_goes_on_without_it(monkeypatch, large):
    start = np.tile([-1.2, 1.0], 2)
    monkeypatch.setattr(chunks, "LARGE", large)
    monkeypatch.setattr(chunks, "_agree", lambda ours, theirs: False)
    monkeypatch.setattr(pure, "SAVED", (1.0, 0.0))  # so that XLA pays at once

    result = tfgrad.minimize(rosenbrock, start)

    assert result.success
    np.testing.assert_allclose(result.x, 1, rtol=1e-4)
    steps = result.history["step"]
    np.testing.assert_array_equal(steps, np.arange(len(steps)))
    if large > 1:  # nothing of what XLA did is left
        plain = tfgrad.minimize(rosenbrock, start, jit=False)
        np.testing.assert_array_equal(result.history["fun"], plain.history["fun"])


def test_a_graph_that_stays_a_call_is_compiled_where_that_is_asked():
    """A function with a repaired gradient is called; XLA compiles it as it is."""

    def f(x):
        labels = tf.nn.softmax(x)
        loss = tf.nn.softmax_cross_entropy_with_logits(labels, x**2)
        return loss + tf.reduce_sum(x**4)

    start = np.array([0.3, 0.2, 0.5])
    results = [tfgrad.minimize(f, start, jit=jit) for jit in (True, False)]

    assert all(result.success for result in results)
    np.testing.assert_allclose(results[0].x, results[1].x, atol=1e-5)
