"""Several processes in one run: what they have to agree on between two chunks.

A chunk of steps is many all-reduces. A worker that takes another number of steps, or
ends at another one, leaves the others waiting for ever. So all workers gather three
things after each chunk: how long the next one is, why the run ends (Ctrl-C, a callback,
the clock of one worker), and how late it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.optimize.distribute import Replicas
from tfgrad.optimize.history import Rows
from tfgrad.optimize.hooks import Callback, Hook
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.options import ENDLESS
from tfgrad.optimize.stopping import code_of, status_of


class Workers(Hook):
    """The last hook of each worker: what the hooks of one worker ask for, all do."""

    def __init__(self, replicas: Replicas, hooks: Sequence[Hook]) -> None:
        self._replicas, self._hooks = replicas, hooks
        self._limit = ENDLESS

    def limit(self, run: Minimisation) -> int:
        """Return the least number of steps that any worker asks for."""
        return self._limit

    def open(self, run: Minimisation) -> None:
        """Wait until all workers have read where they go on.

        Raises:
            InvalidArgumentError: If some of them have a callback and others none.
            RunError: If they go on at different steps.
        """
        step = -1 if run.saved is None else int(run.saved.state.step)
        count = sum(isinstance(hook, Callback) for hook in self._hooks)
        steps, counts = self._replicas.gather([step, count]).T
        if np.any(counts != counts[0]):  # its state takes an evaluation by all
            raise InvalidArgumentError(
                "All workers call `callback`, or none does.",
                got=f"a callback in {int(np.sum(counts))} of {len(counts)} workers",
                hint="the same call in all; what prints looks at "
                "strategy.cluster_resolver.task_id",
            )
        if np.any(steps != steps[0]):
            raise RunError(
                "All workers go on from the same checkpoint.",
                got="steps " + ", ".join(str(int(s)) for s in steps) + " (-1: none)",
                hint="a directory for `checkpoint` that all workers can read",
            )

    def begin(self, run: Minimisation) -> None:
        """Agree on the first chunk."""
        self._agree(run)

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Agree on the next chunk, or on the end."""
        self._agree(run)

    def end(self, run: Minimisation, error: BaseException | None) -> None:
        """Wait until the chief has written all."""
        if error is None:
            self._replicas.gather([0])

    def _agree(self, run: Minimisation) -> None:
        limit = min(hook.limit(run) for hook in self._hooks)
        code = 0 if run.status is None else code_of(run.status)
        value = float(run.state.evaluation.value)
        pace = getattr(run.loop, "pace", None)  # SciPy's methods have none
        elapsed = 0.0 if pace is None else pace.elapsed
        mine = [code, limit, run.clock.seconds(), elapsed, value]
        codes, limits, seconds, elapsed, values = self._replicas.gather(mine).T
        if not np.array_equal(values, values[:1].repeat(len(values)), equal_nan=True):
            raise RunError(
                "All workers must compute the same in each step.",
                got=f"f = {', '.join(f'{v:.17g}' for v in values)} at step {run.step}",
                hint="the same data, code and seeds in all: "
                "keras.utils.set_random_seed(1) at the start of the program",
            )
        self._limit = int(min(limits))
        run.clock.agree(float(np.mean(seconds)))
        if pace is not None:
            pace.adapt(float(np.mean(elapsed)))
        if np.any(codes):
            run.status = status_of(int(np.max(codes)))
