"""`tfgrad minimize`: the minimum of a function, as a table or as JSON."""

from __future__ import annotations

import argparse
import json

import tfgrad
from tfgrad.cli.function import function, require_points, values
from tfgrad.runs.record import to_json

_FIELDS = (
    *("x", "fun", "grad", "nit", "nfev", "success", "status", "message", "seconds"),
    "directory",
)
_OPTIONS = (
    *("method", "learning_rate", "steps", "gtol", "ftol", "xtol", "target", "seconds"),
    *("log", "checkpoint"),
)


def run(options: argparse.Namespace) -> int:
    """Print the result; 0 if a stopping rule says that the point is a solution."""
    f = function(options.function)
    require_points(f, options.x0, "--x0")
    chosen = {n: v for n, v in vars(options).items() if n in _OPTIONS and v is not None}
    x0 = options.x0
    if x0 is not None:
        x0 = values(x0, "x0", float64=options.float64)
    result = tfgrad.minimize(f, x0, **chosen)
    if options.json:
        print(json.dumps({name: to_json(getattr(result, name)) for name in _FIELDS}))
    else:
        print(result)
    return 0 if result.success else 1
