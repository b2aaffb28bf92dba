import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError, TfgradError

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
BAD = 5  # the batch of 8 with row 45

FORMS = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "chunks": {"jit_compile": False, "steps_per_execution": 3},
    "xla in chunks": {"jit_compile": True, "steps_per_execution": 3},
    "eager": {"run_eagerly": True},
}


class Log(keras.layers.Layer):
    def call(self, x):
        return tf.math.log(x)


class Root(keras.layers.Layer):
    def call(self, x):
        return tf.sqrt(x)


def compiled(*layers, optimizer="adam", **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([4]), *layers])
    model.compile(optimizer, loss="mse", **options)
    return model


def layers():
    keras.utils.set_random_seed(0)  # the seeds of what they draw, too
    # Averages and masks are part of the state, too.
    normal = [keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    return [keras.layers.Dense(8), *normal, keras.layers.Dense(1)]


def fit(model, x=X, y=Y, watch=None, epochs=1):
    watch = watch or tfgrad.ExplainNaN()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            x, y, 8, epochs, shuffle=False, verbose=0, callbacks=[watch]
        )
    said = [str(w.message) for w in caught if w.category is RuntimeWarning]
    return watch, "".join(said), history.history["loss"]


def assert_same_state(model, other):
    for a, b in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)
    assert int(model.optimizer.iterations) == int(other.optimizer.iterations)


@pytest.mark.parametrize("form", FORMS)
def test_training_ends_before_the_batch_that_is_to_blame(form):
    model, other = (compiled(*layers(), **FORMS[form]) for _ in range(2))
    x = X.copy()
    x[8 * BAD + 3, 2] = np.nan
    watch, said, _ = fit(model, x, epochs=3)
    other.fit(X[: 8 * BAD], Y[: 8 * BAD], 8, shuffle=False, verbose=0)

    assert (watch.epoch, watch.batch) == (0, BAD)
    assert "batch[0] holds a NaN or an infinity, in row 3" in said
    np.testing.assert_array_equal(watch.data[0], x[8 * BAD : 8 * BAD + 8])
    assert_same_state(model, other)


@pytest.mark.parametrize("form", FORMS)
def test_while_all_is_well_nothing_changes(form):
    model, other = (compiled(*layers(), **FORMS[form]) for _ in range(2))
    watch, said, losses = fit(model, epochs=2)
    history = other.fit(X, Y, 8, 2, shuffle=False, verbose=0)

    assert (said, watch.batch, watch.explanation) == ("", None, None)
    assert losses == history.history["loss"]
    assert_same_state(model, other)


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_names_layer_op_line_and_what_to_write(form):
    dense = keras.layers.Dense(8)
    watch, said, _ = fit(compiled(dense, Log(name="logs"), **FORMS[form]))

    assert watch.layer == "sequential/logs" or watch.layer.endswith("/logs")
    assert "The loss of batch 0 of epoch 0 is not finite" in said
    assert "tf.math.log: an argument is not positive, at test_explain_nan.py:" in said
    assert "try: tf.math.log(x + 1e-6)" in said
    assert watch.explanation.findings[0].status == "non-finite"


def test_a_gradient_is_blamed_where_the_loss_is_finite():
    x = np.abs(X)
    x[8 * BAD + 1] = 0
    rows = keras.layers.Dense(
        4, use_bias=False, kernel_initializer="identity", activation="relu"
    )
    model = compiled(rows, Root(), keras.layers.Dense(1), jit_compile=False)
    watch, said, _ = fit(model, x)

    assert (watch.epoch, watch.batch) == (0, BAD)
    assert "The gradient of batch 5 of epoch 0 is not finite" in said
    assert "tf.sqrt: its slope at zero is infinite" in said
    assert "/root" in watch.layer
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_a_rate_that_is_too_large_is_named():
    sgd = keras.optimizers.SGD(1.0)
    model = compiled(keras.layers.Dense(8), keras.layers.Dense(1), optimizer=sgd)
    watch, said, _ = fit(model, epochs=3)

    assert watch.batch is not None
    assert "the loss was growing" in said
    assert "try: a smaller learning rate" in said


