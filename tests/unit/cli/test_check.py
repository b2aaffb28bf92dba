"""`tfgrad check`, in this process."""

import json


def test_right_derivatives_pass(tfgrad):
    code, out, err = tfgrad("check", "model.py:bowl", "--at", "-1.2,1", "--float64")

    assert (code, err) == (0, "")
    assert "reverse   pass" in out


def test_a_wrong_gradient_exits_with_1_and_names_the_element(tfgrad):
    code, out, err = tfgrad("check", "model.py:wrong", "--at", "3", "--order", "1")

    assert code == 1
    assert "fail" in out
    assert "worst at []: autodiff 3, numerical 6" in err


def test_an_argument_without_a_point_is_named(tfgrad):
    code, _, err = tfgrad("check", "model.py:product", "--at", "3")

    assert code == 2
    assert "got: `product(x, y)`, with 1 of --at\n  try: --at 1 --at 2,3" in err


def test_json_has_every_check(tfgrad):
    code, out, err = tfgrad("check", "model.py:wrong", "--at", "3", "--json")

    report = json.loads(out)
    assert (code, err) == (1, "")
    assert report["passed"] is False
    verdicts = {(c["order"], c["mode"]): c["verdict"] for c in report["checks"]}
    assert verdicts[1, "reverse"] == "fail"
    assert verdicts[1, "compiled"] == "pass"
