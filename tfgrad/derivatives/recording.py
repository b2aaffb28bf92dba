"""`Recording`: an evaluation of f on a tape; its gradients are dense, never None."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.certificates import wrong_gradient
from tfgrad.derivatives.refusals import refusal_by_gradient
from tfgrad.derivatives.repairs import (
    RepairableGradientError,
    mark,
    require_right,
    unrepaired,
)
from tfgrad.derivatives.soundness import every, may_drop, require_whole
from tfgrad.derivatives.tapes import resumed
from tfgrad.derivatives.tracing import (
    holding,
    is_compiling,
    leaves_tensorflow,
    traced_operations,
)
from tfgrad.derivatives.verification import random_like
from tfgrad.diagnosis.causes import cause_of_cut
from tfgrad.diagnosis.graphs import results, writes
from tfgrad.diagnosis.lines import line_of
from tfgrad.diagnosis.path import Cut, may_hide_a_cut, missing_gradients
from tfgrad.diagnosis.report import no_gradient_error
from tfgrad.errors import NoGradientError, TfgradError, WrongDerivativeError
from tfgrad.nested import describe


class Recording:
    """One evaluation of `function(call)` on a tape, ready to be pulled back.

    Args:
        function: Takes a `Call`, returns a nest of float tensors, or with `has_aux` a
            pair of it and anything else.
        call: Where to evaluate it, and what to differentiate.
        has_aux: See `function`.
        persistent: Allow more than one pull-back.

    Attributes:
        output: The nest that the function returned; `outputs` are its leaves.
        aux: With `has_aux`, the rest of what the function returned; else None.
        sources: What is differentiated, flat.
        is_stopped: Whether there was no path to any of them for `gradients`.
    """

    def __init__(
        self,
        function: Callable[[Call], Any],
        call: Call,
        *,
        has_aux: bool = False,
        persistent: bool = False,
    ) -> None:
        if tf.executing_eagerly():
            call = call.apart()
        finds = isinstance(call.variables, tuple) and not call.variables
        self._tape = tf.GradientTape(
            persistent=persistent, watch_accessed_variables=finds
        )
        self._before = len(traced_operations())
        around, inside = _evaluation.get(), _Evaluation()
        if around is not None:
            around.has_inner = True
        with resumed(), self._tape, holding(_evaluation, inside):
            self._tape.watch(call.sources)
            returned = function(call)
        if finds:
            call = replace(call, variables=self._tape.watched_variables())
        self._again = Again(function, call, has_aux, inside.has_inner)
        self._call = call
        self.sources = call.sources
        self.output: Any
        self.aux: Any
        self.output, self.aux = returned if has_aux else (returned, None)
        self.outputs: list[tf.Tensor] = tf.nest.flatten(self.output)
        self._is_marked = self.is_stopped = False
        try:
            self.require_right(twice=around is not None)
        except RepairableGradientError:
            is_nested = around is not None or inside.has_inner
            if is_compiling() or persistent or is_nested or not self._writes():
                raise
            # In a trace of the user's, f cannot be evaluated once more: it would write
            # twice. Unlike a tape, `tf.gradients` obeys marks where the ops are.
            mark(self.operations)
            self._is_marked = True

    def require_right(self, *, twice: bool) -> None:
        """Raise for ops that TensorFlow differentiates wrongly, so that f is repaired.

        Args:
            twice: The gradient will be differentiated again.
        """
        operations = self.operations if twice else self._moving()
        require_right(operations, self.name, twice=twice)

    def _writes(self) -> bool:
        return any(map(writes, every(self.operations)))

    def _moving(self) -> list[tf.Operation]:
        """Return the ops that depend on the sources; all ops if those are variables."""
        if self._call.variables is not None:
            return self.operations
        return _depending(self.operations, self.sources)

    @property
    def name(self) -> str:
        """What to call the function in messages."""
        return self._call.name

    @property
    def operations(self) -> list[tf.Operation]:
        """The ops traced since the evaluation began; none in eager mode."""
        return traced_operations()[self._before :]

    def gradients(
        self,
        cotangents: tf.Tensor | Sequence[tf.Tensor] | None = None,
        *,
        sparse: bool = False,
    ) -> list[Any]:
        """Return the gradient of each source: dense, zeros where there is no path.

        Args:
            cotangents: Weights of the output's elements, one tensor for each output, of
                its shape; None means ones.
            sparse: Keep a `tf.IndexedSlices` as such, with slices of the same row added
                up.

        Raises:
            NoGradientError: If a path exists, but is cut.
        """
        is_one = not isinstance(cotangents, list | tuple | None)
        weights: Any = [cotangents] if is_one else cotangents
        found = self._require_sound(self.outputs, weights and list(weights))
        self.is_stopped = all(gradient is None for gradient in found)
        slices = tf.IndexedSlices
        if sparse:
            pairs = zip(found, self.sources, strict=True)
            return [
                _distinct(g) if isinstance(g, slices) else dense(g, s) for g, s in pairs
            ]
        return self._dense(found)

    def pull(self, cotangents: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the gradients without a search for cuts, after `require_sound`."""
        return self._dense(self._pulled(self.outputs, list(cotangents)))

    def require_sound(self, *, separately: bool = True) -> None:
        """Raise if a path to an output is cut; if not, `pull` may be called.

        Args:
            separately: Whether each output is examined alone. Together, a cut on the
                way to one output is missed if another output has a gradient.
        """
        if leaves_tensorflow():
            # A new recording, since a tf.py_function can be pulled back only once.
            again = Recording(
                self._again.function, self._call, has_aux=self._again.has_aux
            )
            again.gradients(random_like(self.outputs, seed=1))
        elif separately:
            for output in self.outputs:
                self._require_sound([output], None)
        else:
            self._require_sound(self.outputs, None)

    def _require_sound(
        self, outputs: list[tf.Tensor], weights: list[tf.Tensor] | None
    ) -> list[Any]:
        """Return the tape's gradient, or None, for each source; raise if one is cut."""
        undefined = None
        try:
            found = self._pulled(outputs, weights)
        except LookupError as error:  # an op has no gradient: one of the sources is cut
            found, undefined = [None] * len(self.sources), error
        if leaves_tensorflow():
            every_one = self._places(self.outputs)
            self._again.verify(every_one, self._dense(found), weights)
        if may_drop(self.operations) and may_drop(self._moving()):
            self._again.require_whole(self._places(outputs))
        hidden = may_hide_a_cut(self.operations)
        if hidden or any(gradient is None for gradient in found):
            self._again.require_uncut(
                self._places(outputs), [None] * len(found) if hidden else found
            )
            if undefined is not None:
                raise _undefined(self._call, self.operations, undefined)
        return found

    def _places(self, outputs: list[tf.Tensor]) -> list[int]:
        """Return where some outputs stand among all."""
        ids = {id(output) for output in outputs}
        return [i for i, output in enumerate(self.outputs) if id(output) in ids]

    def _pulled(self, outputs: list[tf.Tensor], weights: Any) -> list[Any]:
        """Return what the tape finds for each source: a gradient, or None."""
        with refusals_explained(self.name):
            if self._is_marked:
                return list(tf.gradients(outputs, self.sources, weights))
            found: list[Any] = self._tape.gradient(
                outputs, self.sources, output_gradients=weights
            )
        return found

    def _dense(self, found: Sequence[Any]) -> list[tf.Tensor]:
        return [dense(g, s) for g, s in zip(found, self.sources, strict=True)]


