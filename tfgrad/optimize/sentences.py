"""How a run ended, as a sentence for each status."""

from __future__ import annotations

import numpy as np

from tfgrad.optimize.loop import Rows
from tfgrad.optimize.stopping import UNBOUNDED, Stopping

NO_SOLUTION = "no rule says this is a solution"


def sentence(
    status: str,
    step: int,
    rules: Stopping,
    seconds: float | None,
    nonfinite: Rows,
    why: str = "",
) -> str:
    """Return the sentence for a status.

    Args:
        status: Why the run ended.
        step: After how many steps.
        rules: The rules that were asked.
        seconds: How long it might take.
        nonfinite: With "nonfinite", rows of which the last is not finite.
        why: What is known about that.
    """
    if status == "nonfinite":
        return _about_nonfinite(step, nonfinite, f" ({why})" if why else "")
    return {
        "gtol": f"No element of the gradient is larger than {rules.gtol}.",
        "ftol": f"The last step changed f by less than {rules.ftol}, relatively.",
        "xtol": f"The last step was shorter than {rules.xtol}, relatively.",
        "target": f"f has reached the target {rules.target}.",
        "steps": f"All {step} steps were taken; {NO_SOLUTION}.",
        "epochs": f"All epochs are over, after {step} steps; {NO_SOLUTION}.",
        "data": f"The data ended after {step} steps, and cannot be repeated.",
        "unbounded": f"f fell below {UNBOUNDED:g}: it seems to have no minimum.",
        "precision": "Rounding hides what any further step would change.",
        "trustregion": "No step, however short, goes downhill; f may have a kink.",
        "scipy": "SciPy's method ended by itself.",
        "infeasible": "No point was found that keeps to the limits.",
        "linesearch": "No step downhill was found: f may have a kink here, or larger "
        "rounding errors than its size tells.",
        "seconds": f"The {seconds} seconds were over after {step} steps.",
        "callback": f"The callback asked to stop after step {step}.",
        "interrupted": f"Interrupted after step {step}; all until there is kept.",
        "stopped": f"Left after step {step}.",
    }[status]


def _about_nonfinite(step: int, rows: Rows, why: str) -> str:
    bad = {name: column[-1] for name, column in rows.columns.items()}
    if np.isfinite(bad["fun"]):
        what, value = "an element of the gradient", bad["grad_norm"]
    else:
        what, value = "f", bad["fun"]
    if bad["step"] == 0:
        return f"At the start, {what} is {value}{why}: no step was taken."
    return (
        f"In step {step + 1}, {what} became {value}{why}; "
        f"x is the last finite point, after step {step}."
    )
