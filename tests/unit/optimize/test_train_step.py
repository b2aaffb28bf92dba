import functools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import (
    InvalidArgumentError,
    NoGradientError,
    ScalarObjectiveError,
    WrongDerivativeError,
)
from tfgrad.optimize.methods.keras_optimizer import optimizer_names

RATE = 0.01
X = tf.constant(np.random.default_rng(0).normal(size=(32, 4)), tf.float32)
Y = tf.reduce_sum(X, axis=1, keepdims=True)


def network(seed=0):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input([4]), *layers])


def loss_of(model):
    return lambda x, y: tf.reduce_mean((model(x, training=True) - y) ** 2)


def by_hand(model, optimizer, batches):
    """The step that everybody writes."""
    loss = loss_of(model)
    optimizer.build(model.trainable_variables)

    @tf.function(reduce_retracing=True)
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(x, y)
            scaled = optimizer.scale_loss(value)
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
        return value

    return [float(step(*batch)) for batch in batches]


def assert_same(model, other, atol=0.0):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def by_path(variable):
    kind = keras.optimizers.Adam if "kernel" in variable.path else keras.optimizers.SGD
    return kind(RATE)


OPTIMIZERS = {
    **{name: functools.partial(kind, RATE) for name, kind in optimizer_names().items()},
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(RATE)),
    "multi": lambda: keras.optimizers.MultiOptimizer(by_path),
    "clipped": lambda: keras.optimizers.Adam(RATE, global_clipnorm=0.1),
    "averaged": lambda: keras.optimizers.SGD(
        RATE, use_ema=True, ema_overwrite_frequency=3
    ),
    "accumulated": lambda: keras.optimizers.Adam(RATE, gradient_accumulation_steps=3),
    "scheduled": lambda: keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(0.1, 10)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ten_steps_are_those_of_the_loop_by_hand(name):
    ours, theirs = network(), network()
    step = tfgrad.train_step(loss_of(ours), wrt=ours, optimizer=OPTIMIZERS[name]())

    losses = [float(step(X, Y)) for _ in range(10)]

    assert losses == by_hand(theirs, OPTIMIZERS[name](), [(X, Y)] * 10)
    assert_same(ours, theirs)


def test_the_instance_that_is_given_is_the_one_that_moves():
    model, optimizer = network(), keras.optimizers.SGD(0.5)
    step = tfgrad.train_step(loss_of(model), wrt=model, optimizer=optimizer)
    step(X, Y)
    before = model.get_weights()
    step.optimizer.learning_rate = 0.0
    step(X, Y)

    assert step.optimizer is optimizer
    assert int(optimizer.iterations) == 2
    assert all(map(np.array_equal, before, model.get_weights()))


@pytest.mark.parametrize("wrap", [lambda o: o, keras.optimizers.LossScaleOptimizer])
def test_a_schedule_that_is_assigned_later_is_heeded(wrap):
    w = tf.Variable(10.0)
    optimizer = wrap(keras.optimizers.SGD(1.0))
    step = tfgrad.train_step(lambda: w * 1.0, wrt=w, optimizer=optimizer)
    step()
    later = keras.optimizers.schedules.PiecewiseConstantDecay([2], [2.0, 5.0])
    step.optimizer.learning_rate = later  # 2 at the steps 1 and 2, then 5
    for _ in range(3):
        step()

    assert float(w) == 10 - 1 - 2 - 2 - 5


def test_a_checkpoint_of_model_and_optimizer_goes_on_to_the_last_bit(tmp_path):
    def begin():
        model = network()
        return model, tfgrad.train_step(loss_of(model), wrt=model)

    model, step = begin()
    for _ in range(3):
        step(X, Y)
    saved = tf.train.Checkpoint(model=model, optimizer=step.optimizer)
    path = saved.write(str(tmp_path / "saved"))
    step(X, Y)
    other, again = begin()
    tf.train.Checkpoint(model=other, optimizer=again.optimizer).read(path)
    again(X, Y)

    assert_same(model, other)


