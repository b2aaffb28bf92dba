"""What README.md shows is what happens."""

import doctest
import re
from pathlib import Path

import tfgrad

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_example_in_the_readme_prints_what_it_says():
    results = doctest.testfile(str(ROOT / "README.md"), module_relative=False)

    assert results.failed == 0
    assert results.attempted >= 8


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


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)

    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_public_names_are_what_can_be_imported():
    assert sorted(tfgrad.__all__) == tfgrad.__all__
    for name in tfgrad.__all__:
        assert getattr(tfgrad, name).__doc__
