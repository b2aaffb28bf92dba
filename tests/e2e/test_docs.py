"""What README.md and docs/ show is what happens."""

import doctest
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest

import tfgrad
from tfgrad.cli import main
from tfgrad.optimize.stopping import RULES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("[CR]*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = ("text", "sh")  # trees; commands that make environments, which CI runs

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


@pages
def test_every_python_block_prints_what_it_says(page, tmp_path, monkeypatch):
    if page.stem in ("gpflow", "deepxde"):  # they are no dependencies, nor need they be
        pytest.importorskip(page.stem)
    monkeypatch.chdir(tmp_path)
    blocks = [
        code for kind, code in BLOCK.findall(page.read_text()) if kind == "python"
    ]

    # An output ends with its block, where doctest knows of empty lines alone.
    text = page.read_text().replace("\n```\n", "\n\n```\n")
    names = {"__name__": "__main__"}
    test = doctest.DocTestParser().get_doctest(text, names, page.stem, str(page), 0)
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)

    assert results.failed == 0
    assert all(code.startswith(">>> ") for code in blocks)
    assert bool(results.attempted) == bool(blocks)


@pages
def test_every_command_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for kind, block in BLOCK.findall(page.read_text()):
        assert kind in ("python", "console", *NOT_RUN)
        if kind == "console":
            for call in block.removeprefix("$ ").split("\n$ "):
                command, _, expected = call.partition("\n")
                program, *words = shlex.split(command)
                main(words)

                found = capsys.readouterr().out
                same = doctest.OutputChecker().check_output(
                    expected.removesuffix("\n") + "\n", found, doctest.ELLIPSIS
                )
                assert program == "tfgrad"
                assert same, f"{command}\n{found}"


@pages
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tree_in_the_readme_is_the_tree_of_the_package():
    tree = re.search(r"```text\ntfgrad/\n(.*?)```", README, re.DOTALL).group(1)
    named = {line.split()[1].rstrip("/") for line in tree.splitlines()}
    package = Path(tfgrad.__file__).parent
    found = {
        path.name
        for path in package.iterdir()
        if not path.name.startswith(("_", "py.")) and path.name != "__pycache__"
    }

    assert named == found


def test_the_public_names_are_sorted_and_documented():
    assert sorted(tfgrad.__all__) == tfgrad.__all__
    for name in tfgrad.__all__:
        assert getattr(tfgrad, name).__doc__


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("minimise", "minimize"), ("hessians", "hessian"), ("curve_fit", "least_squares")],
)
def test_a_misspelt_name_is_answered_with_the_right_one(wrong, right):
    with pytest.raises(AttributeError, match=rf"{wrong}'\n  try: tfgrad\.{right}$"):
        getattr(tfgrad, wrong)


def test_a_name_that_is_like_none_is_answered_without_a_guess():
    with pytest.raises(AttributeError, match=r"no attribute 'zzz'$"):
        tfgrad.zzz  # noqa: B018 - the attribute is the test


def test_every_status_is_documented():
    names = {rule.name for rule in RULES}
    fields = tfgrad.OptimizeResult.__doc__
    listed = fields[fields.index("status:") : fields.index("message:")]
    page = (ROOT / "docs/choosing-a-method.md").read_text()

    assert set(re.findall(r'"(\w+)"', listed)) == names
    assert [name for name in names if f"`{name}`" not in page] == []


MADE_BY = {
    "GradCheck": "check_grads",
    "LeastSquaresResult": "least_squares",
    "ManyFitsResult": "least_squares_many",
    "ManyResult": "minimize_many",
    "OptimizeResult": "minimize",
}
"""Names that are not called by a user: their example is that of what makes them."""


@pytest.mark.parametrize("name", tfgrad.__all__)
def test_every_public_name_has_an_example_that_runs(name):
    thing = getattr(tfgrad, MADE_BY.get(name, name))
    module = sys.modules[thing.__module__]

    # As pytest finds them: the package is among the testpaths.
    found = {test.name: test for test in doctest.DocTestFinder().find(module)}

    assert found[f"{module.__name__}.{thing.__name__}"].examples


@pytest.mark.parametrize("name", sorted({*tfgrad.__all__} - {*MADE_BY}))
def test_every_argument_is_documented_by_the_name_it_has(name):
    thing = getattr(tfgrad, name)
    text = inspect.getdoc(thing)
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    documented = re.findall(r"^    \**(\w+):", section.group(1), re.MULTILINE)
    parameters = [*inspect.signature(thing).parameters]
    if documented[-1] == "options":  # those of `minimize`, where they are documented
        del documented[-1]
        assert parameters.pop() == "options"

    assert documented == parameters
