"""`minimize` and `descend`: go downhill from a point, all at once or step by step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe
from tfgrad.optimize.descent import Descent, State
from tfgrad.optimize.interrupt import Interrupts
from tfgrad.optimize.options import Options, takes_options
from tfgrad.optimize.result import OptimizeResult
from tfgrad.runs.writer import Run


def minimize(
    f: Callable[..., Any],
    x0: Nest | None = None,
    *,
    wrt: Nest | None = None,
    method: Any = None,
    learning_rate: Any = None,
    data: Any = None,
    batch_size: int | None = None,
    epochs: int | None = None,
    validation: Callable[..., Any] | None = None,
    steps: int | None = None,
    every: int = 1,
    gtol: float | None = None,
    ftol: float | None = None,
    xtol: float | None = None,
    target: float | None = None,
    seconds: float | None = None,
    bounds: Any = None,
    constraints: Any = (),
    has_aux: bool = False,
    jit: bool | str = "auto",
    callback: Callable[[State], Any] | None = None,
    log: Run | str | PathLike[str] | None = None,
    checkpoint: str | PathLike[str] | None = None,
) -> OptimizeResult:
    """Minimise a function of values or of variables, over data or not, in one loop.

    Give it a function of values and where to start, or a function of nothing and the
    variables that it reads (`wrt`; found when left out), which are then updated in
    place. The function is traced once, twice with `log`. The first step runs alone, so
    that errors surface at once; the loop is compiled when the run is long enough to
    earn that back.

    With `data`, each step takes a batch, which the function takes after the values:
    `loss(batch)`, or `loss(x, y)` where batches are tuples and there is a parameter for
    each part. What the loss writes by itself (moving averages of a batch normalisation,
    seeds of a dropout) it writes once for each step.

    Args:
        f: Returns one float number (shape `[]`) to be made small.
        x0: The values to start from: numbers, arrays, tensors, nests of them. Not
            changed. Or an `OptimizeResult` to go on from: `steps` and `seconds` count
            from its end, its history is continued, and what the call leaves out of
            `wrt`, `method` (with its `bounds`) and `learning_rate` is as it was; data
            and constraints are given again. The method goes on with its memory, from
            where the result ended, wherever variables are now: 300 steps and 700 more
            are 1000 to the last bit (unless XLA, which rounds otherwise, pays for all
            of them and did not for the first: see `jit`). Another method begins at that
            point.
        wrt: Variables that `f` reads: a `tf.Variable`, a `keras.Variable`, a nest of
            them, a `tf.Module` or a `keras.Model`.
        method: "lbfgs" (what None means without data), for smooth functions of any
            size; "newton", for smooth ones that are ill-conditioned or have saddles;
            "scipy:slsqp" and so on, for any method of SciPy; the name of a Keras
            optimizer ("sgd", "adam", ...), for noisy ones (None means "adam" with
            data), or an instance of one (cloned, so that two runs share nothing); any
            object with `apply_gradients`; or a method of your own
            (`tfgrad.optimize.methods.protocol`). A list of them is a chain:
            `[("adam", 1000), "lbfgs"]` takes 1000 steps of Adam, then goes on with
            L-BFGS. A stage ends where its steps are used up, where its method can do no
            better, or at the `gtol` that it has of itself; all else ends the run.
        learning_rate: For Keras optimizers by name: a positive number or a schedule.
        data: An array, or a tuple or dict of arrays with one row per example, shuffled
            anew in each epoch, the same in every run; a `tf.data.Dataset` of batches;
            or an iterable of batches (a list, a `keras.utils.PyDataset`, a generator,
            a function that returns one of them), gone through again in each epoch.
            Float arrays of NumPy take the dtype of the variables.
        batch_size: How many rows of arrays a batch has; None means 32. The last batch
            of an epoch has what is left.
        epochs: How often to go through the data; None means once if there is no other
            budget, else until that is used up.
        validation: A function that is called at the end of each epoch, without
            arguments (with the values, if there is `x0`), and returns a number or a
            dict of numbers for `result.epochs` and the log.
        steps: How many steps to take at most; None means 1000 without data. In a
            chain, those of the entries without a number. An optimizer of Keras takes
            all of them unless a rule below says otherwise.
        every: How many steps there are from one point in the log to the next. The
            history has each step whatever this is.
        gtol: Stop where no element of the gradient is larger. None means no such rule
            for an optimizer of Keras, else 1e-6 in float64 and 1e-4 in float32.
        ftol: Stop after a step that changes f by no more, relative to max(1, |f|).
        xtol: Stop after a step no longer than this, relative to max(1, ||x||).
        target: Stop where f is no larger; with data, after an epoch whose mean loss is
            no larger. The other rules look at the batch of a step.
        seconds: Stop after this time, in seconds.
        bounds: What x must lie between, for the methods of SciPy that know bounds: a
            pair `(lower, upper)` of numbers, None or nests like the point; SciPy's
            `Bounds`; or a list of a pair for each element. A start outside is moved in.
        constraints: For those that know constraints: SciPy's dicts, `LinearConstraint`,
            `NonlinearConstraint`, or a list of them. Their functions take what `f`
            takes, and are differentiated if they are written in TensorFlow.
        has_aux: `f` returns `(value, aux)`; the numbers in aux go to the history and
            the log, their means over an epoch to `result.epochs`.
        jit: Compile with XLA: True, False, or "auto": where that pays (with a Keras
            optimizer if 3000 steps or more are planned, with another method from step
            300 on) and XLA's first value and gradient agree with the graph's.
        callback: Called with a `State` after each chunk of steps (every step in short
            runs, ten times a second or more in long ones); return True to stop.
        log: A directory, in which the run gets one of its own, named after the method,
            or an open `Run`. Every step is written (from 100,000 points on every
            second, from 200,000 on every fourth, ...), the graph, and a card of the
            problem. A disk that refuses ends the log with a warning, not the run.
        checkpoint: A directory to save the run in, between two chunks: at most once a
            second, at a cost of at most a twentieth of the time. The same call again
            goes on from there if the process was killed, and ends as if it had not
            been, to the last bit, in the same log; a run that has ended returns its
            result at once, and goes on if `steps` or a rule has changed. Another
            problem is refused. The last three are kept, as `tf.train.Checkpoint`s. A
            method of SciPy goes on by being told again what it was told, with no new
            evaluation of f: its checkpoints hold n + 1 numbers for each evaluation and
            n for each Hessian product. The last with at most 2**25 of them stays.

    Returns:
        An `OptimizeResult`. Row k of its history is the point after k steps; with data,
        its value there is that of the batch which the next step takes (of the last one
        again, where the data is over). A value or
        a gradient that is not finite ends the run at the last finite point, Ctrl-C at
        the current one; the status says so. A start at a maximum or a saddle is left,
        and "newton" does not end at one either.

    Raises:
        InvalidArgumentError: If an argument breaks its rule; nothing was traced or
            written.
        ScalarObjectiveError: If `f` returns anything but one float number.
        NoGradientError: If a path from an argument to the value exists, but is cut.
        RunError: If `log` is no directory that can be written; nothing was traced.

    Example:
        >>> result = minimize(
        ...     lambda x: x**2 + x - 1, 3.0, method="sgd", learning_rate=0.1, steps=30
        ... )
        >>> print(result.history["x"][:4], result.history["fun"][:3])
        [3.    2.3   1.74  1.292] [11.      6.59    3.7676]
        >>> print(result.status, f"{float(result.x):.3f}")
        steps -0.496
        >>> import numpy as np
        >>> def rosenbrock(p):
        ...     return (1 - p["a"]) ** 2 + 100 * (p["b"] - p["a"] ** 2) ** 2
        >>> result = minimize(rosenbrock, {"a": np.float64(-1.2), "b": np.float64(1)})
        >>> print(result.status, result.success, f"{float(result.x['b']):.4f}")
        gtol True 1.0000
        >>> import tensorflow as tf
        >>> x = np.linspace(-1, 1, 100, dtype=np.float32)
        >>> def loss(line, x, y):
        ...     return tf.reduce_mean((line["a"] * x + line["b"] - y) ** 2)
        >>> result = minimize(
        ...     loss, {"a": 0.0, "b": 0.0}, method="sgd", learning_rate=0.2,
        ...     data=(x, 2 * x + 1), batch_size=20, epochs=30,
        ... )
        >>> print(result.nit, len(result.epochs["fun"]), f"{float(result.x['a']):.3f}")
        150 30 2.000

    References:
        `tfgrad.optimize.methods.lbfgs` and `newton` for those; Keras's and SciPy's
        documentation for each of theirs.
    """
    options = Options(
        wrt=wrt,
        method=method,
        learning_rate=learning_rate,
        data=data,
        batch_size=batch_size,
        epochs=epochs,
        validation=validation,
        steps=steps,
        every=every,
        gtol=gtol,
        ftol=ftol,
        xtol=xtol,
        target=target,
        seconds=seconds,
        bounds=bounds,
        constraints=constraints,
        has_aux=has_aux,
        jit=jit,
        log=log,
        checkpoint=checkpoint,
    )
    return run(Descent(f, x0, options), callback)


def run(descent: Descent, callback: Callable[[State], Any] | None) -> OptimizeResult:
    """Run a minimisation to its end, `callback` called on the way; see `minimize`."""
    if callback is not None and not callable(callback):
        raise InvalidArgumentError(
            "`callback` must be a function of a `State`.",
            got=f"callback={describe(callback)}",
            hint="callback=lambda state: print(state.step, state.fun)",
        )
    if (result := descent.finished()) is not None:
        return result
    with (
        descent.compiling(),
        Interrupts() as interrupts,
        descent,
        _progress(descent.planned) as progress,
    ):
        while descent.status is None:
            progress.update(descent.advance(descent.total) - progress.n)
            if callback and _asks_to_stop(callback, descent.state, interrupts):
                descent.end("callback")
            if interrupts.caught:
                descent.end("interrupted")
    return descent.result()


@takes_options
def descend(
    f: Callable[..., Any], x0: Nest | None = None, **options: Any
) -> Iterator[State]:
    """Minimise like `minimize`, and yield the state on the way: a plain `for` loop.

    Use it to print, plot or decide at each state; leave the loop to stop. Between two
    states the steps run compiled, so a larger `every` is faster.

    Args:
        f: As for `minimize`.
        x0: As for `minimize`.
        **options: The other arguments of `minimize`, all but `callback`. `every` is, in
            the log and here, how many steps there are from one state to the next.

    Yields:
        A `State`: the start, the state after every `every` steps, and the last one.

    Raises:
        InvalidArgumentError: As for `minimize`, at once and not at the first state.

    Example:
        >>> for state in descend(lambda x: x**2 + x - 1, 3.0, method="sgd",
        ...                      learning_rate=0.1, steps=2):
        ...     print(state.step, state.x.numpy(), state.fun)
        0 3.0 11.0
        1 2.3 6.59
        2 1.74 3.7676
    """
    checked = Options(**options)
    return _states(Descent(f, x0, checked), int(checked.every))


def _states(descent: Descent, every: int) -> Iterator[State]:
    if (result := descent.finished()) is not None:
        norm = result.history["grad_norm"][-1]
        yield State(result.nit, result.x, result.fun, norm, result.seconds)
        return
    with contextlib.ExitStack() as stack:
        with descent.compiling():
            stack.enter_context(descent)
        step = descent.state.step
        yield descent.state
        while descent.status is None:
            last = step
            while descent.status is None and step < last + every:
                with descent.compiling(), Interrupts() as interrupts:
                    step = descent.advance(last + every - step)
                if interrupts.caught:
                    descent.end("interrupted")
                    raise KeyboardInterrupt
            if step > last:
                yield descent.state


def _asks_to_stop(
    callback: Callable[[State], Any], state: State, interrupts: Interrupts
) -> bool:
    try:
        return callback(state) is True
    except StopIteration:  # SciPy's way to say it
        return True
    except KeyboardInterrupt:
        interrupts.caught = True
        return False


@contextlib.contextmanager
def _progress(steps: int | None) -> Iterator[Any]:
    """Yield a bar that shows itself after a second, in terminals and notebooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about widgets that a notebook does not have
        from tqdm.auto import tqdm

        bar = tqdm(total=steps, delay=1.0, disable=None, leave=False, unit="step")
    with bar:
        yield bar
