"""Which function is meant by what is typed."""

import sys

import pytest
import tensorflow as tf

from tfgrad import problems
from tfgrad.cli.function import function, values
from tfgrad.errors import InvalidArgumentError


@pytest.mark.usefixtures("folder")
def test_a_file_finds_what_it_imports_from_its_own_folder(monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert float(function("../model.py:bowl")(3.0)) == 1.0


@pytest.mark.usefixtures("folder")
def test_a_function_may_be_in_a_module_or_inside_something():
    assert function("tfgrad.problems:rosenbrock") is problems.rosenbrock
    assert function("model:Space.inside")(3) == 9
    assert "model" in sys.modules


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model.py", r"named by its file and its name.\n  got: model.py\n"),
        ("nowhere.py:f", r"file that exists.\n  got: nowhere.py, which is not there"),
        ("no.module:f", r"can be imported.\n  got: no module 'no.module'"),
        (
            "model.py:bowle",
            r"no 'bowle' in it, but bowl, .*\n  try: model.py:bowl",
        ),
        (
            "model.py:qqq",
            r"but bowl, nes.*, Space\n  try: def qqq\(x\): ...",
        ),
        ("helper.py:f", r"no 'f' in it, but no function at all"),
        ("model.py:number", r"must be a function.\n  got: number = int 3"),
    ],
)
def test_what_is_not_there_is_said(place, message):
    with pytest.raises(InvalidArgumentError, match=message):
        function(place)


def test_a_module_that_lacks_another_one_tells_its_own_error(folder):
    (folder / "broken.py").write_text("import no_such_package\n")

    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        function("broken:f")


def test_values_are_float64_only_on_demand():
    point = {"a": 1, "b": [2.0, 3.0]}

    assert values(point, "x0", float64=False) is point
    assert values(point, "x0", float64=True)["a"].dtype == tf.float64
