"""`tfgrad explain`: why is a gradient None, zero or not finite?"""

from __future__ import annotations

import argparse
import json

import tfgrad
from tfgrad.cli.function import function, require_points, values

_FIELDS = ["name", "status", "place", "reason", "hint"]
_AS_MEANT = ("connected", "stopped")


def run(options: argparse.Namespace) -> int:
    """Print the report; 0 if each gradient arrives or is stopped on purpose."""
    f = function(options.function)
    require_points(f, options.at, "--at")
    at = [values(point, "at", float64=options.float64) for point in options.at]
    report = tfgrad.explain(f, *at)
    if options.json:
        findings = [{n: getattr(f, n) for n in _FIELDS} for f in report.findings]
        print(json.dumps({"function": report.function, "findings": findings}))
    else:
        print(report)
    return 0 if all(f.status in _AS_MEANT for f in report.findings) else 1
