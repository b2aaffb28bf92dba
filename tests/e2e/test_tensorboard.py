"""Runs seen through TensorBoard: a real process, asked over HTTP, both loaders."""

import http.client
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorboard_data_server
import tensorflow as tf
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.board import show
from tfgrad.runs.reader import load_run
from tfgrad.runs.run import Run

RNG = np.random.default_rng(0)
CURVES = {"f": RNG.standard_normal(2000), "gradient/norm": RNG.standard_normal(2000)}
STRANGE = [np.nan, np.inf, -np.inf, 1e-45, -0.0, 3.4e38]
HAS_DATA_SERVER = tensorboard_data_server.server_binary() is not None


@tf.function
def residual(x):
    with tf.name_scope("residual"):
        return tf.square(x - 1.0)


def objective(x):
    with tf.name_scope("model"):
        return tf.reduce_sum(residual(x))


def model():
    layers = [keras.Input([4]), keras.layers.Dense(3, name="hidden")]
    return keras.Sequential(layers, name="net")


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    logs = tmp_path_factory.mktemp("logs")
    with Run(logs / "parabola" / "sgd", {"rate": 0.1, "method": "sgd"}) as run:
        for start in range(0, 2000, 500):
            steps = np.arange(start, start + 500)
            run.log_history({tag: curve[steps] for tag, curve in CURVES.items()}, steps)
        for step, value in enumerate(STRANGE):
            run.log(step, strange=value)
        run.text("problem", "# A parabola")
        run.graph(objective, [1.0, 2.0])
        run.graph(tf.exp, 1.0, name="another")
        run.histogram("weights", np.arange(60.0), step=3)
        run.image("ramp", np.linspace(0, 1, 60).reshape(6, 10), step=4)
        run.layout({"fit": {"both": list(CURVES)}})
    with Run(logs / "model") as run:
        run.graph(model())
    with Run(logs / "resumed") as run:
        run.log_history(dict.fromkeys("fg", np.zeros(100)), range(100))
        run.histogram("h", [1.0], 10)
        run.histogram("h", [1.0], 60)
    for first, value in ((50, 1.0), (70, 2.0)):
        with Run(logs / "resumed", resume_from=first) as run:
            for step in range(first, 80):
                run.log(step, f=value)
    return logs


@pytest.fixture(scope="module", params=["true", "false"])
def board(request, logs):
    if request.param == "true" and not HAS_DATA_SERVER:
        pytest.skip("TensorBoard's data server is not built for this machine")
    with show(logs, load_fast=request.param) as board:
        yield board


def ask(board, path, body=None, **query):
    """Return the answer of TensorBoard's HTTP API, as JSON where it is JSON."""
    address = urllib.parse.urlsplit(board.url)
    server = http.client.HTTPConnection(address.netloc, timeout=30)
    url = f"/data/{path}?{urllib.parse.urlencode(query)}"
    server.request("POST" if body else "GET", url, body and json.dumps(body))
    response = server.getresponse()
    content = response.read()
    server.close()
    assert response.status == 200, content
    return (
        json.loads(content) if "json" in response.headers["Content-Type"] else content
    )


def eventually(fetch, done, seconds=120):
    """Fetch until the answer is `done`: TensorBoard loads in the background."""
    deadline = time.monotonic() + seconds
    while not done(answer := fetch()) and time.monotonic() < deadline:
        pass  # each turn waits for an answer over HTTP
    return answer


def curve(board, run, tag, length):
    """Return (steps, values) of a curve once it has `length` points."""

    def fetch():
        tags = ask(board, "plugin/scalars/tags")
        if tag not in tags.get(run, {}):
            return []
        return ask(board, "plugin/scalars/scalars", run=run, tag=tag)

    points = eventually(fetch, lambda points: len(points) >= length)
    return [step for _, step, _ in points], [float(value) for _, _, value in points]


@pytest.mark.parametrize("tag", CURVES)
def test_scalars_are_served_to_the_last_float32_bit(board, tag):
    steps, values = curve(board, "parabola/sgd", tag, 2000)

    assert steps == list(range(2000))
    np.testing.assert_array_equal(np.float32(values), np.float32(CURVES[tag]))


def test_numbers_at_and_beyond_the_edge_are_served(board):
    _, values = curve(board, "parabola/sgd", "strange", len(STRANGE))

    np.testing.assert_array_equal(np.float32(values), np.float32(STRANGE))