def test_one_trace_serves_all_lengths_from_the_second_on():
    model, other, traced = network(), network(), []

    def loss(x, y):
        traced.append(x.shape[0])
        return tf.reduce_mean((model(x) - y) ** 2)

    batches = [(X[:n], Y[:n]) for n in [32, 7, 5, 32, 1, 30, *range(8, 28)]]
    step = tfgrad.train_step(loss, wrt=model, optimizer="sgd", learning_rate=RATE)
    losses = [float(step(*batch)) for batch in batches]

    assert traced == [32, None]
    expected = by_hand(other, keras.optimizers.SGD(RATE), batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # other kernels by shape
    assert_same(model, other, atol=1e-6)


def test_a_loss_that_needs_the_very_shape_is_traced_for_each():
    w, traced = tf.Variable(1.0), []

    def loss(x):
        traced.append(x.shape[0])
        return w * tf.reduce_sum(x) / float(x.shape[0])

    step = tfgrad.train_step(loss, wrt=w, optimizer="sgd", learning_rate=0.1)
    for n in (2, 3, 4):
        step(tf.ones([n]))

    assert float(w) == pytest.approx(0.7)
    assert [n for n in traced if n is not None] == [2, 3, 4]


def test_numbers_arrays_and_keywords_do_not_retrace():
    w, traced = tf.Variable(0.0), []

    def loss(x, *, target):
        traced.append(1)
        return (w * x - target) ** 2

    step = tfgrad.train_step(loss, wrt=w, optimizer="sgd", learning_rate=0.1)
    for target in (1.0, 2.0, np.float32(3.0), tf.constant(4.0)):
        step(1.0, target=target)

    assert len(traced) == 1
    assert float(w) == pytest.approx(
        0.2 * (1 * 0.8**3 + 2 * 0.8**2 + 3 * 0.8 + 4), rel=1e-6
    )


def test_a_batch_may_be_a_nest_and_a_flag_is_static():
    w = tf.Variable([1.0, 1.0])

    def loss(batch, training):
        return tf.reduce_sum(w * batch["x"]) * (2.0 if training else 1.0)

    step = tfgrad.train_step(loss, wrt=w, optimizer="sgd", learning_rate=1.0)
    step({"x": np.ones(2, "f")}, True)
    step({"x": np.ones(2, "f")}, False)

    np.testing.assert_allclose(w, [-2, -2])


def test_aux_comes_with_the_loss():
    w = tf.Variable(3.0)
    step = tfgrad.train_step(
        lambda x: (w * x, {"twice": 2 * w}), wrt=w, optimizer="sgd", has_aux=True
    )
    value, aux = step(1.0)

    assert (float(value), float(aux["twice"])) == (3.0, 6.0)


def test_in_a_function_of_the_users_a_step_is_a_step():
    ours, theirs = network(), network()
    step = tfgrad.train_step(loss_of(ours), wrt=ours)

    @tf.function
    def three(x, y):
        for _ in tf.range(3):
            step(x, y)

    three(X, Y)
    by_hand(theirs, keras.optimizers.Adam(), [(X, Y)] * 3)

    assert_same(ours, theirs)


def test_two_steps_share_what_only_one_of_them_moves():
    a, b = tf.Variable(1.0), tf.Variable(1.0)
    down = tfgrad.train_step(lambda: a * b, wrt=a, optimizer="sgd", learning_rate=0.1)
    up = tfgrad.train_step(lambda: -a * b, wrt=b, optimizer="sgd", learning_rate=0.1)

    down(), up()

    assert float(a) == pytest.approx(0.9)
    assert float(b) == pytest.approx(1 + 0.1 * 0.9)


class Overridden(keras.Model):
    def __init__(self):
        super().__init__()
        self.net = network()
        self.step = tfgrad.train_step(loss_of(self.net), wrt=self.net)

    def train_step(self, data):
        return {"value": self.step(*data)}


@pytest.mark.parametrize(
    "options",
    [
        {"jit_compile": False},
        {"jit_compile": True},
        {"run_eagerly": True},
        {"steps_per_execution": 3, "jit_compile": False},
    ],
    ids=str,
)
def test_in_the_train_step_of_a_model_under_fit(options):
    model, other = Overridden(), network()
    model.compile(**options)
    history = model.fit(X, Y, batch_size=10, epochs=2, shuffle=False, verbose=0)

    batches = [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 32, 10)] * 2
    losses = by_hand(other, keras.optimizers.Adam(), batches)
    # 32 rows in batches of 10: the last has 2. XLA rounds otherwise.
    assert_same(model.net, other, atol=1e-6)
    assert history.history["value"][-1] == pytest.approx(losses[-1], rel=1e-4)


def test_a_model_that_is_not_built_is_built_by_the_first_call():
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = keras.layers.Dense(1, kernel_initializer="ones")

        def call(self, x):
            return self.layer(x)

    model = Late()
    step = tfgrad.train_step(loss_of(model), wrt=model, optimizer="sgd")
    assert step.variables == []
    value = step(X, Y)

    assert float(value) == pytest.approx(0.0, abs=1e-10)
    assert step.variables == model.trainable_variables


