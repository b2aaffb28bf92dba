"""Where a run is written: one directory, one run, one writer at a time."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from pathlib import Path
from typing import Any

from tfgrad.errors import InvalidArgumentError, RunError

try:
    import fcntl
except ImportError:  # Windows: two runs get two numbers there, but no lock
    fcntl = None  # type: ignore[assignment]  # a module or nothing

_LONGEST = 255
"""Bytes in a name, on all common file systems."""


class Claim:
    """A directory and the lock that keeps other writers out of it.

    The lock is the kernel's, on the directory itself (`flock`): there is no lock file,
    and no stale lock, since the kernel drops the lock when the process ends. A run that
    was never closed drops its lock when it is garbage-collected.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._finalizer = weakref.finalize(self, _unlock, descriptor, os.getpid())

    def release(self) -> None:
        """Let other writers in."""
        self._finalizer()


def _unlock(descriptor: int, owner: int) -> None:
    # Closing the descriptor does not unlock it while a forked worker has a copy; and
    # a worker that ends must not unlock what its parent holds.
    if fcntl is not None and os.getpid() == owner:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def claim(directory: str | os.PathLike[str], resume: bool) -> Claim:
    """Return a locked directory to write a run in.

    With `resume`, it is this directory, which must exist; else this one if it is new or
    empty, or the first free one of `directory-002`, `directory-003`... Two processes
    that ask at the same time get two directories.
    """
    path = _run_path(directory)
    if not resume:
        return _claim_next_free(path)
    if not path.is_dir():
        raise RunError(
            "`resume_from` continues a run that exists.",
            got=f"{path}, which is no directory",
            hint="the `.directory` of the run to continue, or leave `resume_from` out",
        )
    _check_writable(path)
    descriptor = _try_lock(path)
    if descriptor is None:
        raise RunError(
            "A run has one writer at a time: two would hide each other's curves.",
            got=f"{path}, where another writer is alive",
            hint="close() of that run first, or a directory of its own for this one",
        )
    return Claim(path, descriptor)


def check(directory: str | os.PathLike[str]) -> None:
    """Raise those errors of `claim` that can be known without making a directory."""
    path = _run_path(directory)
    places = (path, *path.absolute().parents)
    nearest = next(filter(os.path.lexists, places))
    if not nearest.is_dir():
        raise _is_a_file(nearest)
    _check_writable(nearest)


def is_claimed(directory: Path) -> bool:
    """Return whether a live process writes a run in `directory`."""
    descriptor = _try_lock(directory)
    if descriptor is None:
        return True
    Claim(directory, descriptor).release()
    return False


def local_path(directory: Any, rule: str) -> Path:
    """Return `directory` as a path of this machine.

    Raises:
        InvalidArgumentError: With `rule`, if it is no path, empty, or elsewhere.
    """
    name = os.fspath(directory) if isinstance(directory, os.PathLike) else directory
    if isinstance(name, str) and name and "://" not in name and "\0" not in name:
        # "~nobody" has no home, and half of a surrogate pair no encoding.
        with contextlib.suppress(RuntimeError, UnicodeEncodeError):
            path = Path(name).expanduser()
            if max(len(os.fsencode(part)) for part in path.parts or [""]) <= _LONGEST:
                return path
    raise InvalidArgumentError(
        rule,
        got=f"{directory!r}",
        hint='a local path such as "logs" or "logs/rosenbrock/adam"',
    )


def event_files(directory: Path) -> list[Path]:
    """Return the event files of `directory` in the order of their names, and so of age.

    A pipe or a device is left out: reading it never ends.
    """
    found = []
    for path in directory.iterdir():
        with contextlib.suppress(OSError):  # a symbolic link to itself
            if "tfevents" in path.name and path.is_file():
                found.append(path)
    return sorted(found)


def walk_event_files(root: Path) -> dict[Path, list[Path]]:
    """Return the event files of each directory at and under `root` that has some.

    Links to directories are not followed: they may lead anywhere, also in a circle.
    """
    walk = os.walk(root)
    places = (Path(place) for place, _, names in walk if "tfevents" in "".join(names))
    return {place: files for place in places if (files := event_files(place))}


def _run_path(directory: Any) -> Path:
    path = local_path(directory, "A run is written to a directory of this machine.")
    # "." and ".." have no name to put a number after.
    return path if path.name not in ("", "..") else path.resolve()


def _claim_next_free(path: Path) -> Claim:
    for number in itertools.count(1):
        free = path if number == 1 else path.with_name(f"{path.name}-{number:03d}")
        try:
            free.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            places = (free, *free.parents)
            raise _is_a_file(next(filter(os.path.lexists, places))) from error
        except OSError as error:
            raise _not_writable(free, error.strerror or str(error)) from error
        _check_writable(free)
        if _is_empty(free) and (descriptor := _try_lock(free)) is not None:
            # Another process may have written a run here just before the lock.
            if _is_empty(free):
                return Claim(free, descriptor)
            Claim(free, descriptor).release()
    raise AssertionError("unreachable: numbers do not end")


def _is_a_file(path: Path) -> RunError:
    what = "a link to nothing" if path.is_symlink() and not path.exists() else "a file"
    return RunError(
        "A run is written to a directory.",
        got=f"{path}, which is {what}",
        hint="another name, or move the file away",
    )


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK | os.X_OK):
        raise _not_writable(path, "no permission to write")


def _not_writable(path: Path, reason: str) -> RunError:
    return RunError(
        "A run needs a directory that can be written.",
        got=f"{path}: {reason}",
        hint="a directory of your own, or chmod u+w",
    )


def _is_empty(path: Path) -> bool:
    return next(path.iterdir(), None) is None


def _try_lock(path: Path) -> int | None:
    """Return an open descriptor that holds the lock of `path`, None if it is taken."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass  # some network file systems have no locks: write without one
    return descriptor
