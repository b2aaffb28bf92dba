"""Parts of TensorBoard, imported on use: each costs a tenth of a second."""

from __future__ import annotations

import importlib
from typing import Any

from tfgrad.errors import RunError


def require(module: str) -> Any:
    """Return `tensorboard.<module>`.

    Raises:
        RunError: If TensorBoard is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(f"tensorboard.{module}")
    except ImportError as error:
        raise RunError(
            "Runs need TensorBoard, which TensorFlow does not install.",
            got=str(error),
            hint='pip install "tensorboard>=2.21"',
        ) from error
