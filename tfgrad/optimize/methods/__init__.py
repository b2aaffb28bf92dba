"""The methods: one file each, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfgrad.optimize.methods.keras_optimizer import named, optimizer_names
from tfgrad.optimize.methods.lbfgs import LBFGS
from tfgrad.optimize.methods.newton import Newton
from tfgrad.optimize.methods.protocol import Method
from tfgrad.optimize.methods.scipy import SCIPY

PURE: dict[str, Callable[[], Method]] = {
    "lbfgs": LBFGS,
    "newton": Newton,
}
"""The pure methods by name."""


def named_method(name: str) -> Any:
    """Return the class of a method by name, pure or Keras's."""
    return named(name, {**optimizer_names(), **PURE}, "method", also=SCIPY)
