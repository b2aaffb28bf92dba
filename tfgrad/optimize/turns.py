"""One turn of the loop, for the two kinds of methods: pure ones, and Keras's.

A turn takes one evaluation. A pure method looks at it and says where to look next; an
optimizer of Keras moves the variables by the gradient it has, and then they are
evaluated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

from tfgrad.differences import EPSILONS
from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, either, ravel, unravel
from tfgrad.optimize.methods import PURE, named_method
from tfgrad.optimize.methods.keras_optimizer import KerasMethod, optimizer_factory
from tfgrad.optimize.methods.protocol import Bindable, Explained, Method, Point
from tfgrad.optimize.objective import Evaluation, Objective
from tfgrad.optimize.saddles import PRODUCTS, Array, lower_point


class Turn(NamedTuple):
    """What a turn leads to.

    Attributes:
        at: The evaluation of the current point.
        state: What the next turn needs.
        accepted: Whether the current point is a new one: a step is complete.
        failed: Whether the method cannot go on from here.
        expected: If so, by how much it had expected f to fall.
    """

    at: Evaluation
    state: Any
    accepted: Any = True
    failed: Any = False
    expected: Any = float("inf")


class PureState(NamedTuple):
    """What the turns of a pure method carry.

    Attributes:
        trial: Where to evaluate next, shape `[n]`.
        remembered: What the method has to remember.
        x: The current point, shape `[n]`.
    """

    trial: tf.Tensor
    remembered: Any
    x: tf.Tensor


class Turns(Protocol):
    """A method at work on an objective.

    Attributes:
        name: What to call it.
        failure: The status of a run that it gave up.
    """

    name: str
    failure: str

    @property
    def is_compiled(self) -> bool:
        """Whether a turn can be part of a trace."""

    @property
    def knows_solutions(self) -> bool:
        """Whether it ends at a solution without being told what one is."""

    def evaluate(self) -> Evaluation:
        """Evaluate the objective where the variables are."""

    def operations(self) -> list[str]:
        """Return the op types of an evaluation; none if it cannot be compiled."""

    def start(self, at: Evaluation) -> Any:
        """Return the state before the first turn."""

    def turn(self, at: Evaluation, state: Any) -> Turn:
        """Take one turn; may be part of a trace."""

    def point(self, state: Any) -> list[tf.Tensor]:
        """Return the current point, leaf by leaf."""

    def settle(self, state: Any) -> None:
        """Put the variables to the current point."""

    def gradient(self, at: Evaluation) -> list[tf.Tensor]:
        """Return the gradient of an evaluation, in its own units."""

    def variables(self) -> list[tf.Variable]:
        """Return the variables in which the method keeps what the next turn needs."""

    def prepare(self, at: Evaluation) -> None:
        """Do what the first turn does besides: turns were taken before."""

    def finish(self) -> bool:
        """Do what is due at the end; return whether that moved the variables."""

    def why(self, state: Any) -> tuple[str, str] | None:
        """Return a status and a sentence for a failed turn; None if it has no words."""


class KerasTurns:
    """Turns of an optimizer, which moves the variables by itself."""

    failure = ""  # it never gives up
    knows_solutions = False

    def __init__(self, objective: Objective, method: KerasMethod) -> None:
        """Bring the two together."""
        self._objective = objective
        self._method = method
        self.name = method.name

    @property
    def is_compiled(self) -> bool:
        """Whether a turn can be part of a trace."""
        return self._method.is_compiled

    @property
    def scales(self) -> bool:
        """Whether the optimizer scales the loss, and so looks after overflows."""
        return self._method.scale() is not None

    def evaluate(self, batch: tuple[Nest, ...] = ()) -> Evaluation:
        """Evaluate the objective where the variables are."""
        return self._objective.evaluate(self._method.scale(), batch)

    def operations(self) -> list[str]:
        """Return the op types of an evaluation; none if it cannot be compiled."""
        return self._objective.operations(self._method.scale())

    def start(self, at: Evaluation) -> Any:
        """Return nothing: an optimizer keeps its state in variables."""
        return ()

    def update(self, at: Evaluation) -> None:
        """Take one step by the gradient of an evaluation."""
        self._method.update(at.gradient)

    def turn(self, at: Evaluation, state: Any) -> Turn:
        """Update the variables and evaluate: every turn is a step."""
        self.update(at)
        return Turn(self.evaluate(), ())

    def point(self, state: Any) -> list[tf.Tensor]:
        """Return the values of the variables."""
        return self._objective.read()

    def settle(self, state: Any) -> None:
        """Do nothing: the variables are the current point."""

    def gradient(self, at: Evaluation) -> list[tf.Tensor]:
        """Return the gradient without the loss scale."""
        scale = self._method.scale()
        if scale is None:
            return at.gradient
        return [leaf / tf.cast(scale, leaf.dtype) for leaf in at.gradient]

    def variables(self) -> list[tf.Variable]:
        """Return the moments, the count of steps, the learning rate."""
        return self._method.variables()

    def prepare(self, at: Evaluation) -> None:
        """Compile the update: the first one alone is not part of a trace."""
        self._method.prepare(at.gradient)

    def finish(self) -> bool:
        """Let the optimizer put its averages in place, if it keeps any."""
        return self._method.finish()

    def why(self, state: Any) -> tuple[str, str] | None:
        """Return nothing: an optimizer takes all its steps."""
        return None


class PureTurns:
    """Turns of a pure method, which sees one vector and moves nothing by itself."""

    is_compiled = True

    def __init__(self, objective: Objective, method: Method) -> None:
        """Bring the two together; the variables must share one dtype."""
        self._objective = objective
        self.name = method.name
        dtypes = {variable.dtype.name for variable in objective.variables}
        if len(dtypes) > 1:
            raise InvalidArgumentError(
                f"`{self.name}` works on one vector of one dtype.",
                got=f"leaves of {' and '.join(sorted(dtypes))}",
                hint="cast them to one dtype, or a Keras optimizer such as 'adam'",
            )
        self._flat = _Flat(objective)
        self.failure: str = getattr(method, "failure", "linesearch")
        is_explained = isinstance(method, Explained)  # and has a Jacobian, no Hessian
        self.knows_curvature = isinstance(method, Bindable) and not is_explained
        if isinstance(method, Bindable):
            method = method.bind(self._flat)
        self._method: Any = method
        self.knows_solutions = isinstance(method, Explained)

    def evaluate(self) -> Evaluation:
        """Evaluate the objective where the variables are."""
        return self._objective.evaluate()

    def operations(self) -> list[str]:
        """Return the op types of an evaluation; none if it cannot be compiled."""
        return self._objective.operations()

    def start(self, at: Evaluation) -> Any:
        """Return the first trial, what the method remembers, and the current point."""
        x = ravel(self._objective.read())
        move = self._method.init(self._as_point(x, at))
        return PureState(move.x, move.state, x)

    def turn(self, at: Evaluation, state: Any) -> Turn:
        """Evaluate the trial and ask the method what to make of it."""
        trial, remembered, x = state
        self._objective.assign(unravel(trial, self._objective.variables))
        evaluation = self.evaluate()
        new, old = self._as_point(trial, evaluation), self._as_point(x, at)
        move = self._method.update(new, old, remembered)
        here = (trial, evaluation)
        if move.accepted is not True:
            here = either(move.accepted, here, (x, at))
        x, at = here
        state = PureState(move.x, move.state, x)
        return Turn(at, state, move.accepted, move.failed, move.expected)

    def point(self, state: Any) -> list[tf.Tensor]:
        """Return the current point, leaf by leaf."""
        return unravel(state.x, self._objective.variables)

    def settle(self, state: Any) -> None:
        """Put the variables to the current point; the last trial may lie elsewhere."""
        self._objective.assign(self.point(state))

    def gradient(self, at: Evaluation) -> list[tf.Tensor]:
        """Return the gradient as it is."""
        return at.gradient

    def variables(self) -> list[tf.Variable]:
        """Return none: what a pure method remembers is in its state."""
        return []

    def prepare(self, at: Evaluation) -> None:
        """Do nothing."""

    def finish(self) -> bool:
        """Do nothing."""
        return False

    def why(self, state: Any) -> tuple[str, str] | None:
        """Return what the method says about its state."""
        return self._method.why(state.remembered) if self.knows_solutions else None

    def lower_point(
        self,
        at: Evaluation,
        state: Any,
        evaluate: Callable[[], Evaluation],
        gradients: int | None,
    ) -> list[tf.Tensor] | None:
        """Return a point beside a stationary one where f is lower, leaf by leaf.

        Args:
            at: The evaluation of the current point, maybe a maximum or a saddle.
            state: What the next turn needs.
            evaluate: What to evaluate with where the variables are.
            gradients: How many that may cost; None means none, but products with the
                Hessian, which take long to compile, and tell better what is flat.
        """
        here = self._as_point(state.x, at)

        def product(direction: Array) -> Array:
            if gradients is None:
                v = tf.constant(direction, here.x.dtype)
                return np.asarray(self._flat.hvp(here.x, v), np.float64)
            # The step that balances rounding and curvature of the gradient.
            step = epsilon ** (1 / 3) * max(1.0, float(np.linalg.norm(x))) * direction
            ahead, behind = gradient(x + step), gradient(x - step)
            change: Array = (ahead - behind) / (2 * np.linalg.norm(step))
            return change

        def gradient(x: Array) -> Array:
            self._objective.assign(self._leaves(x))
            return np.asarray(ravel(self.evaluate().gradient), np.float64)

        def value(x: Array) -> float:
            self._objective.assign(self._leaves(x))
            return float(evaluate().row["fun"])

        operations = self.operations()
        if not operations or any("Random" in operation for operation in operations):
            return None
        x, grad = (np.asarray(v, np.float64) for v in (here.x, here.grad))
        epsilon = EPSILONS[here.x.dtype]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as that the second one runs eagerly
            try:
                lower = lower_point(
                    x,
                    float(here.fun),
                    grad,
                    product=product,
                    value=value,
                    epsilon=epsilon,
                    products=PRODUCTS if gradients is None else gradients // 2,
                )
            except Exception:  # a user's gradient may raise anything: nothing is known
                lower = None
        self.settle(state)
        return None if lower is None else self._leaves(lower)

    def _leaves(self, x: Array) -> list[tf.Tensor]:
        variables = self._objective.variables
        return unravel(tf.constant(x, variables[0].dtype), variables)

    def _as_point(self, x: tf.Tensor, at: Evaluation) -> Point:
        return Point(x, tf.cast(at.row["fun"], x.dtype), ravel(at.gradient))


class _Flat:
    """An objective of one vector, for methods that are bound to it.

    As `protocol.Curvature` and, of residuals, as `levenberg_marquardt.Linearizable`.
    """

    def __init__(self, objective: Any) -> None:
        """Remember it."""
        self._objective = objective

    def hvp(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return the Hessian at `x` times `v`, after putting the variables to `x`."""
        variables = self._objective.variables
        self._objective.assign(unravel(x, variables))
        return ravel(self._objective.hvp(unravel(v, variables)))

    def gauss_newton(self, x: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """Return J'J at `x` times `v`, after putting the variables to `x`."""
        variables = self._objective.variables
        self._objective.assign(unravel(x, variables))
        return ravel(self._objective.gauss_newton(unravel(v, variables)))

    def fits_in_memory(self) -> bool:
        """Return whether the Jacobian is small enough to be formed and factorised."""
        return self._objective.fits_in_memory()

    def linearize(self, x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return residuals and Jacobian at `x`, after putting the variables there."""
        self._objective.assign(unravel(x, self._objective.variables))
        return self._objective.linearize()


def make_turns(method: Any, learning_rate: Any) -> Callable[[Objective], Turns]:
    """Return the function from an objective to the turns of a method on it.

    Args:
        method: The name of a method, a pure method (`protocol.Method`), an instance of
            a Keras optimizer, or any object with `apply_gradients`.
        learning_rate: For an optimizer of Keras by name.

    Raises:
        InvalidArgumentError: If there is no such method, or it has no learning rate.
    """
    if isinstance(method, str):
        method = named_method(method)
        if method in PURE.values():
            method = method()
    if isinstance(method, Method) and not isinstance(method, type):
        if learning_rate is not None:
            raise InvalidArgumentError(
                f"`{method.name}` finds its own step size.",
                got=f"learning_rate={learning_rate!r}",
                hint='method="adam" or another optimizer of Keras, or no learning_rate',
            )
        return lambda objective: PureTurns(objective, method)
    factory = optimizer_factory(method, learning_rate)
    return lambda objective: KerasTurns(
        objective, KerasMethod(factory, objective.owners)
    )
