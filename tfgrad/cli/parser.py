"""What can be typed after `tfgrad`, and what it becomes."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

_FUNCTION = "FILE.py:f, or module:f of an installed one"
_POINT = 'numbers as in -1.2,1, or JSON as in {"a": 1, "b": [2, 3]}'
_NEGATIVE = re.compile(r"-[\d.]")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command; wrong usage exits with 2 and says why."""
    return _parser().parse_args(_with_negative_values(argv))


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tfgrad",
        description="Differentiate, check, minimise and watch any TensorFlow function.",
        epilog="Exit codes: 0 done; 1 a check failed, or a minimum was not reached; "
        "2 wrong usage. `tfgrad COMMAND --help` has an example.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=text, description=text, epilog=f"Example: {example}"
        )
        command.add_argument(
            "--traceback", action="store_true", help="show errors with their traceback"
        )
        return command

    _demo(add("demo", "derivatives, 30 steps of descent and a run", "tfgrad demo"))
    rosenbrock = "tfgrad.problems:rosenbrock"
    _minimize(
        add(
            "minimize",
            "find the minimum of a function",
            f"tfgrad minimize {rosenbrock} --x0 -1.2,1 --log logs/rosenbrock",
        )
    )
    _check(
        add(
            "check",
            "check the derivatives of a function at a point",
            f"tfgrad check {rosenbrock} --at -1.2,1 --float64",
        )
    )
    _explain(
        add(
            "explain",
            "explain why a gradient is None, zero or not finite",
            f"tfgrad explain {rosenbrock} --at -1.2,1",
        )
    )
    _runs(add("runs", "list what was logged", "tfgrad runs logs"))
    _board(add("board", "watch runs in TensorBoard until Ctrl-C", "tfgrad board logs"))
    _doctor(add("doctor", "say whether all that is needed works", "tfgrad doctor"))
    return parser


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--logs", default="logs", help="where to write the run (default: %(default)s)"
    )


def _minimize(command: argparse.ArgumentParser) -> None:
    command.add_argument("function", help=_FUNCTION)
    command.add_argument(
        "--x0",
        type=point,
        help=f"where to start: {_POINT}; without it, the variables that f reads are "
        "minimised",
    )
    command.add_argument("--method", help="lbfgs (the default), adam, sgd, ...")
    command.add_argument("--learning-rate", type=float, metavar="RATE")
    command.add_argument("--steps", type=int, help="how many at most")
    command.add_argument("--gtol", type=float, help="stop at a gradient this small")
    command.add_argument("--ftol", type=float, help="stop at a change of f this small")
    command.add_argument("--xtol", type=float, help="stop at a step this short")
    command.add_argument("--target", type=float, help="stop at a value this low")
    command.add_argument("--seconds", type=float, help="stop after this time")
    command.add_argument("--log", metavar="DIR", help="write a run for TensorBoard")
    command.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="save the run, and go on from there if killed",
    )
    _add_float64(command)
    _add_json(command)


def _check(command: argparse.ArgumentParser) -> None:
    _add_function_and_point(command)
    command.add_argument("--order", type=int, help="2 (the default) checks the Hessian")
    command.add_argument("--rtol", type=float, help="the disagreement that is allowed")
    _add_float64(command)
    _add_json(command)


def _explain(command: argparse.ArgumentParser) -> None:
    _add_function_and_point(command)
    _add_float64(command)
    _add_json(command)


def _runs(command: argparse.ArgumentParser) -> None:
    _add_directory(command)
    _add_json(command)


def _board(command: argparse.ArgumentParser) -> None:
    _add_directory(command)
    command.add_argument("--port", type=int, help="where to listen (default: any)")


def _doctor(command: argparse.ArgumentParser) -> None:
    _add_directory(command)
    _add_json(command)


def _add_function_and_point(command: argparse.ArgumentParser) -> None:
    command.add_argument("function", help=_FUNCTION)
    command.add_argument(
        "--at",
        type=point,
        action="append",
        default=[],
        metavar="POINT",
        help=f"the arguments, one --at for each: {_POINT}",
    )


def _add_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "directory",
        nargs="?",
        default="logs",
        metavar="DIR",
        help="where the runs are (default: %(default)s)",
    )


def _add_float64(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--float64", action="store_true", help="make the numbers float64, not float32"
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, for a script")
