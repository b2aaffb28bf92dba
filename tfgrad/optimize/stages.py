"""The methods of a run, one after the other: mostly one, sometimes a chain of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tfgrad.errors import InvalidArgumentError
from tfgrad.optimize.methods import named_method
from tfgrad.optimize.methods.keras_optimizer import optimizer_names
from tfgrad.optimize.methods.scipy import SciPyMethod, scipy_method
from tfgrad.optimize.objective import Objective
from tfgrad.optimize.options import check_count
from tfgrad.optimize.turns import Turns, make_turns


@dataclass(frozen=True)
class Stage:
    """One method of a run, and its share of the steps.

    Attributes:
        name: The method's.
        make_turns: Returns the method at work on an objective.
        steps: How many it may take; None means what is left of `steps`.
        scipy: The method, if it is one of SciPy's.
        identity: What it is made of, as far as that can be written down.
        tells: Whether its state can be put away.
    """

    name: str
    make_turns: Callable[[Objective], Turns]
    steps: int | None
    scipy: SciPyMethod | None
    identity: str
    tells: bool


HANDS_OVER = frozenset(
    {"steps", "precision", "linesearch", "trustregion", "scipy", "infeasible"}
)
"""The statuses with which a stage hands over to the next; others end the run."""


def make_stages(
    method: Any, learning_rate: Any, *, has_data: bool = False
) -> list[Stage]:
    """Return the stages of a method, or of a list of methods and (method, steps) pairs.

    Args:
        method: As for `minimize`.
        learning_rate: For the optimizers of Keras by name among the methods.
        has_data: The function is another one in each step: only an optimizer will do.

    Raises:
        InvalidArgumentError: If there is no such method, a list is empty, or there is
            none that `learning_rate` is for.
    """
    if has_data:
        method = "adam" if method is None else method
        _require_optimizer(method)
    if not isinstance(method, list):
        return [_stage("lbfgs" if method is None else method, learning_rate)]
    if not method:
        raise _bad_chain(method)
    pairs = [entry if isinstance(entry, tuple) else (entry, None) for entry in method]
    if any(len(pair) != 2 or isinstance(pair[0], list | tuple) for pair in pairs):
        raise _bad_chain(method)
    takes_rate = [_is_keras_name(entry) for entry, _ in pairs]
    if learning_rate is not None and not any(takes_rate):
        raise InvalidArgumentError(
            "`learning_rate` is for the optimizers of Keras by name in a chain.",
            got=f"learning_rate={learning_rate!r} with method={method!r}",
            hint='method=[("adam", 1000), "lbfgs"], or no learning_rate',
        )
    return [
        _stage(entry, learning_rate if takes else None, steps)
        for (entry, steps), takes in zip(pairs, takes_rate, strict=True)
    ]


def check_tells(stages: Sequence[Stage]) -> None:
    """Refuse a method whose state cannot be put away.

    Raises:
        InvalidArgumentError: If there is one.
    """
    for stage in stages:
        if not stage.tells:
            got = f"`{stage.name}`, without `build(variables)` and `variables`"
            hint = "both, as Keras's optimizers have them, or no checkpoint"
            raise InvalidArgumentError(
                "With `checkpoint`, a method must tell what it keeps.",
                got=got,
                hint=hint,
            )


def _stage(method: Any, learning_rate: Any, steps: Any = None) -> Stage:
    if isinstance(method, tuple):
        raise _bad_chain(method)
    if steps is not None:
        check_count("steps", steps)
        steps = int(steps)
    scipy = scipy_method(method) if isinstance(method, str) else None
    return Stage(
        # A directory may be called after it, and not every system wants a colon there.
        name=scipy.name.replace(":", "-") if scipy else _name_of(method),
        make_turns=make_turns(scipy or method, learning_rate),
        steps=steps,
        scipy=scipy,
        identity=_identity(method, learning_rate),
        tells=_tells(method),
    )


def _require_optimizer(method: Any) -> None:
    kind = method
    if isinstance(method, str):
        kind = scipy_method(method) or named_method(method)
    if not hasattr(kind, "apply_gradients"):
        raise InvalidArgumentError(
            "With `data`, the method is one optimizer of Keras: the loss is another "
            "one in each batch, and all other methods take it for one function.",
            got=f"method={method!r}",
            hint='method="adam"; or all at once: minimize(lambda: loss(x, y), wrt=...)',
        )


def _name_of(method: Any) -> str:
    if isinstance(method, str):
        return method.lower()
    name = getattr(method, "name", None) if hasattr(method, "init") else None
    kind = method if inspect.isclass(method) else type(method)
    return str(name or kind.__name__.lower())


def _tells(method: Any) -> bool:
    if isinstance(method, str) or not hasattr(method, "apply_gradients"):
        return True
    return hasattr(method, "build") and hasattr(method, "variables")


def _identity(method: Any, learning_rate: Any) -> str:
    """Return the name of a method and the numbers and words that it was made with."""
    is_kind = _is_keras_name(method) or inspect.isclass(method)
    facts = {"learning_rate": learning_rate} if is_kind else {}
    if not isinstance(method, str | type):
        facts |= _configuration(method)
    texts = (f"{name}={_plain(value)}" for name, value in sorted(facts.items()))
    return f"{_name_of(method)}({', '.join(texts)})"


def _configuration(instance: Any) -> dict[str, Any]:
    if hasattr(instance, "get_config"):
        return dict(instance.get_config())
    given = getattr(instance, "__dict__", {}).items()
    return {k: v for k, v in given if type(v) in (bool, int, float, str)}


def _plain(value: Any) -> str:
    """Return a text that is the same in every process: no object's address in it."""
    if hasattr(value, "get_config"):
        return f"{type(value).__name__}({_plain(value.get_config())})"
    if isinstance(value, dict):
        return ", ".join(f"{k}={_plain(v)}" for k, v in sorted(value.items()))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    try:
        return repr(float(value))
    except (TypeError, ValueError):
        return type(value).__name__


def _is_keras_name(method: Any) -> bool:
    return isinstance(method, str) and method.lower() in optimizer_names()


def _bad_chain(method: Any) -> InvalidArgumentError:
    return InvalidArgumentError(
        "A chain is a list: each entry a method, or a method with its steps.",
        got=f"method={method!r}",
        hint='method=[("adam", 1000), "lbfgs"]',
    )
