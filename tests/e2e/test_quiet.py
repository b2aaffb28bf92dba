"""What a first use of tfgrad prints, in a process of its own."""

import subprocess
import sys


def errors_of(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_the_first_use_prints_nothing_of_tensorflow():
    script = "import tfgrad; print(float(tfgrad.derivative(lambda x: x * x)(5.0)))"

    assert errors_of(script) == ""


def test_errors_and_warnings_of_the_users_own_are_printed():
    script = "import tfgrad, warnings; tfgrad.grad; warnings.warn('mine'); 1 / 0"

    errors = errors_of(script)
    assert "UserWarning: mine" in errors
    assert errors.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_process_without_a_standard_error_stream_can_use_it():
    script = "import os, sys, tfgrad; sys.stderr = None; os.close(2); tfgrad.grad"
    command = [sys.executable, "-c", script]

    assert subprocess.run(command, check=False).returncode == 0
