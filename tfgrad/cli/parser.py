"""The arguments of the command `tfgrad`: their names, their help, their values."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tfgrad

_POINT = 'numbers as in -1.2,1, or JSON as in {"a": 1, "b": [2, 3]}'
_NEGATIVE = re.compile(r"-[\d.]")
_ROSENBROCK = "tfgrad.problems:rosenbrock"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command; wrong usage exits with 2 and says why."""
    parser, commands = _parsers()
    options, unknown = parser.parse_known_args(_with_negative_values(argv))
    if unknown:  # the usage of the command names the options that there are
        commands[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def point(text: str) -> Any:
    """Return the values that `text` stands for, all numbers as floats.

    >>> point("3"), point("-1.2,1"), point('{"a": [1, 2]}'), point("[1, 2], [3, 4]")
    (3.0, [-1.2, 1.0], {'a': [1.0, 2.0]}, [[1.0, 2.0], [3.0, 4.0]])
    """
    for read in (_json, _numbers, lambda text: _json(f"[{text}]")):
        try:
            return read(text)
        except ValueError:
            continue
    raise argparse.ArgumentTypeError(f"{text!r} is no point; write {_POINT}")


def _json(text: str) -> Any:
    return json.loads(text, parse_int=float)


def _numbers(text: str) -> Any:
    numbers = [float(number) for number in text.split(",")]
    return numbers if "," in text else numbers[0]


def _with_negative_values(argv: Sequence[str]) -> list[str]:
    """Join `--x0 -1.2,1` to `--x0=-1.2,1`: argparse takes the value for an option."""
    joined: list[str] = []
    for word in argv:
        last = joined[-1] if joined else ""
        if _NEGATIVE.match(word) and last.startswith("--") and "=" not in last:
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


def _number(text: str, kind: type = float, metavar: str | None = None) -> Any:
    return {"type": kind, "help": text, "metavar": metavar}


def _flag(text: str) -> Any:
    return {"action": "store_true", "help": text}


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "function": {"help": "FILE.py:f, or module:f of an installed one"},
    "directory": {
        "nargs": "?",
        "default": "logs",
        "metavar": "DIR",
        "help": "where the runs are (default: %(default)s)",
    },
    "--x0": {
        "type": point,
        "help": f"where to start: {_POINT}; without it, the variables that f reads "
        "are minimised",
    },
    "--at": {
        "type": point,
        "action": "append",
        "default": [],
        "metavar": "POINT",
        "help": f"the arguments, one --at for each: {_POINT}",
    },
    "--method": {"help": "lbfgs (the default), adam, sgd, ..."},
    "--learning-rate": _number("of an optimizer", metavar="RATE"),
    "--steps": _number("take at most so many", int),
    "--gtol": _number("stop at a gradient this small"),
    "--ftol": _number("stop at a change of f this small"),
    "--xtol": _number("stop at a step this short"),
    "--target": _number("stop at a value this low"),
    "--seconds": _number("stop after this time"),
    "--order": _number("2 (the default) checks the Hessian", int),
    "--rtol": _number("the disagreement that is allowed"),
    "--port": _number("where to listen (default: any)", int),
    "--log": {"metavar": "DIR", "help": "write a run for TensorBoard"},
    "--logs": {
        "default": "logs",
        "help": "where to write the run (default: %(default)s)",
    },
    "--checkpoint": {
        "metavar": "DIR",
        "help": "save the run, and go on from there if killed",
    },
    "--float64": _flag("make the numbers float64, not float32"),
    "--json": _flag("print JSON, for a script"),
    "--traceback": _flag("show errors with their traceback"),
}

_COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("derivatives, 30 steps of descent and a run", "", "--logs"),
    "minimize": (
        "find the minimum of a function",
        f"{_ROSENBROCK} --x0 -1.2,1 --log logs/rosenbrock",
        "function --x0 --method --learning-rate --steps --gtol --ftol --xtol --target "
        "--seconds --log --checkpoint --float64 --json",
    ),
    "check": (
        "check the derivatives of a function at a point",
        f"{_ROSENBROCK} --at -1.2,1 --float64",
        "function --at --order --rtol --float64 --json",
    ),
    "explain": (
        "explain why a gradient is None, zero or not finite",
        f"{_ROSENBROCK} --at -1.2,1",
        "function --at --float64 --json",
    ),
    "runs": ("list what was logged", "logs", "directory --json"),
    "board": ("watch runs in TensorBoard until Ctrl-C", "logs", "directory --port"),
    "doctor": ("say whether all that is needed works", "", "directory --json"),
}
"""By name: what the command does, an example of its arguments, its arguments."""


def _parsers() -> tuple[argparse.ArgumentParser, Mapping[str, Any]]:
    """Return the parser, and those of the commands by name."""
    parser = argparse.ArgumentParser(
        prog="tfgrad",
        description="Differentiate, check, minimise and watch any TensorFlow function.",
        epilog="Exit codes: 0 done; 1 a check failed, or a minimum was not reached; "
        "2 wrong usage. `tfgrad COMMAND --help` has an example.",
    )
    version = f"tfgrad {tfgrad.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (text, example, arguments) in _COMMANDS.items():
        epilog = f"Example: tfgrad {name} {example}".rstrip()
        command = commands.add_parser(name, help=text, description=text, epilog=epilog)
        for argument in [*arguments.split(), "--traceback"]:
            command.add_argument(argument, **_ARGUMENTS[argument])
    return parser, commands.choices
