"""`checkpoint=`: what is on the disk, and what is refused before anything is traced."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.errors import InvalidArgumentError, RunError, TfgradError
from tfgrad.optimize import checkpoint as checkpoint_module
from tfgrad.runs.directory import claim

START = np.full(3, -1.2)
CALLS = []


def rosenbrock(x):
    CALLS.append(x)
    return tf.reduce_sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def never(x):
    raise AssertionError


never.__name__ = "rosenbrock"  # the same problem, as far as a name can tell


def minimized(place, f=rosenbrock, x0=START, **options):
    options = {"method": "adam", "steps": 30, **options}
    return tfgrad.minimize(f, x0, checkpoint=place, **options)


def left_at(step, place, **options):
    """Leave a run after a step, by an error of the callback's."""

    def leave(state):
        if state.step >= step:
            raise KeyError

    with pytest.raises(KeyError):
        minimized(place, callback=leave, **options)


def assert_same(result, expected):
    np.testing.assert_array_equal(result.x, expected.x)
    np.testing.assert_array_equal(result.grad, expected.grad)
    for name in result.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(result.history[name], expected.history[name])
    for name in ("nit", "nfev", "status", "message", "success", "fun"):
        assert getattr(result, name) == getattr(expected, name)


@pytest.fixture
def at_each_chunk(monkeypatch):
    monkeypatch.setattr(checkpoint_module, "LEAST_SECONDS", 0)
    monkeypatch.setattr(checkpoint_module, "LEAST_RATIO", 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return minimized(tmp_path_factory.mktemp("whole") / "checkpoint")


def test_a_run_that_was_left_goes_on_to_the_last_bit(tmp_path, whole):
    left_at(12, tmp_path)
    result = minimized(tmp_path)

    assert_same(result, whole)
    assert whole.nit == 30


def test_the_last_checkpoints_are_kept_whole(tmp_path, at_each_chunk, whole):
    left_at(12, tmp_path)

    assert len(list(tmp_path.glob("*.index"))) == checkpoint_module.KEPT
    newest = tf.train.latest_checkpoint(tmp_path)  # TensorFlow reads them, too
    x = tf.Variable(START)
    tf.train.Checkpoint(variables=[x]).restore(newest).expect_partial()
    np.testing.assert_array_equal(x, whole.history["x"][12])


def test_a_finished_run_returns_its_result_after_one_look(tmp_path):
    first = minimized(tmp_path, log=tmp_path / "logs")
    calls = len(CALLS)
    again = minimized(tmp_path, log=tmp_path / "logs")

    assert_same(again, first)
    assert again.directory == first.directory
    assert len(list((tmp_path / "logs").iterdir())) == 1
    call = {"method": "adam", "steps": 30, "checkpoint": tmp_path}
    states = tfgrad.descend(rosenbrock, START, **call)
    assert [(s.step, s.fun) for s in states] == [(30, first.fun)]
    assert len(CALLS) == calls + 2


@pytest.mark.parametrize("method", ["lbfgs", "adam"])
def test_the_result_of_a_finished_run_goes_on_as_in_its_own_process(tmp_path, method):
    first = minimized(tmp_path, method=method)
    again = minimized(tmp_path, method=method)

    result = tfgrad.minimize(rosenbrock, again, steps=20)

    assert_same(result, tfgrad.minimize(rosenbrock, first, steps=20))


def bowl(scale, power=2):
    return lambda x: tf.reduce_sum(scale * (x - 3) ** power) + tf.reduce_sum(scale * x)


ANOTHER = {
    "another body": lambda x: tf.reduce_sum(x**4) + 1,
    "another number behind a name": bowl(2.0),
    "another array behind a name": bowl(np.array([1.0, 2.0, 3.0])),
}


@pytest.mark.parametrize("steps", [100, 200])
@pytest.mark.parametrize("name", ANOTHER)
def test_an_ended_run_is_not_the_answer_for_a_function_with(name, steps, tmp_path):
    call = {"x0": np.ones(3), "method": "lbfgs", "steps": 100}
    first = minimized(tmp_path, bowl(1.0), **call)
    assert first.success

    with pytest.raises(InvalidArgumentError, match="function that it began with"):
        minimized(tmp_path, ANOTHER[name], **{**call, "steps": steps})

    assert_same(minimized(tmp_path, bowl(1.0), **call), first)


def test_a_function_written_otherwise_with_the_same_values_is_the_same(tmp_path):
    call = {"x0": np.ones(3), "method": "lbfgs", "steps": 100}
    first = minimized(tmp_path, bowl(1.0), **call)

    again = minimized(tmp_path, lambda x: tf.reduce_sum(tf.square(x - 3) + x), **call)

    assert_same(again, first)


def test_variables_are_put_to_the_end_of_a_finished_run(tmp_path):
    x = tf.Variable(START)

    def f():
        return rosenbrock(x)

    first = minimized(tmp_path, f, None)  # which finds x
    x.assign(START)
    again = minimized(tmp_path, f, None)

    np.testing.assert_array_equal(x, first.x)
    np.testing.assert_array_equal(again.x, first.x)
    assert again.nfev == first.nfev


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
@pytest.mark.parametrize("has_data", [True, False])
def test_what_f_wrote_is_there_again_with_the_end_of_a_finished_run(
    has_data, method, tmp_path
):
    def ended():
        w, seen = tf.Variable(3.0), tf.Variable(0.0, trainable=False)
        batch = np.arange(1.0, 9.0, dtype=np.float32)

        def loss(x=batch):
            seen.assign_add(tf.reduce_sum(w * x))  # as an average is kept
            return tf.reduce_mean((w * x - 1) ** 2)

        data = {"data": batch, "batch_size": 2} if has_data else {"steps": 20}
        result = tfgrad.minimize(loss, method=method, checkpoint=tmp_path, **data)
        return result, w.numpy(), seen.numpy()

    first, *values = ended()
    again, *others = ended()

    assert_same(again, first)
    assert others == values
    assert values[1] != 0


def test_more_steps_go_on_from_the_end(tmp_path):
    minimized(tmp_path, steps=100)
    result = minimized(tmp_path, steps=150)

    assert_same(result, minimized(tmp_path / "other", steps=150))


def test_what_an_older_version_saved_of_lbfgs_goes_on(tmp_path):
    def vector(leaf):
        return tf.squeeze(leaf, 1) if leaf.shape[1:] == [1] else leaf

    half = tfgrad.minimize(rosenbrock, START, steps=10)
    memory = tf.nest.map_structure(vector, half.state.state.memory)
    older = replace(half.state, state=half.state.state._replace(memory=memory))
    result = tfgrad.minimize(rosenbrock, replace(half, state=older), steps=40)

    assert memory.method.memory.curvature.shape.rank == 1
    assert_same(result, tfgrad.minimize(rosenbrock, START, steps=50))


@pytest.mark.parametrize(
    ("method", "moments"),
    [([("adam", 20), "lbfgs"], (3, 20, 21)), ("newton", (1,))],
    ids=["chain", "newton"],
)
def test_every_stage_goes_on_where_it_was(tmp_path, method, moments):
    expected = tfgrad.minimize(rosenbrock, START, method=method)
    for step in moments:
        left_at(step, tmp_path, method=method, steps=1000)

    assert_same(minimized(tmp_path, method=method, steps=1000), expected)


def test_a_result_that_goes_on_can_be_checkpointed(tmp_path):
    begun = tfgrad.minimize(rosenbrock, START, method="adam", steps=10)
    left_at(13, tmp_path, x0=begun, method=None, steps=20)
    result = minimized(tmp_path, x0=begun, method=None, steps=20)

    assert_same(result, tfgrad.minimize(rosenbrock, begun, steps=20))


@pytest.mark.parametrize("how", ["cut", "changed", "deleted", "emptied"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path, at_each_chunk, whole, how
):
    left_at(12, tmp_path)
    newest = tf.train.latest_checkpoint(tmp_path)
    data = f"{newest}.data-00000-of-00001"
    content = bytearray((tmp_path / data).read_bytes())
    damage = {"cut": bytes(content[: len(content) // 3]), "emptied": b""}
    content[::50] = bytes(len(content[::50]))
    damage["changed"] = bytes(content)
    if how == "deleted":
        Path(data).unlink()
    else:
        (tmp_path / data).write_bytes(damage[how])

    with pytest.warns(RuntimeWarning, match="The checkpoint before is used"):
        result = minimized(tmp_path)

    assert_same(result, whole)


@pytest.mark.parametrize("content", [b"nonsense {", b"\xff\xfe", b""])
def test_a_damaged_list_of_checkpoints_is_done_without(tmp_path, whole, content):
    left_at(12, tmp_path)
    (tmp_path / "checkpoint").write_bytes(content)

    assert_same(minimized(tmp_path), whole)


def test_checkpoints_of_which_none_can_be_read_are_an_error(tmp_path):
    left_at(12, tmp_path)
    for path in tmp_path.glob("*.data*"):
        path.write_bytes(b"")

    with pytest.raises(RunError, match=r"that can be read(?s:.)*delete the directory"):
        minimized(tmp_path, never)


OTHERS = {
    "shape": ({"x0": np.ones(4)}, r"\(3,\), float64 before, x of shape \(4,\)"),
    "dtype": ({"x0": np.float32(START)}, "float64 before.*float32 now"),
    "structure": ({"x0": {"a": START}}, r"x of shape .* before, x\['a'\] of shape"),
    "method": ({"method": "sgd"}, r"methods: .*adam.* before, .*sgd.* now"),
    "chain": ({"method": ["adam", "lbfgs"]}, "before, .*lbfgs.* now"),
    "aux": ({"has_aux": True}, "has_aux: False before, True now"),
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    place = tmp_path_factory.mktemp("left")
    left_at(3, place)
    return place


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_problem_is_refused_by_name(left, case):
    options, message = OTHERS[case]
    before = sorted(path.name for path in left.iterdir())

    with pytest.raises(InvalidArgumentError, match=message) as caught:
        minimized(left, **{"f": never, **options})

    assert "another directory" in str(caught.value)
    assert sorted(path.name for path in left.iterdir()) == before


def test_a_function_of_other_values_is_refused_and_nothing_changes(tmp_path):
    left_at(3, tmp_path)

    def other(x):
        return rosenbrock(x) + 1

    other.__name__ = "rosenbrock"
    with pytest.raises(InvalidArgumentError, match=r"f = .* at the point where it was"):
        minimized(tmp_path, other)
    assert minimized(tmp_path).nit == 30


def test_a_place_that_cannot_be_is_refused_before_anything_is_traced(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")

    for place in (file, file / "below", "/proc/tfgrad"):
        with pytest.raises(RunError, match="`checkpoint` takes a directory"):
            minimized(place, never)
    for place in (3, "", "gs://bucket/run"):
        with pytest.raises(InvalidArgumentError, match="`checkpoint` takes a dir"):
            minimized(place, never)
    assert file.read_text() == "mine"


def test_checkpoints_of_something_else_are_left_alone(tmp_path):
    tf.train.CheckpointManager(
        tf.train.Checkpoint(x=tf.Variable(1.0)), tmp_path, max_to_keep=1
    ).save()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(RunError, match="holds checkpoints of something else"):
        minimized(tmp_path, never)

    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_runs_at_a_time_are_refused(tmp_path):
    writer = claim(tmp_path, resume=True)
    with pytest.raises(RunError, match=r"this run alone(?s:.)*another writer is alive"):
        minimized(tmp_path, never)
    writer.release()


def test_an_optimizer_that_does_not_tell_its_state_is_refused(tmp_path):
    class Plain:
        def apply_gradients(self, pairs):
            raise AssertionError

    with pytest.raises(InvalidArgumentError, match="`plain`, without `build"):
        minimized(tmp_path, never, method=Plain())


def test_what_a_crash_left_is_swept(tmp_path, whole):
    left_at(12, tmp_path)
    (tmp_path / "tfgrad-9_temp").mkdir()
    (tmp_path / "tfgrad-9_temp" / "part").write_text("half")
    (tmp_path / "tfgrad-8.index").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")

    assert_same(minimized(tmp_path), whole)
    assert not list(tmp_path.glob("tfgrad-[89]*"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_a_warning_and_the_last_checkpoint_stays(
    small_disk, at_each_chunk, whole
):
    place = small_disk / "checkpoint"
    filler = small_disk / "filler"

    def fill(state):
        if state.step == 12:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))

    with pytest.warns(RuntimeWarning, match="checkpoint could not be written"):
        assert_same(minimized(place, callback=fill), whole)

    filler.unlink()
    assert_same(minimized(place), whole)


def test_a_list_of_checkpoints_that_is_no_text_is_said(tmp_path):
    (tmp_path / "checkpoint").write_bytes(bytes([255, 254, 0]))

    with pytest.raises(RunError, match="holds checkpoints of something else"):
        minimized(tmp_path, never)


@pytest.mark.parametrize(
    ("f", "options"),
    [
        (rosenbrock, {"bounds": (1, 0)}),
        (lambda x: x, {}),
        (rosenbrock, {"callback": keras.callbacks.ReduceLROnPlateau()}),
    ],
)
def test_a_call_that_is_refused_leaves_no_directory(tmp_path, f, options):
    place = {"checkpoint": tmp_path / "here", "log": tmp_path / "log"}

    with pytest.raises(TfgradError):
        tfgrad.minimize(f, START, **place, **options)
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_of_the_users_stays(tmp_path):
    with pytest.raises(InvalidArgumentError):
        tfgrad.minimize(rosenbrock, START, checkpoint=tmp_path, bounds=(1, 0))

    assert tmp_path.is_dir()


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0), (np.zeros(2), [1.0, 2.0])])
@pytest.mark.parametrize("method", ["lbfgs", "scipy:l-bfgs-b"])
def test_a_run_that_has_ended_is_no_answer_within_other_bounds(
    tmp_path, method, bounds
):
    def f(x):
        return tf.reduce_sum((x - 3) ** 2)

    start, options = np.zeros(2), {"method": method, "checkpoint": tmp_path}
    ended = tfgrad.minimize(f, start, bounds=(0.0, 2.0), **options)

    with pytest.raises(InvalidArgumentError, match=r"bounds: .*\[2.0, 2.0\] before"):
        tfgrad.minimize(f, start, bounds=bounds, **options)

    same = tfgrad.minimize(f, start, bounds=[(0, 2), (0, 2)], **options)
    np.testing.assert_array_equal(same.x, ended.x)
