"""Figures of runs and paths, which need no display and no pyplot."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from tfgrad import nested
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.runs.board import checked_tags
from tfgrad.runs.reader import ReadRun, read_run, run_directories
from tfgrad.runs.values import to_text

_MARGIN = 0.25  # of the path's extent, on each side of a picture
_FLATTEST = 0.2  # of the longer side: a path along an axis is shown in its valley
_LEVELS = 20
_NAMED_RUNS = 10  # as many as a legend can hold, and as a set of colours tells apart
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
    """Return a picture of the points that a minimisation visited, over those of `f`.

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
    path, fun = _path(result), np.asarray(result.history["fun"], float)
    name = nested.name_of(f)
    return draw_path(f, result.x, path, fun, name=name, variables=variables)


def draw_path(
    f: Callable[..., Any],
    x: Nest,
    path: np.ndarray[Any, Any],
    fun: np.ndarray[Any, Any],
    *,
    name: str,
    variables: Nest | None = None,
    resolution: int = 100,
) -> Picture:
    """Return the picture of `plot_path` of a path of shape `[points, 1 or 2]`."""
    steps = len(path) - 1
    path, fun = _drawable(path, fun)
    box = box_around(path)
    sizes = (200,) if len(box) == 1 else (resolution, resolution)
    grid = Grid(box, sizes)
    values = values_at(f, grid.points, x, variables).reshape(sizes)
    figure = Picture(figsize=(6, 5.4), layout="constrained")
    axes = figure.subplots()
    draw = _draw_graph if len(box) == 1 else _draw_contour
    draw(axes, grid, np.ma.masked_invalid(values), path, fun)
    axes.set_xlabel(coordinate_names(x)[0])
    axes.set_ylabel("f" if len(box) == 1 else coordinate_names(x)[1])
    axes.set_title(f"{_literal(name)}: {steps} steps to {fun[-1]:.6g}")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def plot_runs(root: str | os.PathLike[str], tags: str | Iterable[str] = ()) -> Picture:
    """Return a picture that compares the curves of all runs under `root`.

    Where the values of a curve are positive and span more than a thousandfold, the axis
    is in logarithms.

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
    wanted = _known_tags(wanted, runs) if wanted else _common_tags(runs)
    columns = min(len(wanted), 2)
    rows = -(-len(wanted) // columns)
    drawn = {
        n: run for n, run in runs.items() if not run.curves.keys().isdisjoint(wanted)
    }
    figure = Picture(figsize=(5 * columns, 3 * rows + 0.6), layout="constrained")
    charts = figure.subplots(rows, columns, squeeze=False).ravel()
    for chart, tag in zip(charts, wanted, strict=False):
        _draw_curves(chart, tag, drawn)
    for chart in charts[len(wanted) :]:
        chart.set_axis_off()
    if len(drawn) <= _NAMED_RUNS:
        lines = charts[0].lines
        names = [line.get_label() for line in lines]  # or "_name" would be left out
        figure.legend(lines, names, loc="outside lower center", ncols=3)
    return figure


def coordinate_names(x: Nest) -> list[str]:
    """Return what to call each number in `x`: "x", "x[1]", "x['w'][0, 1]"."""
    names = []
    for name, leaf in nested.named_leaves(x, "x"):
        shape = tuple(np.shape(leaf))
        indices = (", ".join(map(str, index)) for index in np.ndindex(shape))
        names += [f"{name}[{index}]" if shape else name for index in indices]
    return names


def _path(result: Any) -> np.ndarray[Any, Any]:
    """Return the points of a history, shape `[rows, parameters]`."""
    names = [name for name, _ in nested.named_leaves(result.x, "x")]
    columns = [np.asarray(result.history[name], float) for name in names]
    return np.concatenate([c.reshape(len(c), -1) for c in columns], axis=1)


def _drawable(path: Any, fun: Any) -> tuple[Any, Any]:
    """Return the points that are finite; of very many, evenly spread ones."""
    kept = np.flatnonzero(np.isfinite(path).all(axis=1))
    if len(kept) > _POINTS:
        kept = kept[np.linspace(0, len(kept) - 1, _POINTS).astype(int)]
    return path[kept], fun[kept]


def _draw_graph(axes: Any, grid: Grid, values: Any, path: Any, fun: Any) -> None:
    axes.plot(grid.points[:, 0], values, color="0.6", label="f")
    axes.plot(path[:, 0], fun, "o-", color="C0", ms=3, lw=1, label="path")
    _mark_ends(axes, path[:, 0], fun)


def _draw_contour(axes: Any, grid: Grid, values: Any, path: Any, fun: Any) -> None:
    finite = values.compressed()
    probabilities = np.linspace(0, 1, _LEVELS)
    levels = np.unique(np.quantile(finite, probabilities)) if len(finite) else ()
    if len(levels) > 1:
        x, y = grid.axes
        norm = BoundaryNorm(levels, ncolors=256)
        filled = axes.contourf(
            x, y, values.T, levels=levels, norm=norm, cmap="Blues_r", alpha=0.8
        )
        axes.contour(x, y, values.T, levels=levels, colors="white", linewidths=0.4)
        bar = axes.figure.colorbar(filled, ax=axes, format="%.3g", label="f")
        bar.set_ticks(levels[:: max(1, len(levels) // 8)])
    line = ".-" if len(path) <= _DOTTED else "-"
    axes.plot(path[:, 0], path[:, 1], line, color="C1", ms=5, lw=1.2, label="path")
    _mark_ends(axes, path[:, 0], path[:, 1])


def _mark_ends(axes: Any, x: Any, y: Any) -> None:
    axes.plot(x[0], y[0], "o", color="black", ms=6, label="start")
    axes.plot(x[-1], y[-1], "*", color="red", ms=11, label="end")


def _draw_curves(axes: Any, tag: str, runs: dict[str, ReadRun]) -> None:
    for name, run in runs.items():
        label = _literal(name)
        if tag in run.curves:
            curve = run.curves[tag]
            marker = "o" if len(curve.steps) == 1 else None  # no line through one
            axes.plot(curve.steps, curve.values, marker=marker, lw=1.2, label=label)
        else:
            axes.plot([], [], label=label)  # keeps the colours the same in each chart
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > _WIDE * finite.min():
        axes.set_yscale("log")
    axes.set(xlabel="step", title=_literal(tag))
    axes.grid(alpha=0.3)


def _literal(name: str) -> str:
    """Return `name` as matplotlib writes it out: a "$" would begin a formula."""
    return to_text(name).replace("$", r"\$")


def _common_tags(runs: dict[str, ReadRun]) -> list[str]:
    counts: dict[str, int] = {}
    for run in runs.values():
        for tag, curve in run.curves.items():
            # A single point is a result, not a curve.
            counts[tag] = counts.get(tag, 0) + (len(curve.steps) > 1)
    most = sorted(filter(counts.get, counts), key=lambda tag: -counts[tag])
    if not most:
        raise InvalidArgumentError(
            "`plot_runs` draws scalars.",
            got="runs without any",
            hint="run.log(step, loss=...) in the loop",
        )
    return most[:_CHARTS]


def _known_tags(tags: Sequence[str], runs: dict[str, ReadRun]) -> list[str]:
    known = dict.fromkeys(tag for run in runs.values() for tag in run.curves)
    for tag in tags:
        if tag not in known:
            raise InvalidArgumentError(
                "`plot_runs` draws tags that some run has.",
                got=f"{tag!r}",
                hint=f"one of {', '.join(map(repr, known))}",
            )
    return list(tags)


# --- a function on a grid -------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Evenly spaced points in a box.

    Args:
        box: (low, high) of each coordinate.
        sizes: How many points there are along each.
    """

    box: Sequence[tuple[float, float]]
    sizes: Sequence[int]

    @property
    def axes(self) -> list[np.ndarray[Any, Any]]:
        """The values of each coordinate."""
        pairs = zip(self.box, self.sizes, strict=True)
        return [np.linspace(low, high, size) for (low, high), size in pairs]

    @property
    def points(self) -> np.ndarray[Any, Any]:
        """All points, shape `[product of the sizes, coordinates]`."""
        mesh = np.meshgrid(*self.axes, indexing="ij")
        return np.stack([axis.ravel() for axis in mesh], axis=1)


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
    """Return `f` at each of `points`, as float64 of shape `[n]`.

    They are evaluated in one compiled call or, if `f` cannot be compiled, one by one.

    Args:
        f: A function of a nest like `like`, or without arguments.
        points: Shape `[n, numbers in like]`.
        like: A nest of tensors, with the structure, shapes and dtypes that `f` takes.
        variables: What `f` reads if it takes no argument; their values are restored.

    Raises:
        InvalidArgumentError: If `f` raises on its first point.
    """
    leaves = [tf.convert_to_tensor(leaf) for leaf in tf.nest.flatten(like)]
    targets = tf.nest.flatten(variables) if variables is not None else None
    before = [variable.read_value() for variable in targets or []]

    def value(point: tf.Tensor) -> tf.Tensor:
        parts = nested.unravel(point, leaves)
        parts = [tf.cast(p, leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        if targets is None:
            output = f(tf.nest.pack_sequence_as(like, parts))
        else:
            for variable, part in zip(targets, parts, strict=True):
                variable.assign(part)
            output = f()
        return tf.cast(output[0] if isinstance(output, tuple) else output, tf.float64)

    def values(points: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(value, points, parallel_iterations=1)

    try:
        return _first_that_works(values, value, tf.constant(points, tf.float64))
    finally:
        for variable, old in zip(targets or [], before, strict=True):
            variable.assign(old)


def _first_that_works(
    all_at_once: Callable[[Any], Any], single: Callable[[Any], Any], points: tf.Tensor
) -> np.ndarray[Any, Any]:
    try:
        return np.asarray(
            tf.function(all_at_once).get_concrete_function(points)(points)
        )
    except Exception:  # whatever TensorFlow or f raise: f may need to run eagerly
        try:
            return np.array([single(point).numpy() for point in tf.unstack(points)])
        except Exception as error:
            raise InvalidArgumentError(
                "`f` must take the parameters that were minimised.",
                got=f"{type(error).__name__}: {error}",
                hint="the function that was given to minimize, and wrt= if it had one",
            ) from error
