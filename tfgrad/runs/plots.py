"""Figures of runs and paths, which need no display and no pyplot."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from tfgrad import nested
from tfgrad.diagnosis.lines import reason_of
from tfgrad.diagnosis.sources import restored
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.runs.board import checked_tags
from tfgrad.runs.reader import ReadRun, read_run, run_directories
from tfgrad.runs.values import to_text

_MARGIN = 0.25  # of the path's extent, on each side of a picture
_FLATTEST = 0.2  # of the longer side: the least height of a picture
_LEVELS = 20
_NAMED_RUNS = 10  # as many as a legend has room for, and as matplotlib has colours
_CHARTS = 4
_POINTS = 2000  # of a path: more than a picture has pixels for
_DOTTED = 100  # points of a path up to which each has a dot
_WIDE = 1e3  # ratio of the values of a chart from which on its axis is in logarithms


class Picture(Figure):
    """A matplotlib figure that a notebook shows, without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        """Return the picture for a notebook that has not loaded pyplot."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def plot_path(
    f: Callable[..., Any], result: Any, *, wrt: Nest | None = None
) -> Picture:
    """Return a picture of `f` with the points that a minimisation visited.

    For one parameter it is the graph of `f`, for two a contour plot, whose levels are
    quantiles of f, so that a narrow valley is visible beside steep walls. `f` is
    evaluated at up to ten thousand points: nothing is drawn before it is asked for.

    Args:
        f: The function that was minimised.
        result: What `minimize` returned.
        wrt: The variables that `f` reads, if it takes no argument; their values are
            restored.

    Returns:
        A `Picture` (a matplotlib figure), which a notebook shows and `savefig` saves.

    Raises:
        InvalidArgumentError: If `result` is no result, or not of one or two parameters,
            or `f` does not take them.

    Example:
        >>> import tfgrad
        >>> bowl = lambda x: x[0] ** 2 + 5 * x[1] ** 2
        >>> result = tfgrad.minimize(bowl, [1.0, 1.0], method="sgd", steps=50)
        >>> plot_path(bowl, result).axes[0].get_xlabel()
        'x[0]'
    """
    if not callable(f) or not {"x", "history"} <= set(dir(result)):
        raise InvalidArgumentError(
            "`plot_path` draws a function and the result of its minimisation.",
            got=f"f={nested.describe(f)}, result={nested.describe(result)}",
            hint="plot_path(f, minimize(f, x0))",
        )
    names = coordinate_names(result.x)
    if len(names) not in (1, 2):
        raise InvalidArgumentError(
            "`plot_path` draws functions of one or two parameters.",
            got=f"{len(names)} parameters",
            hint="result.plot() for the convergence, whatever their number",
        )
    variables = None if wrt is None else nested.variables_of(wrt)
    path, fun = _visited(result)
    if not len(path):
        raise InvalidArgumentError(
            "`plot_path` draws points that are finite.",
            got="a history without one",
            hint="a start where f is finite; tfgrad.explain(f, x0) says why it is not",
        )
    size = 200 if len(names) == 1 else 100
    ticks = [np.linspace(low, high, size) for low, high in box_around(path)]
    points = np.stack(np.meshgrid(*ticks, indexing="ij"), axis=-1)
    values = values_at(f, points.reshape(-1, len(names)), result.x, variables)
    values = np.ma.masked_invalid(values.reshape(points.shape[:-1]))

    figure = Picture(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    if len(names) == 1:
        line = np.column_stack([path, fun])
        axes.plot(ticks[0], values, color="0.6", label="f")
        axes.plot(*line.T, "o-", color="C0", ms=3, lw=1, label="path")
    else:
        line = path
        _draw_contour(axes, ticks, values.T)
        dots = ".-" if len(path) <= _DOTTED else "-"
        axes.plot(*line.T, dots, color="C1", ms=5, lw=1.2, label="path")
    axes.plot(*line[0], "o", color="black", ms=6, label="start")
    axes.plot(*line[-1], "*", color="red", ms=11, label="end")
    axes.set_xlabel(names[0])
    axes.set_ylabel([*names, "f"][1])
    steps = len(result.history["fun"]) - 1
    name = _literal(nested.name_of(f))
    axes.set_title(f"{name}: {steps} steps to {fun[-1]:.6g}")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def plot_runs(root: str | os.PathLike[str], tags: str | Iterable[str] = ()) -> Picture:
    """Return a picture that compares the curves of all runs under `root`.

    Where no value of a curve is negative, and the positive ones span more than a
    thousandfold, the axis is in logarithms.

    Args:
        root: A directory of runs, or one run: whatever `load_runs` reads.
        tags: Which curves to draw, a chart for each; none means the first four that
            most of the runs have.

    Returns:
        A `Picture` (a matplotlib figure), which a notebook shows and `savefig` saves.

    Raises:
        InvalidArgumentError: If `tags` are no tags, or no run has one of them.
        RunError: If there are no runs.

    Example:
        >>> import tempfile
        >>> from tfgrad import Run
        >>> logs = tempfile.mkdtemp()
        >>> for rate in (0.1, 0.2):
        ...     with Run(f"{logs}/{rate}") as run:
        ...         run.log_history({"loss": (1 - 2 * rate) ** np.arange(9)}, range(9))
        >>> [text.get_text() for text in plot_runs(logs).legends[0].get_texts()]
        ['0.1', '0.2']
    """
    wanted = checked_tags(tags, "tags")
    directories = run_directories(root)
    runs = {name: read_run(path) for name, path in directories.items()}
    curves = [pair for run in runs.values() for pair in run.curves.items()]
    known = dict(curves)
    # A point alone is a result, not a curve.
    lines = Counter(tag for tag, curve in curves if len(curve.steps) > 1)
    if unknown := [tag for tag in wanted if tag not in known]:
        raise InvalidArgumentError(
            "`plot_runs` draws tags that some run has.",
            got=f"{unknown[0]!r}",
            hint=f"one of {', '.join(map(repr, known))}",
        )
    wanted = wanted or [tag for tag, _ in lines.most_common(_CHARTS)]
    if not wanted:
        raise InvalidArgumentError(
            "`plot_runs` draws scalars.",
            got="runs without any",
            hint="run.log(step, loss=...) in the loop",
        )
    columns = min(len(wanted), 2)
    rows = -(-len(wanted) // columns)
    drawn = {n: r for n, r in runs.items() if not r.curves.keys().isdisjoint(wanted)}
    figure = Picture(figsize=(5 * columns, 3 * rows + 0.6), layout="constrained")
    charts = figure.subplots(rows, columns, squeeze=False).ravel()
    for chart, tag in zip(charts, wanted, strict=False):
        _draw_curves(chart, tag, drawn)
    for chart in charts[len(wanted) :]:
        chart.set_axis_off()
    if len(drawn) <= _NAMED_RUNS:
        first = charts[0].lines
        # Without this list, matplotlib leaves out names that begin with "_".
        labels = [line.get_label() for line in first]
        figure.legend(first, labels, loc="outside lower center", ncols=3)
    return figure


def coordinate_names(x: Nest) -> list[str]:
    """Return what to call each number in `x`: "x", "x[1]", "x['w'][0, 1]"."""
    names = []
    for name, leaf in nested.named_leaves(x, "x"):
        shape = tuple(np.shape(leaf))
        indices = (", ".join(map(str, index)) for index in np.ndindex(shape))
        names += [f"{name}[{index}]" if shape else name for index in indices]
    return names


def _visited(result: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return finite points of a history, `[rows, parameters]`, and f there."""
    names = [name for name, _ in nested.named_leaves(result.x, "x")]
    columns = [np.asarray(result.history[name], float) for name in names]
    path = np.concatenate([c.reshape(len(c), -1) for c in columns], axis=1)
    kept = np.flatnonzero(np.isfinite(path).all(axis=1))
    if len(kept) > _POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, _POINTS).astype(int)]
    return path[kept], np.asarray(result.history["fun"], float)[kept]


