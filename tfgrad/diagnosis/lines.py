"""Which line of the user's own code an op or an error comes from."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

_USER_CODE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')

_PLACES = ("Graph execution error", "Detected at node", "File ", "<", "^")
"""How lines of a message begin that say where, and not what."""

_GRADIENT_FILES = ("_grad.py", "backprop.py", "gradients_util.py")

_TENSORFLOW = f"{Path(tf.__file__).parent}{os.sep}"
_FOREIGN = (
    f"{Path(__file__).parents[1]}{os.sep}",
    f"{sysconfig.get_path('stdlib')}{os.sep}",
)


class Line(NamedTuple):
    """A line of source: where it is, and what it says (empty where unknown)."""

    file: str
    number: int
    source: str

    def __bool__(self) -> bool:
        """Return whether there is such a line: not every op is made by the user."""
        return bool(self.file)

    def __str__(self) -> str:
        """Return file:line and the source, as messages show them.

        The file of a notebook's cell has a number for a name, which tells nobody which.
        """
        path = Path(self.file)
        place = f"{path.name}:{self.number}" if self else "an unknown line"
        if path.parent.name.startswith("ipykernel_"):
            place = f"line {self.number} of the cell"
        source = self.source
        shown = source if len(source) <= 80 else f"{source[:77]}..."
        return f"{place}, `{shown}`" if shown else place


_NOWHERE = Line("", 0, "")


def frames_of(op: Any) -> Any:
    """Return the calls that made `op`, or what `tf.vectorized_map` made it from."""
    frames, origin = op.traceback, op._original_op
    is_copy = any(frame.filename.endswith("pfor.py") for frame in frames)
    return frames_of(origin) if origin is not None and is_copy else frames


def line_of(op: tf.Operation) -> Line:
    """Return the innermost line of the user's own code that made `op`."""
    return _innermost((frame.filename, frame.lineno) for frame in frames_of(op))


def line_of_error(error: BaseException) -> Line:
    """Return the innermost line of the user's own code that `error` went through.

    AutoGraph runs a translation of the user's function, so the traceback leads to a
    file that is not the user's; the line in the original is in the message.
    """
    matches = _USER_CODE.finditer(str(error))
    in_text = _innermost((match["file"], int(match["line"])) for match in matches)
    frames = traceback.extract_tb(error.__traceback__)
    return in_text or _innermost(
        (frame.filename, frame.lineno or 0) for frame in frames
    )


def reason_of(error: BaseException) -> str:
    """Return the line of an error's message that says what is wrong.

    Names of nodes and devices, which TensorFlow adds to it, are left out.

    >>> reason_of(ValueError("{{function_node f}} Bad shape. [Op:Add] name: x"))
    'Bad shape.'
    """
    text = re.sub(r"\{\{.*?\}\} ?| ?\[Op:.*| ?\[\[\{\{node.*", "", str(error))
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_PLACES)]
    is_last = isinstance(error, tf.errors.OpError) or "in user code:" in text
    words = lines[-1 if is_last else 0] if lines else type(error).__name__
    return words if len(words) <= 200 else f"{words[:197]}..."


def made_by_gradient(op: tf.Operation) -> bool:
    """Return whether TensorFlow made `op` while it differentiated something."""
    files = [frame.filename for frame in frames_of(op)]
    own = [file for file in files if file.startswith(_TENSORFLOW)]
    return any(file.endswith(_GRADIENT_FILES) for file in own)


def _innermost(frames: Iterable[tuple[str, int]]) -> Line:
    own = [frame for frame in frames if _is_users(frame[0])]
    if not own:
        return _NOWHERE
    file, number = own[-1]
    # linecache, since the cells of a notebook are in no file but are in its cache.
    return Line(file, number, linecache.getline(file, number).strip())


@functools.cache
def _is_users(file: str) -> bool:
    """Return whether `file` is none of tfgrad, installed packages, Python itself."""
    if any(f"{part}-packages" in file for part in ("site", "dist")):
        return False
    if "__autograph_generated_file" in file or file.startswith("<frozen"):
        return False
    # Messages of the runtime leave out the first separator.
    return not f"{os.sep}{file.lstrip(os.sep)}".startswith(_FOREIGN)
