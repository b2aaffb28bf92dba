"""The command `tfgrad`: parse, call, print; no mathematics.

TensorFlow takes seconds to import and is imported with the command that needs it:
`tfgrad --help`, `tfgrad runs` and `tfgrad board` answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tfgrad.cli.parser import parse
from tfgrad.cli.quiet import quiet_tensorflow
from tfgrad.errors import InvalidArgumentError, TfgradError

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code.

    0: done; 1: a check failed, a minimisation did not arrive, something went wrong on
    the way; 2: wrong usage; 130: Ctrl-C.
    """
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        with quiet_tensorflow():
            command = importlib.import_module(f"tfgrad.cli.{options.command}")
        return int(command.run(options))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if options.traceback:
            raise
        print(_sentence(error), file=sys.stderr)
        return MISUSED if isinstance(error, InvalidArgumentError) else FAILED


def _sentence(error: Exception) -> str:
    """Return what to tell of an error: the rule, what arrived, what to type next."""
    if isinstance(error, TfgradError):
        return str(error)
    if "tensorflow" not in sys.modules:
        rule, hint = "The command must find what it needs.", "tfgrad doctor"
    else:
        rule = "The function must run without an error."
        hint = "--traceback, which shows all of the way there"
    return str(TfgradError(rule, got=_in_one_line(error), hint=hint))


def _in_one_line(error: Exception) -> str:
    kind, at = type(error).__name__, ""
    if "tensorflow" in sys.modules:
        from tfgrad.diagnosis.lines import line_of_error

        at = f" at {line_of_error(error)}"
    # TensorFlow tells the way through its own code first, what is wrong at the end.
    words = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{kind}{at}: {words[-1].removeprefix(f'{kind}: ')}" if words else kind + at
