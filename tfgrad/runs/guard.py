"""What is watched must not die of being watched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tfgrad.errors import TfgradError


class Guard:
    """Writes to a run until that fails; then warns once, and writes no more.

    It fails on a full disk, on a step that comes twice, in a run that was closed.

    Args:
        what: What goes on without its log, for the warning.
    """

    def __init__(self, what: str) -> None:
        """Begin with a log that works."""
        self._what = what
        self.is_lost = False

    def __call__(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `write(*args, **kwargs)`, unless the log is lost."""
        if self.is_lost:
            return
        try:
            write(*args, **kwargs)
        except (TfgradError, OSError) as error:
            self.is_lost = True
            warnings.warn(
                f"{self._what} goes on without its log. {error}",
                RuntimeWarning,
                stacklevel=3,
            )
