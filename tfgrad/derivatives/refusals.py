"""What TensorFlow raises where it cannot differentiate, in words: which op, which line.

Errors that a user's own op raises are left as they are.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

from tfgrad.derivatives.soundness import every
from tfgrad.diagnosis.lines import line_of, made_by_gradient, reason_of
from tfgrad.errors import NoGradientError

_NODE = re.compile(r"(?:Detected at node|\{\{node) (?P<name>[^\s}]+)")

_PASSED_OVER = ("CheckNumerics", "Assert", "Placeholder")
"""What the user asks is said by the user's op; a placeholder has the name of an op."""

_HINT = "another form of the same function; float32 on a CPU; a tf.custom_gradient"


def is_made_twice(error: Exception) -> bool:
    """Return whether TensorFlow refuses to add a gradient of the same name again.

    Within a gradient of its own, as that of `tf.nn.ctc_loss`, loops and branches have
    names that do not change, and so have their gradients, one for each order.
    """
    return "add a duplicate function" in str(error)


def refusal_at_run_time(
    error: Exception, graph: Any, name: str
) -> NoGradientError | None:
    """Return the error for a gradient op that failed when it ran, if one did."""
    if is_made_twice(error):
        return refusal_by_gradient(error, name)
    if re.search("XLA|tf2xla", str(error)):
        return None
    nodes = {match["name"].split("/")[-1] for match in _NODE.finditer(str(error))}
    for op in every(graph.get_operations()):
        if op.type in _PASSED_OVER:
            continue
        if op.name.split("/")[-1] in nodes and made_by_gradient(op):
            return NoGradientError(
                f"TensorFlow cannot compute the derivative of `{name}` here.",
                got=f"{op.type} at {line_of(op)}: {reason_of(error)}",
                hint=_HINT,
            )
    return None


def refusal_by_gradient(error: Exception, name: str) -> NoGradientError | None:
    """Return the error for an op whose gradient could not be built, if one was."""
    if is_made_twice(error):
        return NoGradientError(
            f"TensorFlow has no derivative of this order of `{name}`.",
            got="a loop or a branch in a gradient of TensorFlow's own, as in "
            "tf.nn.ctc_loss, which it can differentiate once in a process",
            hint="tfgrad.finite_difference of tfgrad.grad(f); another form of the op",
        )
    missing = re.search(r"op type: (\w+)", str(error))
    if isinstance(error, LookupError) and missing:
        return NoGradientError(
            f"TensorFlow has no derivative of this order of `{name}`.",
            got=f"{missing[1]}, an op that has no gradient",
            hint=_HINT,
        )
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.endswith("_grad.py"):
            values = frame.f_locals.values()
            op = next((value for value in values if hasattr(value, "get_attr")), None)
            kind = frame.f_code.co_name.strip("_") if op is None else op.type
            return no_gradient(error, name, f"{kind}: ")
    node = _NODE.search(str(error))
    parts = node["name"].split("/") if node else []
    if any(part.endswith(("_grad", "gradient_tape")) for part in parts):
        return NoGradientError(
            f"TensorFlow cannot compute the derivative of `{name}` here.",
            got=f"{parts[-1]}: {reason_of(error)}",
            hint=_HINT,
        )
    return None


def no_gradient(error: Exception, name: str, where: str = "") -> NoGradientError:
    """Return the error for what TensorFlow raised while it built a derivative."""
    return NoGradientError(
        f"TensorFlow has no derivative of this order of `{name}`.",
        got=f"{where}{reason_of(error)}",
        hint=_HINT,
    )
