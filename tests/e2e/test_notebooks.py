"""The notebooks that are committed are their paired .py, run."""

from pathlib import Path

import jupytext
import nbformat
import pytest

NOTEBOOKS = sorted(Path(__file__).parents[2].glob("notebooks/*.py"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_its_paired_source_did(source):
    cells = jupytext.read(source).cells
    shown = nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells

    assert [cell.source for cell in shown] == [cell.source for cell in cells]
    code = [cell for cell in shown if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert shown[0].source.startswith("# ")  # its title
    assert shown[0].cell_type == "markdown"
    assert "assert" in code[-1].source


def test_there_are_notebooks():
    assert NOTEBOOKS
