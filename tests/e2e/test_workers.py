"""Runs in two and three processes of one cluster, against one process alone."""

import signal

import numpy as np
import pytest

from tests.e2e.clusters import outputs, run, start

CASES = """
keras.backend.set_floatx("float64")
LAYERS, OPTIMIZERS = keras.layers, keras.optimizers
random = np.random.default_rng(0)
X = random.normal(size=(53, 4))
Y = np.sin(X @ random.normal(size=(4, 1)))
WORDS = random.integers(0, 40, size=(53, 3)).astype("int32")

def model_of(kind):
    keras.utils.set_random_seed(1)
    first = [keras.Input([4])]
    if kind == "sparse":
        first = [keras.Input([3], dtype="int32"), LAYERS.Embedding(40, 2)]
        first.append(LAYERS.Flatten())
    between = {
        "synchronized": [LAYERS.BatchNormalization(synchronized=True)],
        "of each": [LAYERS.BatchNormalization(), LAYERS.Dropout(0.3, seed=5)],
    }.get(kind, [])
    hidden = LAYERS.Dense(8, activation="tanh")
    return keras.Sequential([*first, hidden, *between, LAYERS.Dense(1)])

def schedule():
    return OPTIMIZERS.schedules.CosineDecay(0.05, 100)

def own_rows():  # the last batch has one row: the first workers have no part of it
    whole = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 49, 8)]
    whole[-1] = [part[:1] for part in whole[-1]]
    if WORKER < 0:
        return whole
    def make(context):
        index, count = context.input_pipeline_id, context.num_input_pipelines
        def cut(part):
            return part[len(part) * index // count : len(part) * (index + 1) // count]
        mine = [tuple(map(cut, batch)) for batch in whole if len(cut(batch[0]))]
        specs = [tf.TensorSpec([None, *part.shape[1:]], part.dtype) for part in mine[0]]
        generated = tf.data.Dataset.from_generator
        return generated(lambda: iter(mine), output_signature=tuple(specs))
    return strategy.distribute_datasets_from_function(make)

METHODS = {
    "sgd": lambda: OPTIMIZERS.SGD(0.1),
    "adam": lambda: OPTIMIZERS.Adam(
        schedule(), clipnorm=0.1, use_ema=True, ema_overwrite_frequency=4
    ),
    "lbfgs": lambda: "lbfgs",
}
KINDS = "synchronized", "own", "sparse", "of each"
CASES = [("plain", "sgd", 15), ("plain", "adam", 15), ("plain", "lbfgs", 100)]
CASES += [(k, "adam", 3) for k in KINDS]
found = {}
for kind, method, epochs in CASES[:: int(sys.argv[2])]:
    with scope():
        model = model_of(kind)
    def loss(x, y):
        return tf.reduce_mean((model(x, training=True) - y) ** 2)
    budget = {"steps": epochs} if method == "lbfgs" else {"epochs": epochs}
    data = own_rows() if kind == "own" else (WORDS if kind == "sparse" else X, Y)
    result = tfgrad.minimize(
        loss, wrt=model, data=data, batch_size=None if kind == "own" else 8,
        method=METHODS[method](), log=sys.argv[1] + "/log",
        checkpoint=f"{sys.argv[1]}/{kind}-{method}", **budget,
    )
    weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
    found[f"{kind} {method}"] = weights
    found[f"{kind} {method} fun"] = result.history["fun"]
    if result.epochs:
        found[f"{kind} {method} means"] = result.epochs["fun"]
with scope():
    model = model_of("plain")
tfgrad.minimize(loss, wrt=model, data=own_rows(), method="lbfgs", steps=10)
found["lbfgs own"] = np.concatenate([np.ravel(w) for w in model.get_weights()])

def part(rows):  # of its own
    count = 1 if WORKER < 0 else strategy.num_replicas_in_sync
    return np.array_split(rows, count)[max(WORKER, 0)]

for kind, given in ("same", lambda rows: rows), ("own", part):
    with scope():
        model = model_of("plain")
        optimizer = METHODS["adam"]()
    step = tfgrad.train_step(loss, wrt=model, optimizer=optimizer)
    for i in range(0, 49, 8):  # the last batch has one row
        rows = slice(i, min(i + 8, 49))
        value = step(given(X[rows]), given(Y[rows]))
    found[f"step {kind}"] = np.concatenate([np.ravel(w) for w in model.get_weights()])
    found[f"step {kind} fun"] = value.numpy()
np.savez(f"{sys.argv[1]}/{WORKER}.npz", **found)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    directory = tmp_path_factory.mktemp("alone")
    run(0, CASES, directory, 1)
    return np.load(directory / "-1.npz")


@pytest.mark.parametrize(("count", "every"), [(2, 1), (3, 2)])
def test_workers_end_where_one_process_does(count, every, alone, tmp_path):
    run(count, CASES, tmp_path, every)  # of the cases

    chief = np.load(tmp_path / "0.npz")
    for worker in range(1, count):
        other = np.load(tmp_path / f"{worker}.npz")
        for name in chief.files:
            np.testing.assert_array_equal(chief[name], other[name], err_msg=name)
    for name in chief.files:
        if "of each" in name:
            # Each replica normalises by its own rows, and drops other units.
            assert chief[name].shape == alone[name].shape
            assert np.all(np.isfinite(chief[name]))
        else:
            # A hundred steps of L-BFGS magnify what rounds otherwise in the first.
            error = 1e-5 if "lbfgs" in name else 1e-10
            np.testing.assert_allclose(
                chief[name], alone[name], rtol=error, atol=error, err_msg=name
            )
    runs = [path for path in (tmp_path / "log").iterdir() if path.is_dir()]
    assert len(runs) == -(-7 // every)  # the chief's alone


LONG = """
random = np.random.default_rng(0)
X = random.normal(size=(403, 4))
Y = np.sin(X @ random.normal(size=(4, 1)))
keras.backend.set_floatx("float64")
with scope():
    keras.utils.set_random_seed(1)
    hidden = keras.layers.Dense(8, activation="tanh")
    model = keras.Sequential([keras.Input([4]), hidden, keras.layers.Dense(1)])