def test_a_later_epoch_is_counted_from_its_own_begin():
    epochs = []

    def batches():
        epochs.append(1)
        for i in range(0, 64, 8):
            spoils = len(epochs) == 3 and i == 16
            yield X[i : i + 8] + (np.inf if spoils else 0), Y[i : i + 8]

    specs = [tf.TensorSpec([8, n], tf.float32) for n in (4, 1)]
    data = tf.data.Dataset.from_generator(batches, output_signature=tuple(specs))
    data = data.repeat()
    model, watch = compiled(*layers(), jit_compile=False), tfgrad.ExplainNaN()
    with pytest.warns(RuntimeWarning, match="batch 2 of epoch 2"):
        model.fit(
            data,
            None,
            None,
            5,
            steps_per_epoch=8,
            shuffle=False,
            verbose=0,
            callbacks=[watch],
        )

    assert (watch.epoch, watch.batch) == (2, 2)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**40])
def test_an_overflow_that_the_loss_scale_skips_is_none(scale):
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(), initial_scale=scale
    )
    policy = keras.DTypePolicy("mixed_float16")
    hidden = keras.layers.Dense(8, dtype=policy)
    last = keras.layers.Dense(1, dtype="float32")
    model = compiled(hidden, last, optimizer=scaled, jit_compile=False)
    watch, said, _ = fit(model, epochs=3)

    assert (watch.batch, said) == (None, "")
    assert (float(scaled.dynamic_scale.numpy()) < scale) == (scale > 2.0**15)


def test_a_gradient_that_no_loss_scale_mends_is_found():
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(), initial_scale=4.0
    )
    rows = keras.layers.Dense(4, use_bias=False, kernel_initializer="zeros")
    model = compiled(rows, Root(), optimizer=scaled, jit_compile=False)
    watch, said, _ = fit(model)

    assert "The gradient of batch 2 of epoch 0" in said
    assert "tf.sqrt: its slope at zero is infinite" in said
    assert "/root" in watch.layer


class Custom(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="zeros")

    def call(self, x):
        return tf.math.log(self.dense(x))

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            value = tf.reduce_mean((self(x) - y) ** 2)
        gradients = tape.gradient(value, self.trainable_variables)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"distance": value}


def test_a_train_step_of_ones_own_is_watched_likewise():
    model = Custom()
    model.compile("sgd", loss="mse", jit_compile=False)
    watch = tfgrad.ExplainNaN()
    with pytest.warns(RuntimeWarning, match="log: an argument is not positive"):
        model.fit(X, Y, 8, verbose=0, callbacks=[watch])

    assert watch.batch == 0
    np.testing.assert_array_equal(model.dense.kernel.numpy(), np.zeros([4, 1]))


class TwoSteps(keras.Model):
    def __init__(self):
        super().__init__()
        self.a = keras.layers.Dense(1, kernel_initializer="ones")
        self.b = keras.layers.Dense(1, kernel_initializer="ones")
        self.moved = keras.optimizers.SGD(0.1, momentum=0.9)
        self.step = tfgrad.train_step(self.second, wrt=self.b)

    def call(self, x):
        return self.a(x) + self.b(x)

    def second(self, x):
        return tf.reduce_mean(tf.math.log(self.b(x) ** 2 - 1e-3) ** 2)

    def train_step(self, data):
        with tf.GradientTape() as tape:
            value = tf.reduce_mean(self.a(data) ** 2)
        self.moved.apply(tape.gradient(value, self.a.weights), self.a.weights)
        return {"first": value, "second": self.step(data)}