class Again(NamedTuple):
    """A recorded evaluation, made again to see what a tape cannot tell.

    Attributes:
        function: See `Recording`.
        call: See `Recording`.
        has_aux: See `Recording`.
        has_inner: Whether a tape of ours is opened within the function.
    """

    function: Callable[[Call], Any]
    call: Call
    has_aux: bool
    has_inner: bool

    def require_uncut(self, places: list[int], found: list[Any]) -> None:
        """Refuse missing gradients that are cut; the others are zeros."""
        for index, cut in enumerate(self._cuts(places)):
            if found[index] is None and cut is not None:
                raise no_gradient_error(self.call.name, self.call.names[index], cut)

    def require_whole(self, places: list[int]) -> None:
        """Refuse a gradient that lacks a term of some outputs."""
        call = self.call
        require_whole(self._one_output(places), *self._roots(), call.name, call.names)

    def verify(
        self,
        places: list[int],
        found: list[tf.Tensor],
        weights: list[tf.Tensor] | None,
    ) -> None:
        """Compare with differences, since the tape may not have seen all."""
        wrong = wrong_gradient(self.call, self._evaluate, weights, found)
        if wrong is None:
            return
        index, numbers = wrong
        cuts = self._cuts(places)
        cut = cuts[index] or next(filter(None, cuts), None)
        if cut is not None and cut.where:
            raise no_gradient_error(self.call.name, self.call.names[index], cut)
        raise NoGradientError(
            f"The gradient of `{self.call.name}` with respect to "
            f"`{self.call.names[index]}` is cut.",
            got=f"autodiff {numbers}; {leaves_tensorflow()}",
            hint="the same in tf.math or tf.experimental.numpy; a tf.custom_gradient",
        )

    def _cuts(self, places: list[int]) -> list[Cut | None]:
        return missing_gradients(self._one_output(places), *self._roots())

    def _roots(self) -> tuple[list[tf.Tensor], list[tf.Variable]]:
        if self.call.variables is None:
            return self.call.sources, []
        return [], self.call.sources

    def _one_output(self, places: list[int]) -> Callable[..., tf.Tensor]:
        """Return f as a function with one output, which depends on all of these."""
        # The search for cuts asks which gradients exist, not whether they are right.
        f = self.call.f if self.has_inner else unrepaired(self.call.f)

        def function(*inputs: tf.Tensor) -> tf.Tensor:
            call = replace(self.call.at(inputs) if inputs else self.call, f=f)
            # What is differentiated inside is so again.
            with holding(_evaluation, _Evaluation()):
                returned = self._evaluate(call)
            if len(places) == 1:
                return returned[places[0]]
            parts = [tf.reduce_sum(tf.cast(returned[i], tf.float64)) for i in places]
            return tf.add_n(parts)

        return function

    def _evaluate(self, call: Call) -> list[tf.Tensor]:
        returned = self.function(call)
        leaves: list[tf.Tensor] = tf.nest.flatten(
            returned[0] if self.has_aux else returned
        )
        return leaves


