"""Compile once, never retrace: one compiled function per structure, shapes and dtypes.

`tf.function` retraces for each new Python number and keeps every trace for ever. Here
the caller has made tensors of numbers *before* the compiled call, and the traces are
bounded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import threading
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, cast

import tensorflow as tf

from tfgrad.derivatives.refusals import (
    is_made_twice,
    no_gradient,
    refusal_at_run_time,
    refusal_by_gradient,
)
from tfgrad.derivatives.repairs import (
    RepairableGradientError,
    calls_repairable,
    mark,
    repaired,
    repairing,
)
from tfgrad.derivatives.signatures import (
    MOST_TRACES,
    OpenTraces,
    is_dynamic,
    signature,
)
from tfgrad.derivatives.soundness import (
    UnverifiableGradientError,
    every,
    folds_wrongly,
    wrong_under_xla,
)
from tfgrad.diagnosis.graphs import acts
from tfgrad.diagnosis.lines import line_of, line_of_error
from tfgrad.errors import InvalidArgumentError, TfgradError
from tfgrad.nested import name_of

_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(tf.__file__).parent))

# The namespace that Keras, too, builds on. The context is that of plain Python code, so
# that a user's function is converted wherever it is called from.
_autograph = tf.__internal__.autograph
_PLAIN_PYTHON = _autograph.control_status_ctx()


MANY = 2**16
"""Numbers in one tensor from which on TensorFlow's work on a graph soon pays."""

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

Options = Mapping[str, bool | None]
"""Of TensorFlow's graph optimiser; None is its own default."""

_as_it_is: ContextVar[bool] = ContextVar("as_it_is", default=False)
_is_compiling: ContextVar[bool] = ContextVar("is_compiling", default=False)
_why_eager: ContextVar[str] = ContextVar("why_eager", default="")
_is_optimized: ContextVar[bool | None] = ContextVar("is_optimized", default=None)
_usual: ContextVar[Options] = ContextVar("usual")


def not_converted(f: F) -> F:
    """Keep AutoGraph from rewriting `f` where a user's tf.function calls it."""
    return cast(F, tf.autograph.experimental.do_not_convert(f))


