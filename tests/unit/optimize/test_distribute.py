"""Runs on two mirrored replicas, in a process that has two devices, against one."""

import json

import pytest

from tests.e2e.clusters import run
from tfgrad.optimize.distribute import ONE, Replicas

MIRRORED = """
import json, sys
import numpy as np, keras, tensorflow as tf
tf.get_logger().setLevel("ERROR")
(cpu,) = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
import contextlib, tfgrad
"""

PROGRAM = """
LAYERS, OPTIMIZERS = keras.layers, keras.optimizers
keras.backend.set_floatx("float64")
random = np.random.default_rng(0)
X = random.normal(size=(53, 4))
Y = np.sin(X @ random.normal(size=(4, 1)))
WORDS = random.integers(0, 40, size=(53, 3)).astype("int32")
HUGE = Y.copy()
HUGE[10] = 1e307  # times the scale, its gradient overflows: in one of the shares

def train(scope, kind="plain", method="sgd", x=X, y=Y, inside=False, named=True,
          data=None, **more):
    with scope():
        keras.utils.set_random_seed(1)
        first = [keras.Input([4])]
        if kind == "sparse":
            first = [keras.Input([3], dtype="int32"), LAYERS.Embedding(40, 2)]
            first.append(LAYERS.Flatten())
        between = {
            "synchronized": [LAYERS.BatchNormalization(synchronized=True)],
            "averages": [LAYERS.BatchNormalization()],
            "dropout": [LAYERS.Dropout(0.3, seed=5)],
        }.get(kind, [])
        hidden = LAYERS.Dense(8, activation="tanh")
        model = keras.Sequential([*first, hidden, *between, LAYERS.Dense(1)])
    def loss(x, y):
        m = model(x, training=True)
        return tf.reduce_mean(tf.where(y < 1e300, (m - y) ** 2, m * y))
    budget = {} if isinstance(method, str) and method != "sgd" else {"epochs": 3}
    call = dict(wrt=model if named else None, data=data or (x, y), method=method)
    call["batch_size"] = None if data else 8
    with scope() if inside else contextlib.nullcontext():
        result = tfgrad.minimize(loss, **call, **budget, **more)
    copies = 0.0
    for v in model.variables if scope is strategy.scope else ():
        a, b = strategy.experimental_local_results(v.value)
        apart = tf.abs(tf.cast(a - b, "float64"))
        copies = max(copies, float(tf.reduce_max(apart)))
    weights = [np.ravel(w).astype("float64") for w in model.get_weights()]
    weights = np.concatenate(weights)
    return weights, result.nit, copies

ALONE = {}

def compare(name, inside=False, named=True, own=None, like=None, **options):
    if like is None:
        ALONE[name] = train(contextlib.nullcontext, **options)
    alone, steps, _ = ALONE[like or name]
    options = {**options, "data": own} if own else options
    both, taken, copies = train(strategy.scope, inside=inside, named=named, **options)
    difference = float(np.max(np.abs(alone - both)))
    is_finite = bool(np.all(np.isfinite(both)))
    print(json.dumps([name, difference, copies, steps, taken, is_finite]), flush=True)

compare("sgd")
compare("called in the scope", inside=True, like="sgd")
compare("found", named=False, like="sgd")
compare("clipping and averages", method=OPTIMIZERS.Adam(
    OPTIMIZERS.schedules.CosineDecay(0.05, 20), clipnorm=0.1, use_ema=True,
    ema_overwrite_frequency=4))
compare("accumulation",
        method=OPTIMIZERS.Adam(0.02, gradient_accumulation_steps=3))
compare("a scale that overflows", y=HUGE,
        method=OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.Adam(0.02)))
compare("batches of one row", x=X[:9], y=Y[:9])  # one share of the last is empty
compare("sparse rows", kind="sparse", x=WORDS, method=OPTIMIZERS.Adam(0.02))
WHOLE = tf.data.Dataset.from_tensor_slices((X, Y))
compare("rows of its own", data=WHOLE.batch(8),
        own=strategy.distribute_datasets_from_function(lambda _: WHOLE.batch(4)))
compare("distributed", like="rows of its own",
        own=strategy.experimental_distribute_dataset(WHOLE.batch(8)))
compare("all rows of its own", data=WHOLE.batch(8), method="lbfgs", steps=20,
        own=strategy.distribute_datasets_from_function(lambda _: WHOLE.batch(4)))
compare("all that is distributed", data=WHOLE.batch(8), method="newton", steps=5,
        own=strategy.experimental_distribute_dataset(WHOLE.batch(8)))
compare("synchronized", kind="synchronized")
compare("averages", kind="averages")
compare("dropout", kind="dropout")
compare("lbfgs", method="lbfgs", steps=20)
compare("L-BFGS called in the scope", method="lbfgs", steps=5, inside=True)
compare("newton", method="newton", steps=5)

def fit(scope):  # 53 rows by 8: the shares of the last batch are of 3 and 2
    with scope():
        a, b = (tf.Variable(tf.ones([], tf.float64)) for _ in range(2))
    def residuals(x, y):
        return a * tf.tanh(b * x) - y
    result = tfgrad.least_squares(residuals, wrt=[a, b], data=(X[:, 0], Y[:, 0]),
                                  batch_size=8)
    found = [a.numpy(), b.numpy(), *map(float, result.stderr)]
    return np.array(found), result.nit

(alone, steps), (both, taken) = fit(contextlib.nullcontext), fit(strategy.scope)
difference = float(np.max(np.abs(alone - both)))
print(json.dumps(["fit", difference, 0.0, steps, taken, True]))

from tfgrad.optimize.distribute import Copies

def beside(optimizer):  # where copies end that have been given other gradients
    with strategy.scope():
        v = tf.Variable([1.0, 2.0])
        optimizer = optimizer()
        optimizer.build([v])
    copies = Copies([v])

    @tf.function
    def step(goes_on):
        copies.keep([[tf.constant([3.0, 3.0])]])
        def go():
            with copies.beside(optimizer, [tf.constant([5.0, 5.0])]) as gradient:
                optimizer.apply(gradient, [v])
            return 1
        return tf.cond(goes_on, go, lambda: 0)

    step(tf.constant(True))
    return [each.numpy().tolist() for each in strategy.experimental_local_results(v)]

print(json.dumps(["beside", beside(lambda: OPTIMIZERS.SGD(1.0))]))
print(json.dumps(["clipped", beside(lambda: OPTIMIZERS.SGD(1.0, clipvalue=1.0))]))

def refused(name, call):
    try:
        call()
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))

with strategy.scope():
    a = tf.Variable(1.0, name="mirrored")
b = tf.Variable(1.0, name="plain")
refused("mixed", lambda: tfgrad.minimize(lambda: 1 / 0, wrt=[a, b]))
endless = strategy.distribute_datasets_from_function(lambda _: WHOLE.batch(4).repeat())
refused("all of endless", lambda: tfgrad.minimize(
    lambda x, y: a * tf.reduce_mean(x), wrt=a, data=endless, method="lbfgs"))
refused("endless", lambda: tfgrad.minimize(
    lambda x, y: a * tf.reduce_mean(x), wrt=a, data=endless, epochs=2))
def broken(x):
    raise ValueError("the user's own")
refused("an error", lambda: tfgrad.minimize(broken, wrt=a, data=X))
servers = type("ParameterServerStrategyV2", (), {})()
class OfServers:
    distribute_strategy, name = servers, "c"
from tfgrad.optimize.distribute import replicas_of
refused("servers", lambda: replicas_of([OfServers()]))
"""


