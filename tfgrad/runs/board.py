"""`show`: start TensorBoard on a directory of runs, and end it."""

from __future__ import annotations

import atexit
import contextlib
import html
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.directory import is_claimed, local_path, walk_event_files
from tfgrad.runs.tensorboard import require
from tfgrad.runs.tfrecord import unread

_START_SECONDS = 60.0  # to start; mostly 1, more on a cold disk or a busy machine
_LOAD_SECONDS = 3.0  # until TensorBoard has read a run; it reads the others later
_CLOSE_SECONDS = 10.0
_SAMPLES = "scalars=1000000,images=200"  # 0 for "all" gives empty charts in 2.21


class Board(contextlib.AbstractContextManager["Board"]):
    """A TensorBoard process and its address; made by `show`.

    Attributes:
        url: The address to open: curves as they were written, pinned ones first.
        root: The directory whose runs it shows, as it was given.
    """

    def __init__(
        self, root: Path, command: list[str], pins: Sequence[str], has_runs: bool
    ) -> None:
        self.root = root
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open while it lives
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent alone
        )
        atexit.register(self.close)
        try:
            address = self._read_address()
            _wait_for_runs(address, expected=has_runs)
        except BaseException:
            self.close()
            raise
        cards = [{"plugin": "scalars", "tag": tag} for tag in pins]
        pinned = json.dumps(cards, separators=(",", ":"))
        view = {"smoothing": 0} | ({"pinnedCards": pinned} if cards else {})
        query = urllib.parse.urlencode(view)
        # The Scalars and Custom Scalars tabs have a smoothing of their own.
        self.url = f"{address}?{query}#timeseries&_smoothingWeight=0"

    def close(self) -> None:
        """End TensorBoard and its data server, and wait until both are gone."""
        atexit.unregister(self.close)
        if self._log.closed:
            return
        with self._process, self._log:
            try:
                # TensorBoard ends when its input is closed. Its output is closed when
                # its data server has ended, too.
                self._process.communicate(timeout=_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._kill()

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        address = self.url if self._is_running() else "ended"
        return f"<TensorBoard on {self.root}: {address}>"

    def _repr_html_(self) -> str:
        if not self._is_running():
            return (
                f"<p>{html.escape(repr(self))}; <code>show</code> starts another.</p>"
            )
        source = html.escape(self.url)
        style = "width: 100%; height: 800px; border: 0"
        return f'<iframe src="{source}" style="{style}"></iframe>'

    def _is_running(self) -> bool:
        return not self._log.closed and self._process.poll() is None

    def _read_address(self) -> str:
        assert self._process.stdout is not None
        too_late = threading.Timer(_START_SECONDS, self._kill)
        too_late.daemon = True
        too_late.start()
        try:
            for line in self._process.stdout:  # ends when the process does
                if line.startswith("http"):
                    return line.strip()
        finally:
            too_late.cancel()
        self._process.wait()
        self._log.seek(0)
        output = self._log.read().strip().splitlines() or ["no output"]
        raise RunError(
            f"TensorBoard must start within {_START_SECONDS:.0f} seconds.",
            got=f"exit code {self._process.returncode}; it printed last: {output[-1]}",
            hint="another port=, or `tensorboard --logdir ...` to see more",
        )

    def _kill(self) -> None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()


def show(
    root: str | os.PathLike[str],
    pin: str | Iterable[str] = ("loss", "epoch/loss"),
    *,
    port: int | None = None,
    load_fast: Literal["auto", "true", "false"] = "auto",
) -> Board:
    """Start TensorBoard on all runs under `root`; return it when it answers.

    That takes about a second. TensorBoard listens on this machine only (127.0.0.1: it
    has no login). It ends with `close()`, with a `with` block, or with this process,
    even if that is killed. As the last line of a notebook cell it is shown inline.

    Args:
        root: A directory of runs, or one run. It may be empty: runs that are written
            later appear on "reload".
        pin: Tags of scalars to show first, on pinned cards; of a tag that no run has,
            there is no card.
        port: Where to listen; None takes a free one.
        load_fast: TensorBoard's own switch: "true" for its data server, "false" for its
            Python loader, "auto" for the first that this machine has.

    Returns:
        A `Board`; its `url` is the address to open.

    Raises:
        InvalidArgumentError: If `root`, `port`, `pin` or `load_fast` is not of its
            kind.
        RunError: If `root` is no directory, TensorBoard is not installed, or does not
            start; the last line that it printed is in the message.

    Example:
        >>> import tempfile
        >>> with show(tempfile.mkdtemp(), pin="loss") as board:
        ...     board.url.startswith("http://127.0.0.1:")
        True
    """
    path = local_path(root, "TensorBoard shows a directory of this machine.")
    pins = checked_tags(pin, "pin")
    if port is not None and (type(port) is not int or not 0 < port < 2**16):
        raise InvalidArgumentError(
            "A port is a number from 1 to 65535.",
            got=f"port={port!r}",
            hint="port=6006, or leave it out for a free one",
        )
    if load_fast not in ("auto", "true", "false"):
        raise InvalidArgumentError(
            '`load_fast` is "auto", "true" or "false".',
            got=f"load_fast={load_fast!r}",
            hint="leave it out",
        )
    if not path.is_dir():
        raise RunError(
            "TensorBoard shows a directory that exists.",
            got=f"{path}, which is {'a file' if path.exists() else 'not there'}",
            hint="the directory given to Run, or mkdir to watch a run yet to come",
        )
    require("version")
    files = [file for some in walk_event_files(path).values() for file in some]
    ends = {file: unread(file) for file in files}
    if any(is_hostile for _, is_hostile in ends.values()):
        load_fast = "false"  # such a file would end the data server
    # The end of a file that a live run is writing is not damaged.
    damaged = [
        f"{lost} bytes of {file}"
        for file, (lost, is_hostile) in ends.items()
        if is_hostile or (lost and not is_claimed(file.parent))
    ]
    if damaged:
        warnings.warn(
            f"TensorBoard leaves out the damaged ends of event files: "
            f"{', '.join(damaged)}.",
            RuntimeWarning,
            stacklevel=2,
        )
    options = {
        "logdir": path.absolute(),  # TensorBoard takes "a:b" for a name and a path
        "host": "127.0.0.1",
        "port": port or 0,  # 0: the system picks a free one, and TensorBoard says which
        "samples_per_plugin": _SAMPLES,
        "load_fast": load_fast,
    }
    # -P: the folder of the script holds modules of this package, not of the path.
    script = Path(__file__).with_name("serve.py")
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-P", str(script), *flags]
    return Board(path, command, pins, has_runs=bool(files))


def checked_tags(tags: Any, name: str) -> list[str]:
    """Return one tag or several as a list."""
    tags = [tags] if isinstance(tags, str) else tags
    if isinstance(tags, Iterable):
        tags = list(tags)
        if all(isinstance(tag, str) for tag in tags):
            return tags
    raise InvalidArgumentError(
        f"`{name}` takes tags of scalars.",
        got=f"{name}={tags!r}",
        hint=f'{name}="loss", or {name}=["loss", "gradient/norm"]',
    )


def _wait_for_runs(address: str, expected: bool) -> None:
    """Return when TensorBoard answers and, if some are `expected`, knows of a run.

    http.client asks the address itself; urllib would ask a proxy of the environment.
    """
    host = urllib.parse.urlsplit(address).netloc
    deadline = time.monotonic() + _LOAD_SECONDS
    runs: list[str] = []
    while not runs and time.monotonic() < deadline:
        server = http.client.HTTPConnection(host, timeout=10)
        # Where TensorBoard fails, it answers with an error page or not at all.
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            server.request("GET", "/data/runs")
            runs = json.load(server.getresponse())
            if not expected:
                break
        server.close()
        time.sleep(0.02)
    server.close()