def converted(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f` with AutoGraph applied: `if` and `while` on tensors can be traced.

    Within the first attempt of `trace`, that is `f` itself.
    """
    if _as_it_is.get():
        return f
    result: Callable[..., Any] = _autograph.tf_convert(f, _PLAIN_PYTHON)
    return result


def trace(compile: Callable[[Any], Any], f: Callable[..., Any]) -> Any:
    """Return `compile(f)`, with AutoGraph applied to `f` if it has to be.

    Most functions can: they trace faster so, and their errors name the user's own
    lines.

    Raises:
        Exception: What the user's function raised as it is, if AutoGraph does not help.
    """
    token = _as_it_is.set(True)
    try:
        return compile(f)
    except TfgradError:
        raise
    except Exception as error:  # a user's function may raise anything
        _as_it_is.set(False)
        try:
            with quiet():
                return compile(converted(f))
        except TfgradError:
            raise
        except Exception:
            raise error from None
    finally:
        _as_it_is.reset(token)


@contextlib.contextmanager
def as_written(*, optimized: bool = True) -> Iterator[None]:
    """Let compiled functions called in the block compute what eager mode would.

    TensorFlow's graph optimiser moves constants about: x**2 + x - 1 becomes x**2 + (x -
    1), which rounds otherwise, and a `tf.dynamic_partition` by constants comes out
    wrong. Its arithmetic takes sums apart and puts them together again, which rounds
    otherwise, too, and so do the kernels in which it joins a sum and a tanh.

    Args:
        optimized: Let it do the rest of its work, which takes as long as a hundred
            calls of a small function do.
    """
    if _is_optimized.get() is optimized:  # by a block around this one
        yield
        return
    options = {
        "constant_folding": False,
        "arithmetic_optimization": False,
        "remapping": False,
        "disable_meta_optimizer": not optimized,
    }
    with _optimizing(options, optimized):
        yield


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    """Let TensorFlow optimise what is called in the block, as outside of `as_written`.

    Of a million numbers, x**2 takes 90 ms as it is written, and 1 ms as the `Square`
    that TensorFlow makes of it.
    """
    if _is_optimized.get() is None:
        yield
        return
    with _optimizing(_usual.get(), None):
        yield


def suited(graph: Any) -> contextlib.AbstractContextManager[None]:
    """Return the block in which a graph is to be called: `as_usual` if it is large."""
    return as_usual() if _is_large(graph) else contextlib.nullcontext()


@contextlib.contextmanager
def _optimizing(options: Options, is_optimized: bool | None) -> Iterator[None]:
    """Let TensorFlow optimise graphs by these options in the block."""
    before = tf.config.optimizer.get_experimental_options()
    own = {option: before.get(option) for option in options}
    tf.config.optimizer.set_experimental_options(dict(options))
    try:
        with holding(_is_optimized, is_optimized), holding(_usual, own):
            yield
    finally:
        tf.config.optimizer.set_experimental_options(own)


def _is_large(graph: Any) -> bool:
    """Return whether one of the ops, at any depth, makes many numbers.

    Not if one of them comes out wrong where constants are folded.
    """
    operations = list(every(graph.get_operations()))
    outputs = (output for op in operations for output in op.outputs)
    is_large = any((output.shape.num_elements() or 0) >= MANY for output in outputs)
    return is_large and not folds_wrongly(operations)


def is_optimized() -> bool | None:
    """Return how `as_written` is at work: what is called directly keeps to it."""
    return _is_optimized.get()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence TensorFlow's log in this thread: it prints what it cannot convert."""
    thread, logger = threading.get_ident(), tf.get_logger()

    def is_another_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_another_thread)
    try:
        yield
    finally:
        logger.removeFilter(is_another_thread)


def leaves_tensorflow() -> str:
    """Return where the function that runs leaves TensorFlow, so no tape sees it all."""
    return _why_eager.get() if tf.executing_eagerly() else ""


def is_compiling() -> bool:
    """Return whether the trace being made is one of ours, not a user's tf.function."""
    return _is_compiling.get()


def traced_operations() -> list[tf.Operation]:
    """Return the ops of the graph that is being traced; none in eager mode."""
    if tf.executing_eagerly():
        return []
    graph = tf.compat.v1.get_default_graph()
    operations: list[tf.Operation] = graph.get_operations()
    return operations


class Traces:
    """A function of nests of tensors, compiled at its first call for each signature.

    Args:
        run: `run(f, *nests)`: what to compile, given the user's function as it is or
            converted by AutoGraph.
        f: The user's function.
        jit: Compile with XLA.
        check: `check(answer, *nests)`: called with the first answer of each trace; it
            raises if that is wrong.
        opens: Leave open a dimension that varies, after the second shape.
        in_turn: Whether f is likely to write to variables, or to do anything else in
            turn: if not, it is traced twice where it does.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        f: Callable[..., Any],
        *,
        jit: bool,
        check: Callable[..., None] | None = None,
        opens: bool = False,
        in_turn: bool = False,
    ) -> None:
        self._in_turn = in_turn
        self._run = run
        self._f = f
        self._jit = jit
        self._check = check
        self._open = OpenTraces() if opens and not jit else None
        self._compiled: OrderedDict[Any, tuple[Callable[..., Any], Any]] = OrderedDict()
        self._checked: set[Any] = set()
        self._first = threading.RLock()
        self._warned = False

    def __call__(self, *nests: Any) -> Any:
        """Return `run(f, *nests)`, from the trace that fits, or from a new one."""
        key = signature(nests)
        found = self._compiled.get(key) if key in self._checked else None
        if found is None:
            with self._first:  # other threads wait until the answer is checked
                found = self._compiled.get(key)
                if found is None and self._open is not None:
                    given = filter(is_dynamic, tf.nest.flatten(nests))
                    found = self._open.fitting(key, _specs(given))
                    if found is not None:
                        self._remember(key, found[:2])
                        self._checked.add(key)
                if found is None:
                    return self._first_call(key, nests)
        with contextlib.suppress(KeyError):  # another thread may have dropped it
            self._compiled.move_to_end(key)
        return found[0](*filter(is_dynamic, tf.nest.flatten(nests)))

    def compiled(self, *nests: Any) -> Any:
        """Return the concrete function for `nests`, not run yet; None if eager."""
        given = list(filter(is_dynamic, tf.nest.flatten(nests)))
        return self._compile(_body(self._run, nests), _specs(given))[1]

    def has(self, *nests: Any) -> bool:
        """Return whether there was an answer for nests like these, and it was right."""
        return signature(nests) in self._checked

    def concrete(self, *nests: Any) -> Any:
        """Return the concrete function of an earlier answer; None if it ran eagerly."""
        return self._compiled[signature(nests)][1]

    def function(self, *nests: Any) -> Callable[..., Any]:
        """Return the function of tensors that answered `nests`."""
        return self._compiled[signature(nests)][0]

    def graph(self, *nests: Any) -> Any:
        """Return the graph that answered `nests`; None if it runs eagerly."""
        concrete = self.concrete(*nests)
        return None if concrete is None else concrete.graph

    def variables(self) -> list[tf.Variable]:
        """Return the variables that the traces read, each once, in reading order."""
        found: dict[int, tf.Variable] = {}
        for _, concrete in self._compiled.values():
            if concrete is not None:
                graph = concrete.graph
                # `graph.variables` has an order of its own in every process.
                read = {id(variable.handle): variable for variable in graph.variables}
                handles = [id(x) for x in graph.external_captures if id(x) in read]
                found |= {id(read[handle]): read[handle] for handle in handles}
        return list(found.values())

    def captured(self) -> list[tf.Tensor]:
        """Return the float tensors that the traces read by themselves."""
        traced = (c for _, c in self._compiled.values() if c is not None)
        return [x for c in traced for x in c.captured_inputs if x.dtype.is_floating]

    def _first_call(self, key: Any, nests: tuple[Any, ...]) -> Any:
        given = list(filter(is_dynamic, tf.nest.flatten(nests)))
        body = _body(self._run, nests)
        if self._open is None:
            compiled, concrete, reason = self._compile(body, _specs(given))
        else:
            traces, specs = self._open, _specs(given)
            compiled, concrete, reason = self._compile_open(traces, key, body, specs)
        graph = None if concrete is None else concrete.graph
        try:
            answer = compiled(*given)
        except Exception as error:
            self._forget(key)
            is_xla = self._jit and isinstance(error, tf.errors.OpError)
            if is_xla and re.search("XLA|tf2xla", str(error)):
                raise _refused_by_xla(name_of(self._f), graph, str(error)) from None
            raise
        if reason:
            self._warn(reason)
        self._remember(key, (compiled, concrete))
        if self._check is not None:
            try:
                self._check(answer, *nests)
            except Exception as error:
                self._forget(key)
                raise refusal_by_gradient(error, name_of(self._f)) or error from None
        self._checked.add(key)
        return answer

    def _remember(self, key: Any, found: tuple[Callable[..., Any], Any]) -> None:
        self._compiled[key] = found
        if len(self._compiled) > MOST_TRACES:
            self._checked.discard(self._compiled.popitem(last=False)[0])

    def _forget(self, key: Any) -> None:
        """Drop a trace whose first call has failed: the next call is checked, too."""
        self._compiled.pop(key, None)
        if self._open is not None:
            self._open.drop(key)

    def _compile_open(
        self, traces: OpenTraces, key: Any, body: Callable[..., Any], specs: list[Any]
    ) -> tuple[Callable[..., Any], Any, str]:
        """Compile, from the second shape on with the dimensions open that vary."""

        def compiled(wide: list[Any]) -> Any:
            found = self._compile(body, wide)
            if found[2] and wide is not specs:  # a function that has to know its shapes
                raise NotImplementedError
            return found

        found: tuple[Callable[..., Any], Any, str] = traces.add(key, specs, compiled)
        return found

    def _compile(
        self, body: Callable[..., Any], specs: list[Any]
    ) -> tuple[Callable[..., Any], Any, str]:
        """Return `body` compiled, twice; or as it is, None, and the reason."""

        def compiled(f: Callable[..., Any], jit: bool = self._jit) -> Any:
            def whole(*tensors: Any) -> Any:
                return body(f, *tensors)

            concrete = concrete_of(whole, specs, jit=jit, in_turn=self._in_turn)
            if jit and wrong_under_xla(concrete.graph.get_operations()):
                return compiled(f, jit=False)
            return concrete

        try:
            with holding(_is_compiling, True):
                concrete = _repaired_if_needed(compiled, self._f)
        except UnverifiableGradientError as error:
            if self._jit:
                raise
            reason = f"it leaves TensorFlow: {error.got}"
        except TfgradError:
            raise
        except Exception as error:  # a user's function may raise anything
            if self._jit or is_made_twice(error):
                refused = refusal_by_gradient(error, name_of(self._f))
                raise refused or error from None
            what = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            reason = f"it leaves TensorFlow at {line_of_error(error)} ({what})"
        else:
            run = _explained(concrete, name_of(self._f))
            if not self._jit and folds_wrongly(concrete.graph.get_operations()):
                run = as_written()(run)
            elif not self._jit and _is_large(concrete.graph):
                run = as_usual()(run)
            made = concrete.structured_outputs
            if _holds_defaults(made):  # TensorFlow makes a plain dict of it

                def packed(*given: Any, run: Callable[..., Any] = run) -> Any:
                    return tf.nest.pack_sequence_as(made, tf.nest.flatten(run(*given)))

                return packed, concrete, ""
            return run, concrete, ""
        # If f fails in eager mode, too, tracing is not the cause: the eager error,
        # which is clearer, is raised.
        return _leaving(functools.partial(body, self._f), reason), None, reason

    def _warn(self, reason: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"`{name_of(self._f)}` is not compiled and runs eagerly, which is slower: "
            f"{reason}",
            RuntimeWarning,
            stacklevel=level_of_caller(),
        )


def concrete_of(
    function: Callable[..., Any],
    specs: Sequence[Any],
    *,
    jit: bool = False,
    in_turn: bool = False,
) -> Any:
    """Return the concrete function; ops that act, as `graphs.acts` says, run in turn.

    TensorFlow looks for them for an eighth of the time of a trace, so that is left to a
    second trace where the first one has some.

    Args:
        function: What to trace; AutoGraph was applied.
        specs: What it takes.
        jit: Compile with XLA.
        in_turn: Let TensorFlow look at once.
    """
    options = {"autograph": False, "jit_compile": jit or None}
    if not in_turn:
        anyhow = {"_disable_acd": True}  # automatic control dependencies
        traced = tf.function(function, experimental_attributes=anyhow, **options)
        concrete = traced.get_concrete_function(*specs)
        if not acts(concrete.graph):
            return concrete
    return tf.function(function, **options).get_concrete_function(*specs)


def _body(run: Callable[..., Any], nests: tuple[Any, ...]) -> Callable[..., Any]:
    """Return `run` as a function of the tensors in `nests`."""
    flat = tf.nest.flatten(nests)

    def body(f: Callable[..., Any], *dynamic: Any) -> Any:
        left = iter(dynamic)
        filled = [next(left) if is_dynamic(leaf) else leaf for leaf in flat]
        return run(f, *tf.nest.pack_sequence_as(nests, filled))

    return body


def _specs(tensors: Iterable[Any]) -> list[Any]:
    return [tf.type_spec_from_value(tensor) for tensor in tensors]


def _holds_defaults(nest: Any) -> bool:
    """Return whether there is a defaultdict in a nest."""
    if isinstance(nest, defaultdict):
        return True
    is_list = isinstance(nest, list | tuple)
    children = nest.values() if isinstance(nest, Mapping) else nest if is_list else ()
    return any(map(_holds_defaults, children))


def _explained(concrete: Any, name: str) -> Callable[..., Any]:
    """Return `concrete`, with errors in words where a gradient op fails."""

    def run(*given: Any) -> Any:
        try:
            if all(isinstance(tensor, tf.Tensor) for tensor in given):
                # Their number and specs were looked at, in half of the time of a call.
                return concrete._call_flat(list(given), concrete.captured_inputs)
            return concrete(*given)
        except TfgradError:
            raise
        except Exception as error:
            if isinstance(error, tf.errors.OpError):
                refused = refusal_at_run_time(error, concrete.graph, name)
            else:  # a tape around it asks for a gradient that there is not
                refused = refusal_by_gradient(error, name) or no_gradient(error, name)
            raise refused or error from None

    return run


def _refused_by_xla(name: str, graph: Any, text: str) -> InvalidArgumentError:
    """Return the error for a function that XLA does not compile, by what it says."""
    got, hint = text.strip().splitlines()[0], "jit=False"
    for kind in re.findall(r"unsupported operations.*?_JIT: (\w+)", text, re.DOTALL):
        ops = (op for op in every(graph.get_operations()) if op.type == kind)
        got = next((f"{kind} at {line_of(op)}" for op in ops), kind)
    if "tensor list size" in text:
        got, hint = "a loop of unknown length", f"maximum_iterations=... in it; {hint}"
    return InvalidArgumentError(
        f"XLA cannot compile the derivative of `{name}`.", got=got, hint=hint
    )


def _repaired_if_needed(compiled: Callable[[Any], Any], f: Callable[..., Any]) -> Any:
    """Return the concrete function, marked for whoever differentiates it again."""

    def of_repaired() -> Any:
        with repairing():
            concrete = trace(lambda f: compiled(repaired(f)), f)
        mark(concrete.graph.get_operations(), calls=True)
        return concrete

    try:
        concrete = trace(compiled, f)
        if calls_repairable(concrete.graph.get_operations()):
            # The user's own functions get no marks: they are taken apart instead. What
            # cannot be is right by itself, and only then.
            with contextlib.suppress(Exception):
                return of_repaired()
        mark(concrete.graph.get_operations())
        return concrete
    except RepairableGradientError as error:
        try:
            return of_repaired()
        except RepairableGradientError:
            raise error from None
        except TfgradError:
            raise
        except Exception:  # the first message says what to do about it
            raise error from None


def _leaving(eager: Callable[..., Any], reason: str) -> Callable[..., Any]:
    def run(*given: Any) -> Any:
        with holding(_why_eager, reason):
            return eager(*given)

    return run


@contextlib.contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Let a variable of the context have a value within the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def level_of_caller() -> int:
    """Return the stacklevel at which a warning is shown at the user's line."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    return level