@pytest.fixture(scope="module")
def found():
    (text,) = run(0, PROGRAM, beginning=MIRRORED)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith('["')]
    return {name: rest for name, *rest in lines}


EQUAL = {
    "sgd": 1e-14,
    "called in the scope": 1e-14,
    "found": 1e-14,
    "L-BFGS called in the scope": 1e-10,
    "clipping and averages": 1e-14,
    "accumulation": 1e-14,
    "a scale that overflows": 1e-14,
    "batches of one row": 1e-14,
    "sparse rows": 1e-14,
    "rows of its own": 1e-14,
    "distributed": 1e-14,
    "all rows of its own": 1e-10,
    "all that is distributed": 1e-10,
    "synchronized": 1e-13,
    "lbfgs": 1e-10,
    "newton": 1e-10,
    "fit": 1e-10,
}


@pytest.mark.parametrize("name", [*EQUAL, "averages", "dropout"])
def test_two_replicas_end_where_one_does(found, name):
    difference, copies, alone, both, is_finite = found[name]

    assert alone == both
    assert copies == 0
    assert is_finite
    # Each replica normalises by its own rows, and drops other units than the others.
    assert difference <= EQUAL[name] if name in EQUAL else difference > 1e-3


def test_an_optimizer_moves_each_copy_by_the_gradient_beside_it(found):
    assert found["beside"] == [[[-4.0, -3.0], [-2.0, -1.0]]]


def test_what_the_optimizer_has_clipped_moves_all_copies(found):
    assert found["clipped"] == [[[0.0, 1.0], [0.0, 1.0]]]


def test_variables_of_two_strategies_are_refused_before_anything_is_traced(found):
    kind, text = found["mixed"]

    assert kind == "InvalidArgumentError"
    assert "'mirrored:0' of MirroredStrategy and 'plain:0' of no strategy" in text


def test_rows_of_a_workers_own_have_an_end(found):
    assert "goes through all of the data" in found["all of endless"][1]
    assert "without end" in found["all of endless"][1]
    assert "Data without end has no epochs" in found["endless"][1]


def test_parameter_servers_are_refused_by_name(found):
    kind, text = found["servers"]

    assert kind == "InvalidArgumentError"
    assert "ParameterServerStrategyV2: its workers move the variables" in text


def test_an_error_in_the_function_arrives_as_it_is(found):
    assert found["an error"] == ["ValueError", "the user's own"]


def test_without_a_strategy_there_is_one_replica_and_it_is_the_chief():
    assert (ONE.count, ONE.is_chief, ONE.is_clustered) == (1, True, False)
    assert Replicas().run(lambda x: x + 1, 2) == 3
    assert ONE.gather([1.0, 2.0]).tolist() == [[1.0, 2.0]]
