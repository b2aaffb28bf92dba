"""What SciPy was told, so that it can be told again: the way to resume its methods.

The memory of SciPy's methods is in the midst of its own code, where nobody can put it
away. But they are deterministic: told the same values and gradients again, in order,
SciPy ends up where it was, to the last bit, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.limits import Array

MOST_NUMBERS = 2**25
"""Numbers that are kept, 256 MB: n + 1 for an evaluation, n for a product with the
Hessian, n * n for a Hessian. Those of more are forgotten, and the run cannot resume."""

Answers = Mapping[str, Callable[..., Any]]


class Transcript:
    """All answers that a session of SciPy got, in order.

    Constraints, which are functions of x alone, are asked again and not kept.

    Args:
        origin: Where the session began, shape `[n]`.
        answers: What it was told, flat.
        iterations: How often it was asked for an iteration.

    Attributes:
        origin: As above.
        iterations: As above.
        is_whole: Whether nothing was forgotten.
    """

    def __init__(
        self, origin: Array, answers: Sequence[Array] = (), iterations: int = 0
    ) -> None:
        """Remember these."""
        self.origin = origin
        self.iterations = iterations
        self.is_whole = True
        self._answers = list(answers)
        self._count = sum(map(len, self._answers))

    def noting(self, answers: Answers) -> Answers:
        """Return functions that give these answers, and keep them."""

        def noted(answer: Callable[..., Any]) -> Callable[..., Any]:
            def give(*given: Any) -> Any:
                self._note(told := answer(*given))
                return told

            return give

        return {
            name: answer if name == "constraint" else noted(answer)
            for name, answer in answers.items()
        }

    def again(self, constraint: Callable[..., Any]) -> Answers:
        """Return functions that give the answers that were kept, in order."""
        kept = iter(self._answers)

        def fun(x: Array) -> Any:
            value, *_ = answer = _next(kept)
            return float(value) if len(answer) == 1 else (float(value), answer[1:])

        return {
            "fun": fun,
            "hessp": lambda x, v: _next(kept),
            "hess": lambda x: np.reshape(_next(kept), (len(x), len(x))),
            "constraint": constraint,
        }

    def tensors(self) -> list[tf.Tensor]:
        """Return where it began, all answers in one vector, and their lengths."""
        lengths = np.array([len(answer) for answer in self._answers], np.int64)
        whole = np.concatenate([np.zeros(0), *self._answers])
        return [tf.constant(part) for part in (self.origin, whole, lengths)]

    @classmethod
    def of(cls, tensors: Sequence[tf.Tensor], iterations: int) -> Transcript:
        """Return the transcript that `tensors` put away."""
        origin, whole, lengths = (tensor.numpy() for tensor in tensors)
        return cls(origin, np.split(whole, np.cumsum(lengths)[:-1]), iterations)

    def _note(self, told: Any) -> None:
        parts = told if isinstance(told, tuple) else (told,)
        answer = np.concatenate([np.ravel(part) for part in parts], dtype=np.float64)
        self._count += len(answer)
        self.is_whole = self._count <= MOST_NUMBERS
        if self.is_whole:
            self._answers.append(answer)
        else:
            self._answers.clear()


def went_another_way() -> InvalidArgumentError:
    """Return the error for a SciPy that does not repeat itself."""
    import scipy

    return InvalidArgumentError(
        "SciPy's methods go on by being told again what they were told before.",
        got=f"questions of SciPy {scipy.__version__} that it did not ask before",
        hint="SciPy, options and constraints as they were, or minimize(f, result.x)",
    )


def _next(kept: Iterator[Array]) -> Array:
    answer = next(kept, None)
    if answer is None:
        raise went_another_way()
    return answer.copy()  # SciPy may write into what it gets
