"""Each case marks with `# HERE` the line that `explain` has to find."""

# ruff: noqa: SIM108 (AutoGraph's `if` statements are what is tested here)

import inspect
import linecache

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfgrad.diagnosis.explain import explain
from tfgrad.errors import InvalidArgumentError

CASES = []


def case(status, op, *args):
    def register(function):
        CASES.append(pytest.param(function, status, op, args, id=function.__name__))
        return function

    return register


VECTOR = tf.constant([0.3, 1.2, 2.7])
STATE = tf.Variable([1.0, 1.0, 1.0])

# What cuts the path.


@case("cut", "Round", VECTOR)
def rounds(x):
    y = x * 2
    y = tf.round(y)  # HERE
    return tf.reduce_sum(y)


@case("cut", "Floor", VECTOR)
def floors(x):
    return tf.reduce_sum(tf.floor(x))  # HERE


@case("cut", "Ceil", VECTOR)
def ceils(x):
    return tf.reduce_sum(tf.math.ceil(x))  # HERE


@case("cut", "FloorDiv", VECTOR)
def divides_to_whole_numbers(x):
    return tf.reduce_sum(x // 2.0)  # HERE


@case("cut", "ArgMax", VECTOR)
def takes_the_position_of_the_largest(x):
    best = tf.argmax(x)  # HERE
    return tf.cast(best, tf.float32)


@case("cut", "TopKV2", VECTOR)
def sorts_for_the_order(x):
    order = tf.argsort(x)  # HERE
    return tf.reduce_sum(tf.cast(order, tf.float32))


@case("cut", "Greater", VECTOR)
def compares(x):
    is_large = x > 1.0  # HERE
    return tf.reduce_sum(tf.cast(is_large, tf.float32))


@case("cut", "Greater", VECTOR)
def counts_by_where(x):
    return tf.reduce_sum(
        tf.where(
            x > 1.0,  # HERE
            1.0,
            0.0,
        )
    )


@case("cut", "Cast", VECTOR)
def casts_to_integers(x):
    whole = tf.cast(x, tf.int32)  # HERE
    return tf.reduce_sum(tf.cast(whole, tf.float32))


@case("cut", "Cast", VECTOR)
def looks_up_by_index(x):
    table = tf.constant([1.0, 2.0, 3.0])
    rows = tf.cast(x, tf.int32)  # HERE
    return tf.reduce_sum(tf.gather(table, rows))


@case("cut", "ArgMax", VECTOR)
def encodes_one_hot(x):
    winner = tf.argmax(x)  # HERE
    return tf.reduce_sum(tf.one_hot(winner, 3) * [1.0, 2.0, 3.0])


@case("cut", "LowerBound", VECTOR)
def searches_a_sorted_list(x):
    found = tf.searchsorted([0.0, 1.0, 2.0], x)  # HERE
    return tf.reduce_sum(tf.cast(found, tf.float32))


@case("cut", "HistogramFixedWidth", VECTOR)
def counts_a_histogram(x):
    counts = tf.histogram_fixed_width(x, [0.0, 3.0], nbins=3)  # HERE
    return tf.reduce_max(tf.cast(counts, tf.float32))


@case("cut", "Multinomial", VECTOR)
def draws_a_category(x):
    drawn = tf.random.categorical(x[None], 5)  # HERE
    return tf.reduce_mean(tf.cast(drawn, tf.float32))


@case("cut", "PyFunc", VECTOR)
def calls_numpy_function(x):
    y = tf.numpy_function(np.sin, [x], tf.float32)  # HERE
    return tf.reduce_sum(y)


@case("cut", "", VECTOR)
def calls_numpy(x):
    y = np.sin(x)  # HERE
    return tf.reduce_sum(y)


@case("cut", "", VECTOR)
def leaves_by_the_numpy_method(x):
    y = x.numpy() * 2  # HERE
    return tf.reduce_sum(y)


@case("cut", "", tf.constant(1.5))
def makes_a_python_number(x):
    y = float(x)  # HERE
    return tf.constant(y) * 2


@case("cut", "AssignVariableOp", VECTOR)
def passes_the_value_through_a_variable(x):
    STATE.assign(x)  # HERE
    return tf.reduce_sum(STATE * 2)


@case("cut", "AssignAddVariableOp", VECTOR)
def adds_the_value_to_a_variable(x):
    STATE.assign_add(x)  # HERE
    return tf.reduce_sum(STATE.read_value())


@case("cut", "Unique", VECTOR)
def drops_duplicates(x):
    values, _ = tf.unique(x)  # HERE
    return tf.reduce_sum(values)


@case("cut", "Lu", tf.constant([[2.0, 1.0], [1.0, 3.0]]))
def decomposes(x):
    factors, _ = tf.linalg.lu(x)  # HERE
    return tf.reduce_sum(factors)


@case("cut", "ResizeArea", tf.reshape(tf.range(16.0), [1, 4, 4, 1]))
def resizes_by_area(x):
    y = tf.image.resize(x, [2, 2], method="area")  # HERE
    return tf.reduce_sum(y)


@tf.custom_gradient
def without_gradient(x):
    return x * 2, lambda dy: None


@case("cut", "IdentityN", VECTOR)
def has_a_custom_gradient_of_none(x):
    y = without_gradient(x)  # HERE
    return tf.reduce_sum(y)


@case("cut", "Round", VECTOR)
def branches(x):
    if tf.reduce_sum(x) > 0:
        y = tf.round(x)  # HERE
    else:
        y = tf.floor(x)
    return tf.reduce_sum(y)


@case("cut", "Greater", VECTOR)
def branches_on_it(x):
    if tf.reduce_sum(x) > 0:  # HERE
        y = tf.constant(1.0)
    else:
        y = tf.constant(2.0)
    return y


# What makes the gradient exactly zero.


@case("zero", "Sign", VECTOR)
def takes_the_sign(x):
    return tf.reduce_sum(tf.sign(x))  # HERE


@case("zero", "Relu", -VECTOR)
def is_a_dead_relu(x):
    h = tf.nn.relu(x)  # HERE
    return tf.reduce_sum(h * [1.0, 2.0, 3.0])


@case("zero", "Sigmoid", VECTOR * 1000)
def saturates(x):
    p = tf.sigmoid(x)  # HERE
    return tf.reduce_sum(p)


@case("zero", "EagerPyFunc", VECTOR)
def calls_numpy_in_py_function(x):
    y = tf.py_function(lambda x: np.sin(x.numpy()), [x], tf.float32)  # HERE
    return tf.reduce_sum(y)


@case("cut", "Round", VECTOR)
def loops_over_round(x):
    for _ in tf.range(3):
        x = tf.round(x) + 1.0  # HERE
    return tf.reduce_sum(x)


@case("zero", "Relu", -VECTOR)
def dies_in_a_branch(x):
    if tf.reduce_sum(x) < 0:
        y = tf.nn.relu(x)  # HERE
    else:
        y = x
    return tf.reduce_sum(y * 2)


@case("zero", "Maximum", VECTOR)
def clips_everything(x):
    return tf.reduce_sum(tf.clip_by_value(x, 5.0, 6.0))  # HERE


@case("zero", "Mul", tf.zeros([3]))
def starts_at_zero(x):
    return tf.reduce_sum(x * x)  # HERE


# What makes it NaN or infinite.


@case("non-finite", "Log", tf.constant([0.0, 1.0]))
def takes_a_log_behind_where(x):
    y = tf.math.log(x)  # HERE
    return tf.reduce_sum(tf.where(x > 0, y, 0.0))


@case("non-finite", "RealDiv", tf.constant([0.0, 1.0]))
def divides_behind_where(x):
    y = 1.0 / x  # HERE
    return tf.reduce_sum(tf.where(x > 0, y, 0.0))


@case("non-finite", "Pow", tf.constant([0.0, 1.0]))
def takes_a_root_by_power_behind_where(x):
    y = x**0.5  # HERE
    return tf.reduce_sum(tf.where(x > 0, y, 0.0))


@case("non-finite", "Acos", tf.constant([1.0, 0.5]))
def takes_acos_behind_where(x):
    y = tf.acos(x)  # HERE
    return tf.reduce_sum(tf.where(x < 1, y, 0.0))


@case("non-finite", "Atan2", tf.constant([0.0, 0.5]))
def takes_atan2_behind_where(x):
    y = tf.atan2(x, x)  # HERE
    return tf.reduce_sum(tf.where(x > 0, y, 0.0))


@case("non-finite", "Lgamma", tf.constant([0.0, 0.5]))
def takes_lgamma_behind_where(x):
    y = tf.math.lgamma(x)  # HERE
    return tf.reduce_sum(tf.where(x > 0, y, 0.0))


@case("non-finite", "Sqrt", tf.zeros([3]))
def takes_the_norm_at_zero(x):
    return tf.norm(x)  # HERE


@case("non-finite", "Sqrt", tf.ones([3]))
def takes_the_deviation_of_equal_numbers(x):
    return tf.math.reduce_std(x)  # HERE


@case("non-finite", "Sqrt", tf.constant([0.0, 1.0]))
def uses_it_twice(x):
    y = tf.sqrt(x)  # HERE
    return tf.reduce_sum(x * x + y)


@case("non-finite", "Sqrt", tf.constant([0.0, 1.0]))
def spoils_it_in_a_branch(x):
    if tf.reduce_sum(x) > 0:
        y = tf.sqrt(x)  # HERE
    else:
        y = x
    return tf.reduce_sum(y * 2)


@case("non-finite", "Sqrt", tf.constant([0.0, 1.0]))
def spoils_it_in_a_loop(x):
    y = x
    for _ in tf.range(3):
        y = tf.sqrt(y) + 1.0  # HERE
    return tf.reduce_sum(y * 2)


def marked_line(function):
    lines, start = inspect.getsourcelines(
        getattr(function, "python_function", function)
    )
    return start + next(i for i, line in enumerate(lines) if "# HERE" in line)


@pytest.mark.parametrize(("function", "status", "op", "args"), CASES)
def test_the_op_and_the_line_are_found(function, status, op, args):
    finding = explain(function, *args).findings[-1]

    assert finding.status == status
    assert finding.culprit.op == op
    assert finding.culprit.where.file == __file__
    assert finding.culprit.where.number == marked_line(function)
    assert finding.culprit.where.source in inspect.getsource(function)


@case("zero", "StatelessWhile", VECTOR)
def maps_round(x):
    y = tf.map_fn(tf.round, x)  # HERE
    return tf.reduce_sum(y)


@case("non-finite", "StatelessWhile", tf.constant([1.0, 0.0, 2.0]))
def scans_a_root(x):
    y = tf.scan(lambda a, b: tf.sqrt(a * b), x)  # HERE
    return y[-1]


# Where the op may be hidden.


@tf.function
def rounds_inside(x):
    return tf.round(x)  # HERE


@tf.function
def rounds_in_a_branch_inside(x):
    if tf.reduce_sum(x) > 0:
        y = tf.round(x)  # HERE
    else:
        y = tf.floor(x)
    return y


@tf.function(jit_compile=True)
def rounds_inside_compiled(x):
    return tf.round(x)  # HERE


@tf.function
def takes_a_root_in_a_branch_inside(x):
    if tf.reduce_sum(x) == 0:
        y = tf.sqrt(x)  # HERE
    else:
        y = x
    return y


@tf.function
def takes_a_log_in_a_loop_inside(x):
    for _ in tf.range(5):
        x = tf.math.log(x)  # HERE
    return x


class Rounding(keras.layers.Layer):
    def call(self, x):
        return tf.round(x)  # HERE


def scale_and_round(x):
    return tf.round(x * 2)  # HERE


@pytest.mark.parametrize(
    ("inner", "status", "op"),
    [
        (rounds_inside, "cut", "Round"),
        (rounds_in_a_branch_inside, "cut", "Round"),
        (rounds_inside_compiled, "cut", "Round"),
        (takes_a_root_in_a_branch_inside, "non-finite", "Sqrt"),
        (takes_a_log_in_a_loop_inside, "non-finite", "Log"),
    ],
)
def test_the_line_inside_of_a_nested_function_is_found(inner, status, op):
    def outer(x):
        return tf.reduce_sum(inner(x) * 2)

    finding = explain(outer, tf.zeros([3])).findings[0]

    assert (finding.status, finding.culprit.op) == (status, op)
    assert finding.culprit.where.number == marked_line(inner)


@pytest.mark.parametrize(
    ("layer", "code"),
    [(Rounding(), Rounding), (keras.layers.Lambda(scale_and_round), scale_and_round)],
)
def test_the_line_inside_of_a_keras_layer_is_found(layer, code):
    dense = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input([3]), dense, layer])

    report = explain(lambda: tf.reduce_sum(model(tf.ones([4, 3]))), wrt=model)

    assert [finding.status for finding in report.findings] == ["cut", "cut"]
    assert report.findings[0].name.endswith("/kernel")
    assert report.findings[0].culprit.where.number == marked_line(code)