def test_a_model_that_is_not_built_may_be_stepped_in_a_users_function():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="zeros")])
    step = tfgrad.train_step(loss_of(model), wrt=model, optimizer="sgd")
    value = tf.function(lambda x, y: step(x, y))(X, Y)

    assert float(value) == pytest.approx(float(tf.reduce_mean(Y**2)))
    assert np.any(model.get_weights()[0] != 0)


def test_a_frozen_layer_stays():
    model = network()
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    step = tfgrad.train_step(loss_of(model), wrt=model, optimizer="sgd")
    step(X, Y)

    assert len(step.variables) == 2
    assert all(map(np.array_equal, before, model.layers[0].get_weights()))


def test_a_variable_named_twice_moves_once():
    w = tf.Variable(1.0)
    step = tfgrad.train_step(
        lambda: w * 1.0, wrt=[w, w], optimizer="sgd", learning_rate=0.5
    )
    step()

    assert float(w) == 0.5


class Counted:
    """An optimizer that keeps its count of steps in Python."""

    def __init__(self):
        self.count = 0

    def apply_gradients(self, pairs):
        self.count += 1
        for gradient, variable in pairs:
            variable.assign_sub(gradient / self.count)


def test_any_object_with_apply_gradients_will_do():
    w, optimizer = tf.Variable(0.0), Counted()
    step = tfgrad.train_step(lambda: -w, wrt=w, optimizer=optimizer)
    for _ in range(3):
        step()

    assert optimizer.count == 3
    assert float(w) == pytest.approx(1 + 1 / 2 + 1 / 3)


# Rows 2 and 3 stand twice in a batch, row 0, to which left over slices go, in some.
IDS = [[4, 2, 2], [1, 1, 4], [3, 3, 3], [2, 0, 1]]


UNDER_XLA = "adam", "adafactor", "ftrl", "rmsprop", "clipped", "scaled"


@pytest.mark.parametrize(
    ("name", "jit"),
    [
        *((name, False) for name in sorted(OPTIMIZERS.keys() - {"multi"})),
        *((name, True) for name in UNDER_XLA),
    ],
)
def test_sparse_gradients_move_what_dense_ones_would(name, jit):
    def trained(dense):
        table = keras.Variable(
            np.random.default_rng(0).normal(size=(5, 3)), dtype="float32"
        )
        scale = keras.Variable(np.ones([3, 2]), dtype="float32")

        def loss(ids):
            rows = tf.gather(table.value + 0.0 if dense else table.value, ids)
            return tf.reduce_sum(tf.matmul(rows, scale.value) ** 2)

        step = tfgrad.train_step(
            loss, wrt=[table, scale], optimizer=OPTIMIZERS[name](), jit=jit
        )
        for k in range(8):
            step(tf.constant(IDS[k % 4]))
        return table.numpy(), scale.numpy()

    for a, b in zip(trained(dense=False), trained(dense=True), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-7)


def test_an_embedding_hands_slices_to_the_optimizer():
    seen = []

    class Watched:
        def apply_gradients(self, pairs):
            seen.extend(gradient for gradient, _ in pairs)

    layer = keras.layers.Embedding(6, 2)
    layer.build([None])
    step = tfgrad.train_step(
        lambda ids: tf.reduce_sum(layer(ids)), wrt=layer, optimizer=Watched()
    )
    step(np.array([5, 1, 5]))

    (slices,) = seen
    assert isinstance(slices, tf.IndexedSlices)
    rows = dict(zip(slices.indices.numpy(), slices.values.numpy()[:, 0], strict=True))
    assert rows == {1: 1.0, 5: 2.0, 0: 0.0}


def test_a_cut_gradient_names_op_and_line():
    model = network()
    step = tfgrad.train_step(
        lambda x, y: tf.reduce_mean((tf.round(model(x)) - y) ** 2), wrt=model
    )
    before = model.get_weights()

    with pytest.raises(NoGradientError, match=r"tf\.round at test_train_step\.py:\d+"):
        step(X, Y)
    assert all(map(np.array_equal, before, model.get_weights()))


def test_a_term_that_is_dropped_is_refused_unless_nobody_asks():
    w = tf.Variable(0.7)

    def loss():
        return w * w + tf.numpy_function(np.sin, [w], tf.float32)

    options = {"wrt": w, "optimizer": "sgd", "learning_rate": 0.1}
    with pytest.raises(NoGradientError, match="numpy_function"):
        tfgrad.train_step(loss, **options)()
    tfgrad.train_step(loss, **options, verify=False)()

    assert float(w) == pytest.approx(0.7 - 0.1 * 1.4)


