"""False alarms and missed bugs: check_grads beside the checkers of the frameworks.

Every checker runs in a process of its own, JAX's and torch's if they are installed:
`TFGRAD_PEERS=/path/to/python pytest benchmarks/test_gradcheck_study.py` names the
Python that has them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OTHERS = ("tensorflow", "jax", "torch")


def run(checker, dtype):
    """Return (bug, verdict) for every case; None if the checker is not installed."""
    python = sys.executable
    if checker in ("jax", "torch"):
        python = os.environ.get("TFGRAD_PEERS", python)
    if subprocess.run(
        [python, "-c", f"import {checker}"], capture_output=True
    ).returncode:
        return None
    command = [python, str(HERE / "gradcheck_peer.py"), checker, dtype]
    found = subprocess.run(command, capture_output=True, check=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def share(verdicts, wanted, *, with_bug):
    """Return the percentage of the right (or the wrong) cases that got a verdict."""
    chosen = [verdict for bug, verdict in verdicts if bool(bug) == with_bug]
    return 100 * sum(verdict == wanted for verdict in chosen) / len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "alarms", "caught"), [("float32", 2.0, 94.0), ("float64", 0.0, 99.0)]
)
def test_false_alarms_and_missed_bugs(report, dtype, alarms, caught):
    ours = run("tfgrad", dtype)

    refused = share(ours, "fail", with_bug=False)
    found = share(ours, "fail", with_bug=True)
    for other in OTHERS:
        theirs = run(other, dtype)
        if theirs is not None:
            report(
                f"right {dtype} gradients not refused, against {other}",
                100 - refused,
                100 - share(theirs, "fail", with_bug=False),
                "%",
                f"at least {100 - alarms:g} %",
            )
            report(
                f"wrong {dtype} gradients refused, against {other}",
                found,
                share(theirs, "fail", with_bug=True),
                "%",
                f"at least {caught:g} %",
            )
    assert refused <= alarms
    assert found >= caught
