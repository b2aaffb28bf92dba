import os
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs import tfrecord
from tfgrad.runs.reader import load_run, load_runs
from tfgrad.runs.run import Run

RNG = np.random.default_rng(0)


def event_file(directory):
    return max(directory.glob("*tfevents*"))


def raw_file(path, events):
    """Write events, or whatever bytes, as TensorFlow frames them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for event in events:
            writer.write(
                event if isinstance(event, bytes) else event.SerializeToString()
            )
    return path


def event(step, **value):
    event = tf.compat.v1.Event(step=step, wall_time=step)
    event.summary.value.add(**value)
    return event


@pytest.fixture
def logs(tmp_path):
    for name, rate in (("a", 0.1), ("b/c", 0.2)):
        with Run(tmp_path / name, {"rate": rate, "method": name}) as run:
            run.log_history({"f": [1.0, rate]}, [0, 1])
            run.log(5, x=rate)
            run.histogram("h", [1.0], 0)
    return tmp_path


# --- frames ---------------------------------------------------------------------------


def test_a_hundred_thousand_steps_of_four_tags_come_back_exactly(tmp_path):
    history = {tag: RNG.standard_normal(100_000) for tag in "abcd"}
    history["a"][:3] = np.nan, np.inf, -np.inf
    with Run(tmp_path) as run:
        run.log_history(history, range(100_000))

    frame = load_run(tmp_path, wide=True)
    assert list(frame.columns) == ["step", *"abcd"]
    np.testing.assert_array_equal(frame["step"], np.arange(100_000))
    for tag in "abcd":
        np.testing.assert_array_equal(frame[tag], np.float32(history[tag]))


def test_a_long_frame_has_a_row_for_each_point(logs):
    frame = load_runs(logs)

    columns = ["run", "tag", "step", "wall_time", "value"]
    assert list(frame.columns) == [*columns, "hparams/method", "hparams/rate"]
    assert frame["run"].tolist() == ["a"] * 3 + ["b/c"] * 3
    assert frame["tag"].tolist() == ["f", "f", "x"] * 2
    assert frame["step"].tolist() == [0, 1, 5] * 2
    np.testing.assert_array_equal(
        frame["value"], np.float32([1, 0.1, 0.1, 1, 0.2, 0.2])
    )
    assert frame["hparams/rate"].tolist() == [0.1] * 3 + [0.2] * 3


def test_a_wide_frame_has_a_row_for_each_step(logs):
    frame = load_runs(logs, wide=True)

    assert frame["step"].tolist() == [0, 1, 5] * 2
    assert frame["f"].isna().tolist() == [False, False, True] * 2
    assert frame["x"].isna().tolist() == [True, True, False] * 2
    assert frame["hparams/method"].tolist() == ["a"] * 3 + ["b/c"] * 3


def test_a_hyper_parameter_that_a_run_lacks_is_missing_there(tmp_path):
    for name, hparams in (("a", {"rate": 0.1}), ("b", {})):
        with Run(tmp_path / name, hparams) as run:
            run.log(0, f=1.0)

    assert load_runs(tmp_path)["hparams/rate"].isna().tolist() == [False, True]


def test_times_are_those_that_were_written(tmp_path):
    with Run(tmp_path) as run:
        run.log_history({"f": [1.0, 2.0]}, range(2), wall_times=[1e9, 1e9 + 0.25])

    assert load_run(tmp_path)["wall_time"].tolist() == [1e9, 1e9 + 0.25]


def test_a_run_without_curves_is_an_empty_frame(tmp_path):
    Run(tmp_path).close()

    assert len(load_run(tmp_path)) == len(load_run(tmp_path, wide=True)) == 0


# --- sessions and other writers -------------------------------------------------------


def test_a_resumed_run_has_each_step_once_and_its_last_value(tmp_path):
    with Run(tmp_path) as run:
        run.log_history({"f": np.zeros(100), "g": np.zeros(100)}, range(100))
    for first, value in ((50, 1.0), (70, 2.0)):
        with Run(tmp_path, resume_from=first) as run:
            run.log_history({"f": np.full(10, value)}, range(first, first + 10))

    frame = load_run(tmp_path, wide=True)
    assert frame["step"].tolist() == [*range(60), *range(70, 80)]
    assert frame["f"].tolist() == [0.0] * 50 + [1.0] * 10 + [2.0] * 10
    assert frame["g"].notna().sum() == 50  # superseded with the session's start


def test_files_of_tf_summary_are_read_exactly(tmp_path):
    values = RNG.standard_normal(50)
    for steps in (range(50), range(30, 50)):
        with tf.summary.create_file_writer(str(tmp_path)).as_default():
            for step in steps:
                tf.summary.scalar("f", values[step] + (len(steps) < 50), step)
            tf.summary.histogram("h", [1.0, 2.0], 0)
            tf.summary.text("t", "text", 0)

    frame = load_run(tmp_path)
    assert frame["step"].tolist() == list(range(50))
    expected = values + (np.arange(50) >= 30)
    np.testing.assert_array_equal(frame["value"], np.float32(expected))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int32", "int64"])
def test_a_scalar_tensor_of_any_dtype_is_read(tmp_path, dtype):
    tensor = tf.make_tensor_proto(np.array(3, tf.as_dtype(dtype).as_numpy_dtype))
    first = event(0, tag="f", tensor=tensor)
    first.summary.value[0].metadata.plugin_data.plugin_name = "scalars"
    raw_file(tmp_path / "tfevents.1", [first, event(1, tag="f", tensor=tensor)])

    assert load_run(tmp_path)["value"].tolist() == [3.0, 3.0]


def test_the_hparams_of_torch_and_tensorboardx_are_read(tmp_path):
    from tensorboard.plugins.hparams import api

    start = api.hparams_pb({"rate": 0.5, "net": "mlp", "warm": True})
    record = tf.compat.v1.Event()
    record.summary.ParseFromString(start.SerializeToString())
    raw_file(tmp_path / "tfevents.1", [record, event(0, tag="f", simple_value=1.0)])

    frame = load_run(tmp_path)
    row = frame.iloc[0]
    assert (row["hparams/rate"], row["hparams/net"], row["hparams/warm"]) == (
        0.5,
        "mlp",
        True,
    )


# --- damage ---------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    with Run(tmp_path / "run") as run:
        run.log_history({"f": np.arange(3000.0)}, range(3000))
    return event_file(tmp_path / "run")


def test_a_torn_end_is_told_and_what_came_before_is_kept(file):
    os.truncate(file, file.stat().st_size - 10)

    with pytest.warns(RuntimeWarning, match=r"last \d\d of .* bytes .*a torn end"):
        frame = load_run(file.parent)
    assert frame["step"].tolist() == list(range(2999))


def test_a_damaged_record_is_told_with_how_much_is_lost(file):
    content = bytearray(file.read_bytes())
    at = content.index(struct.pack("<f", 1000.0))
    content[at] ^= 1
    file.write_bytes(content)

    with pytest.warns(RuntimeWarning, match=r"a damaged record and 1999 after it"):
        frame = load_run(file.parent)
    assert frame["step"].tolist() == list(range(1000))


def test_an_undamaged_run_is_read_without_a_warning(file, recwarn):
    load_run(file.parent)

    assert not recwarn.list


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"no event file at all, but text", os.urandom(1000)],
    ids=["empty", "a byte", "text", "noise"],
)
def test_what_is_no_event_file_is_a_warning(tmp_path, content):
    (tmp_path / "tfevents.1").write_bytes(content)

    if content:
        with pytest.warns(RuntimeWarning, match="the 0 records before"):
            frame = load_run(tmp_path)
    else:
        frame = load_run(tmp_path)
    assert len(frame) == 0


def masked_crc(data):
    """Return TFRecord's sum of `data`, as TensorFlow itself writes it."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize(
    "length", [2**62, 2**64 - 1, 2**40, tfrecord.LARGEST_RECORD + 1]
)
def test_a_length_that_lies_costs_no_memory(file, length):
    head = struct.pack("<Q", length)
    with file.open("ab") as stream:  # the sum of the length is right
        stream.write(head + struct.pack("<I", masked_crc(head)) + b"\0" * 100)
    os.truncate(file, file.stat().st_size + 2**30)  # a hole: it takes no room

    tracemalloc.start()
    with pytest.warns(RuntimeWarning, match="the 3003 records before|3002 records"):
        frame = load_run(file.parent)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(frame) == 3000
    assert peak < 50e6


