"""Writing and reading runs, against TensorFlow, TensorBoard, torch and tensorboardX.

torch and tensorboardX are measured in a process of their own, if they are installed:
`TFGRAD_PEERS=/path/to/python pytest benchmarks/test_runs.py` names the Python.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tfgrad
from tfgrad.runs.directory import event_files
from tfgrad.runs.reader import read_run
from tfgrad.runs.run import Run

POINTS = 20_000
VALUES = np.random.default_rng(0).standard_normal(POINTS)


def size(directory):
    return sum(path.stat().st_size for path in event_files(directory))


def numbered(place):
    return (place / str(i) for i in itertools.count())


def test_a_history_against_tf_summary_in_a_compiled_loop(report, interleaved, tmp_path):
    ours, theirs = numbered(tmp_path / "ours"), numbered(tmp_path / "theirs")

    @tf.function
    def loop(writer, values):
        with writer.as_default():
            for step in tf.range(len(VALUES), dtype=tf.int64):
                tf.summary.scalar("loss", values[tf.cast(step, tf.int32)], step)

    def by_tf_summary():
        writer = tf.summary.create_file_writer(str(next(theirs)))
        loop(writer, tf.constant(VALUES, tf.float32))
        writer.close()

    def by_run(tags):
        with Run(next(ours)) as run:
            history = dict.fromkeys(map(str, range(tags)), VALUES)
            run.log_history(history, range(POINTS))

    seconds = interleaved(
        3, one=lambda: by_run(1), sixteen=lambda: by_run(16), theirs=by_tf_summary
    )
    per_point = {name: value / POINTS * 1e6 for name, value in seconds.items()}
    per_point["sixteen"] /= 16
    summary = "a scalar of a history, against tf.summary in a tf.function"
    report(summary, per_point["one"], per_point["theirs"], "µs", "2 µs")
    report(
        f"{summary}, 16 tags", per_point["sixteen"], per_point["theirs"], "µs", "0.5"
    )
    bytes_ours = size(tmp_path / "ours" / "0") / POINTS
    bytes_theirs = size(tmp_path / "theirs" / "0") / POINTS
    report("a scalar, on disk", bytes_ours, bytes_theirs, "bytes", "44 bytes")


def test_single_points_against_eager_tf_summary(report, interleaved, tmp_path):
    count = 1000
    steps = itertools.count()

    def by_tf_summary():
        for _ in range(count):
            tf.summary.scalar("loss", 0.5, next(steps))

    def by_run():
        for _ in range(count):
            run.log(next(steps), loss=0.5)

    writer = tf.summary.create_file_writer(str(tmp_path / "theirs"))
    with Run(tmp_path / "ours") as run, writer.as_default():
        seconds = interleaved(5, ours=by_run, theirs=by_tf_summary)

    report(
        "one point, flushed, against eager tf.summary",
        seconds["ours"] / count * 1e6,
        seconds["theirs"] / count * 1e6,
        "µs",
        "",
    )


PEER = """
import sys, time, random
count, place, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if kind == "torch":
    from torch.utils.tensorboard import SummaryWriter
else:
    from tensorboardX import SummaryWriter
writer = SummaryWriter(place)
began = time.process_time()
for step in range(count):
    writer.add_scalar("loss", 0.5, step)
writer.close()
print((time.process_time() - began) / count * 1e6)
"""


@pytest.mark.parametrize("kind", ["torch", "tensorboardX"])
def test_single_points_against_peers(report, tmp_path, kind):
    python = os.environ.get("TFGRAD_PEERS", sys.executable)
    command = [python, "-c", PEER, str(POINTS), str(tmp_path / "theirs"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no {kind} in {python}")
    began = time.process_time()
    with Run(tmp_path / "ours") as run:
        for step in range(POINTS):
            run.log(step, loss=0.5)
    ours = (time.process_time() - began) / POINTS * 1e6

    question = f"one point, in processor time (it writes in a thread), against {kind}"
    report(question, ours, float(done.stdout), "µs", "")


def test_reading_against_event_accumulator(report, interleaved, tmp_path):
    count = 100_000
    with Run(tmp_path) as run:
        run.log_history({"loss": np.resize(VALUES, count)}, range(count))

    def by_event_accumulator():
        accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
        accumulator.Reload()
        assert len(accumulator.Scalars("loss")) == count

    seconds = interleaved(
        5, ours=lambda: read_run(tmp_path), theirs=by_event_accumulator
    )
    report(
        "reading 100,000 points, against EventAccumulator",
        seconds["ours"],
        seconds["theirs"],
        "s",
        "2x, 0.5 s",
    )


@pytest.mark.slow
@pytest.mark.parametrize("load_fast", ["true", "false"])
def test_a_hundred_thousand_steps_of_four_tags_are_served_exactly(tmp_path, load_fast):
    count, tags = 100_000, "abcd"
    values = np.random.default_rng(0).standard_normal((len(tags), count))
    with Run(tmp_path) as run:
        run.log_history(dict(zip(tags, values, strict=True)), range(count))
        run.log(count, end=1.0)  # when this is there, all is

    with tfgrad.show(tmp_path, load_fast=load_fast) as board:
        address = f"{board.url.partition('?')[0]}data/plugin/scalars"
        while "end" not in fetch(f"{address}/tags").get(".", {}):
            time.sleep(1.0)  # to ask keeps the loader from its work
        for tag, expected in zip(tags, values, strict=True):
            points = fetch(f"{address}/scalars?run=.&tag={tag}")
            assert [step for _, step, _ in points] == list(range(count))
            served = np.float32([value for _, _, value in points])
            np.testing.assert_array_equal(served, np.float32(expected))


def fetch(address):
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy.open(address, timeout=300) as response:
        return json.load(response)


def test_memory_while_ten_million_points_are_written(report, tmp_path):
    steps, block = 250_000, 50_000
    values = np.resize(VALUES, block)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    with Run(tmp_path) as run:
        for start in range(0, steps, block):
            history = dict.fromkeys(map(str, range(40)), values)
            run.log_history(history, np.arange(start, start + block))
            if not start:
                first = peak()
        last = peak()

    report("peak memory after 10,000,000 points, and 2,000,000", last, first, "MB", "=")


@pytest.mark.slow
def test_the_cost_of_a_log_to_a_loop_of_ten_microseconds(report, tmp_path):
    matrix = tf.constant(np.random.default_rng(0).standard_normal((200, 200)) / 200)

    def f(x):
        return tf.reduce_sum((tf.linalg.matvec(matrix, x) - 1.0) ** 2)

    def steady(**options):
        result = tfgrad.minimize(
            f, np.zeros(200), method="sgd", learning_rate=1e-3, steps=60_000,
            jit=True, **options,
        )  # fmt: skip
        seconds = result.history["seconds"]
        tenth = len(seconds) // 10
        return (seconds[-1] - seconds[tenth]) / (len(seconds) - tenth) * 1e6

    pairs = [(steady(log=tmp_path), steady()) for _ in range(5)]
    ours, theirs = np.transpose(pairs)
    report("a step that is logged, against one that is not", ours, theirs, "µs", "5 %")
