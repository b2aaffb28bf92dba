"""Keras's callbacks in `minimize`, against `Model.fit` on the same net and data."""

import csv
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import callbacks as of_keras

import tfgrad
from tfgrad.errors import InvalidArgumentError, TfgradError
from tfgrad.problems import rosenbrock

pytestmark = pytest.mark.filterwarnings(  # Keras's own, of NumPy 2 and its defaults
    "ignore:__array__ implementation", "ignore:`shuffle=True` was passed"
)

X = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
Y = X.sum(axis=1, keepdims=True) ** 2
TRAIN = tf.data.Dataset.from_tensor_slices((X[:44], Y[:44])).batch(20)
NUMBERS = tf.data.Dataset.range(8).map(lambda i: tf.cast(i, tf.float32)).batch(2)


def network():
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input([4]), *layers])


def square(x):
    return (x - 2.0) ** 2


def to_batch(x, batch):
    return tf.reduce_mean((x - batch) ** 2)


class Witness(of_keras.Callback):
    """Writes down all that it is told, and sees."""

    def __init__(self):
        super().__init__()
        self.told, self.numbers = [], []

    def _see(self, *what, logs=None):
        self.told.append((*what, tuple(logs or ())))
        self.numbers.append([*map(float, (logs or {}).values())])

    def on_train_begin(self, logs=None):
        self._see("begin")

    def on_train_end(self, logs=None):
        self._see("end", logs=logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._see("epoch", epoch)

    def on_epoch_end(self, epoch, logs=None):
        self._see("epoch ended", epoch, logs=logs)

    def on_test_end(self, logs=None):
        self._see("tested", logs=logs)


class Batches(Witness):
    """The same, after each batch, and the weights there."""

    def on_train_batch_begin(self, batch, logs=None):
        rate = float(self.model.optimizer.learning_rate)
        self._see("batch", batch, logs={"rate": rate})

    def on_train_batch_end(self, batch, logs=None):
        size = float(np.sum(np.abs(self.model.get_weights()[0])))
        self._see("batch ended", batch, logs={**logs, "size": size})


class StopInTheThird(of_keras.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 3:
            self.model.stop_training = True


def files(directory):
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(directory)).split(".out")[0] for path in paths)


def fitted(callbacks, epochs):
    net = network()
    net.compile(keras.optimizers.SGD(0.05), loss="mse")
    given = {"epochs": epochs, "validation_data": (X[44:], Y[44:]), "verbose": 0}
    net.fit(TRAIN, callbacks=callbacks, **given)
    return net


def minimized(callbacks, epochs):
    net = network()

    def loss(x, y):
        return tf.reduce_mean((net(x) - y) ** 2)

    result = tfgrad.minimize(
        loss, wrt=net, method=keras.optimizers.SGD(0.05), data=TRAIN, epochs=epochs,
        validation=lambda: {"loss": loss(X[44:], Y[44:])}, callback=callbacks,
    )  # fmt: skip
    losses = [float(loss(*batch)) for batch in TRAIN]
    assert np.min(np.abs(result.fun - losses)) < 1e-5 * result.fun
    return net


