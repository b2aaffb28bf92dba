"""Ctrl-C between two chunks, never in the middle of the bookkeeping."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """Within the `with` block, the first Ctrl-C is noted and the second one raises.

    Outside of the main thread, where Python delivers no signal, it does nothing.

    Attributes:
        caught: Whether there was one.
    """

    def __init__(self) -> None:
        """Change nothing yet."""
        self.caught = False
        self._before: Any = None

    def __enter__(self) -> Self:
        """Take over the handler."""
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not None:  # None: set by C code, and not ours to replace
            try:
                signal.signal(signal.SIGINT, self._note)
            except ValueError:  # not the main thread
                self._before = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the handler back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True
