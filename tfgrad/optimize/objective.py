"""The function being minimised, in the one form that every method calls."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from tfgrad.derivatives.calls import Call
from tfgrad.derivatives.outputs import objective
from tfgrad.derivatives.recording import Recording
from tfgrad.derivatives.soundness import may_drop
from tfgrad.derivatives.tracing import Traces
from tfgrad.diagnosis.explain import explain
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import (
    Nest,
    describe,
    is_variable,
    name_of,
    named_leaves,
    open_modules,
    to_tensors,
    variables_of,
)

SMALL = 10
"""Parameters, and numbers in an aux value, up to which each step's are kept in the
history."""


class Evaluation(NamedTuple):
    """The objective at one point.

    Attributes:
        row: What the history keeps of it, by name: `fun`, `grad_norm` (the largest
            |element| of the gradient), `x` and aux values while they are small.
        gradient: Its leaves, times the scale that the method asked for.
    """

    row: dict[str, tf.Tensor]
    gradient: list[tf.Tensor]


class Objective:
    """A user's function, and the variables that the loop moves.

    Args:
        f: The function: of one nest of values, or of nothing.
        x0: Where to start; None for a function of variables.
        wrt: The variables; None and no `x0` means all trainable ones that `f` reads.
        has_aux: `f` returns `(value, aux)`.
        jit: Compile with XLA by itself, whatever loop it is part of.

    Attributes:
        takes_values: Whether `f` takes the point as its first argument.
        example: What else it takes: the arguments made of a batch, if there is data.
        is_compiled: Whether the last evaluation of a batch was.
        variables: What the loop moves: the user's variables, or new ones that hold the
            values. Empty until the first evaluation if they are still to be found.
        owners: The same, Keras's as Keras has them: some of its optimizers ask for
            paths.
        template: The nest to pack an answer in.
        takes_many_steps: Whether a run is likely to: then it pays that TensorFlow
            optimises the graphs.
    """

    takes_many_steps = True

    def __init__(
        self,
        f: Callable[..., Any],
        x0: Nest,
        wrt: Nest,
        *,
        has_aux: bool,
        jit: bool = False,
    ) -> None:
        """Check the point; nothing is traced."""
        _check_sources(f, x0, wrt)
        self.f = f
        self.name = name_of(f)
        self._has_aux = has_aux
        self.takes_values = x0 is not None
        self._finds = x0 is None and wrt is None
        if self.takes_values:
            self.template = _checked_start(x0)
            leaves = tf.nest.flatten(self.template)
            self.owners = [
                keras.Variable(leaf, dtype=leaf.dtype.name) for leaf in leaves
            ]
            self.variables = [owner.value for owner in self.owners]
        else:
            self.template = () if self._finds else variables_of(wrt)
            self.owners = [] if self._finds else tf.nest.flatten(open_modules(wrt))
            self.variables = tf.nest.flatten(self.template)
            _check_distinct(self.variables)
        self.example: tuple[Nest, ...] = ()
        self.is_compiled = True
        self._traces = Traces(self._run, f, jit=jit)
        self._products = Traces(self._multiply, f, jit=False)

    def evaluate(
        self, scale: tf.Tensor | None = None, batch: tuple[Nest, ...] = ()
    ) -> Evaluation:
        """Return value and gradient where the variables are; traced once.

        Args:
            scale: What to multiply the gradient by: a loss scale, in the value's dtype.
            batch: What `f` takes besides the point.
        """
        evaluation: Evaluation = self._traces(scale, batch)
        if batch:
            self.is_compiled = self._traces.graph(scale, batch) is not None
        return evaluation

    def hvp(self, direction: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """Return the Hessian, where the variables are, times a direction.

        It is made of the trace of an evaluation, which has to come first.

        Args:
            direction: One tensor for each variable.
        """
        product: list[tf.Tensor] = self._products(*direction)
        return product

    def read(self) -> list[tf.Tensor]:
        """Return the point: the values of the variables now."""
        return [variable.value() for variable in self.variables]

    def assign(self, x: Sequence[tf.Tensor]) -> None:
        """Put the variables to a point, leaf by leaf."""
        for variable, value in zip(self.variables, x, strict=True):
            variable.assign(value)

    @property
    def dtype(self) -> tf.DType | None:
        """The dtype that all variables share; None if they do not, or are not known."""
        dtypes = {variable.dtype for variable in self.variables}
        return dtypes.pop() if len(dtypes) == 1 else None

    def point_argument(self) -> tuple[Nest, ...]:
        """Return the point as the one argument that it is; nothing for variables."""
        return (self.pack(self.read()),) if self.takes_values else ()

    def arguments(self) -> tuple[Nest, ...]:
        """Return what the user's function is called with where the variables are."""
        return (*self.point_argument(), *self.example)

    def blame(self, *batch: Nest) -> str:
        """Return which op and line are not finite where the variables are; "" if none.

        Args:
            *batch: What else the user's function takes.
        """

        def value(*arguments: Nest) -> Any:
            output = self.f(*arguments)
            return output[0] if self._has_aux else output

        wrt = None if self.takes_values else self.variables
        with contextlib.suppress(Exception):  # what ended is to be told in any case
            findings = explain(value, *self.point_argument(), *batch, wrt=wrt).findings
            spoiled = (each for each in findings if each.status == "non-finite")
            found = next((each.culprit for each in spoiled if each.culprit), None)
            if found is not None:
                return f"{found.label} at {found.where}: {found.reason}; {found.hint}"
        return ""

    def facts(self) -> dict[str, Any]:
        """Return what makes it the same problem in another process."""
        leaves = named_leaves(self.pack(self.read()), "x") if self.variables else []
        return {
            "x": [f"{name} of {describe(leaf)}" for name, leaf in leaves],
            "start": _digest(self.read()) if self.takes_values else None,
            "has_aux": self._has_aux,
        }

    @contextlib.contextmanager
    def put_back_on_error(self) -> Iterator[None]:
        """Put the variables back to where they are, should the block raise."""
        before = self.read()
        try:
            yield
        except Exception:
            self.assign(before)
            raise

    def others(self) -> list[tf.Variable]:
        """Return the other variables that f reads: seeds, averages, what is frozen."""
        own = {id(variable) for variable in self.variables}
        return [v for v in self._traces.variables() if id(v) not in own]

    def operations(self, scale: tf.Tensor | None = None) -> list[str]:
        """Return the op types of an evaluation; none if it could not be compiled."""
        return self._traces.operations(scale, ())

    def pack(self, leaves: Sequence[tf.Tensor]) -> Nest:
        """Return one tensor per variable in the structure that the user passed."""
        return tf.nest.pack_sequence_as(self.template, list(leaves))

    def _run(
        self,
        f: Callable[..., Any],
        scale: tf.Tensor | None,
        batch: tuple[Nest, ...],
    ) -> Evaluation:
        recording = self._record(self._call(f, batch))
        if self._finds and not self.variables:
            self._found(recording.sources)
        gradient = recording.gradients(scale)
        row = {
            "fun": recording.output,
            "grad_norm": _largest(gradient, scale, recording.output.dtype),
            **self._small_point(),
            **_small(_named_aux(recording.aux)),
        }
        return Evaluation(row, gradient)

    def _multiply(
        self, f: Callable[..., Any], *direction: tf.Tensor
    ) -> list[tf.Tensor]:
        # Reverse over reverse, as in tfgrad.hvp: no op of TensorFlow refuses it.
        call = self._call(f)
        if self._evaluates_soundly():
            call = replace(call, variables=self.pack(self.variables))
            recording = Recording(lambda _: self.evaluate().gradient, call)
        else:
            recording = Recording(lambda call: self._record(call).gradients(), call)
        return recording.gradients(direction)

    def _evaluates_soundly(self) -> bool:
        """Return whether the trace of the evaluation can be differentiated as it is.

        Else f has to be traced again, repaired: its gradient would lack a term.
        """
        graph = self._traces.graph(None, ())
        return graph is not None and not may_drop(graph.get_operations())

    def _call(self, f: Callable[..., Any], batch: tuple[Nest, ...] = ()) -> Call:
        """Return the call of the user's function where the variables are."""
        variables = None if self.takes_values else self.template
        arguments = (*self.point_argument(), *batch)
        return Call(f, self.name, ("x",), arguments, {}, 0, variables)

    def _record(self, call: Call) -> Recording:
        return Recording(objective(self._has_aux), call, has_aux=self._has_aux)

    def _small_point(self) -> dict[str, tf.Tensor]:
        count = sum(variable.shape.num_elements() for variable in self.variables)
        return _small({"x": self.pack(self.read())}) if count <= SMALL else {}

    def _found(self, variables: Sequence[tf.Variable]) -> None:
        if not variables:
            raise InvalidArgumentError(
                "Without `x0` and `wrt`, the function must read trainable variables.",
                got=f"`{self.name}` reads none",
                hint="minimize(f, x0) for a function of values, or tf.Variable in f",
            )
        self.variables = self.owners = list(variables)
        self.template = list(variables) if len(variables) > 1 else variables[0]


