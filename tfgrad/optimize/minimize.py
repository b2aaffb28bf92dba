"""`minimize` and `descend`: go downhill from a point, all at once or step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from os import PathLike
from typing import Any

from tfgrad.nested import Nest
from tfgrad.optimize import resume
from tfgrad.optimize.driver import Driver
from tfgrad.optimize.hooks import Interrupts
from tfgrad.optimize.options import Options, options_of, require_no
from tfgrad.optimize.result import OptimizeResult, State
from tfgrad.optimize.uncertainty import source_of
from tfgrad.runs.run import Run


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
    verify: bool = True,
    callback: Any = None,
    log: Run | str | PathLike[str] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    **unknown: Any,
) -> OptimizeResult:
    """Minimise a function of values or of variables, over data or not, in one loop.

    Give it a function of values and where to start, or a function of nothing and the
    variables that it reads (`wrt`; found when left out), which are then updated in
    place. The function is traced once, and once more for the graph with `log`; a
    `tf.function` is traced once for all runs. A pure method's own computations are
    compiled once in a process. The loop is compiled where the run is long enough to
    earn that back.

    With `data`, each step takes a batch, which the function takes after the values:
    `loss(batch)`, or `loss(x, y)` where batches are tuples and there is a parameter for
    each part. With a method that is no optimizer of Keras, each evaluation is the mean
    over all batches, weighted by rows. Variables that were made in the scope of a
    `tf.distribute` strategy are moved by all of its replicas together, each of which
    evaluates a share of the rows: see `docs/distribute.md`. What the loss writes by
    itself (moving averages of a batch normalisation, seeds of a dropout) it writes once
    for each step.

    Args:
        f: Returns one float number (shape `[]`) to be made small.
        x0: The values to start from: numbers, arrays, tensors, nests of them. Not
            changed. Or an `OptimizeResult` to go on from: `steps` and `seconds` count
            from its end, its history is continued, and what the call leaves out of
            `wrt`, `method` (with its `bounds`) and `learning_rate` is as it was; data
            and constraints are given again. The method goes on with its memory, from
            where the result ended, wherever variables are now: 300 steps and 700 more
            are 1000 to the last bit (unless XLA, which rounds otherwise, pays for all
            of them and did not for the first: see `jit`). A method of SciPy, and
            another method than before, begin anew at that point.
        wrt: Variables that `f` reads: a `tf.Variable`, a `keras.Variable`, a nest of
            them, a `tf.Module` or a `keras.Model`.
        method: "lbfgs" (what None means without data), for smooth functions of any
            size; "newton", for smooth ones that are ill-conditioned or have saddles;
            "scipy:slsqp" and so on, for any method of SciPy; the name of a Keras
            optimizer ("sgd", "adam", ...), for noisy ones (None means "adam" with
            data), or an instance of one (cloned, so that two runs share nothing); any
            object with `apply_gradients` (it runs eagerly unless it has, as Keras's,
            `build(variables)` and `variables`, and keeps all of its state in them); or
            a method of your own (`tfgrad.optimize.methods.protocol`). A list of them is
            a chain: `[("adam", 1000), "lbfgs"]` takes 1000 steps of Adam, then goes on
            with L-BFGS. A stage ends where its steps are used up, or where its method
            has converged or can do no better; all else ends the run.
        learning_rate: For Keras optimizers by name: a positive number, a schedule, or a
            variable, whose value of the moment is the rate of each step.
        data: An array, or a tuple or dict of arrays with one row per example, shuffled
            anew in each epoch, the same in every run; a `tf.data.Dataset` of batches;
            or an iterable of batches (a list, a `keras.utils.PyDataset`, a generator,
            a function that returns one of them), gone through again in each epoch.
            Float arrays of NumPy take the dtype of the variables. With an optimizer
            also what `strategy.distribute_datasets_from_function` returns: rows of each
            worker's own.
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
        gtol: Stop where no element of the gradient is larger; in units of f per unit of
            x. Without `gtol`, `ftol` and `xtol`, L-BFGS, Newton's method and those of
            your own that tell `Move.expected` stop where they have converged, in any
            units: where the fall of f that the method still expects is negligible
            beside the fall so far, or beside the rounding of f. Keras's optimizers take
            all of their steps, and SciPy's methods stop by tolerances of their own.
        ftol: Stop after a step that changes f by no more, relative to max(1, |f|).
        xtol: Stop after a step no longer than this, relative to max(1, ||x||).
        target: Stop where f is no larger, in units of f; with data, after an epoch
            whose mean loss is no larger. The other rules look at the batch of a step.
        seconds: Stop after this time, in seconds.
        bounds: What x must lie between, for "lbfgs" and the methods of SciPy that know
            bounds ("lbfgs" never calls f outside of them): a pair `(lower, upper)` of
            numbers, None or nests like the point; SciPy's `Bounds`; or a list of a pair
            for each element. A start outside is moved in.
        constraints: For those that know constraints: SciPy's dicts, `LinearConstraint`,
            `NonlinearConstraint`, or a list of them. Their functions take what `f`
            takes, and are differentiated if they are written in TensorFlow.
        has_aux: `f` returns `(value, aux)`; the numbers in aux go to the history and
            the log if there are ten or fewer, their means over an epoch to
            `result.epochs`. They have other names than the history's own columns.
        jit: Compile with XLA: True, False, or "auto": where that pays (with a Keras
            optimizer if 3000 steps or more are planned, with another method from the
            evaluation on at which what it saves comes to what it costs, by the size of
            x and of f), XLA's first values and gradients agree with the graph's, and f
            holds no assertion, which XLA would drop.
        verify: Compare the first gradient of `f` with a difference along a random
            direction, and raise `WrongDerivativeError` if they disagree; costs one
            evaluation or two. An optimizer's first gradient is part of a compiled step
            and is not compared.
        callback: A function, one of Keras's callbacks, or a list of both. A function is
            called with a `State` after each of the first 100 steps, then ten times a
            second or more; it returns something true to stop. What it assigns counts in
            the next step, the rate of `state.optimizer` too. As in SciPy, one whose
            parameter is `xk` or `intermediate_result` takes the point, or the state, in
            arrays of NumPy. Keras's callbacks are told what `Model.fit` would tell them
            (`tfgrad.optimize.keras_callbacks`), and may stop the run.
        log: A directory, in which the run gets one of its own, named after the method,
            or an open `Run`. Every step is written (from 100,000 points on every
            second, from 200,000 on every fourth, ...), the graph, and a card of the
            problem. A disk that refuses ends the log with a warning, not the run.
        checkpoint: A directory to save the run in, between two chunks: at most once a
            second, at a cost of at most a twentieth of the time. The same call again
            goes on from there if the process was killed, and ends as if it had not
            been, to the last bit, in the same log; a run that has ended returns its
            result at once, and goes on if `steps` or a rule has changed. Another
            problem is refused: other shapes, other methods, another value at the saved
            point. The last three are kept, as `tf.train.Checkpoint`s. A method of SciPy
            begins anew at the last point.
        **unknown: Refused with a TypeError that says what to write instead.

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
        converged True 1.0000
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
    require_no(minimize, unknown)
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
        verify=verify,
        log=log,
        checkpoint=checkpoint,
    )
    return run(Driver(f, x0, options, callback=callback))


