"""Programs in several processes on this machine, as workers of one cluster."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

BEGINNING = """
import os, sys
import numpy as np, keras, tensorflow as tf, tfgrad
tf.get_logger().setLevel("ERROR")
WORKER = int(os.environ["WORKER"])
if WORKER < 0:  # one process, without a strategy
    import contextlib
    scope = contextlib.nullcontext
else:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    scope = strategy.scope
"""


def _ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(count, program, *arguments, beginning=BEGINNING):
    """Return `count` processes of a program; 0 starts one without a strategy."""
    hosts = [f"127.0.0.1:{port}" for port in _ports(count)]
    code = beginning + textwrap.dedent(program)
    processes = []
    for index in range(count) if count else [-1]:
        environment = {
            **os.environ,
            "WORKER": str(index),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        if count:
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": hosts}, "task": task}
            environment["TF_CONFIG"] = json.dumps(config)
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def outputs(processes):
    """Return what processes that are started print, once they have ended."""
    return [process.communicate()[0] for process in processes]


def run(count, program, *arguments, **options):
    """Return what each process prints; all have to end well."""
    processes = start(count, program, *arguments, **options)
    texts = outputs(processes)
    for process, text in zip(processes, texts, strict=True):
        assert process.returncode == 0, text[-1500:]
    return texts