CALLBACKS = {
    "none": lambda path: [],
    "stop": lambda path: [StopInTheThird()],
    "early": lambda path: [
        of_keras.EarlyStopping(patience=1, min_delta=0.3, restore_best_weights=True)
    ],
    "plateau": lambda path: [
        of_keras.ReduceLROnPlateau("loss", patience=1, min_delta=0.5)
    ],
    "schedule": lambda path: [of_keras.LearningRateScheduler(lambda _, r: r * 0.8)],
    "best": lambda path: [
        of_keras.ModelCheckpoint(
            path / "{epoch}.weights.h5", save_weights_only=True, save_best_only=True
        )
    ],
    "every two": lambda path: [
        of_keras.ModelCheckpoint(path / "{epoch}.keras", save_freq=2)
    ],
    "terminate": lambda path: [of_keras.TerminateOnNaN()],
    "board": lambda path: [of_keras.TensorBoard(path, histogram_freq=1)],
    "backup": lambda path: [
        of_keras.BackupAndRestore(path / "backup", delete_checkpoint=False)
    ],
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_does_what_it_does_in_fit(name, tmp_path):
    theirs, ours = tmp_path / "fit", tmp_path / "minimize"
    theirs.mkdir()
    ours.mkdir()
    epochs = 6 if name != "plateau" else 12
    # Told of each batch, a run takes its steps one by one, as it has to for some.
    kind = Batches if name in ("none", "stop", "schedule", "every two") else Witness
    seen, witness = kind(), kind()

    expected = fitted([*CALLBACKS[name](theirs), seen], epochs)
    net = minimized([*CALLBACKS[name](ours), witness], epochs)

    assert witness.told == seen.told
    for a, b in zip(witness.numbers, seen.numbers, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    for a, b in zip(net.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert files(ours) == files(theirs)


def test_a_csv_has_the_rows_of_fit(tmp_path):
    theirs, ours = tmp_path / "fit.csv", tmp_path / "minimize.csv"

    fitted([of_keras.CSVLogger(theirs)], 3)
    minimized([of_keras.CSVLogger(ours)], 3)

    rows = [list(csv.reader(path.read_text().splitlines())) for path in (theirs, ours)]
    assert rows[0][0] == rows[1][0] == ["epoch", "loss", "val_loss"]
    for a, b in zip(rows[0][1:], rows[1][1:], strict=True):
        np.testing.assert_allclose([*map(float, a)], [*map(float, b)], rtol=1e-5)


def test_a_loss_that_is_not_finite_is_told_and_the_last_finite_point_kept():
    witness, net = Batches(), network()

    result = tfgrad.minimize(
        lambda x, y: tf.reduce_mean((net(x) - y) ** 2),
        wrt=net, method="sgd", learning_rate=1e9, data=TRAIN, epochs=3,
        callback=[of_keras.TerminateOnNaN(), witness],
    )  # fmt: skip

    assert result.status == "nonfinite"
    assert [told[:2] for told in witness.told[-3:-1]] == [
        ("batch ended", 2), ("epoch ended", 0)
    ]  # fmt: skip
    assert witness.numbers[-1] == [np.inf]
    assert np.all(np.isfinite(net.get_weights()[0]))


def test_a_killed_training_goes_on_from_its_backup(tmp_path):
    class Killed(of_keras.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 4:
                raise RuntimeError

    def run(*callbacks):
        data = np.arange(9, dtype=np.float32)
        given = {"method": "adam", "data": data, "batch_size": 2, "epochs": 6}
        return tfgrad.minimize(to_batch, 3.0, **given, callback=[*callbacks])

    backup, witness = tmp_path / "backup", Witness()
    with pytest.raises(RuntimeError):
        run(of_keras.BackupAndRestore(backup), Killed())
    result = run(of_keras.BackupAndRestore(backup), witness)

    assert [told[1] for told in witness.told if told[0] == "epoch"] == [4, 5]
    assert result.epochs["epoch"].tolist() == [5, 6]
    assert float(result.x) == float(run().x)
    assert not backup.exists()


def test_the_backup_of_an_interrupted_run_stays(tmp_path):
    class Interrupted(of_keras.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 2:
                os.kill(os.getpid(), 2)

    backup = of_keras.BackupAndRestore(tmp_path / "backup")
    callbacks = [backup, Interrupted()]
    result = tfgrad.minimize(square, 3.0, method="sgd", callback=callbacks)

    assert result.status == "interrupted"
    assert files(tmp_path) == [
        "backup/latest.weights.h5",
        "backup/training_metadata.json",
    ]


# --- without a model, without data ---


@pytest.mark.parametrize("every", [1, 10])
def test_without_data_each_step_is_an_epoch_or_every_of_them_are(every):
    class Weights(Witness):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            points.append(self.model.get_weights()[0])

    points, witness = [], Weights()
    result = tfgrad.minimize(rosenbrock, [-1.2, 1.0], every=every, callback=witness)

    ends = [*range(every, result.nit, every), result.nit]
    assert np.array_equal(points, result.history["x"][ends])
    losses = [n[0] for n in witness.numbers if n][: len(ends)]
    assert losses == result.history["fun"][ends].tolist()


def test_the_best_weights_are_the_result_and_where_it_goes_on():
    def f(x):
        return tf.reduce_sum(tf.cos(x) * x)

    early = of_keras.EarlyStopping(
        "loss", patience=2, min_delta=1.0, restore_best_weights=True
    )
    for method in ("lbfgs", "adam"):
        stopped = tfgrad.minimize(f, [3.0, 1.0], method=method, callback=early)
        best = stopped.history["x"][early.best_epoch + 1]
        onward = tfgrad.minimize(f, stopped, steps=1)

        assert stopped.status == "callback"
        assert np.array_equal(stopped.x, best)
        assert stopped.fun == f(stopped.x)
        assert np.array_equal(stopped.grad, tfgrad.grad(f)(stopped.x))
        assert np.any(onward.x != stopped.x)
        assert np.max(np.abs(onward.x - best)) < 1.0


@pytest.mark.parametrize("method", ["lbfgs", "sgd"])
@pytest.mark.parametrize("takes_values", [True, False])
def test_what_a_callback_writes_to_the_model_counts(method, takes_values):
    class Jump(of_keras.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.model.set_weights([np.array([10.0, 20.0], np.float32)])

    v = tf.Variable([3.0, 1.0])
    start = {"x0": [3.0, 1.0]} if takes_values else {"wrt": v}
    result = tfgrad.minimize(
        lambda x=v: tf.reduce_sum(square(x)), **start, method=method, steps=2,
        callback=Jump(),
    )  # fmt: skip

    assert np.all(np.asarray(result.x) > 4.0)


def test_a_saved_stand_in_is_a_model_with_the_point_for_weights(tmp_path):
    v = {"a": tf.Variable([1.0, 2.0]), "b": tf.Variable(3.0, dtype=tf.float64)}

    def f():
        return tf.reduce_sum(v["a"] ** 2) + tf.cast(v["b"], tf.float32) ** 2

    saving = of_keras.ModelCheckpoint(tmp_path / "point.keras")
    tfgrad.minimize(f, wrt=v, method="adam", steps=3, callback=saving)
    model = keras.models.load_model(tmp_path / "point.keras")

    assert [weight.name for weight in model.weights] == ["wrt_a", "wrt_b"]
    for weight, variable in zip(model.get_weights(), v.values(), strict=True):
        assert np.array_equal(weight, variable)
        assert weight.dtype == variable.dtype


def test_in_a_chain_every_step_is_told_once():
    for method in ([("adam", 5), "lbfgs"], [("lbfgs", 5), ("adam", 5)]):
        witness = Witness()
        result = tfgrad.minimize(
            rosenbrock, [-1.2, 1.0], method=method, callback=witness
        )

        epochs = [told[1] for told in witness.told if told[0] == "epoch ended"]
        assert epochs == [*range(result.nit)]


def test_a_method_of_scipy_is_told_of_and_stopped():
    pytest.importorskip("scipy")
    early = of_keras.EarlyStopping("loss", patience=2, min_delta=0.5)
    result = tfgrad.minimize(
        rosenbrock, [-1.2, 1.0], method="scipy:bfgs", callback=early
    )

    assert (result.status, result.nit) == ("callback", early.stopped_epoch + 1)


def test_the_rates_of_callbacks_are_rows_of_the_history():
    halved = of_keras.LearningRateScheduler(lambda epoch, rate: 0.5 ** (epoch + 1))
    result = tfgrad.minimize(square, 3.0, method="sgd", steps=4, callback=halved)

    assert result.history["learning_rate"].tolist() == [
        0.5,
        0.25,
        0.125,
        0.0625,
        0.0625,
    ]


def test_means_of_aux_values_are_logs_and_validation_has_its_prefix():
    witness = Witness()

    def loss(x, batch):
        return to_batch(x, batch), {"largest": tf.reduce_max(batch)}

    tfgrad.minimize(
        loss, 3.0, has_aux=True, data=NUMBERS, validation=lambda x: x, callback=witness
    )

    assert witness.told[-1] == ("end", ("largest", "loss", "val_loss"))
    assert witness.numbers[-1][0] == 4.0  # of 1, 3, 5, 7


def test_the_model_has_its_own_optimizer_back():
    net = network()
    own = keras.optimizers.Adam()
    net.compile(own, loss="mse")
    tfgrad.minimize(
        lambda: tf.reduce_mean((net(X) - Y) ** 2), wrt=net, method="sgd", steps=2,
        callback=Witness(),
    )  # fmt: skip

    assert net.optimizer is own
    assert not own.built


def test_descend_takes_callbacks():
    witness = Witness()
    states = tfgrad.descend(
        square, 3.0, method="sgd", steps=6, every=2, callback=witness
    )

    assert [state.step for state in states] == [0, 2, 4, 6]
    assert [told[1] for told in witness.told if told[0] == "epoch"] == [0, 1, 2]
    assert witness.told[-1][0] == "end"


# --- functions ---


def test_functions_of_scipy_get_what_scipy_gives_them():
    points, values = [], []

    def of_point(xk):
        points.append(xk)

    def of_result(intermediate_result):
        values.append(intermediate_result.fun)
        assert isinstance(intermediate_result.x, np.ndarray)
        return np.bool_(len(values) == 3)

    result = tfgrad.minimize(
        rosenbrock, np.array([-1.2, 1.0]), callback=[of_point, of_result]
    )

    assert result.status == "callback"
    assert np.array_equal(points, result.history["x"][1:])
    assert values == result.history["fun"][1:].tolist()


@pytest.mark.parametrize("answer", [np.bool_(True), tf.constant(True), 1, "stop"])
def test_any_truth_stops(answer):
    result = tfgrad.minimize(square, 3.0, method="sgd", callback=lambda state: answer)

    assert (result.status, result.nit) == ("callback", 1)


def test_the_rate_of_the_runs_optimizer_may_be_set():
    given = keras.optimizers.SGD(0.5)

    def halve(state):
        state.optimizer.learning_rate = state.optimizer.learning_rate * 0.5

    result = tfgrad.minimize(square, 3.0, method=given, steps=3, callback=halve)

    assert result.history["learning_rate"].tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert float(given.learning_rate) == 0.5


@pytest.mark.parametrize("options", [{}, {"jit": True}, {"data": NUMBERS}])
def test_a_schedule_that_is_set_in_a_callback_is_heeded(options):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.25, 0.125])

    def put(state):
        if state.step == 1:
            state.optimizer.learning_rate = schedule

    def slope_1(x, batch=0.0):
        return x + 0.0 * tf.reduce_mean(batch)

    given = keras.optimizers.SGD(0.5)
    result = tfgrad.minimize(
        slope_1, 3.0, method=given, steps=4, callback=put, **options
    )

    assert result.history["learning_rate"].tolist() == [0.5, 0.25, 0.25, 0.125, 0.125]
    assert float(result.x) == 3 - 0.5 - 0.25 - 0.25 - 0.125


@pytest.mark.parametrize("options", [{}, {"jit": True}, {"data": NUMBERS}])
@pytest.mark.parametrize("kind", [tf.Variable, keras.Variable], ids=["tf", "keras"])
def test_a_variable_as_the_rate_is_followed(options, kind):
    rate = kind(0.5)

    def halve(state):
        rate.assign(rate * 0.5)

    f = to_batch if "data" in options else square
    result = tfgrad.minimize(
        f, 3.0, method="sgd", learning_rate=rate, steps=3, callback=halve, **options
    )

    assert result.history["learning_rate"].tolist() == [0.5, 0.25, 0.125, 0.0625]


# --- what is refused ---


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (of_keras.EarlyStopping, r"EarlyStopping\(...\)"),
        ([None], "a Keras callback, or a list"),
        (3, "a Keras callback, or a list"),
        (lambda: 1, "takes one argument"),
        (lambda a, b: 1, "takes one argument"),
        (
            of_keras.LearningRateScheduler(lambda e, r: r),
            "needs a method with a learning",
        ),
        (of_keras.ReduceLROnPlateau("loss"), "needs a method with a learning"),
    ],
    ids=[*"abcdefg"],
)
def test_what_cannot_be_called_is_refused_before_anything_is_traced(callback, match):
    def f(x):
        raise AssertionError

    with pytest.raises(InvalidArgumentError, match=match):
        tfgrad.minimize(f, 3.0, callback=callback)


@pytest.mark.parametrize(
    "options",
    [{"validation": lambda x: 1.0}, {"callback": of_keras.EarlyStopping("loss")}],
    ids=["at the end", "callback"],
)
def test_endless_data_has_no_epochs_unless_a_function_ends_them(options):
    endless, witness = NUMBERS.repeat(), Witness()

    with pytest.raises(InvalidArgumentError, match=r"take\(100\)"):
        tfgrad.minimize(to_batch, 3.0, data=endless, steps=5, **options)

    tfgrad.minimize(
        to_batch, 3.0, data=lambda: endless.take(3), epochs=2, callback=witness
    )
    assert [told[0] for told in witness.told].count("epoch ended") == 2


# --- why is it NaN? ---


class Entropy(keras.layers.Layer):
    def call(self, p):
        return -p * tf.math.log(p)


def test_a_net_names_batch_layer_and_op_as_in_fit():
    x = np.linspace(3.0, -1.0, 64, dtype=np.float32)[:, None]
    data = tf.data.Dataset.from_tensor_slices((x, 0 * x)).batch(8)
    watches = tfgrad.ExplainNaN(raise_error=True), tfgrad.ExplainNaN(raise_error=True)
    nets = []
    for _ in watches:
        layers = [keras.layers.Dense(1, kernel_initializer="ones"), Entropy()]
        nets.append(keras.Sequential([keras.Input([1]), *layers]))
    nets[0].compile(keras.optimizers.SGD(1e-5), loss="mse")

    with pytest.raises(TfgradError, match="The loss of batch 6 of epoch 0"):
        nets[0].fit(data, verbose=0, callbacks=[watches[0]])
    with pytest.raises(TfgradError, match=r"(?s)batch 6 of epoch 0.*log.*entropy"):
        tfgrad.minimize(
            lambda x, y: tf.reduce_mean((nets[1](x) - y) ** 2), wrt=nets[1],
            method="sgd", learning_rate=1e-5, data=data, callback=watches[1],
        )  # fmt: skip

    assert watches[1].batch == watches[0].batch == 6
    assert all(map(np.array_equal, watches[1].data, watches[0].data))
    assert np.all(np.isfinite(nets[1].get_weights()[0]))


@pytest.mark.parametrize("method", ["sgd", "lbfgs", "scipy:bfgs"])
def test_a_function_of_values_names_its_op(method):
    if method.startswith("scipy"):
        pytest.importorskip("scipy")
    watch = tfgrad.ExplainNaN()

    with pytest.warns(RuntimeWarning, match="its slope at zero is infinite"):
        result = tfgrad.minimize(tf.sqrt, 0.0, method=method, callback=watch)

    assert (result.status, watch.epoch) == ("nonfinite", 0)
    assert watch.explanation.findings[0].culprit.label == "tf.sqrt"


def test_a_run_without_nan_has_nothing_to_explain():
    watch = tfgrad.ExplainNaN(raise_error=True)

    assert tfgrad.minimize(square, 3.0, callback=watch).success
    assert watch.epoch is None


def test_callbacks_in_a_nested_list_are_taken_as_fit_takes_them():
    steps, history = [], keras.callbacks.History()
    given = [[lambda state: steps.append(state.step)], history]
    tfgrad.minimize(lambda x: x**2, 3.0, method="sgd", steps=2, callback=given)

    assert steps == [1, 2]
    assert len(history.history["loss"]) == 2
