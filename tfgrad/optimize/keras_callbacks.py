"""Keras's callbacks as a hook: they see a run as they see `Model.fit`.

With data, the epochs and batches are those of the run. Without data, each step is an
epoch of one batch; with `every=n`, n steps are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfgrad.diagnosis.going_back import Step
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import describe, named_leaves
from tfgrad.optimize import resume
from tfgrad.optimize.epochs import NOT_AVERAGED, is_point
from tfgrad.optimize.history import Rows, Table
from tfgrad.optimize.hooks import Callback, Hook
from tfgrad.optimize.methods.protocol import Method
from tfgrad.optimize.minimisation import Minimisation
from tfgrad.optimize.options import ENDLESS
from tfgrad.optimize.traced import explained
from tfgrad.runs.values import as_array

Logs = dict[str, Any]

NO_LOGS = (*NOT_AVERAGED, "epoch", "expected")
"""Columns of a row that are no logs."""

BATCHES = "on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end"


def watching(callback: Any) -> list[Hook]:
    """Return the hooks for a function, a Keras callback, or a list of both.

    Raises:
        InvalidArgumentError: If it is none of these.
    """
    each = tf.nest.flatten(callback)
    for entry in each:
        is_kind = inspect.isclass(entry) and issubclass(entry, keras.callbacks.Callback)
        if is_kind or not (_is_keras(entry) or callable(entry)):
            raise InvalidArgumentError(
                "`callback` is a function of a `State`, a Keras callback, or a list.",
                got=f"callback={describe(entry)}",
                hint=f"callback={entry.__name__}(...)"
                if is_kind
                else "callback=lambda state: print(state.step, state.fun)",
            )
    hooks: list[Hook] = [Callback(entry) for entry in each if not _is_keras(entry)]
    of_keras = [entry for entry in each if _is_keras(entry)]
    return [*hooks, KerasCallbacks(of_keras)] if of_keras else hooks


class KerasCallbacks(Hook):
    """Keras's callbacks, called as and when `fit` would call them."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self._callbacks = callbacks
        self._is_by_batch = any(map(_acts_on_batches, callbacks))
        self._list = keras.callbacks.CallbackList(callbacks)
        self._model: Any = None
        self._own_optimizer: Any = None
        self._optimizer: Any = None
        self._epoch = 0
        self._first = self._step = 0  # where the epoch began; the last step reported
        self._last_logs: Logs | None = None

    def limit(self, run: Minimisation) -> int:
        """Return the steps to the end of the epoch, or to the next batch."""
        if self._is_by_batch:
            return 1
        return ENDLESS if run.training else self._first + run.options.every - run.step

    def open(self, run: Minimisation) -> None:
        """Refuse callbacks that would never be called, or find no learning rate.

        Raises:
            InvalidArgumentError: If there are some.
        """
        kinds = keras.callbacks.LearningRateScheduler, keras.callbacks.ReduceLROnPlateau
        method = run.chain.stage.method
        for callback in self._callbacks:
            name = type(callback).__name__
            has_rate = not (isinstance(method, Method) or run.chain.stage.is_scipy)
            if isinstance(callback, kinds) and not has_rate:
                raise InvalidArgumentError(
                    f"`{name}` needs a method with a learning rate.",
                    got=f"method={run.chain.stage.name!r}, which finds its step itself",
                    hint='method="adam" or another optimizer of Keras',
                )
            is_endless = run.training and run.training.is_endless
            if is_endless and not _overrides(callback, *BATCHES):
                raise InvalidArgumentError(
                    f"`{name}` is called at the end of an epoch: data without end has "
                    "none.",
                    got="a data set of infinite cardinality",
                    hint="data=lambda: dataset.take(100), which ends an epoch after "
                    "100 batches",
                )

    def begin(self, run: Minimisation) -> None:
        """Call `on_train_begin`; go to the epoch that a callback has restored."""
        every = int(run.options.every)
        wrt, training = run.options.wrt, run.training
        self._model = wrt if isinstance(wrt, keras.Model) else _stand_in(run)
        self._own_optimizer = getattr(self._model, "optimizer", None)
        self._show(run)
        model = self._model
        model.stop_training, model._initial_epoch = False, None
        batches = training.source.batches if training else every
        epochs = training.epochs if training else -(-run.chain.total // every)
        self._list.set_model(model)
        told = {"verbose": 0, "epochs": epochs, "steps": batches, "watch": _Watch(run)}
        self._list.set_params(told)
        self._list.on_train_begin()
        self._heed(run)
        if model._initial_epoch:  # BackupAndRestore sets it
            _go_to(run, model._initial_epoch)
        batch = run.state.batch
        self._epoch = int(batch.epoch) if training else run.step // every
        self._first = run.step - int(batch.count) if training else self._epoch * every
        self._step = run.step
        if run.status is None:
            self._begin_epoch()

    def rows(self, run: Minimisation, rows: Rows) -> None:
        """Report the batches, and an epoch that has no data or was cut short."""
        self._show(run)
        taken = run.step - self._first
        is_whole = run.training is None and taken >= int(run.options.every)
        self._end_batches(run, is_last=is_whole)
        is_cut = run.status not in (None, "interrupted") and self._step > self._first
        if is_whole or is_cut:
            self._end_epoch(run, self._logs(run, validated=True))
        self._heed(run)

    def epoch(self, run: Minimisation, row: Mapping[str, Any]) -> None:
        """Report the last batches of an epoch, and its end."""
        self._show(run)
        self._end_batches(run, is_last=True)
        self._end_epoch(run, _logs_of(row))
        self._heed(run)

    def finish(self, run: Minimisation) -> None:
        """Call `on_train_end`; what a callback puts in the variables is the outcome.

        After Ctrl-C none is called, as in `fit`: a backup is kept.
        """
        if run.status == "interrupted":
            return
        self._show(run)
        solver, saved = run.loop.solver, run.saved
        point = [as_array(leaf).copy() for leaf in solver.point(run.state)]
        self._list.on_train_end(self._last_logs)
        self._heed(run)
        if all(map(np.array_equal, point, map(as_array, solver.point(run.state)))):
            return
        run.state = run.state._replace(evaluation=solver.look(run.state))
        run.saved = resume.snapshot(run)
        if solver.stepper.lookahead == 0 and saved is not None:
            # A method that evaluates before it moves goes on from the step before.
            run.saved = replace(run.saved, state=saved.state)

    def end(self, run: Minimisation, error: BaseException | None) -> None:
        """Give a model of the user's its optimizer back."""
        if self._model is not None:
            self._model.optimizer = self._own_optimizer

    # --- batches and epochs ---

    def _begin_epoch(self) -> None:
        self._list.on_epoch_begin(self._epoch)
        self._list.on_train_batch_begin(0)

    def _end_epoch(self, run: Minimisation, logs: Logs) -> None:
        self._last_logs = logs
        validated = {n[4:]: value for n, value in logs.items() if n.startswith("val_")}
        if validated:
            self._list.on_test_begin()
            self._list.on_test_end(validated)
        self._list.on_epoch_end(self._epoch, logs)
        self._epoch, self._first, self._step = self._epoch + 1, run.step, run.step
        self._stop_if_asked(run)
        if run.status is None:
            self._begin_epoch()

    def _end_batches(self, run: Minimisation, *, is_last: bool) -> None:
        """Report the batches since the last report."""
        last, bad = run.step, run.loop.bad
        if run.status == "nonfinite" and bad is not None:  # its step was not taken
            last = int(bad.columns["step"][-1]) + 1 - run.loop.solver.stepper.lookahead
        if not any(_overrides(callback, *BATCHES) for callback in self._callbacks):
            self._step = max(self._step, last)
        while self._step < last:
            self._step += 1
            count = self._step - self._first
            self._list.on_train_batch_end(count - 1, self._logs(run))
            self._stop_if_asked(run)
            if run.status is None and not (is_last and self._step == last):
                self._list.on_train_batch_begin(count)

    def _stop_if_asked(self, run: Minimisation) -> None:
        if self._model.stop_training:
            run.end("callback")

    def _logs(self, run: Minimisation, *, validated: bool = False) -> Logs:
        """Return the means over the epoch so far; without data, the last row."""
        table, bad = Table(run.record.rows.columns()), run.loop.bad
        if bad is not None and bad.columns["step"] not in table.columns()["step"]:
            table.append(bad)
        columns = table.columns()
        ends = np.array([self._first, self._step]) + run.loop.solver.stepper.lookahead
        rows = Rows(columns).part(slice(*np.searchsorted(columns["step"], ends)))
        if run.training is None:
            return _logs_of({n: c[-1] for n, c in rows.columns.items()})
        row = run.training.means(rows)
        if validated:
            point = run.problem.x.pack(run.loop.solver.point(run.state))
            row |= run.training.validated(
                (point,) if run.problem.x.takes_values else ()
            )
        return _logs_of(row)

    # --- the model ---

    def _show(self, run: Minimisation) -> None:
        """Let the model have the optimizer, and the stand-in the point."""
        self._optimizer = run.optimizer or self._optimizer
        self._model.optimizer = self._optimizer
        if isinstance(self._model, Variables):
            point = run.loop.solver.point(run.state)
            for weight, leaf in zip(self._model.weights, point, strict=True):
                weight.assign(leaf)

    def _heed(self, run: Minimisation) -> None:
        """Let the run go on from what the callbacks left; end it if one asks."""
        if isinstance(self._model, Variables):
            _put(run, [weight.value.read_value() for weight in self._model.weights])
        else:
            run.refresh()
        self._stop_if_asked(run)


class _Watch:
    """A run as `ExplainNaN` sees it; a run looks at every step by itself."""

    def __init__(self, run: Minimisation) -> None:
        self._run = run

    @property
    def spoiled(self) -> bool:
        return self._run.status == "nonfinite"

    # A training by Keras is looked at where these are called.
    def begin_epoch(self, epoch: int) -> None: ...
    def end_epoch(self) -> None: ...
    def end(self) -> None: ...

    def culprit(self) -> Step:
        """Return the step to blame."""
        run, bad = self._run, self._run.loop.bad.columns
        point, arguments = run.loop.solver.blamed
        position = max(0, int(bad["step"][-1]) - run.loop.solver.stepper.lookahead), 0
        if run.training is not None:
            position = int(run.state.batch.epoch), int(run.state.batch.count)
        losses = [*map(float, run.record.rows.columns()["fun"][-3:])]
        explain = functools.partial(explained, run.problem, point, *arguments)
        is_loss = not np.isfinite(bad["fun"][-1])
        return Step(*position, arguments, is_loss, tuple(losses), explain)


@keras.saving.register_keras_serializable("tfgrad")
class Variables(keras.Model):  # type: ignore[misc]  # Keras has no stubs
    """A point as a model, for callbacks: its weights are what is minimised over.

    `leaves` has the name, the shape and the dtype of each.
    """

    def __init__(self, leaves: Sequence[tuple[str, Any, str]], **options: Any) -> None:
        super().__init__(**options)
        self._leaves = leaves
        for name, shape, dtype in leaves:
            self.add_weight(name=name, shape=shape, dtype=dtype, initializer="zeros")
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """Return what makes another one."""
        return {**super().get_config(), "leaves": [*self._leaves]}


def _stand_in(run: Minimisation) -> Variables:
    problem = run.problem
    paths = named_leaves(problem.x.template, "x" if problem.x.takes_values else "wrt")
    names = (re.sub(r"\W+", "_", path).strip("_") for path, _ in paths)
    pairs = zip(names, problem.x.leaves, strict=True)
    return Variables([(name, [*x.shape], x.dtype.name) for name, x in pairs])


def _put(run: Minimisation, leaves: Sequence[Any]) -> None:
    """Let a run go on from another point, if it is another."""
    solver, state = run.loop.solver, run.state
    if not all(map(np.array_equal, leaves, solver.point(state))):
        variables = getattr(solver.stepper, "moved", run.problem.x.variables)
        for variable, leaf in zip(variables, leaves, strict=False):
            variable.assign(leaf)
        if not variables:
            run.state = solver.init(leaves, state)[0]._replace(step=state.step)
    run.refresh()


def _go_to(run: Minimisation, epoch: int) -> None:
    """Let a run that has begun go on at an epoch."""
    solver, training, every = run.loop.solver, run.training, int(run.options.every)
    batches = training.source.batches or 0 if training else every
    step = tf.constant(epoch * batches, run.state.step.dtype)
    run.state = run.state._replace(step=step)
    if training is None:
        return
    if training.epochs is not None and epoch >= training.epochs:
        run.end("epochs")
        return
    for other in range(int(run.state.batch.epoch) + 1, epoch + 1):
        run.state = solver.next_epoch(run.state, opens=other == epoch)


def _logs_of(row: Mapping[str, Any]) -> Logs:
    """Return a row as Keras's logs: `loss`, aux values, `val_` what is validated."""
    names = {"fun": "loss", "validation": "val_loss"}
    logs: Logs = {}
    for name, value in row.items():
        if name not in NO_LOGS and not is_point(name):
            key = names.get(name) or re.sub(r"^validation_", "val_", name)
            logs[key] = float(value) if np.ndim(value) == 0 else value
    return logs


def _is_keras(entry: Any) -> bool:
    return isinstance(entry, keras.callbacks.Callback)


def _overrides(callback: Any, *names: str) -> bool:
    base, kind = keras.callbacks.Callback, type(callback)
    return any(
        name in vars(callback) or getattr(kind, name) is not getattr(base, name)
        for name in names
    )


def _acts_on_batches(callback: Any) -> bool:
    """Return whether a callback may act on the model after each batch.

    Of Keras's own, those that save or write once an epoch do not, and NaN ends a run by
    itself.
    """
    if type(callback).__module__.startswith("keras."):
        often = getattr(callback, "save_freq", getattr(callback, "update_freq", ""))
        if often == "epoch" or isinstance(callback, keras.callbacks.TerminateOnNaN):
            return False
    return _overrides(callback, *BATCHES)
