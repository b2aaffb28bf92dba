"""`minimize` over data, as a user calls it."""

import itertools
import threading
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.data import Dataset, source_of

RNG = np.random.default_rng(7)
X = RNG.normal(size=(50, 4)).astype(np.float32)
Y = (X @ np.float32([1, -2, 3, 0.5]) + 1).astype(np.float32)
"""Fifty rows: in batches of 16, the last one has two."""


def batches(epochs=1, size=16):
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, 50, size)] * epochs


def dataset(size=16):
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(size)


class Line:
    """A linear model, and its loss."""

    def __init__(self):
        self.w, self.b = tf.Variable(tf.zeros(4)), tf.Variable(0.0)
        self.traces = 0

    def loss(self, x, y):
        self.traces += 1
        return tf.reduce_mean((tf.linalg.matvec(x, self.w) + self.b - y) ** 2)

    def fit(self, data, loss=None, **options):
        options = {"method": "sgd", "learning_rate": 0.1, **options}
        return tfgrad.minimize(
            loss or self.loss, wrt=[self.w, self.b], data=data, **options
        )


def by_hand(steps, rate=0.1, w=None):
    """Return the rows of SGD on the line: losses and points in NumPy, float64."""
    w = np.zeros(5) if w is None else w
    rows = []
    for x, y in itertools.islice(itertools.cycle(batches()), steps):
        x = np.c_[x, np.ones(len(x))].astype(np.float64)
        gap = x @ w - y
        rows.append((np.mean(gap**2), w))
        w = w - rate * 2 * x.T @ gap / len(y)
    return [row[0] for row in rows], np.array([row[1] for row in rows] + [w])


def curves(directory):
    """Return what was logged, a column for each tag, by step."""
    run = tfgrad.load_run(directory)
    return run.pivot(index="step", columns="tag", values="value")


def network():
    """Return a net with all that a loss may write: moving averages and seeds."""
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.layers.Input([4], dtype="float64"),
            keras.layers.Dense(8, activation="tanh", dtype="float64"),
            keras.layers.BatchNormalization(dtype="float64"),
            keras.layers.Dropout(0.3, seed=1, dtype="float64"),
            keras.layers.Dense(1, dtype="float64"),
        ]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.05),
        lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
        lambda: keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(0.05, decay_steps=30)
        ),
    ],
    ids=["sgd", "momentum", "adam and a schedule"],
)
def test_a_net_goes_the_way_of_a_loop_written_by_hand(make):
    ours, theirs = network(), network()

    def loss_of(model):
        def loss(x, y):
            y = tf.cast(y, tf.float64)
            return tf.reduce_mean((model(x, training=True)[:, 0] - y) ** 2)

        return loss

    losses, loss, optimizer = [], loss_of(theirs), make()
    for x, y in batches(epochs=30):
        with tf.GradientTape() as tape:
            value = loss(x, y)
        losses.append(value)
        weights = theirs.trainable_variables
        optimizer.apply_gradients(
            zip(tape.gradient(value, weights), weights, strict=True)
        )

    result = tfgrad.minimize(
        loss_of(ours), wrt=ours, data=dataset(), epochs=30, method=make()
    )

    rate = 1e-6  # Keras keeps the learning rate of the loop by hand in float32
    np.testing.assert_allclose(result.history["fun"][:-1], losses, rtol=rate)
    for mine, other in zip(ours.variables, theirs.variables, strict=True):
        np.testing.assert_allclose(mine, other, rtol=rate, atol=1e-9)
    assert (
        ours.layers[2].seed_generator.state.value[1] == 30 * 4
    )  # one draw for each step


def test_row_k_is_the_point_after_k_steps_with_its_loss_on_the_next_batch():
    line = Line()

    result = line.fit(dataset(), steps=10)

    losses, points = by_hand(11)
    history = result.history
    assert np.array_equal(history["step"], np.arange(11))
    np.testing.assert_allclose(history["fun"], losses, rtol=1e-5)
    x = np.c_[history["x[0]"], history["x[1]"]]
    np.testing.assert_allclose(x, points[:-1], rtol=1e-5, atol=1e-6)
    assert result.fun == history["fun"][-1]
    assert (result.nit, result.status) == (10, "steps")


