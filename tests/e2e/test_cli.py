"""The command, in a process of its own, as a user starts it."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import urllib.parse

import numpy as np


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "tfgrad", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


def test_help_and_import_do_not_import_tensorflow(tmp_path):
    script = (
        "import sys, tfgrad, tfgrad.cli\n"
        "try:\n    tfgrad.cli.main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "print(sorted({'tensorflow', 'keras', 'numpy', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )

    assert "demo" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_listing_runs_does_not_import_tensorflow(tmp_path):
    (tmp_path / "run.json").write_text('{"status": "gtol", "result": {"fun": 0.5}}')
    script = (
        "import sys, tfgrad.cli\n"
        "assert tfgrad.cli.main(['runs', '.']) == 0\n"
        "print('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )

    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_a_board_answers_until_ctrl_c(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tfgrad", "board", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = process.stdout.readline().strip()
    host = urllib.parse.urlsplit(address).netloc
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as server:
        server.request("GET", "/data/runs")
        answer = server.getresponse().read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)

    assert answer == b"[]"
    assert (process.returncode, errors) == (0, "")


def test_a_function_in_a_file_is_minimised_in_silence(tmp_path):
    (tmp_path / "model.py").write_text("def f(x):\n    return (x - 3) ** 2\n")
    done = run("minimize", "model.py:f", "--x0", "-1", "--json", cwd=tmp_path)

    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["x"] == 3.0


def test_wrong_usage_exits_with_2(tmp_path):
    assert run("dmeo", cwd=tmp_path).returncode == 2
    assert run(cwd=tmp_path).returncode == 2


def test_the_demo_fits_one_screen_and_leaves_a_run_and_a_picture(tmp_path):
    done = run("demo", cwd=tmp_path)

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 120
    assert done.stderr == ""
    steps = re.findall(r"(?<!\S)(\d+) +(-?[\d.]+) +(-?[\d.]+)(?!\S)", done.stdout)
    table = {int(step): (float(x), float(f)) for step, x, f in steps}
    assert sorted(table) == list(range(31))
    k = np.arange(31)
    x = -0.5 + 3.5 * 0.8**k
    np.testing.assert_allclose([table[i][0] for i in k], x, rtol=2e-6, atol=2e-7)
    np.testing.assert_allclose([table[i][1] for i in k], x**2 + x - 1, atol=2e-6)
    (record,) = tmp_path.glob("logs/parabola/sgd/run.json")
    assert json.loads(record.read_text())["result"]["nit"] == 30
    assert record.with_name("history.png").stat().st_size > 10_000
    assert list(record.parent.glob("events.out.tfevents.*"))
