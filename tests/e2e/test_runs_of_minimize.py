"""What `minimize` writes without being asked, read back from its files."""

import collections
import contextlib
import json
import os
import shutil
import subprocess
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad import problems
from tfgrad.optimize import tensorboard as log_module
from tfgrad.runs.directory import event_files
from tfgrad.runs.reader import load_run, load_runs, read_run
from tfgrad.runs.run import Run


def bowl(x):
    return tf.reduce_sum((x - 1.0) ** 2)


def minimized(log, f=bowl, x0=(3.0, 2.0), method="sgd", steps=20, **options):
    options = {"learning_rate": 0.1, **options}
    x0 = None if "wrt" in options else np.array(x0)
    return tfgrad.minimize(f, x0, method=method, steps=steps, log=log, **options)


def values(directory):
    """Return the values that are no scalars, by plugin and tag, with their steps."""
    found = collections.defaultdict(dict)
    for path in event_files(directory):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                plugin = value.metadata.plugin_data.plugin_name
                found[plugin].setdefault(value.tag, []).append((event.step, value))
    return found


def card(directory, tag):
    ((_, value),) = values(directory)["text"][tag]
    return value.tensor.string_val[0].decode()


def curve(directory, tag):
    read = read_run(directory).curves[tag]
    return list(read.steps), np.array(read.values)


# --- what is there without asking -----------------------------------------------------


def test_curves_are_those_of_the_history(tmp_path):
    result = minimized(tmp_path)
    history = result.history

    frame = load_run(result.directory, wide=True)
    frame = frame[frame["loss"].notna()]
    np.testing.assert_array_equal(frame["step"], history["step"])
    np.testing.assert_array_equal(frame["loss"], np.float32(history["fun"]))
    np.testing.assert_array_equal(
        frame["gradient/max_norm"], np.float32(history["grad_max"])
    )
    np.testing.assert_allclose(
        frame["gradient/log10_max_norm"], np.log10(history["grad_max"]), rtol=1e-6
    )
    np.testing.assert_array_equal(frame["x/0"], np.float32(history["x"][:, 0]))
    np.testing.assert_array_equal(frame["x/1"], np.float32(history["x"][:, 1]))


def test_the_fall_that_a_method_still_expects_is_a_curve_without_made_up_points(
    tmp_path,
):
    f = problems.rosenbrock  # Newton says of some steps alone what it expects
    result = tfgrad.minimize(f, [-1.2, 1.0], method="newton", log=tmp_path)

    _, falls = curve(result.directory, "loss/expected_fall")
    assert 0 < np.isnan(falls).sum() < len(falls)
    assert (np.abs(falls[np.isfinite(falls)]) < 1e3).all()


def test_step_lengths_are_the_distances_between_points(tmp_path):
    result = minimized(tmp_path, steps=300)  # in more than one chunk

    steps, lengths = curve(result.directory, "step/length")
    expected = np.linalg.norm(np.diff(result.history["x"], axis=0), axis=1)
    assert steps == list(range(1, 301))
    np.testing.assert_allclose(lengths, expected, rtol=1e-6, atol=1e-30)


def test_methods_compare_by_hyper_parameters_and_results(tmp_path):
    for method in ("sgd", "adam"):
        minimized(tmp_path, method=method)

    frame = load_runs(tmp_path)
    assert set(frame["hparams/method"]) == {"sgd", "adam"}
    assert set(frame["hparams/problem"]) == {"bowl"}
    evaluations = frame[frame["tag"] == "result/evaluations"]
    assert evaluations["value"].tolist() == [21, 21]
    assert (frame[frame["tag"] == "result/seconds"]["value"] > 0).all()


def test_the_cards_tell_the_problem_and_the_result(tmp_path):
    result = minimized(tmp_path, gtol=1e-12)
    problem, outcome = (card(result.directory, tag) for tag in ("problem", "result"))

    assert "tf.reduce_sum((x - 1.0) ** 2)" in problem
    for fact in ("| method | sgd |", "| gtol | 1e-12 |", "| start | x = [3. 2.] |"):
        assert fact in problem
    assert tf.__version__ in problem
    assert "None" not in problem
    assert "| status | steps |" in outcome
    assert result.message in outcome


def test_run_json_keeps_the_result_in_all_its_bits(tmp_path):
    result = minimized(tmp_path)

    record = json.loads((result.directory / "run.json").read_text())
    assert record["status"] == "steps"
    np.testing.assert_array_equal(record["result"]["x"], result.x)
    assert record["result"]["fun"] == result.fun


def test_the_function_is_traced_twice_whatever_is_drawn(tmp_path):
    calls = []

    def counted(x):
        calls.append(x)
        return bowl(x)

    minimized(tmp_path, counted, steps=200)
    assert len(calls) <= 2


def test_many_parameters_are_histograms_ten_to_twenty_times(tmp_path):
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4, name="dense")])
    x = tf.ones([2, 3])
    result = minimized(
        tmp_path, lambda: tf.reduce_sum(model(x) ** 2), wrt=model, steps=99
    )

    histograms = values(result.directory)["histograms"]
    kinds = {tag.split("/")[0] for tag in histograms}
    assert kinds == {"parameters", "gradients"}
    assert any(tag.endswith("dense/kernel") for tag in histograms)
    for points in histograms.values():
        assert 10 <= len(points) <= 22
    assert not any(tag.startswith("x") for tag in read_run(result.directory).curves)