def one_triangle(w, x):
    """A loss whose gradient TensorFlow has wrong: Cholesky reads one triangle only."""
    matrix = [[3.0 * w[0], w[1]], [0.3 * x, 2.0 * w[1]]]
    return tf.reduce_sum(tf.linalg.cholesky(matrix))


@pytest.mark.parametrize("optimizer", ["adam", keras.optimizers.SGD(0.1), Counted()])
def test_a_first_gradient_that_is_wrong_is_refused_and_nothing_is_written(optimizer):
    w, calls = tf.Variable([1.0, 2.0]), tf.Variable(0)

    def loss(x):
        calls.assign_add(1)
        return one_triangle(w, x)

    step = tfgrad.train_step(loss, wrt=w, optimizer=optimizer)
    with pytest.raises(WrongDerivativeError, match="of `loss` is wrong, by"):
        step(1.0)

    assert w.numpy().tolist() == [1.0, 2.0]
    assert int(calls) == 0
    tfgrad.train_step(loss, wrt=w, optimizer="sgd", verify=False)(1.0)
    assert int(calls) == 1


def test_what_a_check_evaluates_leaves_averages_and_random_losses_alone():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input([4]), *layers])
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    optimizers = keras.optimizers.SGD(RATE), keras.optimizers.SGD(RATE)
    tfgrad.train_step(loss_of(model), wrt=model, optimizer=optimizers[0])(X, Y)
    by_hand(other, optimizers[1], [(X, Y)])

    assert_same(model, other)
    w = tf.Variable([1.0, 2.0])
    step = tfgrad.train_step(
        lambda: one_triangle(w, 1.0) + 0.0 * tf.random.normal([]), wrt=w
    )
    step()  # what draws random numbers has no differences


def test_an_overflow_of_the_loss_scale_is_no_wrong_gradient():
    w = tf.Variable(1.0, dtype=tf.float16)
    scaled = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**16
    )
    step = tfgrad.train_step(lambda: 3 * w * w, wrt=w, optimizer=scaled)
    step()

    assert float(w) == 1.0  # the optimizer has skipped it
    for _ in range(4):
        step()
    assert float(w) < 1.0


def test_a_loss_that_reads_nothing_of_wrt_is_refused():
    w, v = tf.Variable(1.0), tf.Variable(1.0)
    with pytest.raises(NoGradientError, match="must read a variable"):
        tfgrad.train_step(lambda: v * v, wrt=w)()


def test_a_loss_of_many_numbers_is_refused():
    model = network()
    step = tfgrad.train_step(lambda x: model(x), wrt=model)
    with pytest.raises(ScalarObjectiveError, match=r"shape \(32, 1\)"):
        step(X)


def test_a_second_derivative_in_the_loss_is_the_right_one():
    layer = keras.layers.LayerNormalization(dtype="float64")
    layer.build((None, 3))
    v = tf.Variable([[1.0, 2.0, 4.0]], dtype=tf.float64)

    def loss():
        return tfgrad.grad(lambda x: tf.reduce_sum(layer(x) ** 3))(v)[0, 0]

    step = tfgrad.train_step(loss, wrt=v, optimizer="sgd", learning_rate=1.0)
    before = v.numpy()
    expected = tfgrad.hvp(lambda x: tf.reduce_sum(layer(x) ** 3))(
        before, np.array([[1.0, 0.0, 0.0]])
    )
    step()

    np.testing.assert_allclose(before - v.numpy(), expected, atol=1e-7)  # rate: float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optimizer": "adm"}, "'adam'"),
        ({"optimizer": keras.optimizers.Adam}, "name, or an optimizer"),
        ({"optimizer": 3}, "name, or an optimizer"),
        ({"learning_rate": -1.0}, "positive number"),
        ({"learning_rate": math.nan}, "positive number"),
        ({"learning_rate": "fast"}, "positive number"),
        ({"learning_rate": True}, "positive number"),
        ({"optimizer": Counted(), "learning_rate": 0.1}, "an instance has one"),
        ({"jit": "yes"}, "True or False"),
        ({"has_aux": 1}, "True or False"),
        ({"verify": None}, "True or False"),
        ({"wrt": 3.0}, "`wrt` names variables"),
        ({"wrt": []}, "at least one variable"),
    ],
    ids=[*"abcdefghijklm"],
)
def test_what_breaks_a_rule_is_refused_before_anything_is_traced(options, match):
    def loss():
        raise AssertionError

    with pytest.raises(InvalidArgumentError, match=match):
        tfgrad.train_step(loss, **{"wrt": tf.Variable(1.0), **options})


def test_a_value_in_place_of_the_loss_is_refused():
    with pytest.raises(InvalidArgumentError, match="the loss function"):
        tfgrad.train_step(tf.constant(1.0), wrt=tf.Variable(1.0))


