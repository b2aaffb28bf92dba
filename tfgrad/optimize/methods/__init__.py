"""The methods: one file each, and the table that names them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.methods.keras_optimizer import optimizer_names
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
    names: dict[str, Any] = {**optimizer_names(), **PURE}
    if name.lower() in names:
        return names[name.lower()]
    close = difflib.get_close_matches(name.lower(), [*names, *SCIPY], n=3, cutoff=0.4)
    raise InvalidArgumentError(
        "`method` must be the name of a method, or an optimizer.",
        got=f"method={name!r}",
        hint=" or ".join(map(repr, close or sorted(names))),
    )