def test_histograms_of_values_are_named_by_their_place(tmp_path):
    def f(params):
        return tf.reduce_sum(params["w"] ** 2) + tf.reduce_sum(params["b"] ** 2)

    start = {"w": np.ones((3, 4)), "b": np.ones(4)}
    result = tfgrad.minimize(f, start, method="sgd", steps=3, log=tmp_path)

    tags = set(values(result.directory)["histograms"])
    assert {"parameters/x/w", "parameters/x/b", "gradients/x/w"} <= tags


# --- bounded --------------------------------------------------------------------------


def test_long_runs_are_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "EVERY_STEP", 100)
    result = minimized(tmp_path, steps=1001, learning_rate=1e-5)

    steps, loss = curve(result.directory, "loss")
    expected = [*range(100), *range(100, 200, 2), *range(200, 400, 4)]
    expected += [*range(400, 800, 8), *range(800, 1001, 16), 1001]
    assert steps == expected
    np.testing.assert_array_equal(loss, np.float32(result.history["fun"][expected]))
    assert len(result.history["fun"]) == 1002


def test_a_log_of_every_tenth_step_has_the_start_and_the_end(tmp_path):
    result = minimized(tmp_path, steps=25, every=10)

    steps, loss = curve(result.directory, "loss")
    assert steps == [0, 10, 20, 25]
    np.testing.assert_array_equal(loss, np.float32(result.history["fun"][steps]))
    assert len(result.history["fun"]) == 26


def test_long_runs_of_every_tenth_step_are_thinned_later(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "EVERY_STEP", 10)
    result = minimized(tmp_path, steps=401, learning_rate=1e-5, every=10)

    steps, _ = curve(result.directory, "loss")
    assert steps == [
        *range(0, 100, 10),
        *range(100, 200, 20),
        *range(200, 401, 40),
        401,
    ]


# --- a log that fails -----------------------------------------------------------------


def tracked(path):
    """Return a callback that deletes `path` at step 3."""

    def callback(state):
        while state.step == 3 and path.exists():  # run.json may be written meanwhile
            shutil.rmtree(path, ignore_errors=True)

    return callback


def test_a_directory_deleted_under_way_ends_the_log_and_not_the_run(tmp_path):
    with pytest.warns(RuntimeWarning, match="The optimisation goes on without its log"):
        result = minimized(tmp_path, callback=tracked(tmp_path / "sgd"))

    assert result.nit == 20
    assert not any(t.name.startswith("tfgrad-log") for t in threading.enumerate())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, of which 20 are free."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    (place / "filler").write_bytes(bytes(40 * 1024))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_ends_the_log_and_not_the_run(small_disk):
    with pytest.warns(RuntimeWarning, match=r"goes on without its log(?s:.)*No space"):
        result = minimized(small_disk, steps=3000)

    assert result.nit == 3000
    run = small_disk / "sgd"
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        frame = load_run(run, wide=True)
    assert frame["step"].tolist() == list(range(len(frame)))
    assert len(frame) > 10
    assert json.loads((run / "run.json").read_text())["status"]


def test_a_disk_that_is_full_from_the_start_does_not_keep_anyone_from_minimizing(
    small_disk,
):
    with contextlib.suppress(OSError), (small_disk / "rest").open("wb", 0) as rest:
        while True:
            rest.write(bytes(4096))

    with pytest.warns(RuntimeWarning, match="The optimisation goes on without its log"):
        result = minimized(small_disk)
    assert result.nit == 20
    assert result.directory is None


def test_a_full_disk_lets_the_directory_go(small_disk):
    with pytest.warns(RuntimeWarning, match="goes on without its log"):
        minimized(small_disk, steps=3000)
    (small_disk / "filler").unlink()

    Run(small_disk / "sgd", resume_from=0).close()


def test_a_run_that_has_these_steps_already_is_a_warning(tmp_path):
    with Run(tmp_path / "run") as run:
        minimized(run)
        with pytest.warns(RuntimeWarning, match="On one tag, steps grow"):
            result = minimized(run)

    assert result.nit == 20
    assert curve(run.directory, "loss")[0] == list(range(21))


def test_a_log_that_cannot_be_begins_nothing(tmp_path):
    (tmp_path / "file").touch()

    def never(x):
        raise AssertionError

    with pytest.raises(tfgrad.errors.RunError, match="which is a file"):
        minimized(tmp_path / "file" / "logs", never)


def test_histograms_of_variables_that_are_fitted_to_data(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4)])
    x = np.ones((8, 3), "float32")

    result = tfgrad.minimize(
        lambda x: tf.reduce_mean(model(x) ** 2),
        wrt=model, data=x, batch_size=4, epochs=2, log=tmp_path,
    )  # fmt: skip

    found = {tag for tag in values(result.directory)["histograms"] if "kernel" in tag}
    assert {tag.partition("/")[0] for tag in found} == {"parameters", "gradients"}
