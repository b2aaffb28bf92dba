import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tfgrad.errors import RunError
from tfgrad.runs.record import Record, hparams_start, to_json


def read(directory):
    return json.loads((directory / "run.json").read_text())


def test_a_record_says_which_versions_it_was_made_with(tmp_path):
    Record(tmp_path)

    versions = read(tmp_path)["versions"]
    assert versions["tensorflow"] == tf.__version__
    assert {"python", "tfgrad", "keras", "tensorboard", "numpy"} < set(versions)


def test_an_update_adds_and_replaces(tmp_path):
    record = Record(tmp_path, seed=1)
    record.update(status="success", seed=2)

    assert (read(tmp_path)["status"], read(tmp_path)["seed"]) == ("success", 2)


def test_a_record_leaves_no_draft_beside_it(tmp_path):
    Record(tmp_path).update(seed=1)

    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_update_leaves_the_last_version_whole(tmp_path, monkeypatch):
    record = Record(tmp_path, seed=1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(RunError, match=r"(?s)last version is safe.*No space left"):
        record.update(seed=2)
    assert read(tmp_path)["seed"] == 1


def test_earlier_sessions_are_kept_the_oldest_first(tmp_path):
    for session in range(3):
        Record(tmp_path, session=session)

    assert read(tmp_path)["session"] == 2
    assert [s["session"] for s in read(tmp_path)["earlier"]] == [0, 1]


@pytest.mark.parametrize(
    "content", ["{", "[]", "3", "[" * 9999, '{"earlier": [3]}', '{"tags": 3}']
)
def test_a_record_that_cannot_be_read_is_not_overwritten(tmp_path, content):
    (tmp_path / "run.json").write_text(content)

    with pytest.raises(RunError, match="try: mend the file"):
        Record(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


def test_numbers_that_json_lacks_become_their_names():
    values = [float("nan"), float("inf"), np.float32("-inf")]

    assert json.loads(json.dumps(to_json(values), allow_nan=False)) == [
        "NaN",
        "Infinity",
        "-Infinity",
    ]


def test_float64_keeps_all_its_bits():
    x = np.random.default_rng(0).standard_normal(100)

    np.testing.assert_array_equal(json.loads(json.dumps(to_json(x))), x)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (True, True),
        ("ä", "ä"),
        (np.int32(3), 3),
        (np.arange(3), [0, 1, 2]),
        (tf.constant([[1.0]]), [[1.0]]),
        (tf.constant(0.5, tf.bfloat16), 0.5),
        (tf.Variable(2.0), 2.0),
        (keras.Variable(2.0), 2.0),
        ({1: (2, 3)}, {"1": [2, 3]}),
        (Path("a/b"), "a/b"),
        (np.ones, "ones"),
        (1 + 2j, "complex (1+2j)"),
        (np.zeros((40, 40)), "array of shape (40, 40), float64"),
    ],
)
def test_every_value_has_a_form_in_json(value, expected):
    assert to_json(value) == expected
    json.dumps(to_json(value), allow_nan=False)


@pytest.mark.parametrize("method", ["adam", "levenberg-marquardt"])
def test_trials_of_one_method_differ_in_the_letters_that_the_tab_shows(method):
    trials = []
    for name in (method, f"{method}-002", f"{method}-003"):
        summary = Summary.FromString(hparams_start({"rate": 0.1}, Path("/logs", name)))
        content = summary.value[0].metadata.plugin_data.content
        trials.append(HParamsPluginData.FromString(content).session_start_info)

    names = [start.group_name or start.model_uri for start in trials]
    assert len({name[:14] for name in names}) == 3
