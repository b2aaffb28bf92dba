"""The command `tfgrad`: parse, call, print; no mathematics.

TensorFlow takes seconds to import and is imported by the commands that need it, when
they
run: `tfgrad --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 failed, 2 wrong usage."""
    options = _parser().parse_args(argv)
    with _quiet_tensorflow():
        import tensorflow as tf

        tf.config.list_logical_devices()  # the search for a GPU has its notes, too
    from tfgrad.errors import TfgradError

    try:
        return int(options.run(options))
    except TfgradError as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfgrad",
        description="Differentiate, check, minimise and watch any TensorFlow function.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="derivatives, 30 steps of descent and a run, in one screen"
    )
    demo.add_argument(
        "--logs", default="logs", help="where to write the run (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from tfgrad.cli.demo import demo

    for line in demo(options.logs):
        print(line, flush=True)
    return 0


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Keep the notes that TensorFlow's C++ writes at its import off the terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