def loss(x, y):
    return tf.reduce_mean((model(x) - y) ** 2)
def told(state):
    print("step", state.step, flush=True)
result = tfgrad.minimize(
    loss, wrt=model, data=(X, Y), batch_size=16, steps=int(sys.argv[2]),
    method="adam", checkpoint=sys.argv[1], callback=told,
)
weights = np.concatenate([np.ravel(w) for w in model.get_weights()])
print("ended", result.status, result.nit, weights.tobytes().hex(), flush=True)
"""


def until(process, step):
    """Read what a process prints, up to a step."""
    for line in process.stdout:
        if line.startswith("step") and int(line.split()[1]) >= step:
            return


def ended(text):
    """Return status, steps and weights that a process has printed."""
    (line,) = (line for line in text.splitlines() if line.startswith("ended"))
    return line.split()[1:]


def test_a_worker_that_is_killed_ends_the_others_with_what_to_do(tmp_path):
    steps = 500
    whole = {ended(text)[2] for text in run(2, LONG, tmp_path / "whole", steps)}
    for victim, moment in ((1, 150), (0, 300)):
        workers = start(2, LONG, tmp_path / "killed", steps)
        until(workers[victim], moment)
        workers[victim].kill()
        text = outputs(workers)[1 - victim]

        assert workers[1 - victim].returncode == 1
        assert "All workers of a run have to live until it ends." in text
        assert "start them again with the same TF_CONFIG" in text
    resumed = {ended(text)[2] for text in run(2, LONG, tmp_path / "killed", steps)}
    assert resumed == whole
    assert len(whole) == 1


def test_ctrl_c_in_one_worker_ends_all_at_the_same_step(tmp_path):
    workers = start(2, LONG, tmp_path, 10**6)
    until(workers[1], 50)
    workers[1].send_signal(signal.SIGINT)

    first, second = (ended(text) for text in outputs(workers))

    assert first == second
    assert first[0] == "interrupted"
    assert int(first[1]) >= 50


REFUSED = """
random = np.random.default_rng(0)
X = random.normal(size=(48, 4))
with scope():
    w = tf.Variable(np.zeros(4))
def loss(x):
    return tf.reduce_mean((w - x) ** 2)
def refused(name, wrt=w, **options):
    try:
        tfgrad.minimize(loss, wrt=wrt, **options)
    except Exception as error:
        print("refused", name, "|", str(error).replace(chr(10), " "), flush=True)
dataset = tf.data.Dataset.from_tensor_slices(X).batch(8)
shuffled = dataset.shuffle(6, seed=1 + WORKER)  # without a seed some runs agree
refused("shuffle", data=shuffled)
refused("all", data=shuffled, method="lbfgs")
refused("arrays", data=X + WORKER)
refused("callback", data=X, callback=print if WORKER == 0 else None)
refused("unnamed", wrt=None, data=X, checkpoint=sys.argv[1], log=sys.argv[1])
result = tfgrad.minimize(loss, wrt=w, data=dataset.shuffle(6, seed=1), epochs=2)
print("done", result.nit)
"""


def test_what_differs_between_workers_is_found_out(tmp_path):
    for text in run(2, REFUSED, tmp_path / "run"):
        lines = [line for line in text.splitlines() if line.startswith("refused")]
        found = dict(line.removeprefix("refused ").split(" | ") for line in lines)
        assert set(found) == {"shuffle", "all", "arrays", "callback", "unnamed"}
        for name in ("shuffle", "all", "arrays"):
            assert "All workers must draw the same batches" in found[name]
            assert "seed=1" in found[name]
        assert "a callback in 1 of 2 workers" in found["callback"]
        assert "`wrt` names the variables" in found["unnamed"]
        assert "done 12" in text
    assert not list(tmp_path.iterdir())
