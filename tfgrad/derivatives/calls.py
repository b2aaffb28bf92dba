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
    mark,
    needs_marks,
    repaired,
    repairing,
)
from tfgrad.derivatives.signatures import MOST_TRACES, is_dynamic, signature
from tfgrad.derivatives.soundness import every, folds_wrongly, require_right_kernels
from tfgrad.derivatives.tapes import is_watched
from tfgrad.derivatives.tracing import (
    Traces,
    converted,
    is_compiling,
    not_converted,
    traced_operations,
)
from tfgrad.diagnosis.graphs import writes
from tfgrad.diagnosis.lines import reason_of
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    argument_names,
    describe,
    name_of,
    named_leaves,
    require_bool,
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

    def apart(self) -> Call:
        """Return the same call with arguments that f reads nowhere else.

        A tape must tell apart two arguments that are one tensor, and an argument from a
        constant. In a trace of its own, every argument is a tensor of its own.
        """
        if self.variables is not None:
            return self
        return self.at([tf.identity(source) for source in self.sources])

    def along(self, direction: Sequence[tf.Tensor]) -> Call:
        """Return the same call with another direction, one tensor for each source."""
        return replace(self, direction=self.pack(direction))

    def output(self) -> Any:
        """Return what the user's function returns."""
        try:
            return self.f(*self.args, **self.kwargs)
        except (TypeError, tf.errors.InvalidArgumentError) as error:
            # A trace that fails is followed by a call, whose errors are clearer.
            odd = self._without_arithmetic() if tf.executing_eagerly() else []
            if odd:
                raise InvalidArgumentError(
                    "The function must compute with what it is given.",
                    got=f"{reason_of(error)}; {', '.join(odd)}",
                    hint="numbers, or a function that makes numbers of text first",
                ) from error
            is_of_values = self.variables is None and self.args and not self.sources
            if not isinstance(error, TypeError) or not is_of_values:
                raise
            raise InvalidArgumentError(
                "An argument to differentiate is an array, or a nest of them.",
                got=f"{describe(self.differentiated)}, which holds none, and "
                f"`{self.name}` cannot take it: {error}",
                hint="np.zeros(0) for an array without numbers",
            ) from error

    def _without_arithmetic(self) -> list[str]:
        """Return what the user calls arguments of text or of complex numbers."""
        names = argument_names(self.f, len(self.args))
        pairs = zip(names, self.args, strict=True)
        leaves = (pair for name, nest in pairs for pair in named_leaves(nest, name))
        return [
            f"`{path}` of {describe(leaf)}"
            for path, leaf in leaves
            if isinstance(leaf, tf.Tensor)
            and (leaf.dtype.is_complex or leaf.dtype == tf.string)
        ]

    def pack(self, flat: Sequence[Any]) -> Nest:
        """Return one value per source in the structure that the user passed."""
        return tf.nest.pack_sequence_as(self.differentiated, list(flat))


_OURS = "_tfgrad_verifies"
"""The attribute of functions whose answers a transform verifies."""


