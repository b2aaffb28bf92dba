"""What a diagnosis says: the error, and the report, in lines and in HTML."""

from __future__ import annotations

from tfgrad.diagnosis.path import Cut
from tfgrad.errors import NoGradientError


def no_gradient_error(
    function_name: str, argument_name: str, cut: Cut
) -> NoGradientError:
    """Return the error for a gradient that is cut, ready to be raised.

    Args:
        function_name: What the user calls the function.
        argument_name: What the user calls the argument or the variable.
        cut: Where its gradient is cut.
    """
    return NoGradientError(
        f"The gradient of `{function_name}` with respect to `{argument_name}` is cut.",
        got=f"{cut.label} at {cut.where}: {cut.reason}",
        hint=cut.hint,
    )
