"""Runs seen in a browser: what the pages of TensorBoard really show, both loaders."""

import json
import re
import shutil
import subprocess
import time
import urllib.request

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfgrad
from tfgrad.runs.board import show
from tfgrad.runs.writer import Run

CHROMIUM = shutil.which("chromium")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1400,1000",
]

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)",
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
LINES = "return all.filter(e => e.matches('path.line')).map(e => e.getAttribute('d'));"
NODES = "return all.filter(e => e.matches('g.node')).map(e => e.dataset.name);"
EXPAND = """
const node = all.find(e => e.matches('g.node') && e.dataset.name == arguments[0]);
node.querySelector('.nodeshape > *').dispatchEvent(
  new MouseEvent('dblclick', {bubbles: true, composed: true, view: window}));"""


class Browser:
    """Headless Chromium, driven by the WebDriver protocol."""

    def __init__(self, driver, profile):
        """Open a session of the running `driver`, with an empty `profile`."""
        started = (
            re.search(r"success.* on port (\d+)", line) for line in driver.stdout
        )
        self.address = f"http://127.0.0.1:{next(filter(None, started))[1]}/session"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
        session = self.call("POST", "", {"capabilities": wanted})["sessionId"]
        self.address += f"/{session}"

    def call(self, method, path, body=None):
        request = urllib.request.Request(
            self.address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with without_proxy.open(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url):
        # Between two addresses that differ after the # alone, the page is not loaded.
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        body = {"script": EVERYWHERE + script, "args": arguments}
        return self.call("POST", "/execute/sync", body)

    def wait_for(self, script, done, seconds=60):
        """Run `script` until its answer is `done`; return the last answer."""
        deadline = time.monotonic() + seconds
        while not done(answer := self.run(script)) and time.monotonic() < deadline:
            pass  # each turn waits for an answer of the browser
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
    for method, steps in (("adam", 60), ("sgd", 30)):
        tfgrad.minimize(
            rosenbrock,
            np.array([-1.2, 1.0]),
            method=method,
            learning_rate=1e-3,
            steps=steps,
            log=logs / "rosenbrock",
        )
    layers = [keras.Input([4]), keras.layers.Dense(3, name="hidden")]
    model = keras.Sequential([*layers, keras.layers.Dense(1, name="top")], name="net")
    model.compile("sgd", "mse")
    with Run(logs / "fit") as run:
        callback = run.keras_callback(histograms=1)
        x, y = np.ones([8, 4]), np.ones([8, 1])
        model.fit(x, y, epochs=3, verbose=0, callbacks=[callback])
    return logs


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    command = [CHROMEDRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        try:
            browser = Browser(driver, tmp_path_factory.mktemp("profile"))
            yield browser
            browser.call("DELETE", "")
        finally:
            driver.terminate()


@pytest.fixture(scope="module", params=["auto", "false"])
def board(request, logs):
    with show(logs, pin="f", load_fast=request.param) as board:
        yield board


@pytest.fixture(scope="module", params=["auto", "false"])
def many(request, minimized):
    with show(minimized, pin="loss", load_fast=request.param) as board:
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
    browser.open(tab(board, "scalars"))

    def whole(lines):
        return max((line.count("L") for line in lines), default=0) == 29

    lines = browser.wait_for(LINES, whole)
    curve = max(lines, key=lambda line: line.count("L"))
    points = np.array([p.split(",") for p in curve[1:].split("L")], dtype=float)
    assert len(points) == 30
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
    wanted = {"/log10_gap", "/log10_max_norm"}  # after the name of their group
    texts = browser.wait_for(TEXTS, lambda texts: wanted <= set(texts))

    assert wanted <= set(texts)


def test_the_images_page_shows_the_contour_with_the_path(many, browser):
    browser.open(tab(many, "images"))
    sizes = """return all.filter(e => e.tagName == 'IMG' && e.src.includes('blob_key'))
      .map(e => [e.naturalWidth, e.naturalHeight]);"""
    loaded = browser.wait_for(sizes, lambda s: s.count([600, 500]) == 2)

    assert loaded == [[600, 500]] * 2


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