def test_a_shape_that_lies_costs_no_memory(tmp_path):
    tensor = tf.make_tensor_proto(2.0)
    tensor.tensor_shape.dim.add(size=2**40)
    record = event(0, tag="f", tensor=tensor)
    record.summary.value[0].metadata.plugin_data.plugin_name = "scalars"
    raw_file(tmp_path / "tfevents.1", [record])

    assert load_run(tmp_path)["value"].tolist() == [2.0]


def test_a_nest_that_is_too_deep_is_a_damaged_record(tmp_path):
    deep = b""
    for _ in range(1000):  # messages in messages: RunMetadata has none so deep
        deep = b"\x0a" + varint(len(deep)) + deep
    nested = b"\x2a" + varint(len(deep)) + deep
    good = event(0, tag="f", simple_value=1.0)
    raw_file(tmp_path / "tfevents.1", [good, nested, good])

    with pytest.warns(RuntimeWarning, match="damaged record and 1 after") as caught:
        frame = load_run(tmp_path)
    assert len(frame) == 1
    assert len(caught) == 1


def varint(number):
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def test_links_and_pipes_are_no_trap(logs):
    (logs / "circle").symlink_to(logs, target_is_directory=True)
    (logs / "a" / "tfevents.nothing").symlink_to(logs / "nothing")
    (logs / "a" / "tfevents.zero").symlink_to("/dev/zero")
    os.mkfifo(logs / "a" / "tfevents.pipe")

    assert len(load_runs(logs)) == 6


