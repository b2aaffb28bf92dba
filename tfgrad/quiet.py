"""TensorFlow, imported without what its C++ code prints at its import."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Discard what is printed to the standard error stream if TensorFlow is imported.

    TensorFlow prints about oneDNN and GPUs before it reads its own setting
    `TF_CPP_MIN_LOG_LEVEL`, which is set here unless the user has set it: on a machine
    without a GPU, the first tensor would print an error about CUDA. If TensorFlow is
    there already, nothing is discarded.
    """
    if "tensorflow" in sys.modules:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    saved = None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it may be closed
        sys.stderr.flush()
        saved = os.dup(2)
    if saved is None:
        yield
        return
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
