"""A step on two replicas against a `strategy.run` loop written by hand."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PEER = Path(__file__).parent / "distribute_peer.py"


def chief_of(kind, count):
    """Return the seconds that the first of `count` processes has measured."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    workers = []
    for index in range(count):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": hosts}, "task": task} if count > 1 else {}
        workers.append(
            subprocess.Popen(
                [sys.executable, str(PEER), kind],
                env={**os.environ, "TF_CONFIG": json.dumps(config)},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    texts = [worker.communicate()[0] for worker in workers]
    assert not any(worker.returncode for worker in workers)
    return json.loads(texts[0].splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("mirrored", 1), ("workers", 2)])
def test_a_step_on_two_replicas(report, times, kind, count):
    seconds = chief_of(kind, count)
    ours, hand = (times(t[1:], t[0]) * 1e3 for t in seconds.values())
    name = "two virtual devices" if count == 1 else "two processes"
    question = f"a step of adam on {name}, against strategy.run by hand"
    report(question, ours, hand, "ms", "not slower")
