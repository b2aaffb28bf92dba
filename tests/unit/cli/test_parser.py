"""What can be typed, and what it becomes."""

import pytest

import tfgrad
from tfgrad.cli.parser import parse, point


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-.5", -0.5),
        ("1e-3,2", [0.001, 2.0]),
        ("[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("[1, 2], [3, 4]", [[1, 2], [3, 4]]),
        ('{"a": 1, "b": [2]}', {"a": 1, "b": [2]}),
    ],
)
def test_a_point_is_numbers_or_json(text, value):
    assert point(text) == value


@pytest.mark.parametrize("words", [["--x0", "-1.2,1"], ["--x0=-1.2,1"]])
def test_a_value_may_begin_with_a_minus(words):
    assert parse(["minimize", "m.py:f", *words]).x0 == [-1.2, 1.0]
    assert parse(["check", "m.py:f", "--at", "-1", "--at", "-.5"]).at == [-1, -0.5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: COMMAND"),
        (["dmeo"], "invalid choice: 'dmeo'"),
        (["minimize"], "required: function"),
        (["minimize", "m.py:f", "--x0", "here"], "'here' is no point; write numbers"),
        (["minimize", "m.py:f", "--steps", "many"], "invalid int value: 'many'"),
        (
            ["minimize", "m.py:f", "--lr", "1"],
            "minimize: error: unrecognized arguments",
        ),
        (["minimize", "m.py:f", "--lr", "1"], "--learning-rate"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what(words, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(words)

    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


COMMANDS = ("demo", "minimize", "check", "explain", "runs", "board", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse([command, "--help"])

    assert exit_.value.code == 0
    assert f"Example: tfgrad {command}" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["--version"])

    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"tfgrad {tfgrad.__version__}\n"