def test_a_resumed_run_has_each_step_once_and_its_last_value(board):
    steps, values = curve(board, "resumed", "f", 80)

    assert steps == list(range(80))
    assert values == [0.0] * 50 + [1.0] * 20 + [2.0] * 10


def test_a_tag_that_is_not_logged_again_ends_where_the_run_was_resumed(board):
    curve(board, "resumed", "f", 80)  # by then, the last session is read
    steps = eventually(
        lambda: curve(board, "resumed", "g", 1)[0], lambda steps: len(steps) == 50
    )

    assert steps == list(range(50))
    where = {"run": "resumed", "tag": "h"}
    points = ask(board, "plugin/histograms/histograms", **where)
    assert [step for _, step, _ in points] == [10]


def test_the_graph_is_served_with_forward_and_gradient_operations(board):
    def fetch():
        return ask(board, "plugin/graphs/info").get("parabola/sgd", {})

    info = eventually(fetch, lambda info: info.get("run_graph") and info["tags"])
    assert info["run_graph"]
    assert list(info["tags"]) == ["graph/another"]

    graph = ask(board, "plugin/graphs/graph", run="parabola/sgd").decode()
    for name in (
        "objective/model/residual/residual/Square",
        "gradient_tape/objective/model/Tile",
        "gradient/x",
    ):
        assert f'name: "{name}"' in graph
    assert "PartitionedCall" not in graph

    another = ask(board, "plugin/graphs/graph", run="parabola/sgd", tag="graph/another")
    assert b'name: "another/Exp"' in another


def test_text_is_served_as_markup(board):
    def fetch():
        return ask(board, "plugin/text/tags").get("parabola/sgd", [])

    assert eventually(fetch, bool) == ["problem"]
    (card,) = ask(board, "plugin/text/text", run="parabola/sgd", tag="problem")
    assert card["text"] == "<h1>A parabola</h1>"


def test_a_histogram_is_served_with_its_counts(board):
    def fetch():
        tags = ask(board, "plugin/histograms/tags")
        return "weights" in tags.get("parabola/sgd", {})

    assert eventually(fetch, bool)
    where = {"run": "parabola/sgd", "tag": "weights"}
    ((_, step, buckets),) = ask(board, "plugin/histograms/histograms", **where)
    assert step == 3
    assert [count for _, _, count in buckets] == [2] * 30


def test_an_image_is_served_with_its_pixels(board):
    where = {"run": "parabola/sgd", "tag": "ramp", "sample": 0}

    def fetch():
        tags = ask(board, "plugin/images/tags").get("parabola/sgd", {})
        return ask(board, "plugin/images/images", **where) if "ramp" in tags else []

    (image,) = eventually(fetch, bool)
    png = ask(board, f"plugin/images/individualImage?{image['query']}&")
    assert image["step"] == 4
    assert tf.io.decode_png(png).shape == (6, 10, 1)


def test_a_layout_is_served_with_the_curves_it_names(board):
    def fetch():
        return ask(board, "plugin/custom_scalars/layout").get("category", [])

    (category,) = eventually(fetch, bool)
    (chart,) = category["chart"]
    regex = chart["multiline"]["tag"][1]
    where = {"run": "parabola/sgd", "tag": regex}
    answer = ask(board, "plugin/custom_scalars/scalars", **where)
    assert list(answer["tag_to_events"]) == ["gradient/norm"]


def test_a_keras_model_is_served_as_operations_and_as_layers(board):
    def fetch():
        return ask(board, "plugin/graphs/info").get("model", {}).get("tags", {})

    tags = eventually(fetch, bool)
    assert tags["layers/net"]["conceptual_graph"]
    where = {"run": "model", "tag": "layers/net", "conceptual": "true"}
    layers = ask(board, "plugin/graphs/graph", **where)
    assert b'name: "net/hidden"' in layers
    operations = ask(board, "plugin/graphs/graph", run="model")
    assert b"MatMul" in operations


def test_hyper_parameters_are_served_with_the_status(board):
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_SUCCESS"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }

    def fetch():
        answer = ask(board, "plugin/hparams/session_groups", body)
        return answer.get("sessionGroups", [])

    (group,) = eventually(fetch, bool)
    assert group["hparams"] == {"rate": 0.1, "method": "sgd"}


