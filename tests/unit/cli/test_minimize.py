"""`tfgrad minimize`, in this process."""

import json
import re

import numpy as np


def test_it_prints_the_result_and_exits_with_0(tfgrad):
    code, out, err = tfgrad("minimize", "model.py:bowl", "--x0", "-1.2,1")

    assert (code, err) == (0, "")
    assert "converged (success: True)" in out
    assert re.search(r"x: \[2\.0*\d?, +2\.0*\d? *\]", out)


def test_json_has_the_fields_and_the_full_precision(tfgrad):
    code, out, _ = tfgrad(
        *("minimize", "model.py:nested", "--x0", '{"a": 3, "b": [1, 2]}'),
        *("--float64", "--json"),
    )

    result = json.loads(out)
    assert code == 0
    assert result["status"] == "converged"
    assert result["success"] is True
    np.testing.assert_allclose(result["x"]["a"], 1.0, atol=1e-9)
    np.testing.assert_allclose(result["x"]["b"], [0.0, 0.0], atol=1e-9)
    assert result["directory"] is None


def test_options_reach_the_method_and_a_run_is_logged(tfgrad, folder):
    code, out, _ = tfgrad(
        *("minimize", "model.py:bowl", "--x0", "3", "--method", "sgd"),
        *("--learning-rate", "0.25", "--steps", "3", "--log", "logs/bowl", "--json"),
    )

    result = json.loads(out)
    assert code == 1  # no rule says that this is a solution
    assert result["status"] == "steps"
    assert result["x"] == 2.125  # halves its distance to 2 in each step
    record = json.loads((folder / "logs/bowl/sgd/run.json").read_text())
    assert record["result"]["nit"] == 3


def test_without_a_start_the_variables_are_minimised(tfgrad):
    code, out, _ = tfgrad("minimize", "model.py:by_variable", "--json")

    assert code == 0
    assert json.loads(out)["fun"] < 1e-6


def test_what_has_no_minimum_exits_with_1(tfgrad):
    code, out, _ = tfgrad("minimize", "model.py:cubic", "--x0", "1", "--json")

    assert code == 1
    assert json.loads(out)["success"] is False


def test_a_run_that_was_saved_goes_on_from_there(tfgrad):
    words = ("minimize", "model.py:bowl", "--x0", "3", "--method", "sgd", "--json")
    words = (*words, "--learning-rate", "0.25", "--checkpoint", "saved")

    tfgrad(*words, "--steps", "1")
    _, out, _ = tfgrad(*words, "--steps", "3")

    assert json.loads(out)["x"] == 2.125
    assert json.loads(out)["nit"] == 3