def test_a_dead_keras_model_is_explained_layer_by_layer():
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(
        2, activation="relu", bias_initializer=lambda *a, **k: tf.fill([2], -100.0)
    )
    model = keras.Sequential([keras.Input([3]), first, keras.layers.Dense(1)])

    report = explain(lambda x: tf.reduce_sum(model(x)), tf.ones([4, 3]), wrt=model)

    assert [f.status for f in report.findings] == ["zero", "zero", "zero", "connected"]
    assert {f.culprit.op for f in report.findings[:2]} == {"Relu"}


def test_the_source_of_a_notebook_cell_is_shown():
    cell = "def cell(x):\n    y = tf.round(x)\n    return y\n"
    file = "<ipython-input-3-cell>"
    linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)
    names = {"tf": tf}
    exec(compile(cell, file, "exec"), names)

    finding = explain(names["cell"], 2.5).findings[0]

    assert str(finding.culprit.where) == "<ipython-input-3-cell>:2, `y = tf.round(x)`"


# What is not cut.


def test_an_argument_that_is_not_used_is_told_from_one_that_is_stopped():
    report = explain(lambda x, y, z: x + tf.stop_gradient(y), 1.0, 2.0, 3.0)

    assert [f.status for f in report.findings] == ["connected", "stopped", "unused"]


