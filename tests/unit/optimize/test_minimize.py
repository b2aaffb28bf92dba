"""`minimize` and `descend` as a user calls them."""

import collections
import inspect
import pickle
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import (
    InvalidArgumentError,
    NoGradientError,
    RunError,
    ScalarObjectiveError,
    WrongDerivativeError,
)
from tfgrad.optimize.solvers import NO_XLA, Form
from tfgrad.optimize.solvers.optimizer import OptimizerForms

# From the founding notebook, as printed: epoch, x, f.
NOTEBOOK = """
0 3.0 11.0
1 2.3 6.59
2 1.74 3.7676
3 1.292 1.9612641
4 0.93360007 0.80520916
5 0.64688003 0.06533384
6 0.417504 -0.40818638
7 0.2340032 -0.71123934
8 0.087202564 -0.90519315
9 -0.03023795 -1.0293236
10 -0.12419036 -1.1087672
11 -0.1993523 -1.159611
12 -0.25948185 -1.1921511
13 -0.30758548 -1.2129767
14 -0.34606838 -1.226305
15 -0.37685472 -1.2348353
16 -0.40148377 -1.2402946
17 -0.421187 -1.2437885
18 -0.4369496 -1.2460246
19 -0.4495597 -1.2474558
20 -0.45964774 -1.2483717
21 -0.46771818 -1.2489579
22 -0.47417456 -1.249333
23 -0.47933966 -1.2495731
24 -0.48347172 -1.2497268
25 -0.48677737 -1.2498251
26 -0.4894219 -1.2498881
27 -0.4915375 -1.2499284
""".strip().splitlines()

FORMS = ["calls", "graph", "xla"]


def parabola(x):
    return x**2 + x - 1


@pytest.fixture
def form(request, monkeypatch):
    """Force one compiled form of the loop."""

    def form(forms, *_):
        refused = request.param == "xla" and forms.kept_with_f()[0].get(NO_XLA)
        return Form("graph" if refused else request.param)

    monkeypatch.setattr(OptimizerForms, "form", form)
    return request.param


def sgd(f, x0=None, **options):
    return tfgrad.minimize(f, x0, method="sgd", **{"learning_rate": 0.1, **options})


def test_the_founding_notebook_to_every_printed_digit():
    x = tf.Variable(3.0, trainable=True)

    @tf.function
    def f_x():
        return x**2 + x - 1

    states = tfgrad.descend(f_x, wrt=x, method="sgd", learning_rate=0.1, steps=30)
    printed = [f"{s.step} {s.x.numpy()!s} {s.fun!s}" for s in states]

    assert printed[: len(NOTEBOOK)] == NOTEBOOK
    assert len(printed) == 31


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_float64_follows_the_closed_form(form):
    result = sgd(parabola, np.float64(3.0), steps=100)

    k = np.arange(101)
    np.testing.assert_allclose(
        result.history["x"], -0.5 + 3.5 * 0.8**k, rtol=0, atol=1e-12
    )
    assert result.x.dtype == tf.float64
    assert np.array_equal(result.history["step"], k)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_function_is_traced_once_however_long_the_run(form):
    traces = []

    def f(x):
        traces.append(1)
        return parabola(x)

    result = sgd(f, 3.0, steps=5000)

    assert sum(traces) <= 2
    assert result.nit == 5000
    assert len(result.history["fun"]) == 5001


@pytest.mark.parametrize("jit", [True, False, "auto"])
def test_every_compilation_gives_the_same_run(jit):
    def rosenbrock(x):
        return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    result = sgd(rosenbrock, np.zeros(4), learning_rate=1e-3, steps=4000, jit=jit)

    x = np.zeros(4)
    for _ in range(4000):
        gradient = np.zeros(4)
        gradient[:-1] -= 400 * x[:-1] * (x[1:] - x[:-1] ** 2) + 2 * (1 - x[:-1])
        gradient[1:] += 200 * (x[1:] - x[:-1] ** 2)
        x -= 1e-3 * gradient
    np.testing.assert_allclose(result.x, x, rtol=1e-9)


