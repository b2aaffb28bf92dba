from tfgrad.diagnosis.causes import Culprit
from tfgrad.diagnosis.lines import Line
from tfgrad.diagnosis.report import VALUE, Explanation, Finding

ROUND = Culprit(
    "Round", Line("/home/me/model.py", 14, "y = tf.round(h)"), "tf.round", "why", "what"
)


def lines(*findings):
    return str(Explanation("loss", findings)).splitlines()


def test_a_cut_takes_four_lines():
    assert lines(Finding("x", "cut", ROUND)) == [
        "loss: 0 of 1 gradient arrived",
        "  x: cut at model.py:14, `y = tf.round(h)`",
        "     tf.round: why",
        "     try: what",
    ]


def test_the_worst_comes_first_and_the_rest_is_one_line():
    found = lines(
        Finding("a", "connected"),
        Finding("b", "unused"),
        Finding("c", "stopped"),
        Finding("d", "cut", ROUND),
        Finding("e", "connected"),
    )

    assert found[0] == "loss: 2 of 5 gradients arrived"
    assert found[1].startswith("  d: cut at model.py:14")
    assert found[-1] == "  b: unused; c: stopped; a, e: connected"
    assert 3 <= len(found) <= 6


def test_inputs_with_one_fate_share_a_line():
    found = lines(*(Finding(f"layer/{i}", "cut", ROUND) for i in range(20)))

    assert found[1].startswith("  layer/0, layer/1, layer/2 and 17 more: cut at")


def test_the_value_is_no_input():
    found = lines(Finding(VALUE, "non-finite", ROUND), Finding("x", "non-finite"))

    assert found[0] == "loss: 0 of 1 gradient arrived"
    assert found[1].startswith("  the value: non-finite at model.py:14")


def test_long_lines_of_source_are_shortened():
    long = Culprit("Round", Line("m.py", 1, "y = " + "x + " * 50), "tf.round", "", "")

    assert len(lines(Finding("x", "cut", long))[1]) < 120


def test_a_notebook_gets_a_table_with_everything_escaped():
    finding = Finding("<x>", "cut", ROUND)

    table = Explanation("loss", (finding,))._repr_html_()

    assert "<td>&lt;x&gt;</td><td>cut</td><td>model.py:14, `y = tf.round(h)`" in table


def test_a_line_of_a_notebook_is_that_of_a_cell_not_of_a_number():
    line = Line("/tmp/ipykernel_71/724560571.py", 2, "y = tf.round(h)")

    assert str(line) == "line 2 of the cell, `y = tf.round(h)`"
