"""The public edge of every transform: the call of a user's function, the answer."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.derivatives.arguments import (
    arguments_in_tensors,
    direction_in_tensors,
    parameter_names,
    positions_of,
)
from tfgrad.derivatives.certificates import Certificate, Ladder, Slopes, certified
from tfgrad.derivatives.repairs import (
    RepairableGradientError,
    called,
    is_repairing,
    needs_marks,
    repaired,
    repairing,
)
from tfgrad.derivatives.signatures import is_dynamic, signature
from tfgrad.derivatives.soundness import every, folds_wrongly, require_right_kernels
from tfgrad.derivatives.tracing import (
    MOST_TRACES,
    Traces,
    converted,
    is_compiling,
    not_converted,
    traced_operations,
)
from tfgrad.diagnosis.graphs import writes
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    name_of,
    named_leaves,
    variables_of,
    weak_dtype,
)


@dataclass(frozen=True)
class Call:
    """One call of a user's function, in tensors, with the sources to differentiate.

    Attributes:
        f: The user's function, AutoGraph applied.
        name: What to call it in messages.
        parameters: The names of its positional parameters.
        args: Its positional arguments: nests of tensors and of static Python values.
        kwargs: Its keyword arguments, likewise.
        argnums: Which positional arguments are differentiated: one, or a tuple of them.
        variables: The nest of variables differentiated instead, or None; the empty
            tuple means all trainable ones that `f` reads.
        direction: What the derivative is multiplied by, structured like
            `differentiated`; None for a transform that takes none.
    """

    f: Callable[..., Any]
    name: str
    parameters: tuple[str, ...]
    args: tuple[Nest, ...]
    kwargs: Mapping[str, Nest]
    argnums: int | tuple[int, ...]
    variables: Nest | None
    direction: Nest | None = None

    @property
    def differentiated(self) -> Nest:
        """The nest of what is differentiated: it has the structure of an answer."""
        if self.variables is not None:
            return self.variables
        if isinstance(self.argnums, int):
            return self.args[self.argnums]
        return tuple(self.args[i] for i in self.argnums)

    @property
    def sources(self) -> list[Any]:
        """What the tape has to watch, flat: tensors, or variables."""
        flat: list[Any] = tf.nest.flatten(self.differentiated)
        return flat

    @property
    def names(self) -> list[str]:
        """What the user calls each source."""
        if self.variables is not None:
            pairs = named_leaves(self.variables, "wrt")
            return [f"{path} ({variable.name})" for path, variable in pairs]
        argnums = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        nests = [named_leaves(self.args[i], self.parameters[i]) for i in argnums]
        return [path for pairs in nests for path, _ in pairs]

    @property
    def nests(self) -> tuple[Any, ...]:
        """What `Compiled` takes: all but the function and its names."""
        return self.args, self.kwargs, self.argnums, self.variables, self.direction

    def at(self, inputs: Sequence[tf.Tensor]) -> Call:
        """Return the same call with other values for the differentiated arguments."""
        values = self.pack(inputs)
        if isinstance(self.argnums, int):
            values = (values,)
        argnums = self.argnums if isinstance(self.argnums, tuple) else (self.argnums,)
        args = list(self.args)
        for i, value in zip(argnums, values, strict=True):
            args[i] = value
        return replace(self, args=tuple(args))

    def along(self, direction: Sequence[tf.Tensor]) -> Call:
        """Return the same call with another direction, one tensor for each source."""
        return replace(self, direction=self.pack(direction))

    def output(self) -> Any:
        """Return what the user's function returns."""
        try:
            return self.f(*self.args, **self.kwargs)
        except TypeError as error:
            if self.variables is not None or not self.args or self.sources:
                raise
            raise InvalidArgumentError(
                "An argument to differentiate is an array, or a nest of them.",
                got=f"{describe(self.differentiated)}, which holds none, and "
                f"`{self.name}` cannot take it: {error}",
                hint="np.zeros(0) for an array without numbers",
            ) from error

    def pack(self, flat: Sequence[Any]) -> Nest:
        """Return one value per source in the structure that the user passed."""
        return tf.nest.pack_sequence_as(self.differentiated, list(flat))


_OURS = "_tfgrad_verifies"
"""The attribute by which transforms know each other."""