def run(driver: Driver) -> OptimizeResult:
    """Run a minimisation to its end."""
    with Interrupts() as interrupts, driver.run.compiling():
        driver.hooks.append(interrupts)
        for _ in driver.states():
            pass
        source = source_of(driver.run, driver.kind)
        return replace(resume.result_of(driver.run), source=source)


def descend(
    f: Callable[..., Any],
    x0: Nest | None = None,
    *,
    callback: Any = None,
    **options: Any,
) -> Iterator[State]:
    """Minimise like `minimize`, and yield the state on the way: a plain `for` loop.

    Use it to print, plot or decide at each state; leave the loop to stop. Between two
    states the steps run compiled, so a larger `every` is faster. What is assigned
    between two states, to a variable that f reads or moves, counts in the next step.

    Args:
        f: As for `minimize`.
        x0: As for `minimize`.
        callback: As for `minimize`; called before the state is yielded. A loop that is
            left tells Keras's callbacks nothing of an end.
        **options: The other arguments of `minimize`. `every` is, in the log and here,
            how many steps there are from one state to the next.

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
    return _states(Driver(f, x0, options_of(descend, options), callback=callback))


def _states(driver: Driver) -> Iterator[State]:
    run = driver.run
    if run.status is not None:
        result = resume.result_of(run)
        size = result.history["grad_max"][-1]
        yield State(result.nit, result.x, result.fun, size, result.seconds)
        return
    states, every, shown = driver.states(pulled=True), int(run.options.every), -1
    interrupts = Interrupts()
    driver.hooks.append(interrupts)
    with contextlib.closing(states):
        while True:
            with interrupts:
                ended = next(states, states) is states
            if ended:
                return
            is_due = run.status is not None or run.step >= shown + every
            if run.step > shown and (shown < 0 or is_due):
                shown = run.step
                state = run.shown()
                if run.status == "interrupted":
                    raise KeyboardInterrupt
                yield state
                if run.status is None:
                    run.refresh()
