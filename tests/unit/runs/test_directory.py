import subprocess
import sys
from pathlib import Path

import pytest

from tfgrad.errors import InvalidArgumentError, RunError
from tfgrad.runs.directory import check, claim

CLAIM_AND_WAIT = """
import sys
from tfgrad.runs.directory import claim
claimed = claim(sys.argv[1], resume=False)
print(claimed.path, flush=True)
sys.stdin.read()
"""


def start_claimer(path):
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_new_directory_is_made_with_its_parents(tmp_path):
    claimed = claim(tmp_path / "parabola" / "sgd", resume=False)

    assert claimed.path == tmp_path / "parabola" / "sgd"
    assert claimed.path.is_dir()


def test_a_directory_that_holds_nothing_is_taken_as_it_is(tmp_path):
    assert claim(str(tmp_path), resume=False).path == tmp_path


def test_a_directory_that_holds_something_is_left_to_its_owner(tmp_path):
    for name in ("sgd", "sgd-002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events").touch()

    assert claim(tmp_path / "sgd", resume=False).path == tmp_path / "sgd-003"


def test_an_empty_directory_with_a_live_writer_is_not_shared(tmp_path):
    first = claim(tmp_path / "sgd", resume=False)
    second = claim(tmp_path / "sgd", resume=False)

    assert (first.path.name, second.path.name) == ("sgd", "sgd-002")


def test_a_lock_leaves_no_file_behind(tmp_path):
    claim(tmp_path, resume=False).release()

    assert list(tmp_path.iterdir()) == []


def test_processes_that_ask_at_the_same_time_get_directories_of_their_own(tmp_path):
    claimers = [start_claimer(tmp_path / "sgd") for _ in range(8)]
    names = [Path(c.stdout.readline().strip()).name for c in claimers]
    for claimer in claimers:
        claimer.communicate()

    assert sorted(names) == ["sgd", *(f"sgd-00{n}" for n in range(2, 9))]


def test_a_second_live_writer_is_refused(tmp_path):
    claimer = start_claimer(tmp_path)
    claimer.stdout.readline()

    with pytest.raises(RunError, match=r"(?s)one writer.*try: close\(\)"):
        claim(tmp_path, resume=True)
    claimer.communicate()


def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path):
    claimer = start_claimer(tmp_path)
    claimer.stdout.readline()
    claimer.kill()
    claimer.communicate()

    assert claim(tmp_path, resume=True).path == tmp_path


def test_a_released_directory_can_be_resumed(tmp_path):
    claim(tmp_path, resume=False).release()

    assert claim(tmp_path, resume=True).path == tmp_path


def test_a_claim_that_is_garbage_holds_nothing(tmp_path):
    claimed = claim(tmp_path, resume=False)
    del claimed

    assert claim(tmp_path, resume=True).path == tmp_path


def test_a_directory_without_a_name_of_its_own_is_numbered_too(tmp_path, monkeypatch):
    here = tmp_path / "sgd"
    (here / "inner").mkdir(parents=True)
    for place, name in ((here, "."), (here / "inner", "..")):
        monkeypatch.chdir(place)

        assert claim(name, resume=False).path == tmp_path / "sgd-002"


@pytest.mark.parametrize("refuse", [check, lambda path: claim(path, resume=False)])
@pytest.mark.parametrize("target", ["nothing", "link"])
def test_a_link_to_nothing_is_named(tmp_path, target, refuse):
    (tmp_path / "link").symlink_to(tmp_path / target)

    with pytest.raises(RunError, match=r"got: .*/link, which is a link to nothing"):
        refuse(tmp_path / "link")


def test_a_run_that_is_not_there_cannot_be_resumed(tmp_path):
    with pytest.raises(RunError, match="leave `resume_from` out"):
        claim(tmp_path / "nothing", resume=True)

    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("below", ["", "sgd", "sgd/deeper"])
@pytest.mark.parametrize("refuse", [check, lambda path: claim(path, resume=False)])
def test_a_file_in_the_way_is_named(tmp_path, below, refuse):
    file = tmp_path / "logs"
    file.touch()

    with pytest.raises(
        RunError, match=rf"(?s)got: {file}, which is a file.*try: another"
    ):
        refuse(file / below)


def test_a_directory_that_cannot_be_made_says_why():
    # For root every directory is writable, but nobody makes one in /proc.
    with pytest.raises(
        RunError, match=r"(?s)can be written.*got: /proc/x: .*try: a dir"
    ):
        claim("/proc/x", resume=False)


@pytest.mark.parametrize(
    "name",
    [
        "",
        None,
        3,
        b"logs",
        "gs://bucket/logs",
        "a\0b",
        "~nobody-here/logs",
        "x" * 256,
        "\ud800",
    ],
    ids=repr,
)
@pytest.mark.parametrize("refuse", [check, lambda path: claim(path, resume=False)])
def test_what_names_no_local_directory_is_refused(name, refuse):
    with pytest.raises(InvalidArgumentError, match=r"try: a local path such as"):
        refuse(name)


def test_a_check_makes_nothing(tmp_path):
    check(tmp_path / "parabola" / "sgd")

    assert list(tmp_path.iterdir()) == []
