"""What a minimisation says about itself in words: its problem and its result."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfgrad
from tfgrad.nested import Nest, named_leaves

_SHOWN = 10
"""Numbers of a point up to which a card shows them."""


def problem_card(f: Callable[..., Any], facts: Mapping[str, Any]) -> str:
    """Return the Markdown of a problem: the source of the function, and the facts."""
    versions = f"tfgrad {tfgrad.__version__}, TensorFlow {tf.__version__}"
    versions += f", Keras {keras.__version__}"
    return f"```python\n{_source(f)}\n```\n\n" + _table({**facts, "versions": versions})


def result_card(status: str, result: Mapping[str, Any]) -> str:
    """Return the Markdown of how a minimisation ended."""
    return _table({"status": status, **result})


def point_text(x: Nest) -> str:
    """Return a point in one line: its numbers while they are few, else how many.

    >>> point_text({"w": np.array([1.0, 2.0]), "b": 0.5})
    "x['b'] = 0.5, x['w'] = [1. 2.]"
    """
    leaves = [(name, np.asarray(leaf)) for name, leaf in named_leaves(x, "x")]
    count = sum(leaf.size for _, leaf in leaves)
    if count > _SHOWN:
        arrays = "one array" if len(leaves) == 1 else f"{len(leaves)} arrays"
        return f"{count} numbers in {arrays}"
    texts = (f"{name} = {np.array2string(leaf, precision=8)}" for name, leaf in leaves)
    return ", ".join(texts).replace("\n", "")


def _source(f: Callable[..., Any]) -> str:
    try:
        lines = inspect.getsource(getattr(f, "python_function", f))
    except (OSError, TypeError):  # typed at a prompt, or no Python function
        return repr(f)
    return textwrap.dedent(lines).rstrip()


def _table(facts: Mapping[str, Any]) -> str:
    cells = {name: str(value).replace("|", "\\|") for name, value in facts.items()}
    rows = "\n".join(f"| {name} | {text} |" for name, text in cells.items())
    return f"| | |\n|---|---|\n{rows}\n"
