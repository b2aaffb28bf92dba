"""What a problem is solved for: values that f takes, or variables that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

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
from tfgrad.optimize.distribute import is_one_of_several


class Unknowns:
    """The point that is moved, and where it is kept.

    Args:
        f: The function.
        x0: Where to start; None for a function of variables.
        wrt: The variables; None and no `x0` means all trainable ones that `f` reads.

    Attributes:
        takes_values: Whether `f` takes the point as its first argument.
        template: The nest to pack an answer in.
        owners: The variables, Keras's as Keras has them: some of its optimizers ask for
            paths. Empty for a function of values, and until they are found.

    Raises:
        InvalidArgumentError: If there is no such point.
    """

    def __init__(self, f: Callable[..., Any], x0: Nest, wrt: Nest) -> None:
        _check_sources(f, x0, wrt)
        self.takes_values = x0 is not None
        self.owners: list[Any] = []
        if self.takes_values:
            self.template = _checked_start(x0)
        elif wrt is None:
            self.template = ()
        else:
            self.template = variables_of(wrt)
            self.owners = tf.nest.flatten(open_modules(wrt))
            _check_distinct(self.variables)

    def found(self, variables: list[Any]) -> None:
        """Let them be these variables."""
        self.owners = variables
        self.template = variables if len(variables) > 1 else variables[0]

    @property
    def wrt(self) -> Nest:
        """What f is differentiated by: variables; None for its first argument."""
        return None if self.takes_values else self.template

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that are moved; none for a function of values."""
        return [] if self.takes_values else tf.nest.flatten(self.template)

    @property
    def leaves(self) -> list[tf.TensorSpec]:
        """The specs of the leaves of the point."""
        leaves = tf.nest.flatten(self.template)
        return [tf.TensorSpec(leaf.shape, leaf.dtype) for leaf in leaves]

    @property
    def dtype(self) -> tf.DType | None:
        """The dtype that all leaves share; None if they do not, or are not known."""
        dtypes = {leaf.dtype for leaf in self.leaves}
        return dtypes.pop() if len(dtypes) == 1 else None

    def start(self) -> list[tf.Tensor]:
        """Return the leaves of the point to start from; of variables, where they are.

        They have been found before.
        """
        if self.takes_values:
            return list(tf.nest.flatten(self.template))
        return [variable.read_value() for variable in self.variables]

    def assign(self, x: Sequence[tf.Tensor]) -> None:
        """Put the variables to a point, leaf by leaf; of values there are none."""
        for variable, value in zip(self.variables, x, strict=False):
            variable.assign(value)

    def restart(self, x: Sequence[tf.Tensor]) -> None:
        """Let `start` return a point from now on; variables are put there."""
        if self.takes_values:
            self.template = self.pack(x)
        self.assign(x)

    def pack(self, leaves: Sequence[Any]) -> Nest:
        """Return one tensor per leaf in the structure that the user passed."""
        return tf.nest.pack_sequence_as(self.template, list(leaves))

    def named(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """Return the leaves of a point by their names in the history."""
        return dict(named_leaves(self.pack(leaves), "x"))

    def arguments(
        self, x: Sequence[tf.Tensor] | None, batch: tuple[Nest, ...] = ()
    ) -> tuple[Nest, ...]:
        """Return what f is called with at a point, where variables are then put.

        Args:
            x: The leaves of the point; None leaves variables where they are.
            batch: What f takes besides.
        """
        if self.takes_values:
            assert x is not None
            return (self.pack(x), *batch)
        if x is not None:
            self.assign(x)
        return batch


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
    if x0 is None and wrt is None and is_one_of_several():
        raise InvalidArgumentError(
            "With several workers, `wrt` names the variables: they tell who writes.",
            got=f"neither `x0` nor `wrt` for `{name_of(f)}`",
            hint="minimize(loss, wrt=model, ...)",
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
    require_numbers(point)
    return point


def require_numbers(point: Nest) -> None:
    """Refuse a start without a number.

    Raises:
        InvalidArgumentError: In this case.
    """
    if all(leaf.shape.num_elements() == 0 for leaf in tf.nest.flatten(point)):
        raise InvalidArgumentError(
            "`x0` must hold at least one number.",
            got=f"x0={describe(point)}",
            hint="a number, an array, or a nest of them to start from",
        )