def test_a_variable_that_was_replaced_by_a_tensor_is_unused():
    variable = tf.Variable(3.0)
    x = variable + 1

    report = explain(lambda: x**2, wrt=variable)

    assert [finding.status for finding in report.findings] == ["unused"]
    assert "x.assign(...)" in str(report)


def test_the_variables_that_a_function_reads_are_found():
    weight, bias = tf.Variable(2.0, name="weight"), tf.Variable(1.0, name="bias")

    report = explain(lambda: weight * 3 + tf.round(bias))

    statuses = {finding.name: finding.status for finding in report.findings}
    assert statuses == {"weight": "connected", "bias": "cut"}


def test_integer_arguments_are_named_as_such():
    report = explain(lambda x, n: tf.reduce_sum(x[: n[0]]), VECTOR, tf.constant([2]))

    assert [f.status for f in report.findings] == ["connected", "integer"]


def test_an_integer_variable_is_named_as_such():
    variable = tf.Variable(3, name="count")

    report = explain(lambda: tf.cast(variable, tf.float32) ** 2)

    assert [(f.name, f.status) for f in report.findings] == [("count", "integer")]
    assert "tf.cast" in str(report)


def test_a_numpy_detour_cuts_only_what_takes_it():
    report = explain(lambda x, t: x * np.sin(t), 2.0, 3.0)

    assert [finding.status for finding in report.findings] == ["connected", "cut"]


