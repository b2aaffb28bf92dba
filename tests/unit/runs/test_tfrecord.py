import tracemalloc

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from tfgrad.runs import tfrecord

RNG = np.random.default_rng(0)


def event_file(directory, *events):
    path = directory / "tfevents.1"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for event in events:
            writer.write(event.SerializeToString())
    return path


def scalar(step, value, tag="f"):
    event = tf.compat.v1.Event(step=step)
    event.summary.value.add(tag=tag, simple_value=value)
    return event


def text(length):
    event = tf.compat.v1.Event()
    event.summary.value.add(tag="t", tensor=tf.make_tensor_proto("x" * length))
    return event


def steps_of(path):
    return [event.step for event in tfrecord.read_events(path)]


@pytest.mark.parametrize("length", [4, 5, 1023, 1024, 1025, 5000])
def test_a_checksum_is_that_of_an_implementation_byte_by_byte(length):
    rows = RNG.integers(0, 256, [3, length], dtype=np.uint8)

    sums = tfrecord.masked(tfrecord.crc32c(rows))
    assert sums.tolist() == [masked_crc32c(row.tobytes()) for row in rows]


def test_the_checksum_is_that_of_the_standard():
    # RFC 3720, appendix B.4: 32 bytes of zeros; of ones; 0, 1, ... 31.
    zeros, ones = np.zeros(32, np.uint8), np.full(32, 255, np.uint8)
    sums = tfrecord.crc32c(np.stack([zeros, ones, np.arange(32, dtype=np.uint8)]))

    assert [hex(s) for s in sums] == ["0x8a9136aa", "0x62a8ab43", "0x46dd794e"]


def test_records_longer_than_a_block_are_read(tmp_path):
    path = event_file(tmp_path, scalar(0, 0.0), text(3_000_000), scalar(1, 1.0))

    assert steps_of(path) == [0, 0, 1]


def test_records_of_hardly_any_bytes_are_read(tmp_path):
    events = (tf.compat.v1.Event(step=step) for step in (0, 1, 300))

    assert steps_of(event_file(tmp_path, *events)) == [0, 1, 300]


def test_a_record_of_many_megabytes_costs_a_few_times_its_size(tmp_path):
    path = event_file(tmp_path, text(2**25), scalar(1, 1.0))

    tracemalloc.start()
    assert steps_of(path) == [0, 1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 2**25


def test_what_a_live_run_adds_while_it_is_read_is_not_called_lost(tmp_path, recwarn):
    path = event_file(tmp_path, scalar(0, 0.0))
    events = tfrecord.read_events(path)
    next(events)
    with path.open("ab") as file:
        file.write(b"half a record")

    assert list(events) == []
    assert not recwarn.list


def test_the_last_values_are_found_at_the_end_of_a_file(tmp_path):
    rows = [scalar(step, step) for step in range(20_000)]
    path = event_file(tmp_path, scalar(0, 7.0, "early"), *rows, text(100_000))

    assert tfrecord.last_scalars(path) == {"f": 19_999.0}
    assert tfrecord.last_scalars(event_file(tmp_path)) == {}


@pytest.mark.parametrize(
    ("length", "is_hostile"),
    [(2**28, False), (2**28 + 1, True), (2**40, True), (2**64 - 1, True)],
)
def test_a_length_beyond_all_memory_is_hostile(tmp_path, length, is_hostile):
    path = event_file(tmp_path, scalar(0, 0.0))
    head = length.to_bytes(8, "little")
    good = path.read_bytes()
    assert tfrecord.unread(path) == (0, False)

    path.write_bytes(good + head + masked_crc32c(head).to_bytes(4, "little"))
    assert tfrecord.unread(path) == (12, is_hostile)

    path.write_bytes(good + head + b"noise, with no checksum")
    assert tfrecord.unread(path) == (31, False)