def test_a_file_that_is_locked_away_hides_no_other(logs, monkeypatch):
    locked = event_file(logs / "a")
    real = type(locked).open

    def refuse(path, *args):
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return real(path, *args)

    monkeypatch.setattr(type(locked), "open", refuse)

    with pytest.warns(RuntimeWarning, match=f"{locked} is left out: Permission denied"):
        frame = load_runs(logs)
    assert set(frame["run"]) == {"b/c"}


def test_reading_does_not_import_tensorflow(logs):
    script = "import sys, tfgrad; print(len(tfgrad.load_runs(sys.argv[1])))\n"
    script += "assert 'tensorflow' not in sys.modules"

    command = [sys.executable, "-c", script, str(logs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "6\n"


# --- what cannot be read --------------------------------------------------------------


def test_no_runs_are_an_error_that_says_where_they_were_looked_for(tmp_path, logs):
    (tmp_path / "empty").mkdir()

    with pytest.raises(RunError, match=r"(?s)empty, which holds no event files.*try: "):
        load_runs(tmp_path / "empty")
    with pytest.raises(RunError, match="which is no directory"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(InvalidArgumentError, match="got: 3"):
        load_runs(3)


def test_one_run_is_not_many(logs):
    with pytest.raises(RunError, match=r"(?s)holds runs: a, b/c.*try: load_runs"):
        load_run(logs)


def test_a_tag_with_the_name_of_a_column_is_refused_in_a_wide_frame(tmp_path):
    with Run(tmp_path) as run:
        run.log(0, {"step": 1.0})

    assert load_run(tmp_path)["tag"].tolist() == ["step"]
    with pytest.raises(InvalidArgumentError, match=r"(?s)'step'.*try: wide=False"):
        load_run(tmp_path, wide=True)


def test_without_pandas_the_error_says_what_to_install(logs, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(RunError, match=r"try: pip install \"tfgrad\[pandas\]\""):
        load_runs(logs)
