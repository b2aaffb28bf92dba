"""`tfgrad explain`, in this process."""

import json


def test_gradients_that_arrive_exit_with_0(tfgrad):
    code, out, _ = tfgrad("explain", "model.py:bowl", "--at", "1,2")

    assert code == 0
    assert "1 of 1 gradient arrived" in out


def test_a_cut_exits_with_1_and_names_op_and_line(tfgrad):
    code, out, _ = tfgrad("explain", "model.py:product", "--at", "1", "--at", "2.4")

    assert code == 1
    assert "y: cut at model.py:15, `return x * tf.round(y)`" in out


def test_json_has_every_finding(tfgrad):
    words = ("explain", "model.py:product", "--at", "1", "--at", "2.4", "--json")
    _, out, _ = tfgrad(*words)

    x, y = json.loads(out)["findings"]
    assert (x["name"], x["status"]) == ("x", "connected")
    assert (y["name"], y["status"]) == ("y", "cut")
    assert "straight-through" in y["hint"]