class Compiled:
    """Takes the arguments of `f`, returns `body(call)`; compiled for each signature.

    Args:
        f: The user's function.
        body: Takes a `Call`, returns an answer and the `Ladder` with which it is
            verified. It runs inside the trace.
        jit: Compile with XLA.
        slopes: From an answer, the slopes that it claims for the functions of the
            ladder (see `Slopes`); None: the answer is not verified.
        opens: From the second shape on, trace for any size of the dimensions that vary.
        lower: From a call to the ladder, where the body returns an empty one, since
            the ladder would make every call slower.
        in_turn: See `Traces`.
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
        in_turn: bool = False,
    ) -> None:
        self._lower = lower
        self._jit = jit
        self._f, self._body, self._slopes = f, body, slopes
        self.name = name_of(f)
        self.parameters = parameter_names(f)
        check = self._check if slopes is not None else None
        self._traces = Traces(
            self._run, f, jit=jit, check=check, opens=opens, in_turn=in_turn
        )

    def __call__(self, *nests: Any) -> Any:
        """Return the answer to the call with these `Call.nests`."""
        if tf.executing_eagerly():
            return self._traces(*nests)[0]
        # Inside another trace the ops go straight into it: no call, no second trace.
        nests = self._call(self._f, *nests).apart().nests
        f, before = converted(self._f), len(traced_operations())
        if is_repairing():
            f = repaired(f)
        try:
            answer, *_ = self._run(f, *nests)
        except RepairableGradientError:
            # The ops of the failed attempt stay in the graph. That is harmless unless
            # they write to variables; then tfgrad begins a trace of its own anew, and
            # refuses to go on in a trace of the user's, unless `Recording` can.
            if any(map(writes, every(traced_operations()[before:]))):
                raise
            with repairing():
                answer, *_ = self._run(repaired(f), *nests)
        made = traced_operations()[before:]
        if is_compiling() or not needs_marks(made):
            return answer
        # A tape of the user's around this call would use the wrong gradients of ops
        # that `repairs` has not marked.
        if not any(map(writes, every(made))):
            with repairing():
                return called(lambda: self._run(repaired(f), *nests)[0])
        if any(map(is_watched, filter(is_dynamic, tf.nest.flatten(answer)))):
            raise RepairableGradientError(
                f"A tape around the derivative of `{self.name}` would be wrong here.",
                got="ops that have to be traced anew to be right, and a function that "
                "writes to variables, as dropout and batch normalisation do",
                hint="the transform outside of your own tf.function; "
                "`with tape.stop_recording():` around it, if that is a constant",
            )
        mark(made)  # for a tape around the user's function
        return answer

    def function(self, *nests: Any) -> Callable[..., Any]:
        """Return the compiled function of tensors that answered `nests` before."""
        run = self._traces.function(*nests)
        return lambda *tensors: run(*tensors)[0]

    def graph(self, *nests: Any) -> Any:
        """Return the graph of an earlier answer; None if it was computed eagerly."""
        return self._traces.graph(*nests)

    def folds_wrongly(self, *nests: Any) -> bool:
        """Return whether an earlier answer has to be run with constant folding off."""
        graph = self.graph(*nests) if tf.executing_eagerly() else None
        return graph is not None and bool(folds_wrongly(graph.get_operations()))

    def _run(self, f: Callable[..., Any], *nests: Any) -> tuple[Any, ...]:
        """Return the answer, and the outputs of each function of the ladder."""
        answer, ladder = self._body(self._call(f, *nests))
        if not tf.executing_eagerly():
            outputs = list(filter(is_dynamic, tf.nest.flatten(answer)))
            require_right_kernels(outputs, self.name, own=is_compiling())
        # The simpler a structure, the less time TensorFlow spends on it.
        levels = [outputs[0] if len(outputs) == 1 else outputs for outputs in ladder]
        return answer, *levels

    def _call(self, f: Callable[..., Any], *nests: Any) -> Call:
        return Call(f, self.name, self.parameters(len(nests[0])), *nests)

    def _check(self, found: tuple[Any, ...], *nests: Any) -> None:
        assert self._slopes is not None
        call, concrete = self._call(self._f, *nests), self._traces.concrete(*nests)
        # An eager gradient is verified where it is taken; and a nest may be empty.
        if concrete is None or not call.sources:
            return
        if getattr(self._f, _OURS, False):  # f verifies its own answer in this call
            call.output()
        if certified(concrete):
            lower = None if found[1:] else self._traced_lower(*nests)
            Certificate(call, concrete, found, self._slopes, lower).require_right()

    def _traced_lower(self, *nests: Any) -> Any:
        """Return the concrete function for the ladder; None if the body returns it."""
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
    options: dict[str, Any] = {"slopes": slopes, "opens": opens, "lower": lower}
    compiled = Compiled(f, body, jit=jit, in_turn=wrt is not None, **options)
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

    # A call with nothing but tensors, the commonest kind in loops, skips `prepared`.
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
    """Return whether a compiled function takes exactly `args`, none converted."""
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


def _checked_argnums(f: Any, argnums: Any, wrt: Any) -> Any:
    """Return `argnums` as plain integers."""
    require_function(f)
    numbers = argnums if isinstance(argnums, Sequence) else (argnums,)
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
    return plain if isinstance(argnums, Sequence) else plain[0]
