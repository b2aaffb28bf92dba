import pytest
import tensorflow as tf

from tfgrad.checks.gradcheck import check_grads
from tfgrad.checks.report import Check, Element, GradCheck
from tfgrad.errors import GradientMismatchError


def report(*checks, notes=()):
    return GradCheck("loss", checks, notes)


PASSED = Check("x", 1, "reverse", "pass", 1.0, 1.0, 1e-9)
FAILED = Check(
    "w",
    1,
    "reverse",
    "fail",
    1.25,
    1.0,
    1e-3,
    size=1000,
    elements=(Element((3, 7), 1.25, 1.0, 1e-3), Element((0, 0), 2.0, 1.9, 1e-3)),
)


def test_it_is_true_only_if_everything_passed():
    unsure = Check("y", 1, "reverse", "inconclusive", 0.0, 0.0, 1.0)

    assert report(PASSED)
    assert not report(PASSED, unsure)
    assert not report(PASSED, FAILED)


def test_the_table_has_a_title_a_head_and_a_line_per_check():
    lines = str(
        report(PASSED, FAILED, notes=["xla, order 1: not checked"])
    ).splitlines()

    assert lines[0] == "check_grads(loss): 1 pass, 1 fail"
    assert lines[1].split() == [
        *("argument", "order", "mode", "verdict"),
        *("autodiff", "reference", "error", "bar"),
    ]
    assert lines[3].split()[:4] == ["w", "1", "reverse", "fail"]
    assert lines[4] == "xla, order 1: not checked"


def test_a_notebook_gets_a_table_with_everything_escaped():
    html = report(Check("<w>", 1, "reverse", "pass", 1.0, 1.0, 0.0))._repr_html_()

    assert "<td>&lt;w&gt;</td>" in html
    assert html.count("<tr>") == 2


def test_the_error_names_argument_elements_and_numbers():
    with pytest.raises(GradientMismatchError) as info:
        report(PASSED, FAILED).raise_on_failure()

    assert info.value.rule == (
        "Autodiff and finite differences disagree for `loss`, `w`: 2 of 1000 elements."
    )
    assert info.value.got == "worst at [3, 7]: autodiff 1.25, numerical 1 ± 1.0e-03"
    assert "float64" in info.value.hint


def test_the_lowest_order_is_blamed_first():
    later = Check("w", 2, "reverse", "fail", 1.0, 2.0, 0.0)

    assert report(later, FAILED).failures[0] is FAILED


def test_the_hint_fits_the_mode():
    def hint(mode, order):
        with pytest.raises(GradientMismatchError) as info:
            report(Check("w", order, mode, "fail", 1.0, 2.0, 0.0)).raise_on_failure()
        return info.value.hint

    assert "jit_compile" in hint("xla", 1)
    assert "tf.stop_gradient" in hint("reverse", 2)
    assert 'modes=("reverse", "compiled")' in hint("forward", 1)


def test_a_failing_check_is_an_assertion_error_for_pytest():
    @tf.custom_gradient
    def wrong(x):
        return x**2, lambda dy: dy * x

    with pytest.raises(AssertionError):
        check_grads(wrong, 3.0)
