"""What the trace of f tells besides its value: what it reads, writes and is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tfgrad.derivatives.signatures import signature
from tfgrad.diagnosis.explain import explain
from tfgrad.diagnosis.graphs import inlined, operations_of, written_variables
from tfgrad.diagnosis.report import Explanation
from tfgrad.diagnosis.sources import restored
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest
from tfgrad.optimize.distribute import whole
from tfgrad.optimize.problem import Problem

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
"""Ops that call another graph: XLA compiles a loop around the derivative of one anew
for each value that the loop is called with."""


def operations(problem: Problem) -> list[str]:
    """Return the types of the ops of an evaluation; none if it runs eagerly."""
    kept = problem.evaluator.kept
    if "operations" not in kept:
        kept["operations"] = operations_of(problem.graph())
    found: list[str] = kept["operations"]
    return found


def written(problem: Problem, data: tuple[Nest, ...] = ()) -> list[tf.Variable]:
    """Return the variables that f writes to; none if it runs eagerly.

    Raises:
        InvalidArgumentError: If it writes to what is minimised.
    """
    given = (*problem.given, *data)
    kept, key = problem.evaluator.kept, ("written", signature(given))
    if key not in kept:
        traced = problem.evaluator.evaluate.concrete(given, None)
        kept[key] = [] if traced is None else written_variables(traced)
    return not_moved(problem, kept[key])


def reads(problem: Problem) -> list[Any]:
    """Return the float variables and tensors that f reads by itself."""
    traces = problem.evaluator.evaluate
    floats = [v for v in traces.variables() if v.dtype.is_floating]
    return [*floats, *traces.captured()]


def traced(problem: Problem) -> Any:
    """Return the trace of f without a batch, a function of the leaves of values.

    It is not run, and its gradient not verified.

    Raises:
        NotImplementedError: If f runs eagerly.
    """
    start = problem.x.start() if problem.x.takes_values else None
    with tf.__internal__.FuncGraph("f").as_default():
        problem.evaluator.evaluate(problem.x.arguments(start), None)
    concrete = problem.evaluator.evaluate.concrete(problem.given, None)
    if concrete is None:
        raise NotImplementedError
    return concrete


def not_moved(problem: Problem, written: list[tf.Variable]) -> list[tf.Variable]:
    """Return variables that f writes to; refuse those that are moved."""
    written = whole(written)
    moved = {id(variable) for variable in problem.x.variables}
    for variable in written:
        if id(variable) in moved:
            raise InvalidArgumentError(
                "The function must not assign to what it is minimised over.",
                got=f"`{problem.name}` assigns to {variable.name!r}",
                hint="a value computed from the variable, without assign",
            )
    return written


def others(problem: Problem) -> list[tf.Variable]:
    """Return the other variables that f reads: seeds, averages, what is frozen."""
    own = {id(variable) for variable in problem.x.variables}
    read = whole(problem.evaluator.evaluate.variables())
    return [v for v in read if id(v) not in own]


def for_xla(problem: Problem, *, is_bound: bool) -> Problem | None:
    """Return the problem in a form that a loop under XLA compiles once.

    Returns:
        None if f calls a graph that cannot be made part of its own, or if there is data
        to go through.
    """
    if problem.source is not None:
        return None
    if CALLS.isdisjoint(operations(problem)) and not is_bound:
        return problem
    kept, key = problem.evaluator.kept, ("xla", signature(problem.x.template))
    if key not in kept:
        kept[key] = without_calls(problem)
    form: Problem | None = kept[key]
    return form


def without_calls(problem: Problem, data: tuple[Nest, ...] = ()) -> Problem | None:
    """Return the problem, evaluated, with the ops of what f calls in f; None if not."""
    other, own = problem.inlined(), written(problem, data)
    # The errors may be AutoGraph's, in a function.
    with restored(own), inlined(), contextlib.suppress(Exception):
        other.evaluate(problem.x.start(), data)
    try:
        graph = other.graph(data)
    except KeyError:  # it was not traced
        return None
    # Without AutoGraph, a function with a Python `if` on a tensor runs eagerly.
    if graph is None or not CALLS.isdisjoint(operations_of(graph)):
        return None
    return other


def blame(problem: Problem, x: Sequence[tf.Tensor], *batch: Nest) -> str:
    """Return which op and line are not finite at a point; "" if none is found."""
    with contextlib.suppress(Exception):  # what ended is to be told in any case
        findings = explained(problem, x, *batch).findings
        spoiled = (each for each in findings if each.status == "non-finite")
        found = next((each.culprit for each in spoiled if each.culprit), None)
        if found is not None:
            place = f" at {found.where}" if found.where else ""
            return f"{found.label}{place}: {found.reason}; try {found.hint}"
    return ""


def explained(problem: Problem, x: Sequence[tf.Tensor], *batch: Nest) -> Explanation:
    """Return what `explain` finds at a point; the variables stay where they are."""

    def value(*arguments: Nest) -> Any:
        output = problem.f(*arguments)
        return output[0] if problem.options["has_aux"] else output

    wrt = None if problem.x.takes_values else problem.x.variables
    with restored(problem.x.variables):
        arguments = problem.x.arguments(x, batch or problem.example)
        return explain(value, *arguments, wrt=wrt)