def test_the_state_of_every_optimizer_is_that_of_before():
    x = np.abs(X) + 1
    x[8 * BAD : 8 * BAD + 8] = 0  # finite, and log(0 - 0.001)
    model, other = TwoSteps(), TwoSteps()
    watch = tfgrad.ExplainNaN()
    model.compile(jit_compile=False)
    other.compile(jit_compile=False)
    with pytest.warns(RuntimeWarning, match=r"tf\.math\.log: an argument is not pos"):
        model.fit(x, None, 8, shuffle=False, verbose=0, callbacks=[watch])
    other.fit(x[: 8 * BAD], None, 8, shuffle=False, verbose=0)

    assert watch.batch == BAD
    for ours, theirs in [
        (model, other),
        (model.moved, other.moved),
        (model.step.optimizer, other.step.optimizer),
    ]:
        for a, b in zip(ours.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


def test_an_error_in_training_leaves_the_model_as_it_was():
    def batches():
        yield X[:8], Y[:8]
        raise ValueError("no more")

    specs = [tf.TensorSpec([8, n], tf.float32) for n in (4, 1)]
    data = tf.data.Dataset.from_generator(batches, output_signature=tuple(specs))
    model = compiled(*layers(), jit_compile=False)
    with pytest.raises(tf.errors.InvalidArgumentError, match="no more"):
        model.fit(data, shuffle=False, verbose=0, callbacks=[tfgrad.ExplainNaN()])

    assert "train_step" not in vars(model)
    model.fit(X, Y, 8, verbose=0)


def test_the_model_trains_on_as_before_afterwards():
    model, other = (compiled(*layers(), jit_compile=False) for _ in range(2))
    x = X.copy()
    x[8 * BAD] = np.inf
    fit(model, x)
    model.fit(X[8 * BAD :], Y[8 * BAD :], 8, shuffle=False, verbose=0)
    for part in (slice(None, 8 * BAD), slice(8 * BAD, None)):
        other.fit(X[part], Y[part], 8, shuffle=False, verbose=0)

    assert "train_step" not in vars(model)
    assert_same_state(model, other)


def test_a_second_fit_with_the_same_callback_begins_anew():
    x = X.copy()
    x[0] = np.nan
    model, watch = compiled(*layers(), jit_compile=False), tfgrad.ExplainNaN()
    fit(model, x, watch=watch)
    assert watch.batch == 0
    fit(model, watch=watch)

    assert watch.batch is None


def test_the_explanation_can_be_raised():
    model = compiled(keras.layers.Dense(8), Log())
    watch = tfgrad.ExplainNaN(raise_error=True)
    with pytest.raises(TfgradError, match=r"tf\.math\.log"):
        model.fit(X, Y, 8, verbose=0, callbacks=[watch])


def test_batches_that_need_much_memory_are_kept_for_a_short_time(monkeypatch):
    monkeypatch.setattr("tfgrad.diagnosis.going_back._MOST_BYTES", 1)
    x = X.copy()
    x[8 * BAD] = np.nan
    watch, _, _ = fit(compiled(*layers(), jit_compile=False), x)

    assert (watch.epoch, watch.batch) == (0, BAD)


def test_ragged_batches_and_missing_targets_are_kept_as_they_are():
    class Length(keras.Model):
        def __init__(self):
            super().__init__()
            self.scale = self.add_weight(shape=[], initializer="ones")
            self.built = True

        def call(self, x):
            return x

        def train_step(self, data):
            value = self.scale * tf.math.log(tf.reduce_sum(data["x"]) - 3.0)
            self.optimizer.apply([value], [self.scale])
            return {"loss": value}

    model = Length()
    model.compile("sgd", jit_compile=False)
    rows = tf.ragged.constant([[1.0], [2.0, 2.0], [1.0, 2.0]])
    data = tf.data.Dataset.from_tensor_slices({"x": rows}).batch(1)
    watch = tfgrad.ExplainNaN()
    with pytest.warns(RuntimeWarning, match=r"tf\.math\.log: an argument"):
        model.fit(data, shuffle=False, verbose=0, callbacks=[watch])

    assert watch.batch == 0
    assert watch.data["x"].to_list() == [[1.0]]


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(InvalidArgumentError, match="True or False"):
        tfgrad.ExplainNaN(raise_error="yes")


def test_a_loop_of_ones_own_may_call_it_without_parameters():
    model, watch = compiled(keras.layers.Dense(1)), tfgrad.ExplainNaN()
    watch.set_model(model)
    watch.on_train_begin()
    for epoch in range(2):
        watch.on_epoch_begin(epoch)
        model.fit(X, Y, 8, verbose=0)
        watch.on_epoch_end(epoch)
    watch.on_train_end()

    assert watch.epoch is None