WRITE_UNTIL_KILLED = """
import itertools, os, random, signal, struct, sys
from tfgrad.runs.run import Run

def write(session, first, report):
    run = Run(sys.argv[1], resume_from=first if session else None)
    rows = 1 + 9 * (session % 2)
    for step in itertools.count(first, rows):
        if rows == 1:
            run.log(step, loss=step, session=session)
        else:
            steps = range(step, step + rows)
            run.log_history({"loss": list(steps), "session": [session] * rows}, steps)
        os.write(report, struct.pack("<q", step + rows - 1))

moments, first = random.Random(0), 0
for session in range(20):
    reading, report = os.pipe()
    child = os.fork()
    if child == 0:
        write(session, first, report)
    for _ in range(moments.randrange(1, 150)):
        (step,) = struct.unpack("<q", os.read(reading, 8))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading), os.close(report)
    first = step + 1
print(first)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process")
def test_runs_killed_twenty_times_have_lost_nothing_and_go_on_without_gap(tmp_path):
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path / "run")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    expected = list(range(int(done.stdout)))
    with Run(tmp_path / "run", resume_from=len(expected)) as run:
        run.log(len(expected), loss=-1.0, session=20)

    frame = load_run(tmp_path / "run", wide=True)
    assert frame["step"].tolist() == [*expected, len(expected)]
    assert frame["loss"].tolist() == [*expected, -1.0]
    assert frame["session"].is_monotonic_increasing
    assert frame["session"].nunique() == 21
    for load_fast in ["true", "false"] if HAS_DATA_SERVER else ["false"]:
        with show(tmp_path, load_fast=load_fast) as board:
            # Until it has read the last file, it shows what that one supersedes.
            points = eventually(
                lambda board=board: curve(board, "run", "loss", len(expected) + 1),
                lambda points: points[1][-1:] == [-1.0],
            )
        assert points[0] == frame["step"].tolist()
        assert points[1] == frame["loss"].tolist()


# --- the process ---------------------------------------------------------------------


def family(pid):
    """Return a descriptor per process, which can be read when the process ends."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [os.pidfd_open(pid), *(os.pidfd_open(int(child)) for child in children)]


def all_end(descriptors, seconds=30):
    running = set(descriptors)
    while running:
        ended, _, _ = select.select(list(running), [], [], seconds)
        if not ended:
            return False
        running -= set(ended)
    return True


needs_proc = pytest.mark.skipif(
    not (Path("/proc/self/task").exists() and hasattr(os, "pidfd_open")),
    reason="looks at processes the way Linux shows them",
)


@needs_proc
def test_closing_leaves_no_process_behind(tmp_path):
    board = show(tmp_path)
    processes = family(board._process.pid)
    board.close()
    board.close()

    assert len(processes) == 1 + HAS_DATA_SERVER
    assert all_end(processes, seconds=0)
    assert "ended" in repr(board)


@needs_proc
def test_a_server_that_was_killed_is_not_shown(tmp_path):
    with show(tmp_path) as board:
        os.killpg(board._process.pid, signal.SIGKILL)
        board._process.wait()

        assert "ended" in repr(board)
        assert "iframe" not in board._repr_html_()
        assert "&lt;TensorBoard on" in board._repr_html_()


SHOW_UNTIL_KILLED = """
import sys
from tfgrad.runs.board import show
board = show(sys.argv[1])
print("tensorflow" in sys.modules, board._process.pid, flush=True)
sys.stdin.read()
"""