class Compiled:
    """The function from a call of `f` to `body(call)`, compiled for each signature.

    Args:
        f: The user's function.
        body: Takes a `Call`, returns an answer and the ladder that it is verified by.
            It runs inside the trace.
        jit: Compile with XLA.
        slopes: The derivatives of what is in the ladder, which the answer holds; None
            leaves the answer unverified.
        opens: Leave open a dimension that varies, after the second shape.
        lower: From a call to the ladder, where the body returns none, since it would
            cost more at every call than to trace it once apart from the answer.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        body: Callable[[Call], tuple[Any, Ladder]],
        *,
        jit: bool = False,
        slopes: Slopes | None = None,
        opens: bool = False,
        lower: Callable[[Call], Ladder] | None = None,
    ) -> None:
        """Compile nothing yet."""
        self._lower = lower
        self._jit = jit
        self._f, self._body, self._slopes = f, body, slopes
        self.name = name_of(f)
        self.parameters = parameter_names(f)
        check = self._check if slopes is not None else None
        self._traces = Traces(self._run, f, jit=jit, check=check, opens=opens)

    def __call__(self, *nests: Any) -> Any:
        """Return the answer to the call that `Call.nests` are given of."""
        if tf.executing_eagerly():
            return self._traces(*nests)[0]
        # Inside another trace the ops go straight into it: no call, no second trace.
        f, before = converted(self._f), len(traced_operations())
        if is_repairing():
            f = repaired(f)
        try:
            answer, _ = self._run(f, *nests)
        except RepairableGradientError:
            # The ops that failed stay behind, which does no harm unless they write to
            # variables. Then our own trace has to begin anew, and a user's is refused.
            if any(map(writes, every(traced_operations()[before:]))):
                raise
            with repairing():
                answer, _ = self._run(repaired(f), *nests)
        made = traced_operations()[before:]
        if is_compiling() or not needs_marks(made) or any(map(writes, every(made))):
            return answer
        # A tape of the user's around it would see ops that have no marks yet.
        with repairing():
            return called(lambda: self._run(repaired(f), *nests)[0])

    def function(self, *nests: Any) -> Callable[..., Any]:
        """Return the function, of the tensors in `nests`, of an earlier answer."""
        run = self._traces.function(*nests)
        return lambda *tensors: run(*tensors)[0]

    def graph(self, *nests: Any) -> Any:
        """Return the graph of an earlier answer; None if it was computed eagerly."""
        return self._traces.graph(*nests)

    def folds_wrongly(self, *nests: Any) -> bool:
        """Return whether an earlier answer has to be run with constant folding off."""
        graph = self.graph(*nests) if tf.executing_eagerly() else None
        return graph is not None and bool(folds_wrongly(graph.get_operations()))

    def _run(self, f: Callable[..., Any], *nests: Any) -> tuple[Any, Ladder]:
        answer, ladder = self._body(self._call(f, *nests))
        if not tf.executing_eagerly():
            outputs = list(filter(is_dynamic, tf.nest.flatten(answer)))
            require_right_kernels(outputs, self.name, own=is_compiling())
        return answer, ladder

    def _call(self, f: Callable[..., Any], *nests: Any) -> Call:
        return Call(f, self.name, self.parameters(len(nests[0])), *nests)

    def _check(self, found: tuple[Any, Ladder], *nests: Any) -> None:
        assert self._slopes is not None
        call, concrete = self._call(self._f, *nests), self._traces.concrete(*nests)
        # What ran eagerly was verified as it was taken; a nest may be empty.
        if concrete is None or not call.sources:
            return
        if getattr(self._f, _OURS, False):  # it verifies its answer if called by itself
            call.output()
        if certified(concrete):
            lower = None if found[1] else self._traced_lower(*nests)
            Certificate(call, concrete, *found, self._slopes, lower).require_right()

    def _traced_lower(self, *nests: Any) -> Any:
        """Return the concrete function for the ladder; None if the answer has it."""
        if self._lower is None:
            return None
        lower = self._lower
        traces = Traces(lambda f, *n: lower(self._call(f, *n)), self._f, jit=self._jit)
        return traces.compiled(*nests)


def transform(
    f: Callable[..., Any],
    body: Callable[[Call], tuple[Any, Ladder]],
    *,
    argnums: int | Sequence[int] = 0,
    wrt: Nest | None = None,
    jit: bool = False,
    direction: str = "",
    slopes: Slopes | None = None,
    opens: bool = False,
    lower: Callable[[Call], Ladder] | None = None,
    require: Callable[[Call], None] = lambda call: None,
) -> Callable[..., Any]:
    """Return the function that answers each call of `f` with `body`, compiled.

    Args:
        f: The user's function.
        body: See `Compiled`.
        argnums: Positions of the differentiated arguments, negative ones from the end.
        wrt: Variables to differentiate instead.
        jit: Compile with XLA.
        direction: What to call the last positional argument, if that is no argument of
            `f` but the direction.
        slopes: See `Compiled`.
        opens: See `Compiled`.
        lower: See `Compiled`.
        require: Called with each call before it is traced; it raises to refuse it.
    """
    argnums = _checked_argnums(f, argnums, wrt)
    require_bool(jit=jit)
    compiled = Compiled(f, body, jit=jit, slopes=slopes, opens=opens, lower=lower)
    name, parameters = compiled.name, compiled.parameters

    @functools.cache
    def chosen_of(count: int) -> int | tuple[int, ...]:
        return () if wrt is not None else positions_of(argnums, count, name)

    def prepared(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        v = None
        if direction:
            args, v = _split_direction(args, name)
        variables = None if wrt is None else variables_of(wrt)
        chosen, names = chosen_of(len(args)), parameters(len(args))
        weak = weak_dtype(args, kwargs, variables)
        args, kwargs = arguments_in_tensors(args, kwargs, chosen, names, weak)
        call = Call(f, name, names, args, kwargs, chosen, variables)
        if direction:
            v = direction_in_tensors(v, call.differentiated, direction)
        require(call)
        return args, kwargs, chosen, variables, v

    # Calls with tensors only, the commonest in loops, find their way without all that.
    short_cuts: dict[Any, Callable[..., Any]] = {}

    @not_converted
    def transformed(*args: Any, **kwargs: Any) -> Any:
        eagerly = tf.executing_eagerly()
        if eagerly and not kwargs:
            short_cut = short_cuts.get(signature(args))
            if short_cut is not None:
                return short_cut(*args)
        nests = prepared(args, kwargs)
        answer = compiled(*nests)
        if eagerly and not kwargs and wrt is None and _are_leaves(args, nests):
            if len(short_cuts) >= MOST_TRACES:
                short_cuts.clear()
            short_cuts[signature(args)] = compiled.function(*nests)
        return answer

    if inspect.isfunction(f):
        functools.update_wrapper(transformed, f)
        if direction:  # its signature is not that of f
            vars(transformed).pop("__wrapped__")
    setattr(transformed, _OURS, slopes is not None)
    return transformed


def _are_leaves(args: tuple[Any, ...], nests: tuple[Any, ...]) -> bool:
    """Return whether `args`, as they are, are all that a compiled function takes."""
    leaves = list(filter(is_dynamic, tf.nest.flatten(nests)))
    pairs = zip(args, leaves, strict=False)
    return len(args) == len(leaves) and all(arg is leaf for arg, leaf in pairs)


def _split_direction(args: tuple[Any, ...], name: str) -> tuple[tuple[Any, ...], Any]:
    if not args:
        raise InvalidArgumentError(
            "The last positional argument is the direction to multiply by.",
            got=f"a call for `{name}` without positional arguments",
            hint="tfgrad.hvp(f)(x, v), or tfgrad.hvp(f, wrt=variables)(v)",
        )
    return args[:-1], args[-1]


def require_function(f: Any) -> None:
    """Refuse what is not callable in place of the function."""
    if not callable(f):
        raise InvalidArgumentError(
            "The first argument is the function, and not its value.",
            got=f"f={describe(f)}",
            hint="tfgrad.grad(f)(x), tfgrad.vjp(f, x), tfgrad.jvp(f, (x,), (v,))",
        )


def require_bool(**options: Any) -> None:
    """Refuse options that are neither True nor False."""
    for name, value in options.items():
        if not isinstance(value, bool | np.bool_):
            raise InvalidArgumentError(
                f"`{name}` must be True or False.",
                got=f"{name}={value!r}",
                hint=f"{name}=True",
            )


def _checked_argnums(f: Any, argnums: Any, wrt: Any) -> Any:
    """Return `argnums` as plain integers."""
    require_function(f)
    numbers = argnums if isinstance(argnums, list | tuple) else (argnums,)
    try:
        if not numbers or any(isinstance(n, bool | np.bool_) for n in numbers):
            raise TypeError
        plain = tuple(map(operator.index, numbers))
    except TypeError:
        raise InvalidArgumentError(
            "`argnums` must be a position, or a tuple of positions, of arguments.",
            got=f"argnums={argnums!r}",
            hint="argnums=0, or argnums=(0, 1)",
        ) from None
    if wrt is not None and plain != (0,):
        raise InvalidArgumentError(
            "Either `argnums` or `wrt` says what is differentiated.",
            got=f"argnums={argnums!r} together with wrt",
            hint="one transform for the arguments and one for the variables",
        )
    return plain if isinstance(argnums, list | tuple) else plain[0]
