"""A file with functions to name, and the command run in this process."""

import sys

import pytest

from tfgrad.cli import main

MODEL = """
import tensorflow as tf
from helper import CENTRE

w = tf.Variable(2.0)
number = 3

def bowl(x):
    return tf.reduce_sum((x - CENTRE) ** 2)

def nested(p):
    return (p["a"] - 1) ** 2 + tf.reduce_sum(p["b"] ** 2)

def product(x, y):
    return x * tf.round(y)

def by_variable():
    return (w - 1) ** 2

def divides(x):
    return x / (1 // 0)

def multiplies(x):
    return tf.reduce_sum(x @ x)

def cubic(x):
    return -(x**3)

@tf.custom_gradient
def wrong(x):
    return x**2, lambda dy: dy * x

class Space:
    def inside(x):
        return x * x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with model.py in it, which imports helper.py beside it."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("CENTRE = 2.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in ("model", "helper"):
        sys.modules.pop(name, None)


@pytest.fixture
def tfgrad(folder, capsys):
    """Run a command line; return (exit code, output, errors)."""

    def run(*words):
        try:
            code = main(words)
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return run
