"""What the benchmarks share: timing in turns, and rows for the tables.

`pytest benchmarks` prints the rows; with `--save FILE` they are kept for `report.py`,
which makes README.md of them; with `--quick` there are fewer repeats, and what is
marked `slow` is left out.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest

QUICK_REPEATS = 3

collect_ignore_glob = ["*_peer.py"]  # run in other environments, by the tests


class Times(float):
    """The median of some measurements: a float that remembers their spread.

    Attributes:
        low: Their first quartile.
        high: Their third quartile.
        first: The first call, tracing and compiling included; None if not measured.
    """

    def __new__(cls, values, first=None):
        values = [float(value) for value in values]
        self = super().__new__(cls, statistics.median(values))
        many = values * 2 if len(values) == 1 else values
        self.low, _, self.high = statistics.quantiles(many, n=4, method="inclusive")
        self.first = first
        return self

    def __mul__(self, factor):
        first = None if self.first is None else self.first * factor
        return Times(
            [self.low * factor, float(self) * factor, self.high * factor], first
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor):
        if isinstance(divisor, Times):
            return float(self) / float(divisor)
        return self * (1 / divisor)

    def as_json(self):
        """Return the numbers by name."""
        spread = {"low": self.low, "high": self.high, "first": self.first}
        return {"median": float(self), **spread}


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="fewer repeats, no slow ones")
    parser.addoption("--save", metavar="FILE", help="keep the rows for report.py")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than ten seconds; not with --quick")
    config.rows, config.notes = [], []


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        skip = pytest.mark.skip(reason="left out with --quick")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


@pytest.fixture
def interleaved(request):
    """Return the function that times several calls in turns."""
    most = QUICK_REPEATS if request.config.getoption("--quick") else sys.maxsize

    def measure(repeats, **calls):
        """Return the `Times` of each call, timed in turns after a first one."""
        seconds = {name: [] for name in calls}
        for _ in range(min(repeats, most) + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
        return {name: Times(times[1:], times[0]) for name, times in seconds.items()}

    return measure


@pytest.fixture
def times():
    """Return `Times`: what a peer measured in a process of its own."""
    return Times


@pytest.fixture
def report(request):
    """Return a function that adds a row.

    It takes the question, ours and theirs in one unit (a number, some numbers or
    `Times`), the unit, and the bar that was set. Less is better, but not of per cent.
    """

    def add(question, ours, theirs, unit, bar):
        ours, theirs = (
            side if isinstance(side, Times) else Times(np.ravel(side))
            for side in (ours, theirs)
        )
        ratio = ours / theirs if unit == "%" else theirs / ours
        request.config.rows.append(
            {
                "test": request.node.nodeid.partition("[")[0],
                "question": question,
                "ours": ours.as_json(),
                "theirs": theirs.as_json(),
                "unit": unit,
                "ratio": float(ratio),
                "bar": bar,
            }
        )

    return add


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    result = outcome.get_result()
    if result.skipped or result.failed:
        reason = result.longrepr[2] if result.skipped else call.excinfo.exconly()
        item.config.notes.append(
            {
                "test": item.nodeid.partition("[")[0],
                "case": item.name,
                "note": "failed" if result.failed else "not measured",
                "reason": reason.removeprefix("Skipped: ").strip().splitlines()[0],
            }
        )


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    write("")
    write("| question | tfgrad | the other | unit | better by | bar |")
    write("|---|---|---|---|---|---|")
    for row in config.rows:
        ours, theirs = row["ours"]["median"], row["theirs"]["median"]
        write(
            f"| {row['question']} | {ours:.4g} | {theirs:.4g} | {row['unit']} "
            f"| {row['ratio']:.4g} | {row['bar']} |"
        )


def pytest_sessionfinish(session):
    file = session.config.getoption("--save")
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        measured = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": f"pytest {' '.join(session.config.invocation_params.args)}",
            "peers": os.environ.get("TFGRAD_PEERS", sys.executable),
            "rows": session.config.rows,
            "notes": session.config.notes,
        }
        path.write_text(json.dumps(measured, indent=1))
