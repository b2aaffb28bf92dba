"""`tfgrad runs`: what was logged, one line a run, without TensorFlow."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tfgrad.errors import RunError
from tfgrad.runs.directory import event_files, is_claimed, local_path

_COLUMNS = ["run", "method", "status", "steps", "loss", "seconds", "started"]
_NUMBERS = ("steps", "loss", "seconds")
_LOSSES = ("loss", "epoch/loss")


def run(options: argparse.Namespace) -> int:
    """Print the table; 1 if a `run.json` could not be read, and was left out."""
    root = local_path(options.directory, "Runs are in a directory of this machine.")
    paths = sorted(root.rglob("run.json"))
    if not paths:
        raise RunError(
            "There must be runs to list.",
            got=f"no run.json below {root}"
            + ("" if root.is_dir() else ", which is no directory"),
            hint="tfgrad.minimize(..., log=...) or tfgrad.Run(...), or another DIR",
        )
    rows = [row for path in paths if (row := _readable_row(root, path))]
    if options.json:
        print(json.dumps(rows))
    else:
        _print(rows)
    return 0 if len(rows) == len(paths) else 1


def _readable_row(root: Path, path: Path) -> dict[str, Any] | None:
    try:
        return _row(root, path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        left = f"{path} is left out: it cannot be read as the record of a run"
        print(f"{left} ({reason})", file=sys.stderr)
        return None


def _row(root: Path, path: Path) -> dict[str, Any]:
    if not path.is_file():  # to read a pipe never ends
        raise OSError("it is no file")
    record = json.loads(path.read_text(encoding="utf-8"))
    result, directory = record.get("result", {}), path.parent
    status = record.get("status")
    if status == "running" and not is_claimed(directory):
        status = "killed"  # its process ended before it could write a status
    return {
        "run": str(directory.relative_to(root)),
        "method": record.get("hparams", {}).get("method"),
        "status": status,
        "steps": result.get("nit"),
        "loss": result["fun"] if "fun" in result else _last_loss(directory),
        "seconds": record.get("seconds"),
        "started": record.get("started"),
    }


def _last_loss(directory: Path) -> float | None:
    """Return the last loss in the event files, for a loop that recorded no result."""
    from tfgrad.runs.tfrecord import last_scalars  # it imports NumPy and TensorBoard

    with contextlib.suppress(OSError):  # what may not be read has no loss to show
        for path in reversed(event_files(directory)):
            scalars = last_scalars(path)
            losses = [scalars[tag] for tag in _LOSSES if tag in scalars]
            if losses:
                return losses[0]
    return None


def _print(rows: list[dict[str, Any]]) -> None:
    cells = [[_text(name, row[name]) for name in _COLUMNS] for row in rows]
    columns = []
    for name, *texts in zip(_COLUMNS, *cells, strict=True):
        width = max(map(len, [name, *texts]))
        justify = str.rjust if name in _NUMBERS else str.ljust
        columns.append([justify(text, width) for text in (name, *texts)])
    for line in zip(*columns, strict=True):
        print("  ".join(line).rstrip())


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if name == "started":
        text = text[:16].replace("T", " ")
    # The name of a directory may hold a line break, or a command to the terminal.
    return text if text.isprintable() else ascii(text)
