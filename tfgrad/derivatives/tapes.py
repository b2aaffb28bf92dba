"""Code that no tape records: constants of a derivative, and minimisations.

In a graph, a tape that watches what goes into a function builds the gradient of the
function as soon as it is called, of its loops, too: minutes, for nothing. A tape
belongs to a thread. So what is a constant is traced in a thread of its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf
from tensorflow.python import pywrap_tfe  # there is no public way to ask a thread
from tensorflow.python.framework import ops  # nor to let go of a gradient

from tfgrad.diagnosis.graphs import make_opaque


def unrecorded(function: Callable[[], Any]) -> Any:
    """Return what a function of ops returns, traced where no tape is open."""
    graph, context = tf.compat.v1.get_default_graph(), contextvars.copy_context()
    scope = graph.get_name_scope()

    def run() -> Any:
        with graph.as_default(), tf.name_scope(f"{scope}/" if scope else ""):
            return function()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(context.run, run).result()


def constant(
    function: Callable[..., Any], *tensors: tf.Tensor
) -> tuple[Any, list[Any]]:
    """Return what a function returns, without a derivative, and what else it reads.

    It is one op in the graph that is being traced, and searches for what has to be
    differentiated do not look inside (`graphs.make_opaque`).

    Returns:
        The answer; and the tensors and variables that the function reads by itself.
    """

    def run() -> Any:
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
        traced = tf.function(function, autograph=False).get_concrete_function(*specs)
        answer = traced(*tensors)
        make_opaque(tf.nest.flatten(answer)[0].op)
        variables = {id(v.handle): v for v in traced.graph.variables}
        captured = traced.graph.external_captures
        return answer, [variables.get(id(tensor), tensor) for tensor in captured]

    answer, outside = unrecorded(run)
    return tf.nest.map_structure(tf.stop_gradient, answer), outside


def with_gradient(function: Callable[..., Any], *tensors: tf.Tensor) -> tf.Tensor:
    """Return the tensor that a function returns, which says how to differentiate it.

    TensorFlow keeps the gradient of each call of a `tf.custom_gradient` in a trace, and
    the graph with it, for as long as the process runs. Here the graph keeps the
    gradient, and so do those that it was traced in.
    """
    answer: tf.Tensor = tf.custom_gradient(function)(*tensors)
    name = answer.op.get_attr("_gradient_op_type").decode()
    entry = ops.gradient_registry._registry[name]
    gradient: Any = entry["type"]
    # A body of a loop may go before what is around it, and that before a tf.function.
    graphs: list[Any] = [answer.graph]
    while hasattr(outer := getattr(graphs[-1], "outer_graph", None), "outer_graph"):
        graphs.append(outer)
    for graph in graphs:
        graph._tfgrad_gradients = [*getattr(graph, "_tfgrad_gradients", ()), gradient]
    found: Any = weakref.ref(gradient)
    entry["type"] = lambda op, *gradients: found()(op, *gradients)
    return answer


def is_watched(source: Any) -> bool:
    """Return whether a tape, or a forward accumulator, records what reads a source.

    Args:
        source: A tensor or a variable. A tape that watches what is read watches it
            from then on.
    """
    value = source.read_value() if isinstance(source, tf.Variable) else source
    return bool(pywrap_tfe.TFE_Py_TapeSetPossibleGradientTypes((value,)))


_is_paused: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "is_paused", default=False
)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Let no tape that is open record what runs in the block."""
    if pywrap_tfe.TFE_Py_TapeSetIsEmpty() or pywrap_tfe.TFE_Py_TapeSetIsStopped():
        yield
        return
    token = _is_paused.set(True)
    pywrap_tfe.TFE_Py_TapeSetStopOnThread()
    try:
        yield
    finally:
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
        _is_paused.reset(token)


@contextlib.contextmanager
def resumed() -> Iterator[None]:
    """Let tapes record again in the block, inside of `paused`."""
    if not _is_paused.get() or not pywrap_tfe.TFE_Py_TapeSetIsStopped():
        yield
        return
    pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
    try:
        yield
    finally:
        pywrap_tfe.TFE_Py_TapeSetStopOnThread()
