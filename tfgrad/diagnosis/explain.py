"""`explain`: for each input, whether its gradient arrives; if not, why and where."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad import nested
from tfgrad.diagnosis.causes import Culprit
from tfgrad.diagnosis.graphs import handle_of, leading_to, trace, unrepeatable
from tfgrad.diagnosis.lines import line_of
from tfgrad.diagnosis.numbers import Numbers
from tfgrad.diagnosis.path import blocks, find_cuts, missing_gradients
from tfgrad.diagnosis.report import VALUE, Explanation, Finding
from tfgrad.diagnosis.sources import Sources, restored, sources_of, variable_name
from tfgrad.errors import InvalidArgumentError, TfgradError

_NOT_REPLAYED = (tf.errors.OpError, LookupError, ValueError)
"""What may be raised where a part of a graph cannot be run on its own."""


_ARGUMENT = re.compile(r"^  (\w+) \([A-Z_]+\): (.*)$", re.MULTILINE)
_SPEC = re.compile(r"TensorSpec\(shape=(.*?), dtype=tf\.(\w+), name=[^)]*\)")
_LITERAL = re.compile(r"Literal\[([^\[\]]*)\]")
"""How TensorFlow prints the arguments of each trace of a tf.function."""

_SHOWN = 3
"""Kinds of one argument that are named."""


def explain(f: Callable[..., Any], *args: Any, wrt: Any = None) -> Explanation:
    """Explain why a gradient is None, zero or not finite: which op, which line.

    Use it when a gradient surprises you. It traces `f`, follows the path from each
    input to the output, and runs a copy of the graph once to see the numbers on it.
    Variables that `f` writes to get their values back.

    Args:
        f: Takes `args`, returns one tensor of any shape: its elements are summed.
        *args: The point. Float numbers and arrays, and nests of them, are explained;
            all else is passed on.
        wrt: Variables that `f` reads, to explain instead of the arguments: a variable,
            a nest of them, a `tf.Module` or a `keras.Model`. Without `args` and `wrt`,
            all trainable variables that `f` reads.

    Returns:
        An `Explanation`: it prints as three to six lines, and as a table in a notebook.
        Its `findings` say of each input whether its gradient is `connected`,
        `unused`, `stopped` (on purpose), `cut`, `zero` or `non-finite`, or the input
        `integer`. Its `note` says how often a `tf.function` was traced, and for which
        arguments, if more than once.

    Raises:
        InvalidArgumentError: If `f` does not return one tensor, or if there is nothing
            to explain.

    Example:
        >>> report = explain(lambda x, t: tf.reduce_sum(tf.round(x) * t), 2.6, 3.0)
        >>> [(finding.name, finding.status) for finding in report.findings]
        [('x', 'cut'), ('t', 'connected')]
        >>> report.findings[0].culprit.hint
        'x + tf.stop_gradient(tf.round(x) - x), a straight-through estimator'
    """
    sources = sources_of(f, args, wrt)
    name = nested.name_of(f)

    def function(*tensors: tf.Tensor) -> tf.Tensor:
        return _one_tensor(sources.call(*tensors), name)

    try:
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in sources.tensors]
        traced = trace(function, specs)
    except TfgradError:
        raise
    except Exception as error:  # it leaves TensorFlow, and may do so in any way
        if not sources.names:
            raised = f"{type(error).__name__}: {error}"
            raise InvalidArgumentError(
                "There must be something to differentiate with respect to.",
                got=f"no float argument; `{name}` raised {raised}",
                hint="explain(f, x), with numbers that f can be called with",
            ) from error
        findings, note = _without_graph(function, sources), ""
    else:
        findings, note = _with_graph(traced, sources), _note(traced)
    note = "; ".join(filter(None, [note, _retraces(f, name)]))
    if not findings:
        raise InvalidArgumentError(
            "There must be something to differentiate with respect to.",
            got=f"no float argument, and `{name}` reads no trainable variable",
            hint="explain(f, x), or wrt= the variables that f should read",
        )
    return Explanation(name, tuple(findings), note)


def _note(traced: Any) -> str:
    """Return why derivatives of the function are not verified; "" if they are."""
    op = unrepeatable(traced.graph)
    if op is None:
        return ""
    return (
        f"its derivatives are not verified: {op.type} at {line_of(op)} gives something "
        "else each time"
    )


def _retraces(f: Any, name: str) -> str:
    """Return how often a tf.function was traced, and why; "" if it was traced once."""
    count = getattr(f, "experimental_get_tracing_count", lambda: 0)()
    if count < 2:
        return ""
    signatures = f.pretty_printed_concrete_signatures()
    kinds: dict[str, dict[str, None]] = {}
    for argument, kind in _ARGUMENT.findall(signatures):
        kind = _SPEC.sub(r"\2 of shape \1", kind)
        kinds.setdefault(argument, {})[_LITERAL.sub(r"\1", kind)] = None
    differing = [
        f"for `{argument}` = {', '.join([*seen][:_SHOWN])}"
        + (" ..." if len(seen) > _SHOWN else "")
        for argument, seen in kinds.items()
        if len(seen) > 1
    ]
    if not differing:
        return f"`{name}` was traced {count} times, as one that creates variables is"
    return (
        f"`{name}` was traced {count} times, {' and '.join(differing)}: a tf.function "
        "is traced for each shape, dtype and Python value; pass numbers as tensors"
    )


def _with_graph(traced: Any, sources: Sources) -> list[Finding]:
    """Return the findings for a function that can be traced."""
    graph, outputs = traced.graph, traced.outputs[:1]
    sources = _with_variables(sources, traced.trainable_variables)
    places = list(traced.inputs[: len(sources.tensors)])
    places += [handle_of(variable, traced) for variable in sources.variables]
    with restored(traced.variables):
        # Before the cuts: looking for those builds gradients in the graph.
        numbers = _numbers(traced, sources)
        of_value = _by_value(outputs[0], numbers)
        pairs = zip(sources.names, places, strict=True)
        findings = [_by_slope(*pair, numbers, known=bool(of_value)) for pair in pairs]
    leads, unblocked = leading_to(graph, outputs), leading_to(graph, outputs, blocks)
    cuts = iter(find_cuts(graph, outputs, [p for p in places if p is not None]))
    for index, (name, place) in enumerate(zip(sources.names, places, strict=True)):
        cut = None if place is None else next(cuts)
        if place is None or place.ref() not in leads:
            findings[index] = Finding(name, "unused")
        elif cut is not None:
            findings[index] = Finding(name, "cut", cut)
        elif place.ref() not in unblocked:
            findings[index] = Finding(name, "stopped")
    return [*of_value, *findings, *_integers(sources)]


def _with_variables(sources: Sources, read: Sequence[tf.Variable]) -> Sources:
    """Return `sources`, or if there are none all trainable variables that are read."""
    if sources.names:
        return sources
    floats = tuple(variable for variable in read if variable.dtype.is_floating)
    others = [v for v in read if v.dtype.is_integer]
    return replace(
        sources,
        variables=floats,
        names=tuple(map(variable_name, floats)),
        integers=(*sources.integers, *map(variable_name, others)),
    )


def _integers(sources: Sources) -> list[Finding]:
    return [Finding(name, "integer") for name in sources.integers]


def _numbers(traced: Any, sources: Sources) -> Numbers | None:
    """Return the numbers in the graph; None if there are none, or it cannot be run."""
    if not traced.outputs[0].dtype.is_floating:
        return None
    with contextlib.suppress(*_NOT_REPLAYED):
        values = [*sources.tensors, *traced.captured_inputs]
        return Numbers(traced.graph, values, traced.outputs[:1])
    return None


def _by_value(output: tf.Tensor, numbers: Numbers | None) -> list[Finding]:
    """Return the finding for the value of the function, if that is not finite."""
    counts = numbers.value(output) if numbers else None
    if numbers is None or counts is None or not counts.spoiled:
        return []
    return [Finding(VALUE, "non-finite", numbers.origin_of_value(output))]


def _by_slope(
    name: str, place: tf.Tensor | None, numbers: Numbers | None, *, known: bool
) -> Finding:
    """Return the finding for an input by what its gradient holds.

    `known` says that the value is not finite, which explains a gradient that is not.
    """
    if place is None or numbers is None:
        return Finding(name, "connected")
    counts = numbers.slope(place)
    if counts is None or not (counts.spoiled or counts.zero):
        return Finding(name, "connected")
    status = "non-finite" if counts.spoiled else "zero"
    if counts.spoiled and known:
        return Finding(name, status)
    find = numbers.origin_of_slope if counts.spoiled else numbers.origin_of_zero
    with contextlib.suppress(*_NOT_REPLAYED):
        return Finding(name, status, find(place))
    return Finding(name, status)


def _without_graph(
    function: Callable[..., tf.Tensor], sources: Sources
) -> list[Finding]:
    """Return the findings for a function that only runs eagerly."""
    with tf.GradientTape() as tape:
        tape.watch(sources.tensors)
        output = function(*sources.tensors)
    sources = _with_variables(sources, tape.watched_variables())
    watched = [*sources.tensors, *sources.variables]
    gradients: list[Any] = [None for _ in watched]
    with contextlib.suppress(LookupError):  # an op without gradient: it is a cut
        gradients = tape.gradient(output, watched)
    cuts = missing_gradients(function, sources.tensors, sources.variables)
    known = zip(sources.names, gradients, cuts, strict=True)
    return [*(_by_gradient(*each) for each in known), *_integers(sources)]


def _by_gradient(name: str, gradient: Any, cut: Culprit | None) -> Finding:
    if cut is not None:  # even beside a gradient, which then misses a part
        return Finding(name, "cut", cut)
    if gradient is None:
        return Finding(name, "unused")
    dense = tf.convert_to_tensor(gradient)
    if not tf.reduce_all(tf.math.is_finite(dense)):
        return Finding(name, "non-finite")
    return Finding(name, "connected" if tf.reduce_any(dense != 0) else "zero")


def _one_tensor(output: Any, name: str) -> tf.Tensor:
    """Return the one tensor that the function returned, or refuse what it did."""
    is_array = isinstance(output, tf.Tensor | np.ndarray | np.generic)
    if is_array or nested.is_number(output) or nested.is_variable(output):
        tensor = tf.convert_to_tensor(output)
        if tensor.dtype != tf.string:
            return tensor
    raise InvalidArgumentError(
        "The function must return one tensor.",
        got=f"`{name}` returned {nested.describe(output)}",
        hint="return the tensor to differentiate; is a `return` missing?",
    )
