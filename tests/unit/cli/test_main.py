"""Exit codes, and errors as sentences."""

import subprocess
import sys
import warnings

import pytest

import tfgrad as library

BLOCKED = """
import sys
from tfgrad.cli import main
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "packaging":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
sys.exit(main(["doctor"]))
"""


def test_an_error_in_the_function_is_a_sentence_with_its_line(tfgrad):
    code, out, err = tfgrad("minimize", "model.py:divides", "--x0", "1")

    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "The function must run without an error."
    assert "got: ZeroDivisionError at model.py:21, `return x / (1 // 0)`" in err
    assert "Traceback" not in err


def test_an_error_of_tensorflow_is_a_sentence_too(tfgrad):
    code, _, err = tfgrad("minimize", "model.py:multiplies", "--x0", "1,2")

    assert code == 1
    assert len(err.splitlines()) == 3
    assert "at model.py:24, `return tf.reduce_sum(x @ x)`" in err


def test_a_package_that_is_missing_is_named_with_how_to_install_it():
    command = [sys.executable, "-c", BLOCKED]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("try: pip install packaging\n")


def test_traceback_shows_it_all(tfgrad):
    with pytest.raises(ZeroDivisionError):
        tfgrad("minimize", "model.py:divides", "--x0", "1", "--traceback")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "lbfsg"], "got: method='lbfsg'\n  try: 'lbfgs'"),
        (["--steps", "0"], "got: steps=0"),
    ],
)
def test_a_value_that_the_library_refuses_is_wrong_usage(tfgrad, words, said):
    code, _, err = tfgrad("minimize", "model.py:bowl", "--x0", "1", *words)

    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("command", "option"),
    [("minimize", "--x0"), ("check", "--at"), ("explain", "--at")],
)
def test_a_function_of_values_without_a_point_is_told_the_option(
    tfgrad, command, option
):
    code, _, err = tfgrad(command, "model.py:bowl")

    assert code == 2
    assert f"try: {option} -1.2,1" in err


def test_an_error_without_a_line_of_the_users_names_no_node(tfgrad):
    _, _, err = tfgrad("minimize", "tfgrad.problems:rosenbrock", "--x0", "1")

    assert "got: InvalidArgumentError: Attempting to slice scalar input." in err
    assert "unknown line" not in err


def test_ctrl_c_ends_a_command_without_a_traceback(tfgrad, monkeypatch):
    def press(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "check_grads", press)

    assert tfgrad("check", "model.py:bowl", "--at", "1") == (130, "", "")


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_sentence_too(tfgrad, folder, monkeypatch):
    def warn(*_, **__):
        warnings.warn("Some file is left out.", RuntimeWarning, stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "show", warn)

    assert tfgrad("board", ".")[2] == "Some file is left out.\n"