def test_values_come_back_in_their_structure_and_stay_unchanged():
    Point = collections.namedtuple("Point", "w b")
    start = {"p": Point(np.ones((2, 2)), 3.0), "q": [np.float64(1), (2.0,)]}

    def f(nest):
        leaves = tf.nest.flatten(nest)
        return tf.add_n([tf.reduce_sum(leaf**2) for leaf in leaves])

    result = sgd(f, start, steps=200)

    tf.nest.assert_same_structure(result.x, start)
    tf.nest.assert_same_structure(result.grad, start)
    assert result.x["p"].w.shape == (2, 2)
    assert np.array_equal(start["p"].w, np.ones((2, 2)))
    assert result.fun < 1e-12


@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable], ids=["tf", "keras"])
def test_variables_are_updated_in_place_and_found_when_not_named(kind):
    named, found = kind([3.0, 1.0]), kind([3.0, 1.0])
    frozen = tf.Variable(1.0, trainable=False)

    sgd(lambda: tf.reduce_sum((named - frozen) ** 2), wrt=named, steps=50)
    result = sgd(lambda: tf.reduce_sum((found - frozen) ** 2), steps=50)

    np.testing.assert_allclose(np.asarray(named), 1, atol=1e-3)
    assert np.array_equal(np.asarray(named), np.asarray(found))
    assert np.array_equal(result.x, np.asarray(found))
    assert float(frozen) == 1.0


def test_a_keras_model_is_trained_in_place():
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input((2,)), *layers])
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    y = x[:, :1] * x[:, 1:]

    result = tfgrad.minimize(
        lambda: tf.reduce_mean((model(x) - y) ** 2),
        wrt=model,
        method="adam",
        learning_rate=0.01,
        steps=500,
    )

    assert result.fun < 0.1 * result.history["fun"][0]
    assert result.fun == pytest.approx(
        float(tf.reduce_mean((model(x) - y) ** 2)), rel=1e-4
    )
    assert [tuple(leaf.shape) for leaf in result.x] == [(2, 8), (8,), (8, 1), (1,)]
    assert "x" not in result.history  # 33 numbers a step are too many to keep


def test_aux_numbers_are_in_the_history_row_by_row():
    def f(x):
        return x**2, {"twice": 2 * x, "pair": tf.stack([x, -x])}

    history = sgd(f, 3.0, has_aux=True, steps=10).history

    np.testing.assert_allclose(history["twice"], 2 * history["x"])
    assert history["pair"].shape == (11, 2)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_value_that_is_not_finite_keeps_the_last_finite_point(form):
    result = sgd(tf.math.log, 3.0, learning_rate=0.5, steps=1000)

    assert result.status == "nonfinite"
    assert not result.success
    assert np.isfinite(result.fun)
    assert result.fun == pytest.approx(float(tf.math.log(result.x)), rel=1e-6)
    assert result.history["x"][-1] == result.x
    assert len(result.history["x"]) == result.nit + 1
    assert f"In step {result.nit + 1}, f became nan" in result.message


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_gradient_that_is_not_finite_stops_before_it_is_used(form):
    x = tf.Variable([1.0, 0.5])

    def f():  # sqrt has an infinite slope at 0, where relu takes it
        return tf.reduce_sum(tf.sqrt(tf.nn.relu(x)))

    result = sgd(f, wrt=x, learning_rate=1.0, steps=50)

    assert result.status == "nonfinite"
    assert "an element of the gradient became" in result.message
    assert "tf.sqrt at test_minimize.py" in result.message
    assert np.all(np.isfinite(x.numpy()))
    assert np.array_equal(result.x, x.numpy())


def test_a_start_that_is_not_finite_is_said_at_once():
    result = sgd(tf.math.log, -1.0)

    assert (result.status, result.nit) == ("nonfinite", 0)
    assert "At the start, f is nan" in result.message
    assert float(result.x) == -1.0


