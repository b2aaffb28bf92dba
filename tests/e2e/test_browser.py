"""Runs seen in a browser: what the pages of TensorBoard really show.

One run is read by TensorBoard's Python loader, many by its data server; that both serve
the same is tested in test_tensorboard.py.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.runs.board import show
from tfgrad.runs.run import Run

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1400,1300",
]

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and os.name == "posix"), reason="needs chromium, driven by pipes"
)

# TensorBoard is built of web components: each hides its elements in a tree of its own.
EVERYWHERE = """
const all = [];
(function walk(node) {
  for (const child of node.children) {
    all.push(child);
    if (child.shadowRoot) walk(child.shadowRoot);
    walk(child);
  }
})(document.body);
"""
TEXTS = """return all.filter(e => !['STYLE', 'SCRIPT', 'TEMPLATE'].includes(e.tagName))
  .flatMap(e => [...e.childNodes]).filter(n => n.nodeType == Node.TEXT_NODE)
  .map(n => n.textContent.trim()).filter(t => t);"""
LINES = """return all.filter(e => e.matches('path.line'))
  .map(e => e.getAttribute('d')).filter(d => d);"""  # a line has no d until it is drawn
NODES = "return all.filter(e => e.matches('g.node')).map(e => e.dataset.name);"
EXPAND = """
const node = all.find(e => e.matches('g.node') && e.dataset.name == arguments[0]);
node.querySelector('.nodeshape > *').dispatchEvent(
  new MouseEvent('dblclick', {bubbles: true, composed: true, view: window}));"""


WITH_PIPES = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(pipe), fcntl.F_DUPFD, 10) for pipe in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium with one page, driven by its DevTools protocol.

    Messages are JSON that ends with a zero byte; the browser reads them from its file
    descriptor 3 and answers on 4.
    """

    def __init__(self, profile):
        """Start it with an empty `profile`."""
        to_browser, self._commands = os.pipe()
        answers, from_browser = os.pipe()
        self._answers = os.fdopen(answers, "rb")
        pipes = [to_browser, from_browser]
        chromium = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", WITH_PIPES, *map(str, pipes), *chromium],
            pass_fds=pipes,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._count, self._session = 0, {}
        pages = self.call("Target.getTargets")["targetInfos"]
        (page,) = (p["targetId"] for p in pages if p["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def close(self):
        self._session = {}
        self.call("Browser.close")
        self._process.wait()
        os.close(self._commands)
        self._answers.close()

    def call(self, method, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        content = json.dumps(message | self._session).encode() + b"\0"
        while content:
            content = content[os.write(self._commands, content) :]
        while (answer := self._read()).get("id") != self._count:
            pass  # events, which nobody asked for
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self):
        content = b""
        while not content.endswith(b"\0"):
            byte = self._answers.read(1)
            assert byte, "the browser has ended"
            content += byte
        return json.loads(content[:-1])

    def open(self, url):
        # Between two addresses that differ after the # alone, the page is not loaded.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)

    def run(self, script, *arguments):
        call = ", ".join(map(json.dumps, arguments))
        answer = self.call(
            "Runtime.evaluate",
            expression=f"(function() {{{EVERYWHERE}{script}}})({call})",
            returnByValue=True,
        )
        # While a page is on its way, there is none to ask.
        return answer["result"].get("value")

    def wait_for(self, script, done, seconds=60):
        """Run `script` until its answer is `done`; return the last answer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.run(script)
            if answer is not None and done(answer):
                break
        return answer


@tf.function
def residual(x):
    with tf.name_scope("residual"):
        return tf.square(x - 1.0)


def objective(x):
    with tf.name_scope("model"):
        return tf.reduce_sum(residual(x))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    steps = np.arange(30)
    with Run(tmp_path_factory.mktemp("logs"), {"rate": 0.1}) as run:
        run.log_history({"f": 12.25 * 0.64**steps - 1.25, "x": 3.5 * 0.8**steps}, steps)
        run.text("problem", "# A parabola")
        run.graph(objective, [1.0, 2.0])
    return run.directory


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


@pytest.fixture(scope="module")
def minimized(tmp_path_factory):
    """Runs of `minimize`, with two methods on two parameters, and of a Keras model."""
    logs = tmp_path_factory.mktemp("minimized")
    result = minimize_rosenbrock(logs)
    layers = [keras.Input([4]), keras.layers.Dense(3, name="hidden")]
    model = keras.Sequential([*layers, keras.layers.Dense(1, name="top")], name="net")
    model.compile("sgd", "mse")
    with Run(logs / "fit") as run:
        run.image("path", tfgrad.plot_path(rosenbrock, result))
        callback = run.keras_callback(histograms=1)
        x, y = np.ones([8, 4]), np.ones([8, 1])
        model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
    return logs


def minimize_rosenbrock(logs):
    for method, steps in (("adam", 60), ("sgd", 30)):
        result = tfgrad.minimize(
            rosenbrock,
            np.array([-1.2, 1.0]),
            method=method,
            learning_rate=1e-3,
            steps=steps,
            log=logs / "rosenbrock",
        )
    return result


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def board(logs):
    with show(logs, pin="f", load_fast="false") as board:
        yield board


@pytest.fixture(scope="module")
def many(minimized):
    with show(minimized, pin="loss") as board:
        yield board


def tab(board, name):
    return board.url.split("?")[0] + f"#{name}"


def test_the_page_opens_on_the_pinned_curve_unsmoothed(board, browser):
    browser.open(board.url)
    texts = browser.wait_for(TEXTS, lambda texts: "-1.25" in texts)

    pinned = texts[texts.index("Pinned") :]
    assert pinned.index("f") < pinned.index("-1.25")  # the value at the last step
    assert "29" in pinned
    smoothing = "return all.find(e => e.matches('.scalars-smoothing input')).value;"
    assert browser.wait_for(smoothing, bool) == "0"


def test_the_scalars_page_draws_the_curve_through_every_step(board, browser):
    browser.open(board.url.replace("#timeseries", "#scalars"))
    smoothing = "return all.find(e => e.matches('tf-smoothing-input'))?.weight;"
    assert browser.wait_for(smoothing, lambda weight: weight == 0) == 0

    def whole(lines):
        # The first steps may be outliers, which the page leaves out of view.
        return max((line.count("L") for line in lines), default=0) >= 27

    lines = browser.wait_for(LINES, whole)
    curve = max(lines, key=lambda line: line.count("L"))
    points = np.array([p.split(",") for p in curve[1:].split("L")], dtype=float)
    assert 28 <= len(points) <= 30
    np.testing.assert_allclose(np.diff(points[:, 0]), np.diff(points[:2, 0])[0])
    assert (np.diff(points[:, 1]) > 0).all()  # f falls; on a screen y points down


def test_the_graph_page_shows_forward_and_gradient_operations(board, browser):
    browser.open(tab(board, "graphs"))
    nodes = browser.wait_for(NODES, lambda nodes: "gradient_tape" in nodes)
    assert {"x", "objective", "value", "gradient_tape", "gradient"} <= set(nodes)

    for scope in (
        "objective",
        "objective/model",
        "objective/model/residual",
        "objective/model/residual/residual",
        "gradient_tape",
        "gradient_tape/residual",
        "gradient",
    ):
        browser.wait_for(NODES, lambda nodes, scope=scope: scope in nodes)
        browser.run(EXPAND, scope)
    inside = {
        "objective/model/residual/residual/Square",
        "objective/model/Sum",
        "gradient_tape/residual/gradients",
        "gradient/x",
    }
    assert inside <= set(browser.wait_for(NODES, lambda nodes: inside <= set(nodes)))


def test_the_text_page_shows_the_card(board, browser):
    browser.open(tab(board, "text"))

    assert "A parabola" in browser.wait_for(TEXTS, lambda t: "A parabola" in t)


def test_the_hparams_page_shows_the_hyper_parameter(board, browser):
    browser.open(tab(board, "hparams"))

    assert "0.10000" in browser.wait_for(TEXTS, lambda texts: "0.10000" in texts)


# --- what minimize and fit have written -----------------------------------------------


def test_the_page_compares_the_methods_on_the_pinned_loss(many, browser):
    browser.open(many.url)
    wanted = {"rosenbrock/adam", "rosenbrock/sgd", "60", "30"}
    texts = browser.wait_for(TEXTS, lambda texts: wanted <= set(texts))

    pinned = texts[texts.index("Pinned") :]
    assert wanted <= set(pinned)  # a row for each method, with its last step
    assert "loss" in pinned


def test_the_page_shows_what_a_minimiser_wants_to_see(many, browser):
    browser.open(many.url.replace("#", "&tagFilter=log10#"))
    wanted = "/log10_max_norm"  # after the name of its group

    assert wanted in browser.wait_for(TEXTS, lambda texts: wanted in texts)


def test_the_images_page_shows_a_contour_with_the_path(many, browser):
    browser.open(tab(many, "images"))
    sizes = """return all.filter(e => e.tagName == 'IMG' && e.src.includes('blob_key'))
      .map(e => [e.naturalWidth, e.naturalHeight]);"""
    loaded = browser.wait_for(sizes, lambda s: [600, 540] in s)

    assert [600, 540] in loaded


def test_the_histograms_page_draws_a_slice_for_each_epoch(many, browser):
    browser.open(tab(many, "histograms"))
    slices = "return all.filter(e => e.matches('g.histogram')).length;"

    # Four weights, in three epochs each; the page may draw a part of what is below.
    assert browser.wait_for(slices, lambda count: count >= 3) % 3 == 0
    texts = browser.wait_for(TEXTS, lambda t: any("hidden/kernel" in x for x in t))
    assert any("hidden/kernel" in text for text in texts)


def test_the_hparams_page_compares_the_methods(many, browser):
    browser.open(tab(many, "hparams"))
    wanted = {"adam", "sgd", "0.0010000", "result/evaluations"}
    texts = browser.wait_for(TEXTS, lambda texts: wanted <= set(texts))

    assert wanted <= set(texts)


def test_the_text_page_shows_source_and_result(many, browser):
    browser.open(tab(many, "text"))

    def whole(texts):
        return any("def rosenbrock" in t for t in texts) and "All 60 steps" in str(
            texts
        )

    assert whole(browser.wait_for(TEXTS, whole))


def test_the_graph_page_opens_a_model_as_operations_and_as_layers(many, browser):
    browser.open(f"{tab(many, 'graphs')}&run=fit")
    operations = browser.wait_for(
        NODES, lambda nodes: "net_1" in nodes or "net" in nodes
    )
    assert {"net", "net_1"} & set(operations)

    browser.open(f"{tab(many, 'graphs')}&run=fit&tag=layers/net&type=conceptual_graph")
    layers = browser.wait_for(NODES, lambda nodes: "net" in nodes)
    assert "net" in layers
    browser.run(EXPAND, "net")
    inside = {"net/hidden", "net/top"}
    assert inside <= set(browser.wait_for(NODES, lambda nodes: inside <= set(nodes)))
