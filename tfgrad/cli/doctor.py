"""`tfgrad doctor`: does everything that tfgrad needs work here?"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import platform
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import tfgrad
from tfgrad.errors import TfgradError
from tfgrad.quiet import quiet_import

Finding = dict[str, Any]


def run(options: argparse.Namespace) -> int:
    """Print each finding, and what to do if it is wrong; 0 if none is."""
    findings = []
    for finding in examine(Path(options.directory)):
        findings.append(finding)
        if not options.json:
            verdict = "ok" if finding["ok"] else "wrong"
            print(f"{verdict:<5} {finding['what']:<22} {finding['found']}", flush=True)
            if not finding["ok"]:
                print(f"      try: {finding['hint']}", flush=True)
    if options.json:
        print(json.dumps(findings))
    return 0 if all(finding["ok"] for finding in findings) else 1


def examine(logs: Path) -> Iterator[Finding]:
    """Yield the findings; what another one depends on comes first."""
    yield _finding("Python", _python, "Python 3.11, 3.12 or 3.13")
    for text in importlib.metadata.requires("tfgrad") or ():
        requirement = Requirement(text)
        # An extra of one package is called like it; others are for developers.
        is_optional = str(requirement.marker) == f'extra == "{requirement.name}"'
        if requirement.marker is None or is_optional:
            version = f"{requirement.name}{requirement.specifier}"
            package = functools.partial(_package, requirement, is_optional)
            yield _finding(version, package, f'pip install --upgrade "{version}"')
    reinstall = "pip install --force-reinstall tensorflow"
    yield _finding("TensorFlow", _devices, reinstall)
    yield _finding("a derivative", _derivative, reinstall)
    yield _finding("XLA", _xla, "jit=False, which does without it")
    yield _finding("TensorBoard", _board, "pip install --upgrade tensorboard")
    yield _finding(
        f"logs in {logs}", lambda: _writable(logs), "another directory, or chmod u+w"
    )


def _finding(what: str, examination: Callable[[], str], hint: str) -> Finding:
    try:
        return {"what": what, "ok": True, "found": examination(), "hint": ""}
    except Exception as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, TfgradError):
            found, hint = error.got, error.hint
        return {"what": what, "ok": False, "found": found, "hint": hint}


def _python() -> str:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise RuntimeError(f"{platform.python_version()}: TensorFlow has no wheels")
    return f"{platform.python_version()} at {sys.executable}"


def _package(requirement: Requirement, is_optional: bool) -> str:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        if is_optional:
            return "not installed (optional)"
        raise RuntimeError("not installed") from None
    if not requirement.specifier.contains(version, prereleases=True):
        raise RuntimeError(f"{version}, which is too old")
    return version


def _devices() -> str:
    with quiet_import():
        import tensorflow as tf

        kinds = [device.device_type for device in tf.config.list_logical_devices()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _derivative() -> str:
    return f"x² at 5 has the slope {float(tfgrad.derivative(lambda x: x * x)(5.0)):g}"


def _xla() -> str:
    import tensorflow as tf

    began = time.perf_counter()
    slope = tfgrad.grad(lambda x: tf.sin(x), jit=True)(0.0)
    if abs(float(slope) - 1.0) > 1e-6:
        raise RuntimeError(f"the slope of the sine at 0 is {float(slope)}, not 1")
    return f"compiles, in {time.perf_counter() - began:.1f} s, and is right"


def _board() -> str:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as empty, tfgrad.show(empty) as board:
        # TensorBoard is on this machine; a proxy would look for it elsewhere.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        opener.open(board.url.partition("?")[0], timeout=30).close()
    return f"starts and answers, in {time.perf_counter() - began:.1f} s"


def _writable(logs: Path) -> str:
    nearest = next(p for p in (logs, *logs.absolute().parents) if p.exists())
    tempfile.TemporaryDirectory(dir=nearest).cleanup()
    return f"writable, {shutil.disk_usage(nearest).free / 1e9:.0f} GB free"
