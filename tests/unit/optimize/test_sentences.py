"""Every status has a sentence of its own."""

import numpy as np
import pytest

from tfgrad.optimize.loop import Rows
from tfgrad.optimize.methods import PURE
from tfgrad.optimize.methods.levenberg_marquardt import LevenbergMarquardt
from tfgrad.optimize.methods.scipy import SciPyMethod
from tfgrad.optimize.result import OptimizeResult
from tfgrad.optimize.saved import UNFINISHED
from tfgrad.optimize.sentences import sentence
from tfgrad.optimize.stages import HANDS_OVER
from tfgrad.optimize.stopping import SOLUTIONS, STATUSES, Stopping

FAILURES = {getattr(method, "failure", "linesearch") for method in PURE.values()}
FAILURES |= {LevenbergMarquardt.failure, SciPyMethod.failure}

# "running" is no end, and what "gave up" is called the method says.
ENDS = (
    {*STATUSES} - {"running", "gave up"} | FAILURES | HANDS_OVER | UNFINISHED - {None}
)
ENDS |= {"steps", "epochs", "data", "seconds", "callback"}


def said(status):
    last = {"step": [7], "fun": [np.nan], "grad_norm": [np.nan]}
    rows = Rows({name: np.array(column) for name, column in last.items()})
    return sentence(status, 6, Stopping(1.0, 2.0, 3.0, 4.0), 5.0, rows)


@pytest.mark.parametrize("status", sorted(ENDS))
def test_a_status_has_a_sentence_and_stands_in_the_docstring(status):
    text = said(status)

    assert text[0].isupper() or text.startswith("f ")
    assert text.endswith(".")
    assert "None" not in text
    assert ("no rule says" in text) <= (status not in SOLUTIONS)
    assert f'"{status}"' in str(OptimizeResult.__doc__)


def test_no_two_statuses_share_a_sentence():
    assert len({said(status) for status in ENDS}) == len(ENDS)
