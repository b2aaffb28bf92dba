"""`tfgrad runs`, in this process."""

import json
import os

import pytest

import tfgrad as library
from tfgrad.cli import runs


@pytest.fixture
def logs(folder):
    """Three runs: of `minimize`, of a loop, and of a process that was killed."""
    library.minimize(lambda x: (x - 1) ** 2, 0.0, log=folder / "logs" / "bowl")
    with library.Run(folder / "logs" / "loop") as run:
        run.log_history({"loss": [1.0, 0.5]}, range(2))
    with library.Run(folder / "logs" / "dead") as run:
        record = (run.directory / "run.json").read_text()
    (run.directory / "run.json").write_text(record)  # as it was while it ran
    return folder / "logs"


@pytest.mark.usefixtures("logs")
def test_each_run_is_a_line(tfgrad):
    code, out, _ = tfgrad("runs")

    heads, *lines = out.splitlines()
    assert code == 0
    assert heads.split() == [*runs._COLUMNS]
    assert [line.split()[:5] for line in lines] == [
        ["bowl/lbfgs", "lbfgs", "converged", "2", "0"],
        ["dead", "-", "killed", "-", "-"],
        ["loop", "-", "success", "-", "0.5"],
    ]


def test_json_is_for_scripts(tfgrad, logs):
    with library.Run(logs / "alive"):
        _, out, _ = tfgrad("runs", "logs", "--json")

    found = {row["run"]: row for row in json.loads(out)}
    assert found["bowl/lbfgs"]["loss"] == 0.0
    assert found["alive"]["status"] == "running"


@pytest.mark.parametrize("record", ['{"status": ', "[]", "[" * 9999, '{"result": 3}'])
def test_a_damaged_record_is_named_and_hides_no_other(tfgrad, logs, record):
    (logs / "loop" / "run.json").write_text(record)

    code, out, err = tfgrad("runs")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["bowl/lbfgs", "dead"]
    said = "logs/loop/run.json is left out: it cannot be read as the record of a run ("
    assert err.startswith(said)


def test_a_name_cannot_break_the_table(tfgrad, logs):
    (logs / "dead").rename(logs / "two\nlines\x1b[31m")

    _, out, err = tfgrad("runs")

    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "bowl/lbfgs",
        "loop",
        r"'two\nlines\x1b[31m'",
    ]
    assert err == ""


def test_a_run_whose_events_may_not_be_read_is_listed_without_a_loss(
    tfgrad, logs, monkeypatch
):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("tfgrad.runs.tfrecord.last_scalars", refused)

    code, out, _ = tfgrad("runs")
    assert code == 0
    assert out.splitlines()[-1].split()[:5] == ["loop", "-", "success", "-", "-"]


def test_a_pipe_is_no_record(tfgrad, logs):
    (logs / "loop" / "run.json").unlink()
    os.mkfifo(logs / "loop" / "run.json")

    code, out, err = tfgrad("runs")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["bowl/lbfgs", "dead"]
    assert "loop/run.json is left out" in err


def test_a_path_that_cannot_be_is_an_error(tfgrad):
    assert "try: a local path" in tfgrad("runs", "a\0b")[2]


def test_no_runs_is_an_error_that_says_how_to_make_some(tfgrad):
    code, out, err = tfgrad("runs", "nowhere")

    assert (code, out) == (1, "")
    assert "got: no run.json below nowhere, which is no directory" in err
