"""`tfgrad board`: TensorBoard on a directory of runs, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import threading

import tfgrad


def run(options: argparse.Namespace) -> int:
    """Print the address, and wait for Ctrl-C."""
    with tfgrad.show(options.directory, port=options.port) as board:
        print(f"{board.url}\nCtrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0
