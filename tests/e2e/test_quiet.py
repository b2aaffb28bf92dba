"""What a first use of tfgrad prints, in a process of its own."""

import subprocess
import sys


def test_the_first_use_prints_nothing_but_what_is_the_users_own():
    script = "import tfgrad; float(tfgrad.derivative(lambda x: x * x)(5.0)); "
    script += "import warnings; warnings.warn('mine'); 1 / 0"
    command = [sys.executable, "-c", script]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    warning, traceback, error = done.stderr.partition("Traceback")
    assert warning.splitlines()[0].endswith("UserWarning: mine")
    assert len(warning.splitlines()) <= 2  # from Python 3.13 on, with its source
    assert traceback
    assert error.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_process_without_a_standard_error_stream_can_use_it():
    script = "import os, sys, tfgrad; sys.stderr = None; os.close(2); tfgrad.grad"
    command = [sys.executable, "-c", script]

    assert subprocess.run(command, check=False).returncode == 0