@pytest.mark.parametrize("has_aux", [False, True])
def test_the_line_that_made_the_value_not_finite_is_said_with_a_remedy(has_aux):
    def loss(x):
        y = tf.math.log(x["a"])
        return (y, x["b"]) if has_aux else y * x["b"]

    start = {"a": 1.0, "b": 1.0}
    result = sgd(loss, start, learning_rate=2.0, steps=5, has_aux=has_aux)

    assert "In step 1, f became nan (tf.math.log at test_minimize.py" in result.message
    assert '`y = tf.math.log(x["a"])`: an argument is not positive; try tf.' in (
        result.message
    )


def test_an_ending_is_told_where_nothing_is_to_blame():
    calls = iter([1.0, 1.0, np.nan])

    @tf.custom_gradient
    def fails_once(x):
        y = tf.py_function(lambda: next(calls, 1.0), [], tf.float32)
        return tf.reshape(y, []), lambda dy: dy

    result = sgd(fails_once, 1.0, steps=10)

    assert result.status == "nonfinite"
    assert result.message.endswith(f"point, after step {result.nit}.")


@pytest.mark.parametrize("form", FORMS, indirect=True)
@pytest.mark.parametrize(
    ("name", "bound"),
    [("gtol", 1e-3), ("ftol", 1e-6), ("xtol", 1e-4), ("target", -1.2)],
)
def test_a_rule_that_holds_stops_at_the_first_step_where_it_does(name, bound, form):
    result = sgd(parabola, np.float64(3.0), steps=1000, **{name: bound})

    free = sgd(parabola, np.float64(3.0), steps=result.nit + 5).history
    holds = {
        "gtol": free["grad_max"][1:] <= bound,
        "target": free["fun"][1:] <= bound,
        "ftol": np.abs(np.diff(free["fun"]))
        <= bound * np.maximum(1, np.abs(free["fun"][1:])),
        "xtol": np.abs(np.diff(free["x"]))
        <= bound * np.maximum(1, np.abs(free["x"][1:])),
    }[name]
    assert result.status == name
    assert result.success
    assert result.nit == np.argmax(holds) + 1


def test_a_time_budget_ends_the_run_between_two_steps():
    result = sgd(parabola, 3.0, steps=1000, seconds=0.0)

    assert (result.status, result.nit) == ("seconds", 0)


def test_a_callback_sees_each_state_of_a_short_run_and_can_stop_it():
    seen = []

    def callback(state):
        seen.append((state.step, float(state.x), state.fun))
        return state.step == 4

    result = sgd(parabola, 3.0, steps=30, callback=callback)

    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert result.status == "callback"
    assert seen[-1] == (4, float(result.x), result.fun)


def test_a_callback_may_raise_stop_iteration_or_anything_else():
    def stop(state):
        raise StopIteration

    def fail(state):
        raise KeyError("mine")

    assert sgd(parabola, 3.0, callback=stop).status == "callback"
    x = tf.Variable(3.0)
    with pytest.raises(KeyError, match="mine"):
        sgd(lambda: parabola(x), wrt=x, callback=fail)
    assert x.numpy() == pytest.approx(2.3)  # the step before it is not lost


@pytest.mark.parametrize("name", ["callbacks", "foo"])
def test_an_argument_that_descend_has_not_is_refused_in_its_name(name):
    with pytest.raises(TypeError, match=rf"descend\(\) .*'{name}'"):
        tfgrad.descend(lambda x: x**2, 3.0, **{name: None})


def test_descend_yields_the_start_every_nth_state_and_the_end():
    x = tf.Variable(3.0)
    states = tfgrad.descend(
        lambda: parabola(x), wrt=x, method="sgd", learning_rate=0.1, steps=10, every=4
    )

    steps = []
    for state in states:
        steps.append(state.step)
        assert float(state.x) == x.numpy()

    assert steps == [0, 4, 8, 10]


def test_leaving_a_descent_leaves_the_variables_at_the_last_state():
    x = tf.Variable(3.0)
    for state in tfgrad.descend(lambda: parabola(x), wrt=x, method="sgd", steps=1000):
        if state.step == 3:
            break

    assert x.numpy() == float(state.x)


