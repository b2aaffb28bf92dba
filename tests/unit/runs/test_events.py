import contextlib
import resource

import numpy as np
import pytest
import tensorflow as tf

from tfgrad.errors import RunError
from tfgrad.runs.events import EventFile


def read(file):
    """Return the events of a file, as far as it is whole."""
    events = []
    with contextlib.suppress(tf.errors.DataLossError):
        events.extend(tf.compat.v1.train.summary_iterator(str(file.path)))
    return events


def points(file):
    return [
        (event.step, value.tag, value.simple_value)
        for event in read(file)
        for value in event.summary.value
    ]


def test_a_file_begins_with_its_version_and_the_start_of_a_session(tmp_path):
    version, start = read(EventFile(tmp_path, first_step=7))

    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == tf.compat.v1.SessionLog.START
    assert start.step == 7


def test_a_file_sorts_after_those_that_were_opened_before_it(tmp_path):
    files = [EventFile(tmp_path, 0).path for _ in range(20)]

    assert sorted(files) == files


def test_what_was_written_is_in_the_file_before_it_is_closed(tmp_path):
    file = EventFile(tmp_path, 0)
    file.scalars(("a", "b"), [0, 1], [10.0, 11.0], [[1.0, 2.0], [3.0, 4.0]])

    assert points(file) == [(0, "a", 1.0), (0, "b", 3.0), (1, "a", 2.0), (1, "b", 4.0)]
    assert [event.wall_time for event in read(file)[2:]] == [10.0, 11.0]


def test_tags_may_change_from_call_to_call(tmp_path):
    file = EventFile(tmp_path, 0)
    file.scalars(("a", "b"), [0], [0.0], [[1.0], [2.0]])
    file.row(("c",), 1, 0.0, [3.0])
    file.scalars(("a", "b"), [2], [0.0], [[4.0], [5.0]])

    assert points(file)[2:] == [(1, "c", 3.0), (2, "a", 4.0), (2, "b", 5.0)]


def test_a_scalar_and_its_framing_take_44_bytes(tmp_path):
    file = EventFile(tmp_path, 0)
    before = file.path.stat().st_size
    file.scalars(("loss",), [1], [1e9], [[0.5]])

    assert file.path.stat().st_size - before <= 44


def test_nan_and_numbers_beyond_float32_are_kept_as_nan_and_infinity(tmp_path):
    file = EventFile(tmp_path, 0)
    file.scalars(("a",), [0, 1, 2], [0.0] * 3, [[float("nan"), 1e39, -1e39]])

    numbers = [number for _, _, number in points(file)]
    np.testing.assert_array_equal(numbers, [np.nan, np.inf, -np.inf])


@pytest.fixture
def _full_disk():
    """Let files grow to 4 kB, after which a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("_full_disk")
def test_a_full_disk_is_an_error_and_what_fitted_stays_readable(tmp_path):
    file = EventFile(tmp_path, 0)

    def fill():
        for step in range(1000):
            file.row(("loss",), step, 0.0, [float(step)])

    with pytest.raises(RunError, match=r"(?s)is safe.*try: make room"):
        fill()
    with pytest.raises(RunError, match="is safe"):  # and for good: the tail is torn
        file.tensor("card", "text", 0, "text")
    file.close()

    steps = [step for step, _, _ in points(file)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 50


TAGS = {
    "one": ("loss",),
    "two": ("loss", "gradient/max_norm"),
    "many, which take more than a lane of a checksum": [f"é {i}" for i in range(80)],
    "long ones": ["x" * 3000, "y" * 130],
}
EDGES = [2**bits + k for bits in range(7, 63, 7) for k in (-1, 0, 1)]
STEPS = np.array([0, 1, *EDGES, 2**63 - 1])
"""Where a step takes another byte, and the first and the last one."""


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS)
def test_records_hold_what_was_given_one_by_one_or_all_at_once(tmp_path, tags):
    generator = np.random.default_rng(0)
    times = generator.uniform(1e9, 2e9, len(STEPS))
    times[1] = 0.0
    values = generator.normal(size=(len(tags), len(STEPS)))
    values *= 10.0 ** generator.integers(-45, 45, values.shape)
    values[0, :4] = [np.nan, np.inf, -np.inf, 0.0]

    rows, single = EventFile(tmp_path, 0), EventFile(tmp_path, 0)
    rows.scalars(tags, STEPS, times, values)
    for step, time, numbers in zip(STEPS, times, values.T, strict=True):
        single.row(tags, int(step), float(time), numbers.tolist())

    with np.errstate(over="ignore"):
        kept = values.astype(np.float32)
    for file in (rows, single):
        events = read(file)[2:]
        assert [event.step for event in events] == STEPS.tolist()
        assert [event.wall_time for event in events] == times.tolist()
        for event, numbers in zip(events, kept.T, strict=True):
            assert [value.tag for value in event.summary.value] == list(tags)
            written = [value.simple_value for value in event.summary.value]
            np.testing.assert_array_equal(written, numbers)
