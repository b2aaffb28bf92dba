"""Solvers: what takes one step. One file for each kind of method.

A solver is three things. A `Stepper` takes a step, in three parts, so that a loop can
run each where it is cheapest: `evaluate` knows the function and nothing of the method;
`accept` says what becomes of the point that was evaluated; `move` goes on from there,
unless a rule has ended the run: `Ruled` asks. `Forms` says how steps are compiled. The
`Solver` itself does what is due before, between and after them, outside of any trace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from tfgrad.nested import either
from tfgrad.optimize import stopping
from tfgrad.optimize.evaluator import Evaluation
from tfgrad.optimize.history import Rows
from tfgrad.optimize.stopping import RUNNING, Step, Tolerances, code_of, judge

NO_XLA = "no XLA"
"""The key that is set if XLA was found to compute something else than the graph."""


class State(NamedTuple):
    """Where a run is: all that a loop carries, a checkpoint stores and a result holds.

    Attributes:
        x: The current point, a vector `[n]`; empty where variables hold it.
        evaluation: The function there, without what is not carried along.
        memory: What the solver needs for the next step.
        accepted: Whether the last evaluation was of a point that becomes current.
        code: Why the run ended, see `stopping.code_of`; RUNNING while it goes on.
        step: How many steps were taken.
        evaluations: How often the function was evaluated.
        expected: By how much the method expects f to fall yet; the dtype's largest
            number if it does not say.
        first: The value at the first point.
        batch: With data, the batches at hand and how many were taken; else empty.
    """

    x: Any
    evaluation: Evaluation
    memory: Any
    accepted: Any
    code: Any
    step: Any
    evaluations: Any
    expected: Any
    first: Any
    batch: Any = ()


Visit = Callable[[State, Rows], bool]
"""Takes where a run is, and its row; returns whether to go on."""


class Stepper:
    """Takes steps; may be traced. What it says nothing about is as here.

    Attributes:
        lookahead: How many steps beyond the current point a step evaluates: 1 for the
            trial that it leads to, 0 for the current point.
        is_eager: Whether `accept` and `move` have to run outside of a trace.
        expects: Whether the method says by how much it expects f to fall.
        knows_solutions: Whether the method says itself where a solution is: no rule is
            asked then.
        is_one_kernel: Whether XLA may make one kernel of all but `evaluate`; see
            `compiled.in_one_kernel`.
    """

    lookahead: int
    expects = True
    is_eager: Any = False
    knows_solutions: Any = False
    is_one_kernel: Any = False

    def has_next(self, state: State) -> Any:
        """Return whether there is something to evaluate next, shape `[]`."""
        return True

    def query(self, state: State) -> Any:
        """Return what `evaluate` needs of the state."""
        raise NotImplementedError

    def evaluate(self, query: Any) -> Evaluation:
        """Return the function at the point that comes next."""
        raise NotImplementedError

    def row(self, x: Any, evaluation: Evaluation) -> dict[str, Any]:
        """Return what the history keeps of a point.

        Args:
            x: What `query` returned; None for the current point.
            evaluation: The function there.
        """
        raise NotImplementedError

    def place(self, query: Any) -> dict[str, Any]:
        """Return what the history keeps of what `query` returned, part of a row."""
        return {}

    def of_any_size(self, state: Any, evaluation: Any) -> tuple[Any, Any]:
        """Return specs of a state and an evaluation, open for any number of parameters.

        As they are, if a step by single calls has to be traced for each number.
        """
        return state, evaluation

    def accept(self, state: State, evaluation: Evaluation) -> State:
        """Return the state with the point that was evaluated as the current one."""
        raise NotImplementedError

    def way(self, old: State, new: State) -> tuple[list[Any], list[Any]]:
        """Return the current point and the one before, leaf by leaf."""
        raise NotImplementedError

    def inputs(self, state: State, limit: int) -> tuple[Any, ...]:
        """Return what `move` takes besides, for a chunk of up to `limit` steps."""
        return ()

    def move(self, new: State, evaluation: Evaluation, *inputs: Any) -> State:
        """Go on from the current point, unless the code of `new` ends the run."""
        return new

    def for_xla(self) -> Stepper | None:
        """Return it in a form that XLA compiles once; None if there is none."""
        return self


class Ruled(NamedTuple):
    """A stepper whose steps the rules look at.

    Attributes:
        stepper: What takes a step.
        tolerances: The rules that were asked for.
    """

    stepper: Stepper
    tolerances: Tolerances

    @property
    def key(self) -> Any:
        """All that the rules depend on."""
        return self.tolerances, stopping.RULES, self.uses_expected

    @property
    def uses_expected(self) -> bool:
        """Whether a rule may ask for the fall of f that the method expects."""
        return self.stepper.expects and not self.stepper.knows_solutions

    def first(self, fun: Any, grad_max: Any, expected: Any, first: Any) -> tf.Tensor:
        """Return the code of the rules at a start."""
        expected = self._usable(expected)
        return judge(
            Step(
                fun, grad_max, [fun], expected, first, fun, [fun], expected,
                tf.constant(True), self.tolerances,
            )
        )  # fmt: skip

    def step(self, state: State, evaluation: Evaluation, *inputs: Any) -> State:
        """Return the state after a step, given the evaluation of it."""
        new = self.stepper.accept(state, evaluation)
        judged = self.code(state, new)
        is_asked = (
            new.accepted & (new.code != code_of("nonfinite")) & (judged != RUNNING)
        )
        new = new._replace(code=either(is_asked, judged, new.code))
        return self.stepper.move(new, evaluation, *inputs)

    def code(self, old: State, new: State) -> tf.Tensor:
        """Return the code of the rules after a step."""
        x: tuple[list[Any], list[Any]] = ([], [])
        if self.tolerances.xtol is not None:
            x = self.stepper.way(old, new)
        return judge(
            Step(
                fun=new.evaluation.value,
                grad_max=new.evaluation.grad_max,
                x=x[0],
                expected=self._usable(new.expected),
                first=new.first,
                before_fun=old.evaluation.value,
                before_x=x[1],
                before_expected=old.expected,
                is_start=new.step == 0,
                tolerances=self.tolerances,
            )
        )

    def _usable(self, expected: tf.Tensor) -> tf.Tensor | None:
        """Return the fall that a rule may use; None if the method says none."""
        return expected if self.uses_expected else None


class Form(NamedTuple):
    """How steps are run.

    Attributes:
        name: "calls" (a call of each part), "graph" or "xla" (one compiled loop).
        evaluations: The number of evaluations from which on it is another form.
    """

    name: str
    evaluations: int = 2**62


class Forms:
    """In which form steps are run, and where what was compiled for them is kept."""

    def form(self, state: State, planned: int, jit: bool | str) -> Form:
        """Return how the next steps are run.

        Args:
            state: Where the run is.
            planned: How many steps there will be in all, at most.
            jit: As for `minimize`.
        """
        raise NotImplementedError

    def kept(self) -> tuple[Any, Any]:
        """Return a dict to keep compiled steps in, and what they depend on.

        None in place of the dict says that they serve all functions.
        """
        raise NotImplementedError

    def kept_with_f(self) -> tuple[Any, Any]:
        """Return the same for what depends on the function, too."""
        return self.kept()

    def variables(self) -> list[tf.Variable]:
        """Return what a compiled step reads and writes, in the same order always."""
        return []

    def refresh(self) -> None:
        """Take note of what the user may have changed in what traces hold."""


class Solver:
    """A method at work on a problem; the functions here are the defaults.

    Attributes:
        stepper: What takes its steps.
        forms: How they are compiled.
    """

    stepper: Any
    forms: Forms

    # --- where a run is ---

    def init(
        self, x: list[tf.Tensor] | None = None, before: State | None = None
    ) -> tuple[State, Evaluation | None]:
        """Return where a run begins, and the evaluation of it, if it was made.

        Args:
            x: The leaves of a point to begin anew at; None for the problem's start.
            before: The run until there.
        """
        raise NotImplementedError

    def point(self, state: State) -> list[tf.Tensor]:
        """Return the leaves of the current point."""
        raise NotImplementedError

    def gradient(self, evaluation: Evaluation) -> list[tf.Tensor]:
        """Return the leaves of the gradient of an evaluation, without a loss scale."""
        raise NotImplementedError

    def variables(self) -> list[tf.Variable]:
        """Return the variables that belong to where the run is."""
        raise NotImplementedError

    def named(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of rows with the names of leaves for those of a vector."""
        return columns

    # --- between steps, and at the end ---

    def prepare(self, state: State) -> State:
        """Return the state with what the next evaluation takes at hand."""
        return state

    def settle(self, state: State) -> None:
        """Put the user's variables to the current point."""

    def look(self, state: State) -> Evaluation:
        """Return the function at the current point, where f leaves what it writes."""
        return state.evaluation

    def refresh(self, state: State) -> State:
        """Return the state for what f reads now: a user may have changed it."""
        return state

    def recover(self, state: State) -> tuple[State, str]:
        """Go back from a point that is not finite; return also what made it so."""
        raise NotImplementedError

    def escape(self, state: State) -> tuple[State, Evaluation | None]:
        """Leave a point that may be a maximum or a saddle, if it is one.

        Returns:
            The state that goes on beside it, and the evaluation there; or the same
            state, and None.
        """
        return state, None

    def finish(self, state: State) -> tuple[State, Evaluation | None]:
        """Do what is due at the end of the run.

        Returns:
            The state, and the evaluation of its point if the history lacks it.
        """
        return state, None

    def why(self, state: State) -> tuple[str, str] | None:
        """Return the method's own status and sentence, if it gave up and has some."""
        return None