def test_two_runs_are_the_same_to_the_last_bit():
    runs = [tfgrad.minimize(parabola, 3.0, method="adam", steps=4000) for _ in range(2)]

    for name in ("fun", "grad_max", "x"):
        assert np.array_equal(runs[0].history[name], runs[1].history[name])


def test_a_function_with_python_branches_is_compiled():
    def f(x):
        if x > 1:
            return x**2
        return 2 * tf.abs(x) - 1

    result = sgd(f, 3.0, steps=20)

    np.testing.assert_allclose(result.history["x"][1], 2.4, rtol=1e-6)
    assert abs(float(result.x)) <= 0.2


def test_an_optimizer_of_ones_own_is_compiled_when_its_state_is_in_variables():
    class Momentum:
        def __init__(self):
            self.velocity = None

        def apply_gradients(self, pairs):
            pairs = list(pairs)
            if self.velocity is None:
                self.velocity = [tf.Variable(tf.zeros_like(v)) for _, v in pairs]
            for (gradient, variable), velocity in zip(
                pairs, self.velocity, strict=True
            ):
                velocity.assign(0.5 * velocity - 0.1 * gradient)
                variable.assign_add(velocity)

    ours = tfgrad.minimize(parabola, 3.0, method=Momentum(), steps=200)
    kept = keras.optimizers.SGD(0.1, momentum=0.5)
    theirs = tfgrad.minimize(parabola, 3.0, method=kept, steps=200)

    np.testing.assert_allclose(
        ours.history["x"], theirs.history["x"], rtol=1e-5, atol=1e-6
    )


def test_an_optimizer_that_counts_in_python_is_not_frozen_by_a_trace():
    class Decaying:
        count = 0

        def __init__(self):
            self.count = 0

        def apply_gradients(self, pairs):
            self.count += 1
            for gradient, variable in pairs:
                variable.assign_sub(gradient / (2.0 + self.count))

    result = tfgrad.minimize(parabola, 3.0, method=Decaying(), steps=5)

    x = 3.0
    for k in range(1, 6):
        x -= (2 * x + 1) / (2 + k)
    assert float(result.x) == pytest.approx(x, rel=1e-6)


def test_the_result_prints_as_a_table_shows_itself_and_plots():
    result = sgd(parabola, 3.0, steps=30)

    assert re.search(r"status: steps \(success: False\)", repr(result))
    assert "nit, nfev: 30, 31" in repr(result)
    assert result._repr_html_().count("<tr>") == len(repr(result).splitlines())
    line = result.plot().axes[0].lines[0]
    assert np.array_equal(line.get_ydata(), result.history["fun"])


