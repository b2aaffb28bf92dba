"""The methods of a run, one after the other: mostly one, sometimes a chain of them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.constraints import Limits
from tfgrad.optimize.data import Source
from tfgrad.optimize.methods import PURE, named_method
from tfgrad.optimize.methods.keras_optimizer import optimizer_factory, optimizer_names
from tfgrad.optimize.methods.protocol import Method
from tfgrad.optimize.methods.scipy import SciPyMethod, scipy_method
from tfgrad.optimize.options import check_count
from tfgrad.optimize.problem import Problem
from tfgrad.optimize.solvers import Solver
from tfgrad.optimize.solvers.optimizer import OptimizerSolver
from tfgrad.optimize.solvers.pure import PureSolver


@dataclass(frozen=True)
class Stage:
    """One method of a run, and its share of the steps.

    Attributes:
        name: The method's.
        method: A pure method, a `SciPyMethod`, or a factory of optimizers.
        steps: How many it may take; None means what is left of `steps`.
        tells: Whether all of its state is in the `variables` that it lists.
    """

    name: str
    method: Any
    steps: int | None
    tells: bool = True

    @property
    def is_scipy(self) -> bool:
        """Whether it is one of SciPy's."""
        return isinstance(self.method, SciPyMethod)

    @property
    def is_by_batch(self) -> bool:
        """Whether each step takes a batch of the data, and not all of it."""
        return not self.is_scipy and not isinstance(self.method, Method)

    def solver(
        self,
        problem: Problem,
        source: Source | None = None,
        position: tuple[int, int] = (0, 0),
        limits: Limits | None = None,
    ) -> Solver:
        """Return the method at work on a problem; see `OptimizerSolver`."""
        if isinstance(self.method, Method):
            return PureSolver(problem, self.method, limits)
        return OptimizerSolver(problem, self.method, source, position)


