"""Differentiate, check, minimise and watch any TensorFlow function.

>>> import tfgrad
>>> float(tfgrad.derivative(lambda x: x * x)(5.0))
10.0

The public names are listed in `tfgrad.__all__`. Each is imported when it is first used,
so that `import tfgrad` takes milliseconds and does not import TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfgrad.derivatives.reverse import derivative, grad, value_and_grad
    from tfgrad.differences import finite_difference
    from tfgrad.optimize.minimize import descend, minimize
    from tfgrad.optimize.result import OptimizeResult
    from tfgrad.runs.board import show
    from tfgrad.runs.writer import Run

__version__ = "0.1.0"

_HOMES = {
    "OptimizeResult": "tfgrad.optimize.result",
    "Run": "tfgrad.runs.writer",
    "derivative": "tfgrad.derivatives.reverse",
    "descend": "tfgrad.optimize.minimize",
    "finite_difference": "tfgrad.differences",
    "grad": "tfgrad.derivatives.reverse",
    "minimize": "tfgrad.optimize.minimize",
    "show": "tfgrad.runs.board",
    "value_and_grad": "tfgrad.derivatives.reverse",
}

__all__ = [
    "OptimizeResult",
    "Run",
    "derivative",
    "descend",
    "finite_difference",
    "grad",
    "minimize",
    "show",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tfgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
