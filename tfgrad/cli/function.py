"""The function that a command is about: `FILE.py:f` or `module:f`."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import tensorflow as tf

from tfgrad.errors import InvalidArgumentError
from tfgrad.nested import Nest, describe, name_of, to_tensors
from tfgrad.optimize.data import can_take

_SHOWN = 10
"""Functions of a file that an error names."""


def function(place: str) -> Callable[..., Any]:
    """Return the function at `place`; its file is run, as an import would.

    Raises:
        InvalidArgumentError: If there is no such file, module or function.
    """
    where, colon, name = place.rpartition(":")
    if not colon or not where or not name:
        raise InvalidArgumentError(
            "A function is named by its file and its name.",
            got=place,
            hint="model.py:loss, or package.module:loss",
        )
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise _missing(where, name, found, part)
        found = getattr(found, part)
    if not callable(found):
        raise InvalidArgumentError(
            f"`{name}` must be a function.",
            got=f"{name} = {describe(found)}",
            hint=f"def {name}(x): ... in {where}",
        )
    return found


def values(point: Nest, name: str, *, float64: bool) -> Nest:
    """Return the numbers of a point in the dtype that was asked for."""
    return to_tensors(point, name, tf.float64) if float64 else point


def require_points(f: Callable[..., Any], given: Any, option: str) -> None:
    """Refuse a function that takes an argument for which no point was given.

    Raises:
        InvalidArgumentError: If it does, and none was.
    """
    if given and option == "--at" and not can_take(f, len(given)):
        raise InvalidArgumentError(
            "Each argument of the function needs a point of its own.",
            got=f"`{name_of(f)}{inspect.signature(f)}`, with {len(given)} of --at",
            hint="--at 1 --at 2,3 for f(x, y)",
        )
    if given in (None, []) and not can_take(f, 0):
        raise InvalidArgumentError(
            f"A function of values needs {option}.",
            got=f"`{name_of(f)}`, which takes an argument, without {option}",
            hint=f"{option} -1.2,1, with the numbers of the point",
        )


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidArgumentError(
            "The function must be in a file that exists.",
            got=f"{path}, which is {'a folder' if path.is_dir() else 'not there'}",
            hint="its path from here, as in models/net.py:loss",
        )
    # As `python FILE.py` does, so that the file finds what it imports.
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise InvalidArgumentError(
            "The function must be in a module that can be imported.",
            got=f"no module {name!r}",
            hint="FILE.py:f, or a module that this Python has",
        ) from error


def _missing(where: str, name: str, found: Any, part: str) -> InvalidArgumentError:
    public = [n for n in vars(found) if callable(getattr(found, n)) and n[0] != "_"]
    close = difflib.get_close_matches(part, public, n=3, cutoff=0.4)
    if isinstance(found, ModuleType):  # names that it imports are left out
        homes = {n: getattr(getattr(found, n), "__module__", None) for n in public}
        public = [n for n, home in homes.items() if home in (None, found.__name__)]
    there = ", ".join(public[:_SHOWN]) + (", ..." if len(public) > _SHOWN else "")
    return InvalidArgumentError(
        f"`{name}` must be in {where}.",
        got=f"no {part!r} in it, but {there or 'no function at all'}",
        hint=" or ".join(f"{where}:{n}" for n in close) or f"def {name}(x): ... in it",
    )
