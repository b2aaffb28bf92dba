"""Compile once, never retrace: one compiled function per structure, shapes and dtypes.

`tf.function` retraces for each new Python number and keeps every trace for ever. Here the
caller has made tensors of numbers *before* the compiled call, and the traces are bounded.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

from tfgrad.diagnosis.lines import line_of_error
from tfgrad.errors import TfgradError
from tfgrad.nested import name_of

MOST_TRACES = 64
"""Compiled functions kept for one transform; the least recently used goes first."""

# The namespace that Keras, too, builds on. The context is that of plain Python code, so that
# a user's function is converted wherever it is called from.
_autograph = tf.__internal__.autograph
_PLAIN_PYTHON = _autograph.control_status_ctx()


_as_it_is: ContextVar[bool] = ContextVar("as_it_is", default=False)


def converted(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return `f` with AutoGraph applied: Python `if` and `while` on tensors can be traced.

    Within the first attempt of `trace`, that is `f` itself.
    """
    if _as_it_is.get():
        return f
    result: Callable[..., Any] = _autograph.tf_convert(f, _PLAIN_PYTHON)
    return result


def trace(compile: Callable[[Any], Any], f: Callable[..., Any]) -> Any:
    """Return `compile(f)`, with AutoGraph applied to `f` if it cannot be traced as it is.

    Most functions can: they trace faster so, and their errors name the user's own lines.

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
            return compile(converted(f))
        except TfgradError:
            raise
        except Exception:
            raise error from None
    finally:
        _as_it_is.reset(token)


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Let compiled functions, first run in the block, compute what eager mode would.

    TensorFlow's graph optimiser moves constants about: x**2 + x - 1 becomes x**2 + (x - 1),
    which rounds otherwise, and a `tf.dynamic_partition` by constants comes out wrong.
    """
    before = tf.config.optimizer.get_experimental_options()
    tf.config.optimizer.set_experimental_options({"constant_folding": False})
    try:
        yield
    finally:  # None is TensorFlow's own default
        user = {"constant_folding": before.get("constant_folding")}
        tf.config.optimizer.set_experimental_options(user)


def is_dynamic(leaf: object) -> bool:
    """Return whether `leaf` is an input of the compiled function; all else is static."""
    return isinstance(leaf, tf.Tensor | tf.RaggedTensor | tf.SparseTensor)


class Traces:
    """A function of nests of tensors, compiled at its first call for each signature.

    Args:
        run: `run(f, *nests)`: what to compile, given the user's function as it is or
            converted by AutoGraph.
        f: The user's function.
        jit: Compile with XLA.
    """

    def __init__(
        self, run: Callable[..., Any], f: Callable[..., Any], *, jit: bool
    ) -> None:
        """Compile nothing yet."""
        self._run = run
        self._f = f
        self._jit = jit
        self._compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._warned = False

    def __call__(self, *nests: Any) -> Any:
        """Return `run(f, *nests)`, from the trace that fits, or from a new one."""
        key = signature(nests)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(nests)
            if len(self._compiled) > MOST_TRACES:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(key)
        return compiled(*filter(is_dynamic, tf.nest.flatten(nests)))

    def operations(self, *nests: Any) -> list[str]:
        """Return the op types in the trace that `nests` called; none if they run eagerly."""
        concrete = self._compiled[signature(nests)]
        if not isinstance(concrete, tf.types.experimental.ConcreteFunction):
            return []
        graph = concrete.graph.as_graph_def()
        bodies = [graph.node, *(body.node_def for body in graph.library.function)]
        return [node.op for nodes in bodies for node in nodes]

    def _compile(self, nests: tuple[Any, ...]) -> Callable[..., Any]:
        flat = tf.nest.flatten(nests)
        specs = [tf.type_spec_from_value(leaf) for leaf in flat if is_dynamic(leaf)]

        def traced(f: Callable[..., Any], *dynamic: Any) -> Any:
            given = iter(dynamic)
            filled = [next(given) if is_dynamic(leaf) else leaf for leaf in flat]
            return self._run(f, *tf.nest.pack_sequence_as(nests, filled))

        def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
            body = functools.partial(traced, f)
            function = tf.function(body, autograph=False, jit_compile=self._jit or None)
            concrete: Callable[..., Any] = function.get_concrete_function(*specs)
            return concrete

        try:
            return trace(compiled, self._f)
        except TfgradError:
            raise
        except Exception as error:  # a user's function may raise anything
            if self._jit:
                raise
            # What fails in eager mode, too, is no matter of tracing: that error is the clear
            # one, and it is raised from here.
            eager = functools.partial(traced, self._f)
            eager(*filter(is_dynamic, flat))
            self._warn(error)
            return eager

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        reason = str(error).strip().splitlines()[-1].strip()
        warnings.warn(
            f"`{name_of(self._f)}` cannot be compiled and runs eagerly, which is slower: "
            f"it leaves TensorFlow at {line_of_error(error)} ({reason})",
            RuntimeWarning,
            stacklevel=6,
        )


def signature(nest: Any) -> Any:
    """Return a hashable key of the structure, specs and static values in `nest`."""
    if isinstance(nest, tf.Tensor):
        return nest.dtype, nest.shape
    if isinstance(nest, tf.RaggedTensor | tf.SparseTensor):
        return tf.type_spec_from_value(nest)
    if isinstance(nest, list | tuple):
        return type(nest), tuple(map(signature, nest))
    if isinstance(nest, Mapping):
        items = tuple((key, signature(nest[key])) for key in sorted(nest))
        return type(nest), items
    try:
        hash(nest)
    except TypeError:  # variables, among others: the trace keeps them, so the id stays theirs
        return type(nest), id(nest)
    return type(nest), nest