def test_a_function_with_an_integer_answer_is_explained():
    report = explain(lambda x: tf.argmax(x), VECTOR)

    assert (report.findings[0].status, report.findings[0].culprit.op) == (
        "cut",
        "ArgMax",
    )


def test_a_value_that_is_not_finite_is_traced_to_its_origin():
    report = explain(
        lambda x: tf.reduce_sum(tf.math.log(x) * 2), tf.constant([-1.0, 1])
    )

    assert report.findings[0].name == "the value"
    assert report.findings[0].culprit.op == "Log"


def test_a_variable_that_holds_nan_is_blamed_itself():
    variable = tf.Variable(float("nan"))

    report = explain(lambda: tf.sqrt(variable), wrt=variable)

    assert report.findings[0].culprit.op == "ReadVariableOp"


# What is left behind, and what is refused.


def test_variables_and_flags_are_as_before():
    STATE.assign([1.0, 1.0, 1.0])
    explain(passes_the_value_through_a_variable, VECTOR)

    assert STATE.numpy().tolist() == [1.0, 1.0, 1.0]
    assert not tf.config.functions_run_eagerly()


@pytest.mark.parametrize("returned", [None, "text", [1.0, tf.constant(2.0)]])
def test_a_function_that_does_not_return_one_tensor_is_refused(returned):
    with pytest.raises(InvalidArgumentError, match="must return one tensor"):
        explain(lambda x: returned, 1.0)


