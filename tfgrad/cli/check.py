"""`tfgrad check`: are the derivatives of a function right?"""

from __future__ import annotations

import argparse
import dataclasses
import json

import tfgrad
from tfgrad.cli.function import function, require_points, values
from tfgrad.runs.record import to_json

_OPTIONS = ("order", "rtol")


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 if all passed, 1 if a check failed or was inconclusive."""
    f = function(options.function)
    require_points(f, options.at, "--at")
    at = [values(point, "at", float64=options.float64) for point in options.at]
    chosen = {n: v for n, v in vars(options).items() if n in _OPTIONS and v is not None}
    report = tfgrad.check_grads(f, *at, raises=False, **chosen)
    if options.json:
        passed = {"passed": bool(report)}
        print(json.dumps(to_json(passed | dataclasses.asdict(report))))
    else:
        print(report)
        report.raise_on_failure()
    return 0 if report else 1
