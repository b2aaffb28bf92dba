"""Functions, points and planted bugs for the study of gradient checkers.

Nothing here imports a framework: each function gets the module `m` it is written in, so
that all checkers see the same mathematics at the same points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

SCALES = (1e-3, 1.0, 1e3)
SEEDS = (0, 1)
SIZE = 12
_MATRIX = np.random.default_rng(7).normal(size=(SIZE, SIZE)) / SIZE**0.5


def _rosenbrock(m: Any, x: Any) -> Any:
    return m.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def _network(m: Any, x: Any) -> Any:
    matrix = m.array(_MATRIX, x)
    return m.sum(m.tanh(m.matvec(matrix, m.tanh(m.matvec(matrix, x)))) * x)


def _deviation(m: Any, x: Any) -> Any:
    return m.sqrt(m.sum((x - m.sum(x) / SIZE) ** 2) / SIZE)


FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "square": lambda m, x: m.sum(x**2),
    "linear": lambda m, x: m.sum(x * m.array(_MATRIX[0], x)),
    "quadratic form": lambda m, x: m.sum(x * m.matvec(m.array(_MATRIX, x), x)),
    "rosenbrock": _rosenbrock,
    "cubic": lambda m, x: m.sum(x**3) / 3 - m.sum(x),
    "sines": lambda m, x: m.sum(m.sin(x)),
    "wave": lambda m, x: m.sin(m.sum(x) / SIZE),
    "log-sum-exp": lambda m, x: m.logsumexp(x),
    "softplus": lambda m, x: m.sum(m.softplus(x)),
    "sigmoid": lambda m, x: m.sum(m.sigmoid(m.sin(x)) * m.array(_MATRIX[1], x)),
    "network": _network,
    "smooth norm": lambda m, x: m.sqrt(1 + m.sum(x**2)),
    "deviation": _deviation,
    "rational": lambda m, x: m.sum(x / (1 + x**2)),
    "logarithm": lambda m, x: m.sum(m.log(1 + x**2)),
    "bell": lambda m, x: m.sum(m.exp(-(x**2) / 2)),
    "offset": lambda m, x: 1000 + m.sum(m.sin(x)),
    "mean square": lambda m, x: m.sum((m.matvec(m.array(_MATRIX, x), x) - 1) ** 2) / 2,
}

BUGS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "scaled by 1.01": lambda g, _: g * 1.01,
    "sign": lambda g, _: -g,
    "one zeroed": lambda g, generator: g * (np.arange(g.size) != _any(g, generator)),
    "one doubled": lambda g, generator: (
        g * (1 + (np.arange(g.size) == _any(g, generator)))
    ),
    "permuted": lambda g, generator: g[generator.permutation(g.size)],
}
"""What is done to a right gradient, given a generator, to make it a wrong one."""


class Case(NamedTuple):
    """One function at one point, right or with a planted bug.

    Attributes:
        function: Its name in `FUNCTIONS`.
        scale: The size of the point.
        seed: Of the point and of the bug.
        bug: Its name in `BUGS`; empty for a right gradient.
    """

    function: str
    scale: float
    seed: int
    bug: str

    @property
    def name(self) -> str:
        """The case in one line."""
        return f"{self.function}, scale {self.scale:g}, seed {self.seed}, {self.bug}"

    @property
    def point(self) -> np.ndarray:
        """The point, in float64."""
        return self.scale * np.random.default_rng(self.seed).normal(size=SIZE)

    def call(self, m: Any, x: Any) -> Any:
        """Return the value of the function."""
        return FUNCTIONS[self.function](m, x)

    def spoil(self, gradient: np.ndarray) -> np.ndarray:
        """Return the gradient with the bug in it, or as it is."""
        if not self.bug:
            return gradient
        generator = np.random.default_rng(self.seed + 100)
        return BUGS[self.bug](gradient, generator).astype(gradient.dtype)


def cases() -> Iterator[Case]:
    """Yield every function at every scale and seed, right and with every bug."""
    for function in FUNCTIONS:
        for scale in SCALES:
            for seed in SEEDS:
                for bug in ("", *BUGS):
                    yield Case(function, scale, seed, bug)


def is_wrong(right: np.ndarray, spoiled: np.ndarray) -> bool:
    """Return whether a bug changed the gradient by more than half a percent."""
    return bool(np.linalg.norm(spoiled - right) > 5e-3 * np.linalg.norm(right))


def _any(gradient: np.ndarray, generator: np.random.Generator) -> int:
    return int(generator.integers(gradient.size))
