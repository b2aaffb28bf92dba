"""Differentiate, check, minimise and watch any TensorFlow function.

>>> import tfgrad
>>> float(tfgrad.derivative(lambda x: x * x)(5.0))
10.0

The public names are listed in `tfgrad.__all__`. Each is imported when it is first used,
so that `import tfgrad` takes milliseconds and does not import TensorFlow.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from tfgrad.quiet import quiet_import

if TYPE_CHECKING:  # `as` says that the name is for users
    from tfgrad.checks.gradcheck import check_grads as check_grads
    from tfgrad.checks.report import GradCheck as GradCheck
    from tfgrad.derivatives.elementwise import derivative as derivative
    from tfgrad.derivatives.forward import jvp as jvp
    from tfgrad.derivatives.matrices import hessian as hessian
    from tfgrad.derivatives.matrices import hvp as hvp
    from tfgrad.derivatives.matrices import jacobian as jacobian
    from tfgrad.derivatives.reverse import grad as grad
    from tfgrad.derivatives.reverse import value_and_grad as value_and_grad
    from tfgrad.derivatives.reverse import vjp as vjp
    from tfgrad.diagnosis.explain import explain as explain
    from tfgrad.diagnosis.explain_nan import ExplainNaN as ExplainNaN
    from tfgrad.differences import finite_difference as finite_difference
    from tfgrad.optimize.least_squares import LeastSquaresResult as LeastSquaresResult
    from tfgrad.optimize.least_squares import least_squares as least_squares
    from tfgrad.optimize.many import ManyResult as ManyResult
    from tfgrad.optimize.many import minimize_many as minimize_many
    from tfgrad.optimize.many_fits import ManyFitsResult as ManyFitsResult
    from tfgrad.optimize.many_fits import least_squares_many as least_squares_many
    from tfgrad.optimize.minimize import descend as descend
    from tfgrad.optimize.minimize import minimize as minimize
    from tfgrad.optimize.result import OptimizeResult as OptimizeResult
    from tfgrad.optimize.solution import solution as solution
    from tfgrad.optimize.train_step import train_step as train_step
    from tfgrad.runs.board import show as show
    from tfgrad.runs.plots import plot_path as plot_path
    from tfgrad.runs.plots import plot_runs as plot_runs
    from tfgrad.runs.reader import load_run as load_run
    from tfgrad.runs.reader import load_runs as load_runs
    from tfgrad.runs.run import Run as Run

__version__ = "0.1.0"

_HOMES = {
    "ExplainNaN": "tfgrad.diagnosis.explain_nan",
    "GradCheck": "tfgrad.checks.report",
    "LeastSquaresResult": "tfgrad.optimize.least_squares",
    "ManyFitsResult": "tfgrad.optimize.many_fits",
    "ManyResult": "tfgrad.optimize.many",
    "OptimizeResult": "tfgrad.optimize.result",
    "Run": "tfgrad.runs.run",
    "check_grads": "tfgrad.checks.gradcheck",
    "derivative": "tfgrad.derivatives.elementwise",
    "descend": "tfgrad.optimize.minimize",
    "explain": "tfgrad.diagnosis.explain",
    "finite_difference": "tfgrad.differences",
    "grad": "tfgrad.derivatives.reverse",
    "hessian": "tfgrad.derivatives.matrices",
    "hvp": "tfgrad.derivatives.matrices",
    "jacobian": "tfgrad.derivatives.matrices",
    "jvp": "tfgrad.derivatives.forward",
    "least_squares": "tfgrad.optimize.least_squares",
    "least_squares_many": "tfgrad.optimize.many_fits",
    "load_run": "tfgrad.runs.reader",
    "load_runs": "tfgrad.runs.reader",
    "minimize": "tfgrad.optimize.minimize",
    "minimize_many": "tfgrad.optimize.many",
    "plot_path": "tfgrad.runs.plots",
    "plot_runs": "tfgrad.runs.plots",
    "show": "tfgrad.runs.board",
    "solution": "tfgrad.optimize.solution",
    "train_step": "tfgrad.optimize.train_step",
    "value_and_grad": "tfgrad.derivatives.reverse",
    "vjp": "tfgrad.derivatives.reverse",
}

__all__ = [*_HOMES]


_ELSEWHERE = {
    "curve_fit": "least_squares",
    "fit": "minimize",
    "jacfwd": "jacobian",
    "jacrev": "jacobian",
}
"""What SciPy, Keras and JAX call functions whose names here are not like theirs."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        close = difflib.get_close_matches(name, __all__, n=1)
        close = [_ELSEWHERE[name]] if name in _ELSEWHERE else close
        hint = f"\n  try: tfgrad.{close[0]}" if close else ""
        raise AttributeError(f"module 'tfgrad' has no attribute {name!r}{hint}")
    with quiet_import():
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