def test_a_function_without_inputs_is_refused():
    with pytest.raises(InvalidArgumentError, match="reads no trainable variable"):
        explain(lambda: tf.constant(1.0))


def test_a_called_function_is_refused():
    with pytest.raises(InvalidArgumentError, match="with f not called"):
        explain(tf.constant(1.0), 1.0)


def test_a_call_inside_of_tf_function_is_refused():
    @tf.function(autograph=False)
    def compiled(x):
        explain(tf.sin, x)
        return x

    with pytest.raises(InvalidArgumentError, match=r"outside of tf\.function"):
        compiled(tf.constant(1.0))


def test_flags_are_as_before_after_an_error_too():
    def breaks(x):
        raise RuntimeError("a bug of the user's")

    with pytest.raises(RuntimeError, match="a bug of the user's"):
        explain(breaks, 1.0)
    assert not tf.config.functions_run_eagerly()


def test_many_explanations_are_made_without_a_word_on_retracing(caplog):
    for _ in range(6):
        explain(lambda x: tf.where(x > 0, x * tf.math.log(x), 0.0), 0.0)

    assert [record.getMessage() for record in caplog.records] == []


def test_what_is_not_verified_is_said():
    random = explain(lambda x: tf.reduce_sum(x * tf.random.normal([2])), [1.0, 2.0])
    fixed = explain(lambda x: tf.reduce_sum(x**2), [1.0, 2.0])

    assert "not verified: RandomStandardNormal at test_explain.py" in str(random)
    assert "RandomStandardNormal" in random._repr_html_()
    assert fixed.note == ""


def test_the_arguments_for_which_a_tf_function_was_traced_again_are_named():
    @tf.function
    def f(x, scale=1.0):
        return tf.reduce_sum(x) * scale

    x = tf.constant([1.0, 2.0])
    f(x)
    assert explain(f, x).note == ""  # and explaining it is no trace of it
    for scale in (2.0, 3.0, 4.0):
        f(x, scale)

    note = explain(f, x).note
    assert note.startswith("`f` was traced 4 times, for `scale` = 1.0, 2.0, 3.0 ...:")
    f(tf.constant(1.0))
    assert "for `x` = float32 of shape (2,), float32 of shape () and" in (
        explain(f, x).note
    )


def test_a_tf_function_that_was_traced_again_for_no_argument_is_noted():
    made = []

    @tf.function
    def f(x):
        if not made:  # variables are made at the first call: it is traced twice
            made.append(tf.Variable(2.0))
        return made[0] * x

    f(tf.constant(3.0))
    assert "traced 2 times, as one that creates variables" in explain(f, 3.0).note


def test_a_call_without_a_number_that_fails_is_refused():
    with pytest.raises(
        InvalidArgumentError, match=r"(?s)no float argument; `f` raised TypeError.*try:"
    ):
        explain(lambda x: x * x, None)
