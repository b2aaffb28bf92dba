"""What a gradient check says: one line per argument, order and mode."""

from __future__ import annotations

from dataclasses import dataclass

from tfgrad.diagnosis.report import html_table
from tfgrad.errors import GradientMismatchError

REFERENCE = {
    "reverse": "autodiff and finite differences",
    "forward": "forward and reverse mode",
    "compiled": "compiled and eager execution",
    "xla": "XLA-compiled and eager execution",
    "symmetry": "the two triangles of the Hessian",
}
"""What each mode compares, in words."""

_HEADS = ("argument", "order", "mode", "verdict", "autodiff", "reference", "error bar")


@dataclass(frozen=True)
class Element:
    """One element of a gradient that is wrong.

    Attributes:
        index: Where it is in the argument.
        autodiff: What automatic differentiation says.
        reference: What it should be.
        error: How far off the reference may be.
    """

    index: tuple[int, ...]
    autodiff: float
    reference: float
    error: float


@dataclass(frozen=True)
class Check:
    """One comparison: of one argument, at one order, in one mode.

    Attributes:
        name: What the user calls the argument or variable.
        order: 1 for the gradient, 2 for its gradient.
        mode: "reverse", "forward", "compiled", "xla" or "symmetry": see `REFERENCE`.
        verdict: "pass", "fail" or "inconclusive".
        autodiff: The value that is checked: the slope along the worst direction.
        reference: What it is compared with.
        error: How far off the reference may be.
        note: Why it is inconclusive, or what to know about the failure.
        size: How many elements the argument has.
        elements: The wrong ones, the worst first.
        complete: Whether these are all the wrong ones.
    """

    name: str
    order: int
    mode: str
    verdict: str
    autodiff: float
    reference: float
    error: float
    note: str = ""
    size: int = 1
    elements: tuple[Element, ...] = ()
    complete: bool = True

    @property
    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        numbers = (f"{self.autodiff:.6g}", f"{self.reference:.6g}", f"{self.error:.1e}")
        return self.name, str(self.order), self.mode, self.verdict, *numbers


@dataclass(frozen=True)
class GradCheck:
    """The outcome of `check_grads`: true when everything passed.

    Attributes:
        function: What the user calls the function.
        checks: One per argument, order and mode.
        notes: What could not be checked, and why.
    """

    function: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether all checks passed; an inconclusive one did not."""
        return all(check.verdict == "pass" for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        """The checks that failed, those of lower order first."""
        failed = [check for check in self.checks if check.verdict == "fail"]
        return sorted(failed, key=lambda check: check.order)

    @property
    def title(self) -> str:
        """How many checks passed, failed and were inconclusive."""
        verdicts = [check.verdict for check in self.checks]
        counts = [(v, verdicts.count(v)) for v in ("pass", "fail", "inconclusive")]
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts if count)
        return f"check_grads({self.function}): {words}"

    def __str__(self) -> str:
        """Return the table, one line per check, and the notes."""
        rows = [_HEADS, *(check.cells for check in self.checks)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([self.title, *lines, *self._all_notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        rows = [check.cells for check in self.checks]
        return html_table(rows, _HEADS, before=self.title, after=self._all_notes())

    def raise_on_failure(self) -> None:
        """Raise if a check failed.

        Raises:
            GradientMismatchError: If one did: the first of the lowest order, with the
                worst of its elements.
        """
        if self.failures:
            raise _mismatch(self.function, self.failures[0])

    def _all_notes(self) -> list[str]:
        own = [f"{c.name}, order {c.order}: {c.note}" for c in self.checks if c.note]
        return list(dict.fromkeys([*own, *self.notes]))


def _mismatch(function: str, check: Check) -> GradientMismatchError:
    """Return the error for a check that failed."""
    wrong = len(check.elements)
    least = "" if check.complete else "at least "
    count = f": {least}{wrong} of {check.size} elements" if wrong else ""
    what = f"`{check.name}`" + (f", order {check.order}" if check.order > 1 else "")
    if wrong:
        worst = check.elements[0]
        at = f"worst at {list(worst.index)}: "
        numbers = worst.autodiff, worst.reference, worst.error
    else:
        at = "along one direction: "
        numbers = check.autodiff, check.reference, check.error
    left, right = ("checked", "reference")
    if check.mode == "reverse":
        left, right = ("autodiff", "numerical")
    two = REFERENCE[check.mode]
    return GradientMismatchError(
        f"{two[0].upper()}{two[1:]} disagree for `{function}`, {what}{count}.",
        got=f"{at}{left} {numbers[0]:.6g}, {right} {numbers[1]:.6g} ± {numbers[2]:.1e}",
        hint=_hint(check),
    )


def _hint(check: Check) -> str:
    if check.note:
        return check.note
    if check.mode in ("compiled", "xla"):
        return "the function without tf.function or jit_compile; a report to TensorFlow"
    if check.mode == "forward":
        return 'modes=("reverse", "compiled") if forward mode is not used'
    if check.order > 1:
        return (
            "order=1 if no second derivative is needed; a tf.stop_gradient in f (Keras "
            "normalisation layers hold one) or a custom gradient is right once only"
        )
    return (
        "float64 inputs; a point away from kinks; tfgrad.explain(f, ...); "
        "then the tf.custom_gradient code"
    )
