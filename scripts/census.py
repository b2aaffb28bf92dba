"""Count what of tfgrad a call passes through: functions, files, depth; and its sizes.

Run it as `python scripts/census.py`. The numbers are aims that show whether the design
carries, not limits.
"""

from __future__ import annotations

import ast
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = Path(__file__).parents[1] / "tfgrad"


NO_FUNCTIONS = ("<module>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")
"""Code that is part of something else."""


def passed(call: Callable[[], Any]) -> tuple[int, int, int]:
    """Return how many functions and files of ours a call passes, and how deep.

    It is the second call: what modules do when they are imported, and what a method
    compiles once in a process, is no part of it. Comprehensions and the like are part
    of the function that they stand in.
    """
    call()
    functions: set[tuple[str, int]] = set()
    depth = deepest = 0
    ours = str(ROOT) + os.sep

    def look(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth, deepest
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(ours):
            return
        if code.co_name in NO_FUNCTIONS:
            return
        if event == "call":
            functions.add((code.co_filename, code.co_firstlineno))
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(functions), len({file for file, _ in functions}), deepest


def calls() -> dict[str, Callable[[], Any]]:
    """Return the calls that are counted."""
    import keras
    import numpy as np
    import tensorflow as tf

    import tfgrad

    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    x = np.ones((8, 2), np.float32)

    def loss(x: Any, y: Any) -> Any:
        return tf.reduce_mean((model(x) - y) ** 2)

    point = tf.constant([1.0, 2.0])

    def f(x: Any) -> Any:
        return tf.reduce_sum(x**3)

    return {
        "minimize(lambda x: ..., 3.0)": lambda: tfgrad.minimize(
            lambda x: (x - 1) ** 2 + 1, 3.0
        ),
        "minimize(loss, wrt=, data=, log=, checkpoint=)": lambda: tfgrad.minimize(
            loss,
            wrt=model,
            data=(x, x[:, :1]),
            log=Path(tempfile.mkdtemp()),
            checkpoint=Path(tempfile.mkdtemp()),
        ),
        "grad(f)(x)": lambda: tfgrad.grad(f)(point),
        "hessian(f)(x)": lambda: tfgrad.hessian(f)(point),
    }


def classes() -> list[tuple[int, int, str]]:
    """Return (methods, attributes, name) of each class, the largest last."""
    found = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(n, ast.FunctionDef) for n in node.body)
                targets = (
                    target
                    for inner in ast.walk(node)
                    if isinstance(inner, ast.Assign | ast.AnnAssign)
                    for target in getattr(
                        inner, "targets", [inner.__dict__.get("target")]
                    )
                )
                flat = [e for t in targets for e in getattr(t, "elts", [t])]
                attributes = {
                    e.attr
                    for e in flat
                    if isinstance(e, ast.Attribute)
                    and getattr(e.value, "id", "") == "self"
                }
                found.append((methods, len(attributes), node.name))
    return sorted(found)


def lines(folder: Path) -> tuple[int, int]:
    """Return the files and the lines below a folder."""
    files = list(folder.rglob("*.py"))
    return len(files), sum(len(file.read_text().splitlines()) for file in files)


def main() -> None:
    """Print the census."""
    for name, call in calls().items():
        functions, files, depth = passed(call)
        print(f"{name}: {functions} functions in {files} files, {depth} deep")
    most = classes()
    methods, _, name = most[-1]
    attributes, other = max(each[1:] for each in most)
    print(f"most methods: {name}, {methods}; most attributes: {other}, {attributes}")
    for folder in (ROOT, ROOT / "optimize"):
        files, count = lines(folder)
        print(f"{folder.name}: {count} lines in {files} files")


if __name__ == "__main__":
    main()