def _check_sources(f: Any, x0: Nest, wrt: Nest) -> None:
    if not callable(f):
        raise InvalidArgumentError(
            "The first argument is the function to minimise.",
            got=f"f={describe(f)}",
            hint="tfgrad.minimize(lambda x: (x + 1) ** 2, 0.0)",
        )
    if x0 is not None and wrt is not None:
        raise InvalidArgumentError(
            "Either `x0` holds the values to start from, or `wrt` names the variables.",
            got="both `x0` and `wrt`",
            hint="minimize(f, x0), or minimize(f, wrt=variables)",
        )


def _check_distinct(variables: Sequence[tf.Variable]) -> None:
    if len({id(variable) for variable in variables}) < len(variables):
        raise InvalidArgumentError(
            "`wrt` must name each variable once.",
            got=f"{len(variables)} variables, some of them the same",
            hint="leave out the repeated ones; a model lists shared weights once",
        )


def _checked_start(x0: Nest) -> Nest:
    for path, leaf in named_leaves(x0, "x0"):
        if is_variable(leaf):
            raise InvalidArgumentError(
                "`x0` holds values; variables, which change in place, go to `wrt=`.",
                got=f"`{path}` is {describe(leaf)}",
                hint="minimize(f, wrt=variable), or variable.numpy() as the start",
            )
    point = to_tensors(x0, "x0")
    if sum(leaf.shape.num_elements() for leaf in tf.nest.flatten(point)) == 0:
        raise InvalidArgumentError(
            "`x0` must hold at least one number.",
            got=f"x0={describe(x0)}",
            hint="a number, an array, or a nest of them to start from",
        )
    return point