BAD_INPUT = {
    "vector": (lambda: sgd(lambda x: x * [1.0, 2.0], 3.0), "returned shape \\(2,\\)"),
    "none": (lambda: sgd(lambda x: None, 3.0), "returned NoneType"),
    "int": (lambda: sgd(lambda x: 3, 3.0), "returned int 3"),
    "numpy": (lambda: sgd(lambda x: np.float32(1), 3.0), "returned float32"),
    "int array": (lambda: sgd(parabola, np.array([1, 2])), "must be of a float dtype"),
    "string": (lambda: sgd(parabola, "3"), "must be made of float"),
    "ragged": (lambda: sgd(parabola, [[1.0], [1.0, 2.0]]), "must be rectangular"),
    "empty": (lambda: sgd(parabola, np.zeros(0)), "at least one number"),
    "empty nest": (lambda: sgd(parabola, []), "at least one number"),
    "variable": (lambda: sgd(parabola, tf.Variable(3.0)), "minimize\\(f, wrt="),
    "both": (lambda: sgd(parabola, 3.0, wrt=tf.Variable(1.0)), "Either `x0`"),
    "value as wrt": (lambda: sgd(parabola, wrt=3.0), "`wrt` names variables"),
    "no variables": (lambda: sgd(lambda: tf.constant(1.0)), "reads none"),
    "not callable": (lambda: sgd(3.0, 3.0), "function to minimise"),
    "steps 0": (lambda: sgd(parabola, 3.0, steps=0), "steps=0"),
    "steps -1": (lambda: sgd(parabola, 3.0, steps=-1), "steps=-1"),
    "steps 1.5": (lambda: sgd(parabola, 3.0, steps=1.5), "steps=1.5"),
    "steps True": (lambda: sgd(parabola, 3.0, steps=True), "steps=True"),
    "rate nan": (lambda: sgd(parabola, 3.0, learning_rate=np.nan), "positive number"),
    "rate -1": (lambda: sgd(parabola, 3.0, learning_rate=-1), "positive number"),
    "rate str": (lambda: sgd(parabola, 3.0, learning_rate="0.1"), "positive number"),
    "method": (lambda: tfgrad.minimize(parabola, 3.0, method="adm"), "'adam'"),
    "not a method": (
        lambda: tfgrad.minimize(parabola, 3.0, method=dict),
        "an optimizer with `apply_gradients`",
    ),
    "rate of instance": (
        lambda: sgd(parabola, 3.0, method=keras.optimizers.SGD()),
        "an instance has one",
    ),
    "gtol": (lambda: sgd(parabola, 3.0, gtol=-1.0), "must not be negative"),
    "target": (lambda: sgd(parabola, 3.0, target="low"), "must be a number"),
    "jit": (lambda: sgd(parabola, 3.0, jit="yes"), "`jit` must be True, False or"),
    "callback": (lambda: sgd(parabola, 3.0, callback=3), "function of a `State`"),
    "every": (lambda: tfgrad.descend(parabola, 3.0, every=0), "every=0"),
    "aux": (lambda: sgd(parabola, 3.0, has_aux=True), "pair \\(value, aux\\)"),
    "log": (lambda: sgd(parabola, 3.0, log=3), "a directory of this machine"),
}  # fmt: skip
ERRORS = (InvalidArgumentError, ScalarObjectiveError, NoGradientError)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_a_rule_what_arrived_and_what_to_try(case):
    call, message = BAD_INPUT[case]
    if case == "rate of instance":

        def call():
            return tfgrad.minimize(
                parabola, 3.0, method=keras.optimizers.SGD(), learning_rate=0.1
            )

    with pytest.raises(ERRORS, match=message) as caught:
        call()

    assert re.search(r".+\n  got: .+\n  try: .+", str(caught.value))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_a_log_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    calls = []

    def f(x):
        calls.append(1)
        return parabola(x)

    file = tmp_path / "file"
    file.write_text("mine")
    for log in (file, file / "below"):
        with pytest.raises(RunError, match="which is a file"):
            sgd(f, 3.0, log=log)

    assert not calls
    assert file.read_text() == "mine"


def test_a_log_that_the_system_refuses_leaves_the_variables_alone():
    x = tf.Variable(3.0)
    with pytest.raises(RunError, match="/proc"):  # which refuses even the superuser
        sgd(lambda: parabola(x), wrt=x, log="/proc/tfgrad")

    assert x.numpy() == 3.0


@pytest.mark.parametrize("start", [[-1.0, -1.0], [np.nan, 1.0], [np.nan] * 2, -1.0])
def test_a_start_without_a_value_has_a_log_without_a_picture(start, tmp_path):
    def f(x):
        return tf.reduce_sum(tf.math.log(x))

    result = tfgrad.minimize(f, np.array(start), log=tmp_path)

    assert (result.status, result.nit) == ("nonfinite", 0)
    assert (result.directory / "run.json").exists()


def test_a_bad_function_leaves_no_trace_on_disk_nor_in_the_variables(tmp_path):
    x = tf.Variable(3.0)
    with pytest.raises(ScalarObjectiveError):
        sgd(lambda: x * [1.0, 2.0], wrt=x, log=tmp_path / "logs")

    assert not (tmp_path / "logs").exists()
    assert x.numpy() == 3.0