def test_the_last_row_is_on_the_last_batch_again_when_the_data_is_over():
    line = Line()

    result = line.fit(dataset(), epochs=2)

    _, points = by_hand(8)
    x, y = batches()[-1]
    last = np.mean((x @ points[-1][:4] + points[-1][4] - y) ** 2)
    np.testing.assert_allclose(result.fun, last, rtol=1e-4)
    assert (result.nit, len(result.history["fun"])) == (8, 9)
    assert (result.status, result.success) == ("epochs", False)


def test_an_epoch_has_the_means_over_its_batches_by_their_sizes():
    line = Line()

    def loss(x, y):
        return line.loss(x, y), {"rows": tf.shape(x)[0]}

    result = line.fit(
        dataset(),
        loss,
        epochs=3,
        has_aux=True,
        validation=lambda: {"b": line.b, "twice_b": 2 * line.b},
    )

    losses = np.array(by_hand(12)[0]).reshape(3, 4)
    sizes = np.array([16, 16, 16, 2])
    epochs = result.epochs
    assert epochs["epoch"].tolist() == [1, 2, 3]
    assert epochs["step"].tolist() == [4, 8, 12]
    np.testing.assert_allclose(epochs["fun"], losses @ sizes / 50, rtol=1e-5)
    np.testing.assert_allclose(epochs["rows"], sizes @ sizes / 50)
    at_ends = result.history["x[1]"][[4, 8, 12]]
    np.testing.assert_allclose(epochs["validation_b"], at_ends)
    np.testing.assert_allclose(epochs["validation_twice_b"], 2 * at_ends)


