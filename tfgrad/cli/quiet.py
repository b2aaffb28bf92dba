"""TensorFlow, imported without what it has to say about it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Keep the notes that TensorFlow's C++ writes at its import off the terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    saved = os.dup(2)
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
        if "tensorflow" in sys.modules:  # its search for a GPU has notes, too
            sys.modules["tensorflow"].config.list_logical_devices()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