FOREIGN = {
    "lr": "learning_rate=", "tol": "gtol=", "maxiter": "steps=", "jac": "nothing",
    "options": "steps=", "optimizer": "method=", "logdir": "log=",
    "callbacks": "callback=", "verbose": "log=", "jit_compile": "jit=",
    "args": "lambda x", "stpes": "steps=", "learning_rat": "learning_rate=",
    "max_iters": "steps=", "solver": "method=", "stepsize": "learning_rate=",
    "p0": "second argument", "timeout": "seconds=", "random_state": "nothing",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("call", [tfgrad.minimize, tfgrad.descend])
def test_an_argument_of_another_library_is_refused_with_ours(call, name):
    with pytest.raises(TypeError, match=rf"'{name}'(?s:.)*try: .*{FOREIGN[name]}"):
        call(parabola, 3.0, **{name: 1})


TYPED = "lr tol maxiter jac options optimizer logdir callbacks verbose jit_compile args"
CALLS = {
    "least_squares": lambda **k: tfgrad.least_squares(lambda x: x, [1.0], **k),
    "minimize_many": lambda **k: tfgrad.minimize_many(parabola, np.ones(2), **k),
    "least_squares_many": lambda **k: tfgrad.least_squares_many(
        lambda x: x, np.ones((2, 1)), **k
    ),
    "solution": lambda **k: tfgrad.solution(parabola, 1.0, **k),
    "train_step": lambda **k: tfgrad.train_step(
        parabola, wrt=tf.Variable(1.0), optimizer="sgd", **k
    ),
}


@pytest.mark.parametrize("name", TYPED.replace("optimizer ", "").split())
@pytest.mark.parametrize("call", CALLS)
def test_every_function_says_what_to_write_in_place_of(call, name):
    with pytest.raises(TypeError) as error:
        CALLS[call](**{name: 1})

    rule, hint = str(error.value).split("\n  try: ")
    assert rule == f"{call}() got an unexpected keyword argument {name!r}"
    known = list(inspect.signature(getattr(tfgrad, call)).parameters)
    written = re.findall(r"(\w+)=", hint.removeprefix("tfgrad.minimize, which has "))
    elsewhere = hint.startswith("tfgrad.minimize, which has")
    assert elsewhere or not written or written[0] in known


def test_what_is_meant_is_an_argument_of_the_function_that_was_called():
    with pytest.raises(TypeError) as error:
        tfgrad.least_squares(lambda x: x, [1.0], lr=0.1)

    assert "minimize, which has learning_rate=; least_squares has" in str(error.value)


def test_a_run_that_diverges_names_the_rate_first():
    result = sgd(lambda x: x**2, 3.0, learning_rate=10.0, steps=100)

    assert result.status == "nonfinite"
    assert re.search(r"became \S+: f grew from 9 to .* so the learning rate, 10, is",
                     result.message)  # fmt: skip
    assert "try" not in result.message  # another op is no help
    at_once = sgd(lambda x: x**2, 3.0, learning_rate=1e25, steps=100).message
    assert "In step 1, f became inf: the learning rate, 1e+25, is" in at_once


def test_a_function_of_values_without_a_start_is_told_what_to_give():
    with pytest.raises(InvalidArgumentError, match=r"minimize\(f, x0\), or"):
        tfgrad.minimize(parabola)


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x, a: a * x**2, r"got: `f\(x, a\)`\n  try: lambda x: f\(x, a\)"),
        (lambda: 3.0, r"got: `f\(\)`\n  try: wrt="),
    ],
)
def test_a_function_that_does_not_take_the_values_is_told_how_to(f, words):
    with pytest.raises(InvalidArgumentError, match=words):
        tfgrad.minimize(f, 3.0)


@pytest.mark.parametrize("data", [np.array(["a", "b"]), ["a", "b"], 1j * np.ones(2)])
@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_data_that_the_loss_cannot_compute_with_are_named(data, method):
    w = tf.Variable(1.0)

    with pytest.raises(InvalidArgumentError, match=r"got: .*; `batch` .*(str|complex)"):
        tfgrad.minimize(
            lambda batch: tf.reduce_sum((w - batch) ** 2),
            wrt=w, data=data, method=method,
        )  # fmt: skip


def test_text_is_data_for_a_loss_that_takes_text():
    w = tf.Variable(1.0)

    def loss(words):
        lengths = tf.cast(tf.strings.length(words), tf.float32)
        return (w - tf.reduce_mean(lengths)) ** 2

    result = tfgrad.minimize(loss, wrt=w, data=np.array(["a", "bcd"]), method="lbfgs")

    assert result.success
    assert float(w) == pytest.approx(2.0)