@pytest.mark.parametrize("steps", [3, 5, None], ids=["one", "two", "all"])
def test_validation_sees_the_state_that_the_epochs_steps_have_left(steps):
    writes, seen = tf.Variable(0, trainable=False), []
    line = Line()

    def loss(x, y):
        writes.assign_add(1)
        return line.loss(x, y)

    def validation():
        seen.append(int(writes))
        return 0

    line.fit(dataset(), loss, epochs=3, steps=steps, validation=validation)

    assert seen == [4, 8, 12][: 3 if steps is None else steps // 4]
    assert int(writes) == (steps or 12)


KINDS = {
    "data set": lambda: dataset(),
    "data set of unknown length": lambda: dataset().filter(lambda *_: True),
    "list": lambda: batches(),
    "lists of parts": lambda: [list(batch) for batch in batches()],
    "function": lambda: lambda: iter(batches()),
    "keras.utils.PyDataset": lambda: Pieces(),
    "one-shot generator": lambda: (batch for batch in batches(epochs=5)),
    "endless data set": lambda: dataset().repeat(),
}


class Pieces(keras.utils.PyDataset):
    """Batches by number."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return batches()[index]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_run(kind):
    line = Line()

    result = line.fit(KINDS[kind](), steps=18)

    np.testing.assert_allclose(result.history["fun"][:-1], by_hand(18)[0], rtol=1e-5)
    assert result.nit == 18
    assert line.traces == 1


def test_arrays_are_shuffled_anew_in_each_epoch_the_same_in_every_run():
    def run():
        line, seen = Line(), []

        def loss(x, y):
            return line.loss(x, y), {"first": y[0]}

        result = line.fit((X, Y), loss, batch_size=16, epochs=3, has_aux=True)
        return result.history["first"][:-1].reshape(3, 4), seen

    (first, _), (second, _) = run(), run()

    assert np.array_equal(first, second)
    assert len({tuple(epoch) for epoch in first}) == 3


def test_every_row_is_drawn_once_in_each_epoch():
    total = tf.Variable(0.0, trainable=False)
    drawn = tf.Variable(tf.zeros(50, tf.int32), trainable=False)
    w = tf.Variable(1.0)

    def loss(rows):
        drawn.scatter_nd_add(rows[:, None], tf.ones_like(rows))
        total.assign_add(1.0)
        return w**2

    tfgrad.minimize(
        loss, wrt=w, data=np.arange(50, dtype=np.int32), batch_size=16, epochs=3
    )

    assert drawn.numpy().tolist() == [3] * 50
    assert float(total) == 12


def test_a_source_goes_on_from_any_batch_of_any_epoch():
    def seeded():
        return dataset().unbatch().shuffle(50, seed=4).batch(16)

    for make in (lambda: (X, Y), seeded, batches, lambda: lambda: iter(batches())):
        size = 16 if isinstance(make(), tuple) else None
        whole = source_of(make(), size)
        epochs = [list(map(whole.batch, whole.open(epoch))) for epoch in range(3)]
        again = source_of(make(), size)
        rest = list(map(again.batch, again.open(2, 1)))

        for (x, y), (x_again, y_again) in zip(epochs[2][1:], rest, strict=True):
            assert np.array_equal(x, x_again)
            assert np.array_equal(y, y_again)


def test_the_loss_takes_a_batch_whole_or_in_parts_after_the_values():
    def mean(params, x, y):
        return tf.reduce_mean((tf.linalg.matvec(x, params["w"]) + params["b"] - y) ** 2)

    start = {"w": np.zeros(4, np.float32), "b": 0.0}
    options = {"method": "sgd", "learning_rate": 0.1, "steps": 6}
    losses = [
        (mean, dataset()),
        (lambda params, batch: mean(params, *batch), dataset()),
        (
            lambda params, batch: mean(params, batch["x"], batch["y"]),
            dataset().map(lambda x, y: {"x": x, "y": y}),
        ),
        (lambda params, *batch: mean(params, *batch), dataset()),
        (tf.function(mean), dataset()),
    ]

    runs = [tfgrad.minimize(f, start, data=data, **options) for f, data in losses]

    for run in runs:
        np.testing.assert_allclose(run.history["fun"], by_hand(7)[0], rtol=1e-5)
        assert run.x.keys() == start.keys()


def test_without_a_method_it_is_adam():
    line = Line()

    result = tfgrad.minimize(line.loss, wrt=[line.w, line.b], data=dataset(), steps=3)

    # The first step of Adam is its learning rate, 0.001, in every element.
    np.testing.assert_allclose(np.abs(result.history["x[0]"][1]), 1e-3, rtol=1e-4)


def test_variables_are_found_and_values_stay_unchanged():
    line = Line()
    result = tfgrad.minimize(
        line.loss, data=dataset(), method="sgd", learning_rate=0.1, steps=5
    )

    np.testing.assert_allclose(result.history["fun"], by_hand(6)[0], rtol=1e-5)
    assert line.traces == 1
    assert float(line.b) != 0


def test_a_function_that_leaves_tensorflow_runs_eagerly_on_the_same_way():
    line = Line()

    def loss(x, y):
        assert x.numpy().shape[1] == 4
        return line.loss(x, y)

    with pytest.warns(RuntimeWarning, match="runs eagerly"):
        result = line.fit(dataset(), loss, steps=6)

    np.testing.assert_allclose(result.history["fun"], by_hand(7)[0], rtol=1e-5)


def test_the_states_on_the_way_are_those_of_the_history():
    line, other = Line(), Line()
    history = other.fit(dataset(), steps=9).history

    states = list(
        tfgrad.descend(
            line.loss,
            wrt=[line.w, line.b],
            data=dataset(),
            method="sgd",
            learning_rate=0.1,
            every=3,
            steps=9,
            validation=lambda: 1.0,
        )
    )

    assert [state.step for state in states] == [0, 3, 6, 9]
    at_same_batch = [0, 1, 2, 3]
    for i in at_same_batch:
        step = states[i].step
        np.testing.assert_allclose(states[i].fun, history["fun"][step], rtol=1e-6)
        np.testing.assert_allclose(states[i].x[1], history["x[1]"][step], rtol=1e-6)
    assert [len(state.epochs.get("validation", [])) for state in states] == [0, 0, 1, 2]


# --- how a run ends ---


def test_the_target_is_the_mean_of_an_epoch():
    line = Line()

    result = line.fit(dataset(), epochs=100, target=0.1)

    means = result.epochs["fun"]
    assert (result.status, result.success) == ("target", True)
    assert means[-1] <= 0.1
    assert np.all(means[:-1] > 0.1)


def test_data_that_cannot_be_repeated_ends_the_run():
    line = Line()

    result = line.fit((b for b in batches()), steps=100)

    assert (result.status, result.nit, result.success) == ("data", 4, False)
    assert "ended after 4 steps" in result.message
    assert len(result.epochs["fun"]) == 1


def test_a_function_whose_second_epoch_is_empty_ends_the_run():
    line, used = Line(), iter(batches())

    result = line.fit(lambda: used, epochs=3)

    assert (result.status, result.nit) == ("data", 4)


def test_a_callback_and_a_rule_stop_between_and_in_chunks():
    line = Line()
    result = line.fit(dataset(), epochs=50, callback=lambda state: state.step >= 6)
    assert result.status == "callback"
    assert result.history["step"][-1] == result.nit

    line = Line()
    result = line.fit(dataset(), epochs=1000, gtol=1e-3)
    assert (result.status, result.success) == ("gtol", True)
    assert result.history["grad_max"][-1] <= 1e-3 < result.history["grad_max"][-2]
    np.testing.assert_array_equal(result.x[0], result.history["x[0]"][-1])


@pytest.mark.parametrize("where", ["x", "y"])
def test_a_number_that_is_not_finite_is_named_with_its_batch(where):
    x, y = X.copy(), Y.copy()
    (x if where == "x" else y)[37] = np.nan  # row 5 of batch 2
    writes = tf.Variable(0, trainable=False)
    line = Line()

    def loss(x, y):
        writes.assign_add(1)
        return line.loss(x, y)

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    result = line.fit(data, loss, epochs=3)

    assert (result.status, result.nit, result.success) == ("nonfinite", 1, False)
    assert "batch 2 of epoch 0 (counted from 0) holds nan" in result.message
    assert f"in `{where}`, row 5 of it" in result.message
    assert np.all(np.isfinite(result.history["fun"]))
    assert len(result.history["fun"]) == 2
    np.testing.assert_array_equal(line.b, result.history["x[1]"][-1])
    assert int(writes) == 2


def test_of_arrays_the_row_itself_is_named():
    y = Y.copy()
    y[29] = np.inf

    line = Line()

    result = line.fit({"x": X, "y": y}, lambda b: line.loss(b["x"], b["y"]))

    assert result.status == "nonfinite"
    assert "holds inf in `b['y']`, row 29 of the data" in result.message


def test_a_run_that_diverges_keeps_the_last_finite_point():
    line = Line()

    result = line.fit(dataset(), epochs=200, learning_rate=1e3)

    assert result.status == "nonfinite"
    assert "in `" not in result.message
    assert np.all(np.isfinite(result.x[0]))
    assert np.isfinite(result.fun)
    assert result.nit == result.history["step"][-1]


def test_an_error_of_a_generator_reaches_the_user_and_the_log_is_whole(tmp_path):
    class NotThereError(Exception):
        pass

    def broken():
        yield from batches()[:3]
        raise NotThereError("file 3")

    line = Line()
    with pytest.raises(NotThereError, match="file 3"):
        line.fit(broken, epochs=2, log=tmp_path)

    losses, points = by_hand(3)
    curve = curves(tmp_path / "sgd")["loss"].dropna()
    np.testing.assert_allclose(curve, losses, rtol=1e-5)
    np.testing.assert_allclose(line.b, points[-1][4], rtol=1e-5)


def test_loss_and_epochs_are_logged(tmp_path):
    line = Line()

    result = line.fit(dataset(), epochs=3, log=tmp_path, validation=lambda: line.b)

    run = curves(result.directory)
    np.testing.assert_allclose(run["loss"].dropna(), result.history["fun"])
    at_ends = run.loc[[4, 8, 12]]
    np.testing.assert_allclose(at_ends["epoch/loss"], result.epochs["fun"], rtol=1e-6)
    np.testing.assert_allclose(
        at_ends["epoch/validation"], result.epochs["validation"], rtol=1e-6
    )


# --- what is refused ---

BAD = {
    "arrays of different lengths": ({"data": (X, Y[:-1])}, "same number of rows"),
    "empty arrays": ({"data": (X[:0], Y[:0])}, "at least one batch"),
    "an empty data set": ({"data": dataset().take(0)}, "at least one batch"),
    "an empty list": ({"data": []}, "at least one batch"),
    "a generator of nothing": ({"data": (b for b in [])}, "at least one batch"),
    "batches of batches": ({"data": dataset(), "batch_size": 8}, "cuts arrays"),
    "batches of nothing": ({"data": (X, Y), "batch_size": 0}, "at least 1"),
    "a number": ({"data": 3}, "must be arrays, a tf.data.Dataset"),
    "an array and a word": ({"data": (X, "y")}, "must be arrays, a tf.data.Dataset"),
    "an array of objects": ({"data": np.array([object()])}, "made of arrays"),
    "three parts for two": ({"data": (X, Y, Y)}, "the loss takes a batch"),
    "a chain": (
        {"data": dataset(), "method": [("adam", 5), "lbfgs"]},
        "one method, and no chain",
    ),
    "epochs of a method that takes all at once": (
        {"data": dataset(), "method": "lbfgs", "epochs": 3},
        "takes a batch in each step",
    ),
    "endless data for a method that takes all": (
        {"data": dataset().repeat(), "method": "lbfgs"},
        "all of the data at each evaluation",
    ),
    "an iterator for a method that takes all": (
        {"data": iter([(X, Y)]), "method": "newton"},
        "all of the data at each evaluation",
    ),
    "epochs of endless data": (
        {"data": dataset().repeat(), "epochs": 2},
        "without end has no epochs",
    ),
    "a validation that is none": (
        {"data": dataset(), "validation": 3},
        "`validation` is a function",
    ),
    "a validation of something": (
        {"data": dataset(), "validation": lambda x: x},
        "`validation` is a function",
    ),
    "half an epoch": ({"data": dataset(), "epochs": 1.5}, "whole number"),
    "epochs of no data": ({"epochs": 2}, "goes with `data`"),
    "a batch size of no data": ({"batch_size": 2}, "goes with `data`"),
    "a validation of no data": ({"validation": lambda: 1}, "goes with `data`"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_refused_before_anything_is_traced(kind, tmp_path):
    options, message = BAD[kind]
    line = Line()

    with pytest.raises(InvalidArgumentError, match=message):
        tfgrad.minimize(line.loss, wrt=line.w, log=tmp_path, **options)

    assert line.traces == 0
    assert not list(tmp_path.iterdir())


def test_batches_that_change_their_shape_are_refused_where_they_come():
    line = Line()

    with pytest.raises(InvalidArgumentError, match=r"look alike.*\n.*3.*after.*4"):
        line.fit([*batches(), (X[:, :3], Y)], epochs=1)


def test_a_data_set_may_leave_dimensions_open():
    w = tf.Variable(1.0)
    lengths = [[1.0, 2.0], [1.0, 2.0, 3.0], [4.0]]
    data = tf.data.Dataset.from_generator(
        lambda: iter(lengths), output_signature=tf.TensorSpec([None], tf.float32)
    )
    traces = []

    def loss(x):
        traces.append(1)
        return w * tf.reduce_sum(x)

    result = tfgrad.minimize(loss, wrt=w, data=data, method="sgd", epochs=2)

    assert result.nit == 6
    assert len(traces) == 1


def _ahead(w):
    return tf.fill([4], w + 1.0)


FROM_W = {
    "a generator": lambda w: lambda: (_ahead(w) for _ in range(20)),
    "a data set of a generator": lambda w: tf.data.Dataset.from_generator(
        lambda: (_ahead(w) for _ in range(20)),
        output_signature=tf.TensorSpec([4], tf.float32),
    ),
    "a data set of a variable": lambda w: tf.data.Dataset.range(20).map(
        lambda _: _ahead(w)
    ),
    "one within another": lambda w: tf.data.Dataset.range(20).flat_map(
        lambda _: tf.data.Dataset.range(1).map(lambda _: _ahead(w))
    ),
    "one of Python": lambda w: tf.data.Dataset.range(20).map(
        lambda _: tf.ensure_shape(tf.py_function(_ahead, [w], tf.float32), [4])
    ),
}


@pytest.mark.parametrize("kind", FROM_W)
def test_batches_made_of_the_variables_are_made_after_the_step_before(kind):
    w = tf.Variable(0.0)
    options = {"method": "sgd", "learning_rate": 0.125, "epochs": 2}

    def loss(x):
        return tf.reduce_mean((w - x) ** 2)

    result = tfgrad.minimize(loss, wrt=w, data=FROM_W[kind](w), **options)

    assert (result.nit, float(w)) == (40, 10.0)  # each step is a quarter


def test_a_data_set_holds_a_variable_that_nobody_else_holds():
    def made():
        two = tf.Variable(2.0)
        twice = tf.function(lambda x: two * x)
        twice = twice.get_concrete_function(tf.TensorSpec([4], tf.float32))
        ones = np.ones([3, 4], np.float32)
        return tf.data.Dataset.from_tensor_slices(ones).map(twice)

    options = {"method": "sgd", "learning_rate": 0.5, "epochs": 1}

    result = tfgrad.minimize(
        lambda p, x: tf.reduce_mean((p - x) ** 2), 0.0, data=made(), **options
    )

    assert float(result.x) == 2.0


def test_a_validation_must_return_numbers():
    line = Line()

    with pytest.raises(InvalidArgumentError, match="return a number"):
        line.fit(dataset(), validation=lambda: "good")


def test_floats_of_numpy_take_the_dtype_of_the_variables():
    line, other = Line(), Line()
    x, y = X.astype(np.float64), Y.astype(np.float64)

    result = line.fit((x, y), batch_size=16)
    listed = other.fit([(x[:16], y[:16])], steps=1)

    assert result.fun.dtype == np.float32
    np.testing.assert_allclose(listed.history["fun"][0], by_hand(1)[0], rtol=1e-5)


def test_lists_of_numbers_keep_their_digits_beside_float64():
    source = source_of([0.1, 0.2], 2, tf.float64)

    assert source.example().numpy().tolist() == [0.1, 0.2]


def test_bfloat16_is_kept_in_rows_and_means():
    def loss(p, x):
        return tf.reduce_mean((p - x) ** 2)

    ones = tf.ones([8], tf.bfloat16)
    result = tfgrad.minimize(
        loss, tf.constant(3, tf.bfloat16), data=ones, batch_size=4, epochs=2,
        method="sgd", learning_rate=0.25,
    )  # fmt: skip

    # 4, then a half of the way each time, all exact in binary.
    assert result.history["fun"].dtype == tf.bfloat16.as_numpy_dtype
    expected = [4, 1, 0.25, 0.0625, 0.015625]
    np.testing.assert_array_equal(result.history["fun"].astype(float), expected)


def test_an_overflow_of_scaled_gradients_is_left_to_the_optimizer():
    policy = keras.mixed_precision.DTypePolicy("mixed_float16")
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, dtype=policy), keras.layers.Dense(1)]
    model = keras.Sequential([keras.layers.Input([4]), *layers])
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.05), initial_scale=2.0**24
    )

    result = tfgrad.minimize(
        lambda x, y: tf.reduce_mean((model(x)[:, 0] - y) ** 2),
        wrt=model,
        data=(X, Y),
        epochs=30,
        method=optimizer,
    )

    assert not np.all(np.isfinite(result.history["grad_max"]))
    assert result.status == "epochs"
    assert result.epochs["fun"][-1] < 0.1 * result.epochs["fun"][0]


def test_an_average_of_the_way_is_put_in_place_at_the_end():
    line = Line()
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)

    result = line.fit(dataset(), epochs=2, method=optimizer, learning_rate=None)

    average, points = 0.0, by_hand(8)[1]
    for k, point in enumerate(points[1:]):
        average = point if k == 0 else 0.5 * average + 0.5 * point
    assert result.history["step"].tolist() == list(range(9))
    np.testing.assert_array_equal(result.x[1], line.b)
    np.testing.assert_allclose(result.x[0], average[:4], rtol=1e-5)


@pytest.mark.parametrize("kind", ["arrays", "seeded data set", "function"])
def test_a_run_that_goes_on_from_a_checkpoint_ends_as_one_without_a_break(
    kind, tmp_path
):
    data = {
        "arrays": lambda: (X, Y),
        "seeded data set": lambda: dataset().unbatch().shuffle(50, seed=4).batch(16),
        "function": lambda: lambda: iter(batches()),
    }[kind]
    options = {"epochs": 4, "method": "adam", "learning_rate": 0.05}
    whole = Line().fit(data(), **options)

    class KilledError(Exception):
        pass

    def killer(state):
        if state.step >= 6:  # in the middle of the second epoch
            raise KilledError

    options["checkpoint"] = tmp_path
    with pytest.raises(KilledError):
        Line().fit(data(), callback=killer, **options)
    first = []
    rest = Line().fit(
        data(), callback=lambda state: first.append(state.step), **options
    )

    assert first[0] > 1  # it did not begin anew
    assert rest.status == whole.status
    for x, y in zip(rest.x, whole.x, strict=True):
        np.testing.assert_array_equal(x, y)
    for name in ("step", "fun", "x[0]"):
        np.testing.assert_array_equal(rest.history[name], whole.history[name])
    np.testing.assert_array_equal(rest.epochs["fun"], whole.epochs["fun"])


def test_a_validation_that_is_never_called_is_a_warning():
    def endless():
        while True:
            yield np.ones(2, "f")

    options = {"data": endless, "steps": 3, "method": "sgd"}
    with pytest.warns(RuntimeWarning, match="none has ended in 3 steps"):
        tfgrad.minimize(
            lambda x, b: tf.reduce_sum((x - b) ** 2),
            0.0,
            validation=lambda x: x,
            **options,
        )


def test_what_data_raises_where_it_is_opened_again_is_the_users_own_error():
    opened = []

    def batches():
        opened.append(len(opened))
        if len(opened) > 2:
            raise OSError("the file is gone")
        return iter([np.array([1.0, 2.0])])

    def distance(x, batch):
        return tf.reduce_mean((x - batch) ** 2)

    with pytest.raises(OSError, match=r"^the file is gone$"):
        tfgrad.minimize(distance, 0.0, data=batches, method="lbfgs")


def test_the_loop_does_not_wait_for_the_threads_of_an_epoch_that_is_over(monkeypatch):
    ended, opened = [], Dataset.open

    def watched(self, *args):
        iterator = opened(self, *args)
        weakref.finalize(iterator, lambda: ended.append(threading.current_thread()))
        return iterator

    monkeypatch.setattr(Dataset, "open", watched)
    Line().fit(dataset(), epochs=4)

    assert len(ended) == 4
    assert ended.count(threading.main_thread()) == 1  # the last, with the run