def _draw_contour(axes: Any, ticks: Sequence[Any], values: Any) -> None:
    x, y = ticks
    finite = values.compressed()
    probabilities = np.linspace(0, 1, _LEVELS)
    levels = np.unique(np.quantile(finite, probabilities)) if len(finite) else ()
    if len(levels) > 1:
        colors = {"norm": BoundaryNorm(levels, ncolors=256), "cmap": "Blues_r"}
        filled = axes.contourf(x, y, values, levels=levels, alpha=0.8, **colors)
        axes.contour(x, y, values, levels=levels, colors="white", linewidths=0.4)
        bar = axes.figure.colorbar(filled, ax=axes, format="%.3g", label="f")
        bar.set_ticks(levels[:: max(1, len(levels) // 8)])


def _draw_curves(axes: Any, tag: str, runs: dict[str, ReadRun]) -> None:
    for name, run in runs.items():
        label = _literal(name)
        if tag in run.curves:
            curve = run.curves[tag]
            marker = "o" if len(curve.steps) == 1 else None  # no line through one
            axes.plot(curve.steps, curve.values, marker=marker, lw=1.2, label=label)
        else:
            axes.plot([], [], label=label)  # so that a run has one colour in all charts
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]  # a loss of exactly 0 is at the lower edge
    is_wide = positive.size and positive.max() > _WIDE * positive.min()
    if is_wide and finite.min() >= 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", title=_literal(tag))
    axes.grid(alpha=0.3)


def _literal(name: str) -> str:
    """Return `name` as matplotlib writes it out: a "$" would begin a formula."""
    return to_text(name).replace("$", r"\$")


def box_around(path: np.ndarray[Any, Any]) -> list[tuple[float, float]]:
    """Return a box with room around the points of `path`, shape `[n, coordinates]`."""
    low, high = path.min(axis=0), path.max(axis=0)
    extent = high - low
    extent = np.maximum(extent, _FLATTEST * extent.max(initial=0.0))
    extent = np.where(extent > 0, extent, np.maximum(1.0, np.abs(low)))
    middle, half = (low + high) / 2, extent * (0.5 + _MARGIN)
    return list(zip((middle - half).tolist(), (middle + half).tolist(), strict=True))


def values_at(
    f: Callable[..., Any],
    points: np.ndarray[Any, Any],
    like: Nest,
    variables: Nest | None = None,
) -> np.ndarray[Any, Any]:
    """Return `f` at each of `points` (rows of the numbers in `like`), shape `[n]`.

    They are evaluated in one compiled call or, if `f` cannot be compiled, one by one.
    The values of `variables`, which f reads if it takes no argument, are restored.
    """
    leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(like)]
    targets = [] if variables is None else tf.nest.flatten(variables)

    def value(point: tf.Tensor) -> tf.Tensor:
        parts = nested.unravel(point, leaves)
        parts = [tf.cast(p, leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        if variables is None:
            output = f(tf.nest.pack_sequence_as(like, parts))
        else:
            for variable, part in zip(targets, parts, strict=True):
                variable.assign(part)
            output = f()
        output = output[0] if isinstance(output, tuple) else output  # (value, aux)
        return tf.ensure_shape(tf.cast(output, tf.float64), [])

    @tf.function
    def values(points: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(value, points, parallel_iterations=1)

    tensor = tf.constant(points, tf.float64)
    with restored(targets):
        try:
            return np.asarray(values(tensor))
        except Exception:  # whatever TensorFlow or f raise: f may need to run eagerly
            try:
                return np.array([value(point).numpy() for point in tf.unstack(tensor)])
            except Exception as error:
                raise InvalidArgumentError(
                    "`f` must take the parameters that were minimised.",
                    got=f"{type(error).__name__}: {reason_of(error)}",
                    hint="the function that was minimised, and its wrt= if it had one",
                ) from error
