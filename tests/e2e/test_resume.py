"""Runs that are killed, or interrupted, and called again, as real processes.

`TFGRAD_KILLS=20` kills as often; by default, twice: at a step, and amid a checkpoint.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.test_tensorboard import HAS_DATA_SERVER, curve
from tfgrad.runs.board import show
from tfgrad.runs.reader import read_run

KILLS = int(os.environ.get("TFGRAD_KILLS", "2"))

SCRIPT = """
import os, pickle, signal, sys, threading
import keras
import numpy as np
import tensorflow as tf
import tfgrad
from tfgrad.optimize import checkpoint

root, step, write, number = sys.argv[1], *map(int, sys.argv[2:])
checkpoint.LEAST_SECONDS = checkpoint.LEAST_RATIO = 0
keras.utils.set_random_seed(1)  # the order of a seeded data set hangs on it, too
x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
layers = [keras.layers.Dense(8), keras.layers.BatchNormalization()]
layers += [keras.layers.Dropout(0.3, seed=1), keras.layers.Dense(1)]
model = keras.Sequential([keras.Input([4]), *layers])
generator = np.random.default_rng(1)
model.set_weights([
    w if w.dtype == np.uint32 else generator.uniform(0.1, 1, w.shape)
    for w in model.get_weights()
])
kill = lambda: os.kill(os.getpid(), number)

def callback(state):
    if 0 <= step <= state.step:
        threading.Thread(target=kill).start()

saves, save = [], tf.train.CheckpointManager.save
def killed_amid(*args, **kwargs):
    saves.append(1)
    if len(saves) == write:
        threading.Timer(0.003, kill).start()
    return save(*args, **kwargs)
tf.train.CheckpointManager.save = killed_amid

data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).shuffle(64, seed=5).batch(16)
result = tfgrad.minimize(
    lambda x, y: tf.reduce_mean((model(x, training=True) - y) ** 2),
    wrt=model, data=data, epochs=40, callback=callback,
    log=f"{root}/logs", checkpoint=f"{root}/checkpoint",
)
facts = result.nit, result.nfev, result.status, result.message
history = {k: v for k, v in result.history.items() if k != "seconds"}
out = facts, history, result.epochs, model.get_weights(), str(result.directory)
with open(f"{root}/out", "wb") as file:
    pickle.dump(out, file)
"""


def run(root, step=-1, write=-1, number=signal.SIGKILL):
    root.mkdir(exist_ok=True)
    numbers = [str(int(n)) for n in (step, write, number)]
    command = [sys.executable, "-c", SCRIPT, root, *numbers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def outcome(root):
    return pickle.loads((root / "out").read_bytes())


def curves(directory):
    """Return the curves as tfgrad reads them, and as TensorBoard's Python loader."""
    ours = read_run(Path(directory)).curves
    accumulator = EventAccumulator(directory, size_guidance={"scalars": 0})
    accumulator.Reload()
    names = set(ours) - {"result/seconds"}
    theirs = {name: accumulator.Scalars(name) for name in names}
    return {
        name: (
            list(zip(ours[name].steps, ours[name].values, strict=True)),
            [(point.step, point.value) for point in theirs[name]],
        )
        for name in names
    }


def assert_same(killed, whole):
    """Assert that a run which was called again is the one which was not, to the bit."""
    facts, history, epochs, weights, directory = outcome(whole)
    again = outcome(killed)
    assert again[0] == facts
    for ours, theirs in ((again[1], history), (again[2], epochs)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    for ours, theirs in zip(again[3], weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(list((killed / "logs").iterdir())) == 1
    assert curves(again[4]) == curves(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    assert run(root) == 0
    return root


def test_a_run_that_ctrl_c_ends_and_that_is_killed_ends_as_if_it_had_not_been(
    whole, tmp_path
):
    killed = tmp_path / "killed"
    assert run(killed, step=30, number=signal.SIGINT) == 0
    (nit, _, status, message), history, *_ = outcome(killed)
    assert (status, len(history["fun"])) == ("interrupted", nit + 1)
    assert 30 <= nit < outcome(whole)[0][0]
    assert "all until there is kept" in message
    for name, column in history.items():
        column = np.asarray(column)[:nit]  # the last row is of a batch yet to come
        np.testing.assert_array_equal(column, outcome(whole)[1][name][:nit])

    moments = sorted(random.Random(0).sample(range(nit + 1, 160), KILLS))
    for number, step in enumerate(moments):
        where = {"write": 2} if number % 2 else {"step": step}
        assert run(killed, **where) == -signal.SIGKILL
    assert run(killed) == 0

    assert_same(killed, whole)
    if HAS_DATA_SERVER:  # it is not built for every machine
        loss = read_run(Path(outcome(whole)[-1])).curves["loss"]
        directory = Path(outcome(killed)[-1])
        with show(killed / "logs", load_fast="true") as board:
            steps, values = curve(board, directory.name, "loss", len(loss.steps))
        assert steps == list(loss.steps)
        assert values == list(loss.values)