def _digest(leaves: Sequence[tf.Tensor]) -> str:
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(leaf.numpy().tobytes())
    return digest.hexdigest()


def _largest(gradient: list[tf.Tensor], scale: Any, dtype: tf.DType) -> tf.Tensor:
    """Return the largest |element|, without the scale; an empty leaf counts as 0."""
    sizes = [tf.abs(leaf) for leaf in gradient if leaf.shape.num_elements() != 0]
    largest = [tf.reduce_max(leaf) if leaf.shape.rank else leaf for leaf in sizes]
    largest = [tf.cast(leaf, dtype) for leaf in largest]
    norm = largest[0] if len(largest) == 1 else tf.reduce_max(tf.stack(largest))
    return norm if scale is None else norm / scale


def _named_aux(aux: Any) -> dict[str, Any]:
    if aux is None:
        return {}
    return dict(aux) if isinstance(aux, dict) else {"aux": aux}


def _small(values: dict[str, Any]) -> dict[str, tf.Tensor]:
    """Return the numbers in `values` that a history can keep, by name."""
    pairs = [pair for name, nest in values.items() for pair in named_leaves(nest, name)]
    tensors = {
        name: tf.convert_to_tensor(leaf)
        for name, leaf in pairs
        if isinstance(leaf, tf.Tensor | int | float)
    }
    count = sum(tensor.shape.num_elements() or SMALL + 1 for tensor in tensors.values())
    return tensors if count <= SMALL else {}
