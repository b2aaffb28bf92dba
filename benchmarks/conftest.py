"""Benchmarks print one table of ratios, all measured in this run."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import statistics
import time

import pytest

ROWS = []


def _interleaved(repeats, **calls):
    """Return the median seconds of each call, timed in turns after a first one."""
    seconds = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


@pytest.fixture
def interleaved():
    """Return the function that times several calls in turns."""
    return _interleaved


@pytest.fixture
def report():
    """Return a function that adds a row: question, ours, theirs (in one unit), bar."""

    def add(question, ours, theirs, unit, bar):
        ROWS.append((question, ours, theirs, unit, theirs / ours, bar))

    return add


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write("| question | tfgrad | the other | unit | the other / tfgrad | bar |")
    write("|---|---|---|---|---|---|")
    for question, ours, theirs, unit, ratio, bar in ROWS:
        write(
            f"| {question} | {ours:.4g} | {theirs:.4g} | {unit} | {ratio:.4g} | {bar} |"
        )
