"""What a diagnosis says: the report, in lines and in HTML, and the error."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from tfgrad.diagnosis.causes import Culprit
from tfgrad.diagnosis.path import Cut
from tfgrad.errors import NoGradientError

VALUE = "the value"
"""The name of the finding for a function whose value is not finite."""

_REASONS = {
    "non-finite": "there are NaNs or infinities in its gradient",
    "cut": "an op on its way to the output has no gradient",
    "zero": "every element of its gradient is exactly zero",
    "unused": "nothing leads from it to the output",
    "integer": "whole numbers have no derivative",
    "stopped": "it reaches the output through tf.stop_gradient or its shape only",
    "connected": "its gradient arrives",
}
"""What is said of each status, the worst first."""

_HINTS = {
    "connected": "tfgrad.check_grads, which tells whether it is right",
    "unused": "reading it; changing a variable by x.assign(...), never by x = ...",
    "integer": "tf.cast(..., tf.float32) of it before the call",
    "zero": "another starting point",
    "non-finite": "what the finding about the value says, or another point",
}

_MOST_NAMES = 3


@dataclass(frozen=True)
class Finding:
    """What happens to the gradient of one input.

    Attributes:
        name: What the user calls the input.
        status: "connected"; "unused": nothing leads from it to the output; "stopped":
            only tf.stop_gradient or a shape does; "cut"; "zero"; "non-finite";
            "integer".
        culprit: The op to blame, if one is.
    """

    name: str
    status: str
    culprit: Culprit | None = None

    @property
    def place(self) -> str:
        """The user's line, with its source; empty if unknown."""
        return str(self.culprit.where) if self.culprit and self.culprit.where else ""

    @property
    def reason(self) -> str:
        """Why it has this status."""
        if self.culprit is None:
            return _REASONS[self.status]
        return f"{self.culprit.label}: {self.culprit.reason}"

    @property
    def hint(self) -> str:
        """What to write instead, or next."""
        return self.culprit.hint if self.culprit else _HINTS.get(self.status, "")


@dataclass(frozen=True)
class Explanation:
    """Why each gradient of a function arrives or does not.

    Attributes:
        function: What the user calls the function.
        findings: One for each input, and one for the value if that is not finite.
        note: Why derivatives of the function are not verified, and how often a
            `tf.function` was traced; empty if there is nothing to say.
    """

    function: str
    findings: tuple[Finding, ...]
    note: str = ""

    @property
    def title(self) -> str:
        """How many gradients arrive, in a few words."""
        inputs = [finding for finding in self.findings if finding.name != VALUE]
        arrived = sum(finding.status == "connected" for finding in inputs)
        noun = "gradient" if len(inputs) == 1 else "gradients"
        return f"{self.function}: {arrived} of {len(inputs)} {noun} arrived"

    def __str__(self) -> str:
        """Return three to six lines: the worst finding in full, a word on others."""
        worst, *others = self._groups()
        at = f" at {worst[0].place}" if worst[0].place else ""
        lines = [f"{_names(worst)}: {worst[0].status}{at}", f"   {worst[0].reason}"]
        if worst[0].hint:
            lines.append(f"   try: {worst[0].hint}")
        for group in others[:1] if len(others) < 3 else ():
            at = f" at {group[0].place}" if group[0].place else ""
            lines.append(f"{_names(group)}: {group[0].status}{at}")
        rest = others[1:] if len(others) < 3 else others
        if rest:
            words = (f"{_names(group)}: {group[0].status}" for group in rest)
            lines.append("; ".join(words))
        lines += [self.note] if self.note else []
        return "\n  ".join([self.title, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return a table for a notebook: one row for each kind of finding."""
        titles = ("input", "gradient", "where", "why", "try")
        rows = [
            (_names(group), first.status, first.place, first.reason, first.hint)
            for group in self._groups()
            for first in group[:1]
        ]
        return html_table(rows, titles, before=self.title, after=[self.note])

    def _groups(self) -> list[list[Finding]]:
        """Return the findings in groups of equal ones, the worst first."""
        groups: dict[object, list[Finding]] = {}
        for finding in self.findings:
            key = finding.status, finding.culprit
            groups.setdefault(key, []).append(finding)
        return sorted(groups.values(), key=lambda g: [*_REASONS].index(g[0].status))


def no_gradient_error(
    function_name: str, argument_name: str, cut: Cut
) -> NoGradientError:
    """Return the error for a gradient that is cut, ready to be raised."""
    return NoGradientError(
        f"The gradient of `{function_name}` with respect to `{argument_name}` is cut.",
        got=f"{cut.label} at {cut.where}: {cut.reason}",
        hint=cut.hint,
    )


def _names(group: list[Finding]) -> str:
    """Return the names in the group; of many, the first ones and how many more."""
    names = [finding.name for finding in group]
    more = len(names) - _MOST_NAMES
    shown = ", ".join(names[:_MOST_NAMES] if more > 1 else names)
    return f"{shown} and {more} more" if more > 1 else shown


def html_table(
    rows: Iterable[Iterable[str]],
    titles: Iterable[str] = (),
    *,
    before: str = "",
    after: Iterable[str] = (),
) -> str:
    """Return a table of plain text for a notebook, with paragraphs around it.

    >>> html_table([("f < 0", "yes")], before="result")
    '<p>result</p><table><tr><td>f &lt; 0</td><td>yes</td></tr></table>'
    """

    def line(tag: str, cells: Iterable[str]) -> str:
        inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>" if inner else ""

    table = line("th", titles) + "".join(line("td", row) for row in rows)
    first, *last = (
        f"<p>{html.escape(text)}</p>" if text else "" for text in (before, *after)
    )
    return f"{first}<table>{table}</table>{''.join(last)}"
