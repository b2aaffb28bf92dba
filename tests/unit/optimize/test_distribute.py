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
random = np.random.default_rng(0)
X = random.normal(size=(53, 4)).astype("float32")
Y = np.sin(X @ random.normal(size=(4, 1))).astype("float32")
WORDS = random.integers(0, 40, size=(53, 3)).astype("int32")
HUGE = X.copy(); HUGE[10] = 1e30  # its gradient overflows, in one of the shares only
X64, Y64 = X.astype("float64"), Y.astype("float64")

def train(scope, kind="plain", method="sgd", x=X, y=Y, inside=False, named=True,
          **more):
    double = x.dtype == np.float64
    keras.backend.set_floatx("float64" if double else "float32")
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
    traces = []
    def loss(x, y):
        traces.append(1)
        return tf.reduce_mean((model(x, training=True) - y) ** 2)
    budget = {} if isinstance(method, str) and method != "sgd" else {"epochs": 3}
    call = dict(wrt=model if named else None, data=(x, y), batch_size=8, method=method)
    with scope() if inside else contextlib.nullcontext():
        result = tfgrad.minimize(loss, **call, **budget, **more)
    copies = 0.0
    for v in model.variables if scope is strategy.scope else ():
        a, b = strategy.experimental_local_results(v.value)
        apart = tf.abs(tf.cast(a - b, "float64"))
        copies = max(copies, float(tf.reduce_max(apart)))
    weights = [np.ravel(w).astype("float64") for w in model.get_weights()]
    weights = np.concatenate(weights)
    return weights, result, copies, len(traces)

def compare(name, **options):
    alone = train(contextlib.nullcontext, **options)
    both = train(strategy.scope, **options)
    inside = train(strategy.scope, inside=True, named=False, **options)
    difference = float(np.max(np.abs(alone[0] - both[0])))
    print(json.dumps([name, difference, both[2], bool(np.all(both[0] == inside[0])),
                      alone[1].nit, both[1].nit, bool(np.all(np.isfinite(both[0])))]))

compare("sgd", x=X64, y=Y64)
compare("clipping and averages", x=X64, y=Y64, method=OPTIMIZERS.Adam(
    OPTIMIZERS.schedules.CosineDecay(0.05, 20), clipnorm=0.1, use_ema=True,
    ema_overwrite_frequency=4))
compare("accumulation", x=X64, y=Y64,
        method=OPTIMIZERS.Adam(0.02, gradient_accumulation_steps=3))
compare("a scale that overflows", x=HUGE,
        method=OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.Adam(0.02)))
compare("batches of one row", x=X64[:9], y=Y64[:9])  # one share of the last is empty
compare("sparse rows", kind="sparse", x=WORDS, method=OPTIMIZERS.Adam(0.02))
compare("synchronized", kind="synchronized", x=X64, y=Y64)
compare("averages", kind="averages", x=X64, y=Y64)
compare("dropout", kind="dropout", x=X64, y=Y64)
compare("lbfgs", x=X64, y=Y64, method="lbfgs", steps=20)
compare("newton", x=X64, y=Y64, method="newton", steps=5)

def refused(name, call):
    try:
        call()
    except Exception as error:
        print(json.dumps([name, type(error).__name__, str(error)]))

with strategy.scope():
    a = tf.Variable(1.0, name="mirrored")
b = tf.Variable(1.0, name="plain")
refused("mixed", lambda: tfgrad.minimize(lambda: 1 / 0, wrt=[a, b]))
refused("an error", lambda: tfgrad.minimize(lambda x: a * x[9], wrt=a, data=[X[:8]]))
servers = type("ParameterServerStrategyV2", (), {})()
c = type("Copy", (tf.Variable,), {})
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
    "clipping and averages": 1e-14,
    "accumulation": 1e-14,
    "a scale that overflows": 1e-6,  # float32
    "batches of one row": 1e-14,
    "sparse rows": 1e-6,  # float32
    "synchronized": 1e-13,
    "lbfgs": 1e-10,
    "newton": 1e-10,
}


@pytest.mark.parametrize("name", [*EQUAL, "averages", "dropout"])
def test_two_replicas_end_where_one_does(found, name):
    difference, copies, is_same_inside, alone, both, is_finite = found[name]

    assert alone == both
    assert copies == 0
    assert is_same_inside  # called in the scope, with variables that f reads
    assert is_finite
    # Each replica normalises by its own rows, and drops other units than the others.
    assert difference <= EQUAL[name] if name in EQUAL else difference > 1e-3


def test_variables_of_two_strategies_are_refused_before_anything_is_traced(found):
    kind, text = found["mixed"]

    assert kind == "InvalidArgumentError"
    assert "'mirrored:0' of MirroredStrategy and 'plain:0' of no strategy" in text


def test_parameter_servers_are_refused_by_name(found):
    kind, text = found["servers"]

    assert kind == "InvalidArgumentError"
    assert "ParameterServerStrategyV2: its workers move the variables" in text


def test_an_error_in_the_function_arrives_as_it_is(found):
    _, text = found["an error"]

    assert "slice index 9" in text


def test_without_a_strategy_there_is_one_replica_and_it_is_the_chief():
    assert (ONE.count, ONE.is_chief, ONE.is_clustered) == (1, True, False)
    assert Replicas().run(lambda x: x + 1, 2) == 3
    assert ONE.gather([1.0, 2.0]).tolist() == [[1.0, 2.0]]