def test_a_minimisation_inside_of_a_tf_function_is_refused_by_name():
    # AutoGraph puts the error in one of its own.
    with pytest.raises(Exception, match="not inside a tf"):
        tf.function(lambda x: tfgrad.minimize(parabola, 3.0).x)(1.0)


def test_a_closed_run_is_no_log(tmp_path):
    with tfgrad.Run(tmp_path / "run") as run:
        pass

    with pytest.raises(RunError, match="A run that is closed takes no more"):
        tfgrad.minimize(parabola, 3.0, log=run)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_a_single_number_of_16_bits_is_minimised(dtype):
    def f(x):
        return 2 * (x - 1) ** 2

    x = tf.constant(3.0, dtype)
    with warnings.catch_warnings(action="error"):
        free = tfgrad.minimize(f, x)
        bounded = tfgrad.minimize(f, x, bounds=(2, None))
        by_scipy = tfgrad.minimize(f, x, method="scipy:l-bfgs-b")

    assert [float(r.x) for r in (free, bounded, by_scipy)] == [1.0, 2.0, 1.0]
    assert free.x.dtype == dtype
    assert "x: 1" in str(free)
    assert float(free.stderr) == 0.5
    assert float(free.error_of(lambda x: 2 * x)) == 1.0


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_bounds_hold_some_of_many_numbers_of_16_bits(dtype):
    def f(x):
        return tf.reduce_sum([1, 4, 2] * (x - [2, 3, -1]) ** 2)

    result = tfgrad.minimize(f, tf.constant([3, 1, 4], dtype), bounds=(0.5, None))

    np.testing.assert_array_equal(tf.cast(result.x, tf.float32), [2, 3, 0.5])


def quotient(x):
    return tf.reduce_sum(tf.math.divide_no_nan(x * x, x))  # x, but for TensorFlow at 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "newton"},
        {"method": "scipy:bfgs"},
        {"method": "sgd"},
        {"method": "adam", "jit": True},
        {"method": "scaled"},
    ],
    ids=["lbfgs", "newton", "scipy", "optimizer", "under XLA", "scaled"],
)
def test_a_first_gradient_that_is_wrong_is_refused_by_every_method(options):
    def minimize(*given, **more):
        if options.get("method") == "scaled":
            of_keras = keras.optimizers
            more["method"] = of_keras.LossScaleOptimizer(of_keras.SGD())
        return tfgrad.minimize(*given, steps=3, **{**options, **more})

    with pytest.raises(WrongDerivativeError, match="of `quotient` is wrong"):
        minimize(quotient, np.zeros(2))

    w = tf.Variable([0.0, 0.0])
    with pytest.raises(WrongDerivativeError):
        minimize(lambda: quotient(w), wrt=w)
    assert w.numpy().tolist() == [0, 0]
    assert minimize(quotient, np.zeros(2), verify=False).fun <= 0


def test_what_a_function_draws_does_not_depend_on_whether_its_gradient_is_compared():
    def ends(verify):
        tf.random.set_seed(3)
        result = tfgrad.minimize(
            lambda x: (x - tf.random.normal([])) ** 2,
            1.0,
            method="sgd",
            steps=4,
            verify=verify,
        )
        return result.history["fun"]

    np.testing.assert_array_equal(ends(True), ends(False))


@pytest.mark.parametrize("name", ["fun", "grad_max", "step", "x", 1])
@pytest.mark.parametrize("method", ["lbfgs", "sgd", "scipy:bfgs"])
def test_a_number_in_aux_takes_no_name_of_the_history(method, name):
    def f(x):
        value = tf.reduce_sum(x**2)
        return value, {name: 2 * value}

    told = rf"aux\['?{name}'?\](?s:.)*my_{name}"
    with pytest.raises(InvalidArgumentError, match=told):
        tfgrad.minimize(f, [1.0, 2.0], has_aux=True, method=method, steps=3)