def test_an_optimizer_bound_to_another_model_is_refused():
    first, second, optimizer = network(), network(), keras.optimizers.Adam()
    tfgrad.train_step(loss_of(first), wrt=first, optimizer=optimizer)

    with pytest.raises(InvalidArgumentError, match="it was built for"):
        tfgrad.train_step(loss_of(second), wrt=second, optimizer=optimizer)


def test_an_optimizer_of_all_may_move_some_of_them():
    a, b = tf.Variable(1.0), tf.Variable(1.0)
    optimizer = keras.optimizers.SGD(0.5)
    tfgrad.train_step(lambda: a + b, wrt=[a, b], optimizer=optimizer)()
    tfgrad.train_step(lambda: a + b, wrt=a, optimizer=optimizer)()

    assert (float(a), float(b)) == (0.0, 0.5)
    assert int(optimizer.iterations) == 2


def test_a_branch_on_a_tensor_can_be_traced():
    w = tf.Variable(1.0)

    def loss(x):
        if x > 0:
            return w * x
        return -w * x

    step = tfgrad.train_step(loss, wrt=w, optimizer="sgd", learning_rate=0.5)
    step(1.0), step(-3.0)

    assert float(w) == 1.0 - 0.5 - 1.5


def test_an_error_of_the_users_arrives_as_it_is():
    w = tf.Variable(1.0)

    def loss(x):
        raise KeyError(x.shape[0])

    with pytest.raises(KeyError, match="3"):
        tfgrad.train_step(loss, wrt=w)(tf.ones([3]))


def test_a_loss_that_leaves_tensorflow_is_refused_with_its_line():
    w = tf.Variable(1.0)
    step = tfgrad.train_step(lambda x: tf.constant(w.numpy() * x), wrt=w)
    with pytest.raises(InvalidArgumentError, match=r"at test_train_step\.py:\d+"):
        step(1.0)


def test_python_code_in_the_loss_is_taken_where_it_need_not_be_verified():
    w = tf.Variable(3.0)

    def loss():
        return tf.ensure_shape(tf.py_function(tf.square, [w], tf.float32), [])

    with pytest.raises(NoGradientError, match="verify=False"):
        tfgrad.train_step(loss, wrt=w)()
    tfgrad.train_step(loss, wrt=w, optimizer="sgd", learning_rate=0.5, verify=False)()

    assert float(w) == 0.0


def test_a_step_says_what_it_is():
    def distance(x):
        return x

    step = tfgrad.train_step(distance, wrt=tf.Variable(1.0))

    assert repr(step) == "<train_step of distance by Adam>"


def test_variables_made_outside_of_a_scope_are_stepped_in_it():
    strategy = tf.distribute.OneDeviceStrategy("/cpu:0")
    w = tf.Variable(1.0)

    with strategy.scope():
        step = tfgrad.train_step(
            lambda x, y: (w * x - y) ** 2, wrt=w, optimizer="sgd", learning_rate=0.1
        )
        value = step(1.0, 3.0)

    assert float(value) == 4.0
    assert float(w) == pytest.approx(1.4)


@pytest.mark.parametrize("make", [lambda: "sgd", keras.optimizers.SGD], ids=["a", "b"])
def test_a_step_made_in_a_function_that_is_traced_is_refused(make):
    w = tf.Variable(1.0)

    @tf.function
    def inside():
        return tfgrad.train_step(lambda: w * w, wrt=w, optimizer=make())()

    with pytest.raises(InvalidArgumentError, match=r"outside of a tf\.function"):
        inside()


def test_a_step_made_in_a_trace_may_move_by_an_optimizer_that_was_made_before():
    w, optimizer = tf.Variable(1.0), keras.optimizers.SGD(0.25)

    @tf.function
    def inside():
        return tfgrad.train_step(lambda: w * w, wrt=w, optimizer=optimizer)()

    inside(), inside()

    assert float(w) == 0.25
    assert int(optimizer.iterations) == 2


def test_an_optimizer_that_needs_variables_of_keras_says_so():
    with pytest.raises(InvalidArgumentError, match="works on Keras variables only"):
        tfgrad.train_step(
            lambda: 0.0, wrt=tf.Variable([[1.0]]), optimizer=keras.optimizers.Muon(0.1)
        )


def test_the_optimizer_of_a_step_cannot_be_replaced():
    step = tfgrad.train_step(lambda: 0.0, wrt=tf.Variable(1.0))
    with pytest.raises(AttributeError):
        step.optimizer = keras.optimizers.SGD()
