"""Make README.md of what the benchmarks have measured.

    python benchmarks/report.py .benchmarks/latest.json > benchmarks/README.md

One table per question: a question is a test, and a table has its rows.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = ("tfgrad", "tensorflow", "keras", "tensorboard", "numpy", "scipy")
PEERS = (
    *("jax", "optax", "optimistix", "torch", "tensorboardX"),
    *("tensorflow-probability", "tbparse"),
)

HEAD = """\
# Benchmarks

`make bench` makes two environments, tfgrad's and that of the others, measures, and
writes this page; `make bench-quick` takes two minutes, skips what is slow, and prints
the tables only. Each other tool runs in a process of its own. The two sides of a row
are measured in turns where they share a process; on a shared machine, believe ratios
rather than times.

A number is the median, with the quartiles in brackets, after a first call that is given
apart (with tracing and compiling in it). *Better by* is the other's number over
tfgrad's, or the reverse where more is better (%): above 1, tfgrad is ahead. What tfgrad
loses stays in the table, in **bold**.
"""


def page(measured: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of README.md."""
    yield HEAD
    yield from facts(measured)
    tests = dict.fromkeys(row["test"] for row in measured["rows"] + measured["notes"])
    file = ""
    for test in tests:
        if test.partition("::")[0] != file:
            file = test.partition("::")[0]
            yield f"\n## {title_of(HERE.parent / file)}\n"
        yield f"\n### {sentence(test)}\n"
        rows = [row for row in measured["rows"] if row["test"] == test]
        if rows:
            yield from table(rows)
        for note in measured["notes"]:
            if note["test"] == test:
                yield f"\n{note['case']}: {note['note']}: {note['reason']}\n"


def facts(measured: dict[str, Any]) -> Iterator[str]:
    """Yield what the numbers depend on."""
    yield f"- Date: {measured['date']}; command: `{measured['command']}`"
    yield f"- Machine: {processor()}, {os.cpu_count()} cores, {platform.system()}"
    own = (f"{name} {importlib.metadata.version(name)}" for name in OURS)
    yield f"- Here: Python {platform.python_version()}, {', '.join(own)}"
    yield f"- The others: {', '.join(versions_of_peers(measured['peers']))}"


def processor() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.machine()


def versions_of_peers(python: str) -> list[str]:
    """Return name and version of each peer, or that it is missing."""
    script = (
        "import importlib.metadata as m, json, sys\n"
        "names = {d.metadata['Name'].lower().replace('_', '-'): d.version\n"
        "         for d in m.distributions()}\n"
        "print(json.dumps(names))"
    )
    try:
        done = subprocess.run([python, "-c", script], capture_output=True, check=True)
        found = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError):
        found = {}
    return [f"{name} {found.get(name.lower(), '(missing)')}" for name in PEERS]


def title_of(file: Path) -> str:
    """Return the first sentence of a benchmark file's docstring."""
    found = re.match(r'"""(.+?)(?:\.(?!\w)|"""|\n)', file.read_text(encoding="utf-8"))
    return found[1] if found else file.stem


def sentence(test: str) -> str:
    """Return the name of a test as a sentence.

    >>> sentence("benchmarks/test_runs.py::test_reading_against_event_accumulator")
    'Reading against event accumulator'
    """
    words = test.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    return words[0].upper() + words[1:]


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of one table."""
    yield "| | tfgrad | the other | unit | better by | bar | first calls |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        ratio = short(row["ratio"])
        if row["ratio"] < 1:
            ratio = f"**{ratio}**"
        sides = " | ".join(number(row[side]) for side in ("ours", "theirs"))
        yield (
            f"| {row['question']} | {sides} | {row['unit']} | {ratio} | {row['bar']} "
            f"| {first_calls(row)} |"
        )


def number(side: dict[str, Any]) -> str:
    """Return a median with its quartiles, if there is a spread."""
    low, high = short(side["low"]), short(side["high"])
    spread = "" if low == high else f" [{low}, {high}]"
    return f"{short(side['median'])}{spread}"


def short(value: float) -> str:
    """Return three digits of a number, or all before the point.

    >>> short(0.012345), short(12345.6)
    ('0.0123', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def first_calls(row: dict[str, Any]) -> str:
    """Return the two first calls, where they were measured."""
    firsts = [row[side]["first"] for side in ("ours", "theirs")]
    if firsts == [None, None]:
        return ""
    return " / ".join("-" if f is None else short(f) for f in firsts)


if __name__ == "__main__":
    for line in page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        print(line)