@dataclass
class Chain:
    """The methods of a run, one after the other: mostly one.

    Attributes:
        stages: The methods.
        steps: What those without a number of their own share.
        index: Which one is at work.
        first: The step at which it began.
        used: How many of the shared steps were used before.
        taken: The name and the steps of each stage that is over.
    """

    stages: list[Stage]
    steps: int
    index: int = 0
    first: int = 0
    used: int = 0
    taken: list[tuple[str, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What to call the methods together."""
        return "+".join(stage.name for stage in self.stages)

    @property
    def stage(self) -> Stage:
        """The method at work."""
        return self.stages[self.index]

    @property
    def last(self) -> int:
        """The step at which its share is used up."""
        own = self.stage.steps
        return self.first + (self.steps - self.used if own is None else own)

    @property
    def total(self) -> int:
        """The step at which the run ends, at most."""
        after = self.stages[self.index + 1 :]
        shares = self.stage.steps is not None and any(s.steps is None for s in after)
        shared = self.steps - self.used if shares else 0
        return self.last + shared + sum(stage.steps or 0 for stage in after)

    @property
    def has_next(self) -> bool:
        """Whether another method follows."""
        return self.index + 1 < len(self.stages)

    def hand_over(self, step: int) -> None:
        """Go on with the next method from a step."""
        count = step - self.first
        if self.stage.steps is None:
            self.used += count
        self.taken.append((self.stage.name, count))
        self.index, self.first = self.index + 1, step

    def go_on(self, saved: Chain, step: int) -> None:
        """Go on where a run of the same stages was, `steps` counted from there."""
        self.index, self.first = saved.index, saved.first
        self.used, self.taken = saved.used, list(saved.taken)
        if self.stage.steps is None:
            self.steps += saved.used + step - saved.first
        elif not self.has_next:
            self.stages[-1] = replace(self.stage, steps=step - self.first + self.steps)

    def message(self, sentence: str, step: int) -> str:
        """Return a sentence and, of a chain, how many steps each stage took."""
        if not self.taken:
            return sentence
        taken = [*self.taken, (self.stage.name, step - self.first)]
        return f"{sentence} Steps: {', '.join(f'{n} {count}' for n, count in taken)}."


def make_stages(
    method: Any, learning_rate: Any, *, has_data: bool = False
) -> list[Stage]:
    """Return the stages of a method, or of a list of methods and (method, steps) pairs.

    Args:
        method: As for `minimize`.
        learning_rate: For the optimizers of Keras by name among the methods.
        has_data: There is data: the method is one, "adam" unless it is named.

    Raises:
        InvalidArgumentError: If there is no such method, a list is empty, or there is
            none that `learning_rate` is for.
    """
    if has_data:
        method = "adam" if method is None else method
        _require_one(method)
    if not isinstance(method, list):
        return [_stage("lbfgs" if method is None else method, learning_rate)]
    if not method:
        raise _bad_chain(method)
    pairs = [entry if isinstance(entry, tuple) else (entry, None) for entry in method]
    if any(len(pair) != 2 or isinstance(pair[0], list | tuple) for pair in pairs):
        raise _bad_chain(method)
    takes_rate = [_is_keras_name(entry) for entry, _ in pairs]
    if learning_rate is not None and not any(takes_rate):
        raise InvalidArgumentError(
            "`learning_rate` is for the optimizers of Keras by name in a chain.",
            got=f"learning_rate={learning_rate!r} with method={method!r}",
            hint='method=[("adam", 1000), "lbfgs"], or no learning_rate',
        )
    return [
        _stage(entry, learning_rate if takes else None, steps)
        for (entry, steps), takes in zip(pairs, takes_rate, strict=True)
    ]


def pure_method(method: Any, bounds: Any, rule: str, hint: str) -> Method:
    """Return the pure method that is meant; refuse others, with these words."""
    stages: list[Stage] = []
    with contextlib.suppress(InvalidArgumentError):  # here, fewer names are meant
        stages = make_stages(method, None)
    if len(stages) != 1 or not isinstance(stages[0].method, Method):
        raise InvalidArgumentError(rule, got=f"method={method!r}", hint=hint)
    if bounds is not None and not hasattr(stages[0].method, "within"):
        raise InvalidArgumentError(
            f"`{stages[0].name}` knows no bounds.",
            got="bounds with this method",
            hint='method="lbfgs"',
        )
    return stages[0].method


def _stage(method: Any, learning_rate: Any, steps: Any = None) -> Stage:
    if isinstance(method, tuple):
        raise _bad_chain(method)
    if steps is not None:
        check_count("steps", steps)
        steps = int(steps)
    is_scipy = isinstance(method, str) and ":" in method
    scipy = scipy_method(method) if is_scipy else None
    # The log's directory gets this name, and some systems allow no colon.
    name = f"scipy-{scipy.name}" if scipy else _name_of(method)
    if scipy is not None and learning_rate is not None:
        raise _no_rate(f"scipy:{scipy.name}", learning_rate)
    resolved = scipy or _resolved(method, learning_rate)
    return Stage(name, resolved, steps, _tells(method))


def check_tells(stages: Sequence[Stage]) -> None:
    """Raise for a method whose state cannot be saved.

    Raises:
        InvalidArgumentError: If there is one.
    """
    for stage in stages:
        if not stage.tells:
            raise InvalidArgumentError(
                "With `checkpoint`, an optimizer must list the variables of its state.",
                got=f"`{stage.name}`, without `build(variables)` and `variables`",
                hint="both, as Keras's optimizers have them, or no checkpoint",
            )


def _tells(method: Any) -> bool:
    if isinstance(method, str) or not hasattr(method, "apply_gradients"):
        return True
    return hasattr(method, "build") and hasattr(method, "variables")


def _resolved(method: Any, learning_rate: Any) -> Any:
    """Return the pure method, or the factory of optimizers, that a user means."""
    if isinstance(method, str):
        pure = PURE.get(method.lower())
        method = named_method(method) if pure is None else pure()
    if not isinstance(method, Method) or isinstance(method, type):
        return optimizer_factory(method, learning_rate)
    if learning_rate is not None:
        raise _no_rate(method.name, learning_rate)
    return method


def _no_rate(name: str, learning_rate: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"`{name}` finds its own step size.",
        got=f"learning_rate={learning_rate!r}",
        hint='method="adam" or another optimizer of Keras, or no learning_rate',
    )


def _require_one(method: Any) -> None:
    if isinstance(method, list | tuple):
        raise InvalidArgumentError(
            "With `data`, there is one method, and no chain: Keras's optimizers take a "
            "batch in each step, all others take all of the data.",
            got=f"method={method!r}",
            hint='method="adam", then again with method="lbfgs"',
        )


def _name_of(method: Any) -> str:
    if isinstance(method, str):
        return method.lower()
    name = getattr(method, "name", None) if hasattr(method, "init") else None
    kind = method if inspect.isclass(method) else type(method)
    return str(name or kind.__name__.lower())


def _is_keras_name(method: Any) -> bool:
    return isinstance(method, str) and method.lower() in optimizer_names()


def _bad_chain(method: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        "A chain is a list: each entry a method, or a method with its steps.",
        got=f"method={method!r}",
        hint='method=[("adam", 1000), "lbfgs"]',
    )
