"""The shape of the package: no class grows beyond what a reader holds in the head."""

import runpy
from pathlib import Path

census = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "census.py"))


def test_no_class_has_more_than_15_methods_or_10_attributes():
    # What a class inherits counts where it is defined.
    large = [
        f"{name}: {methods} methods, {attributes} attributes"
        for methods, attributes, name in census["classes"]()
        if methods > 15 or attributes > 10
    ]

    assert large == []


def test_the_largest_class_is_found():
    assert max(methods for methods, _, _ in census["classes"]()) > 10
