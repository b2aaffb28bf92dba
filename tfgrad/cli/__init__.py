"""The command `tfgrad`: parse, call, print; no mathematics.

TensorFlow takes seconds to import and is imported with the command that needs it:
`tfgrad --help`, `tfgrad runs` and `tfgrad board` answer at once.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfgrad.cli.parser import parse
from tfgrad.errors import InvalidArgumentError, TfgradError
from tfgrad.quiet import quiet_import

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    0: done; 1: a check failed, a minimum was not reached, or the function raised an
    error; 2: wrong usage; 130: Ctrl-C.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        with quiet_import():
            command = importlib.import_module(f"tfgrad.cli.{options.command}")
            if "tensorflow" in sys.modules:  # its search for a GPU prints, too
                sys.modules["tensorflow"].config.list_logical_devices()
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return int(command.run(options))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if options.traceback:
            raise
        print(_sentence(error), file=sys.stderr)
        return MISUSED if isinstance(error, InvalidArgumentError) else FAILED


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    *_: Any,
    **__: Any,
) -> None:
    """Print a warning: its text alone if it is about what was typed."""
    is_ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    text = warnings.formatwarning(message, category, filename, lineno)
    print(str(message) if is_ours else text.rstrip(), file=sys.stderr)


def _sentence(error: Exception) -> str:
    """Return an error as the rule, what arrived, and what to type next."""
    if isinstance(error, TfgradError):
        return str(error)
    kind = type(error).__name__
    if "tensorflow" not in sys.modules:
        rule = "The command must find what it needs."
        hint = "tfgrad doctor"
        if isinstance(error, ModuleNotFoundError):
            hint = f"pip install {error.name}"
        return str(TfgradError(rule, got=f"{kind}: {error}", hint=hint))
    from tfgrad.diagnosis.lines import line_of_error, reason_of

    line, reason = line_of_error(error), reason_of(error).removeprefix(f"{kind}: ")
    return str(
        TfgradError(
            "The function must run without an error.",
            got=f"{kind}{f' at {line}' if line else ''}: {reason}",
            hint="--traceback, to see all calls that led to it",
        )
    )
