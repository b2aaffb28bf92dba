"""Write a log so that a failed write does not end the training that is logged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from tfgrad.errors import TfgradError


class Guard:
    """Calls functions that write to a run; after a failure warns once, and stops.

    Writing fails on a full disk, at a step that was written already, in a closed run.

    Attributes:
        is_lost: Whether writing has failed.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self.is_lost = False

    def __call__(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `write(*args, **kwargs)`, unless an earlier call has failed."""
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
