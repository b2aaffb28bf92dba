"""`tfgrad doctor`, well and ill."""

import json
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tfgrad.cli import doctor


@pytest.fixture
def without_a_board(monkeypatch):
    """TensorBoard takes a second to start; tests/e2e starts it."""
    monkeypatch.setattr(doctor, "_board", lambda: "starts and answers")


@pytest.mark.usefixtures("without_a_board")
def test_all_is_well_here(tfgrad):
    code, out, _ = tfgrad("doctor")

    assert code == 0, out
    assert {line.split()[0] for line in out.splitlines()} == {"ok"}
    for what in ("Python", "tensorflow>=2.21", "XLA", "TensorBoard", "logs in logs"):
        assert f" {what} " in out


@pytest.mark.usefixtures("without_a_board")
def test_what_is_wrong_comes_with_what_to_do(tfgrad, monkeypatch, folder):
    (folder / "file").touch()
    monkeypatch.setattr(sys, "version_info", (3, 10, 0, "final", 0))

    code, out, _ = tfgrad("doctor", "file/logs", "--json")

    wrong = [finding for finding in json.loads(out) if not finding["ok"]]
    assert code == 1
    assert [finding["what"] for finding in wrong] == ["Python", "logs in file/logs"]
    assert wrong[0]["hint"] == "Python 3.11, 3.12 or 3.13"
    assert "chmod" in wrong[1]["hint"]


@pytest.mark.parametrize(
    ("requirement", "is_optional", "found"),
    [
        ("numpy>=1", False, ""),
        ("numpy>=99", False, "which is too old"),
        ("no-such-package", False, "not installed"),
        ("no-such-package", True, "not installed (optional)"),
    ],
)
def test_packages_are_compared_with_what_is_required(requirement, is_optional, found):
    try:
        said = doctor._package(Requirement(requirement), is_optional)
    except RuntimeError as error:
        said = str(error)

    assert found in said


def test_a_directory_yet_to_be_made_is_asked_for_above(tmp_path):
    assert "GB free" in doctor._writable(tmp_path / "a" / "b")
    assert not Path(tmp_path, "a").exists()
