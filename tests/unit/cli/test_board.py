"""`tfgrad board`, with a board that starts nothing (tests/e2e starts one)."""

import contextlib
import threading
from types import SimpleNamespace

import pytest

import tfgrad as library


@pytest.fixture
def shown(monkeypatch):
    """What `show` was called with; Ctrl-C is pressed at once."""
    calls = []

    @contextlib.contextmanager
    def show(root, port):
        calls.append((root, port))
        yield SimpleNamespace(url="http://127.0.0.1:6006/?smoothing=0#timeseries")
        calls.append("closed")

    def press(self, timeout=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "show", show)
    monkeypatch.setattr(threading.Event, "wait", press)
    return calls


def test_it_prints_the_address_and_ends_with_ctrl_c(tfgrad, shown):
    code, out, err = tfgrad("board", "runs", "--port", "6006")

    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "http://127.0.0.1:6006/?smoothing=0#timeseries"
    assert shown == [("runs", 6006), "closed"]
