"""Hooks: what watches a run. The bar, the callback, Ctrl-C.

TensorBoard and checkpoints are hooks, too, in files of their own.
"""

from __future__ import annotations

import inspect
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import describe
from tfgrad.optimize.data import can_take
from tfgrad.optimize.history import Rows
from tfgrad.optimize.options import ENDLESS
from tfgrad.optimize.result import State

if TYPE_CHECKING:
    from tfgrad.optimize.minimisation import Minimisation

WATCHED = 100
"""Steps after each of which a callback is called; later on, after each chunk."""


class Hook:
    """What may watch a run; each method does nothing unless it is overridden."""

    def limit(self, run: Minimisation) -> int:
        """Return how many steps the next chunk may have at most."""
        return ENDLESS

    def open(self, run: Minimisation) -> None:
        """Be called before anything is traced."""

    def begin(self, run: Minimisation) -> None:
        """Be called where the run begins; `run.record` has the rows until there."""

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Be called after each chunk, with its rows."""

    def epoch(self, run: Minimisation, row: Mapping[str, Any]) -> None:
        """Be called after each epoch, with its row."""

    def flush(self) -> None:
        """Wait until all that was handed over is on the disk."""

    def finish(self, run: Minimisation) -> None:
        """Be called where the run has come to an end, before its outcome is taken."""

    def end(self, run: Minimisation, error: BaseException | None) -> None:
        """Be called at the end, whatever happened, with what was raised."""


def bar_of(total: int | None, unit: str) -> Any:
    """Return a progress bar, shown after a second, in terminals and notebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about widgets that a notebook lacks
        from tqdm.auto import tqdm

        return tqdm(total=total, delay=1.0, disable=None, leave=False, unit=unit)


class ProgressBar(Hook):
    """A progress bar, shown after a second, in terminals and notebooks."""

    _bar: Any = None

    def begin(self, run: Minimisation) -> None:
        """Make the bar."""
        self._bar = bar_of(run.planned, "step")

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Move it."""
        self._bar.update(run.step - self._bar.n)

    def end(self, run: Minimisation, error: BaseException | None) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.close()


class Callback(Hook):
    """A function of the user's, called after each chunk; it may ask to stop.

    Args:
        function: Takes a `State`; or the point, in arrays of NumPy, if its parameter is
            `xk`; or the state by name, likewise in arrays, if it has a parameter
            `intermediate_result`: both as SciPy calls it. It returns something true, or
            raises `StopIteration`, to stop.

    Raises:
        InvalidArgumentError: If it takes nothing, or more.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):  # builtins and some callables have none
            names = []
        by_name = "intermediate_result"
        self._form = by_name if by_name in names else (*names, "")[0]
        if self._form != by_name and not can_take(function, 1):
            raise InvalidArgumentError(
                "A callback takes one argument.",
                got=f"callback={describe(function)}",
                hint="callback=lambda state: print(state.step, state.fun)",
            )
        self._function = function

    def limit(self, run: Minimisation) -> int:
        """Return 1 in the first steps."""
        return 1 if run.step < WATCHED else ENDLESS

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Call the function; what it changes counts in the next step."""
        if not len(rows):
            return
        try:
            asks = bool(self._called(run.shown()))
        except StopIteration:  # SciPy's way to say it
            asks = True
        if asks:
            run.end("callback")
        elif run.status is None:
            run.refresh()

    def _called(self, state: State) -> Any:
        if self._form not in ("xk", "intermediate_result"):
            return self._function(state)
        x = tf.nest.map_structure(np.array, state.x)
        if self._form == "xk":
            return self._function(x)
        return self._function(intermediate_result=replace(state, x=x))


class Interrupts(Hook):
    """Ctrl-C: recorded within the `with` block, acted on between two chunks.

    The first one ends the run, the second one raises at once. One that comes too late
    to end the run raises `KeyboardInterrupt` where the block ends. Outside of the main
    thread, where Python delivers no signal, nothing is done.
    """

    def __init__(self) -> None:
        self._caught = self._is_heeded = False
        self._before: Any = None

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """End the run if there was one."""
        if run.status is None and self.heed():
            run.end("interrupted")

    def heed(self) -> bool:
        """Return whether there was one; whoever asks ends the run."""
        self._is_heeded = self._is_heeded or self._caught
        return self._caught

    def __enter__(self) -> Self:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not None:  # None: set by C code, and not ours to replace
                signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._caught and not self._is_heeded and error[0] is None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._caught:
            raise KeyboardInterrupt
        self._caught = True