@needs_proc
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_nothing_outlives_the_parent_however_it_ends(tmp_path, end):
    parent = subprocess.Popen(
        [sys.executable, "-c", SHOW_UNTIL_KILLED, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    imported_tensorflow, pid = parent.stdout.readline().split()
    processes = family(int(pid))
    if end is not None:
        parent.send_signal(end)
    parent.communicate()

    assert all_end(processes)
    assert imported_tensorflow == "False"


def test_it_listens_on_this_machine_only(board):
    address = urllib.parse.urlsplit(board.url)

    assert address.hostname == "127.0.0.1"
    # All of 127.0.0.0/8 is this machine: a server on all interfaces would answer here.
    with socket.socket() as client:
        assert client.connect_ex(("127.0.0.2", address.port)) != 0


def test_an_empty_directory_is_shown_while_it_waits_for_runs(tmp_path):
    with show(tmp_path) as board:
        assert ask(board, "runs") == []


def test_a_run_itself_can_be_shown(logs):
    with show(logs / "resumed") as board:
        assert ask(board, "runs") == ["."]


def test_the_address_opens_the_right_view(logs):
    with show(logs, pin=["f", "gradient/norm"]) as board:
        address = urllib.parse.urlsplit(board.url)
    query = urllib.parse.parse_qs(address.query)

    assert address.fragment == "timeseries&_smoothingWeight=0"
    assert query["smoothing"] == ["0"]
    assert json.loads(query["pinnedCards"][0]) == [
        {"plugin": "scalars", "tag": "f"},
        {"plugin": "scalars", "tag": "gradient/norm"},
    ]


def test_it_names_the_directory_as_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path)

    with show("logs") as board:  # a notebook keeps it: no path of this machine
        assert repr(board).startswith("<TensorBoard on logs: http://127.0.0.1:")


def test_a_notebook_shows_the_page_itself(board):
    assert board._repr_html_().startswith('<iframe src="http://127.0.0.1:')


def hostile(good, kind, path):
    """Make a file at `path` that a reader had better not believe."""

    def frame(content, length=None):
        head = struct.pack("<Q", len(content) if length is None else length)
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (head, content)]
        return head + sums[0] + content + sums[1]

    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "noise":
        path.write_bytes(RNG.bytes(5000))
    elif kind == "torn":
        path.write_bytes(good[:-5])
    elif kind == "no event":
        path.write_bytes(good + frame(b"\xff" * 50))
    else:
        path.write_bytes(good + frame(b"", length=int(kind)))


KINDS = ["pipe", "noise", "torn", "no event", 2**31, 2**40, 2**62, 2**63 + 5]


@pytest.mark.parametrize("load_fast", ["auto", "false"])
@pytest.mark.filterwarnings("ignore:TensorBoard leaves out:RuntimeWarning")
def test_no_file_hides_the_run_beside_it(tmp_path, load_fast):
    names = [f"{i}-good" for i in range(len(KINDS))]
    for i, kind in enumerate(KINDS):  # in the order in which they are loaded
        with Run(tmp_path / f"{i}-good") as run:
            run.log_history({"f": [1.0, 2.0]}, range(2))
        (file,) = run.directory.glob("*tfevents*")
        (tmp_path / f"{i}-bad").mkdir()
        hostile(file.read_bytes(), str(kind), tmp_path / f"{i}-bad" / "tfevents.1")

    with show(tmp_path, load_fast=load_fast) as board:
        for name in names:
            assert curve(board, name, "f", 2) == ([0, 1], [1.0, 2.0])


@pytest.mark.parametrize("kind", ["torn", 2**40])
def test_a_file_with_a_damaged_end_is_named(tmp_path, kind):
    with Run(tmp_path / "good") as run:
        run.log(0, f=1.0)
    (file,) = run.directory.glob("*tfevents*")
    (tmp_path / "bad").mkdir()
    hostile(file.read_bytes(), str(kind), tmp_path / "bad" / "tfevents.1")

    with (
        pytest.warns(RuntimeWarning, match=r"leaves out.* \d+ bytes of .*bad/tfevents"),
        show(tmp_path) as board,
    ):
        assert curve(board, "good", "f", 1) == ([0], [1.0])


def test_without_tensorboard_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.version", None)

    with pytest.raises(RunError, match=r'try: pip install "tensorboard>=2\.21"'):
        show(tmp_path)


def test_a_port_that_is_taken_is_named(board, logs):
    port = urllib.parse.urlsplit(board.url).port

    with pytest.raises(
        RunError, match=rf"(?s)port {port}, it was already in use.*try:"
    ):
        show(logs, port=port)


def test_a_root_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(
        RunError, match=r"(?s)nothing, which is not there.*try: .*mkdir"
    ):
        show(tmp_path / "nothing")
    with pytest.raises(RunError, match="which is a file"):
        show(tmp_path / "file")


@pytest.mark.parametrize(
    "bad",
    [
        {"root": None},
        {"root": ""},
        {"root": "a\0b"},
        {"root": ".", "port": 0},
        {"root": ".", "port": "6006"},
        {"root": ".", "pin": [3]},
        {"root": ".", "pin": 3},
        {"root": ".", "load_fast": True},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_starts(bad):
    with pytest.raises(InvalidArgumentError, match="try: "):
        show(**bad)