def _undefined(
    call: Call, operations: list[tf.Operation], error: LookupError
) -> TfgradError:
    """Return the error for an op without gradient, beside paths that have one."""
    kinds = {*re.findall(r"\w+", str(error))}
    for op in every(operations):
        if op.type in kinds:
            cut = Cut(op.type, line_of(op), *cause_of_cut(op))
            return no_gradient_error(call.name, call.names[0], cut)
    return NoGradientError(
        f"The gradient of `{call.name}` lacks a term: one of its ops has none.",
        got=str(error).splitlines()[0],
        hint="a smooth stand-in, or a tf.custom_gradient",
    )


class _Evaluation:
    """What is known of an evaluation while it is recorded."""

    has_inner = False  # whether another `Recording` was made within it


_evaluation: ContextVar[_Evaluation | None] = ContextVar("evaluation", default=None)


@contextlib.contextmanager
def refusals_explained(name: str) -> Iterator[None]:
    """Raise errors in words where TensorFlow refuses to differentiate twice."""
    try:
        yield
    except tf.errors.UnknownError as error:
        if "pyfunc" not in str(error):
            _raise_in_words(error, name)
        raise NoGradientError(
            f"The tf.py_function in `{name}` can be differentiated once, in one pass.",
            got="a second pass, for another row, direction or order",
            hint="the same in tf.math, or tf.custom_gradient around tf.numpy_function",
        ) from None
    except NotImplementedError as error:
        if "recompute_grad" not in str(error):
            _raise_in_words(error, name)
        raise NoGradientError(
            f"The tf.recompute_grad in `{name}` has first derivatives only.",
            got="a gradient, or a direction, of its gradient",
            hint="the function itself, without tf.recompute_grad around it",
        ) from None
    except (TfgradError, LookupError):
        raise
    except Exception as error:  # a gradient may raise anything
        _raise_in_words(error, name)


def _raise_in_words(error: Exception, name: str) -> NoReturn:
    """Raise the error of a TensorFlow gradient; in words unless a trace tries again."""
    ends = tf.executing_eagerly() or not is_compiling()
    refused = refusal_by_gradient(error, name) if ends else None
    raise refused or error from None


def _depending(
    operations: Sequence[tf.Operation], sources: Sequence[tf.Tensor]
) -> list[tf.Operation]:
    """Return the operations that depend on `sources`; they are in creation order."""
    found = {source.ref() for source in sources}
    reached = []
    for op in operations:
        if any(tensor.ref() in found for tensor in op.inputs):
            reached.append(op)
            found.update(tensor.ref() for tensor in results(op))
    return reached


def _distinct(gradient: tf.IndexedSlices) -> tf.IndexedSlices:
    """Return the slices with each row once: slices of the same row are added up."""
    rows, index = tf.unique(gradient.indices)
    values = tf.math.unsorted_segment_sum(gradient.values, index, tf.size(rows))
    return tf.IndexedSlices(values, rows, gradient.dense_shape)


def dense(gradient: Any, source: Any) -> tf.Tensor:
    """Return a tensor of the shape and dtype of `source`; zeros for None.

    Raises:
        WrongDerivativeError: If the gradient has another shape or dtype.
    """
    if gradient is None:
        return tf.zeros_like(source)
    if isinstance(gradient, tf.IndexedSlices):
        # Slices of the same row are added up, as in the chain rule.
        return tf.math.unsorted_segment_sum(
            gradient.values, gradient.indices, tf.shape(source)[0]
        )
    fits = gradient.shape.is_compatible_with(source.shape)
    if not fits or gradient.dtype != source.dtype:
        raise WrongDerivativeError(
            "A gradient must have the shape and the dtype of what it is taken by.",
            got=f"{describe(gradient)} for {describe(source)}",
            hint="tf.reduce_sum, tf.broadcast_to or tf.cast in your tf.custom_gradient",
        )
    return gradient
