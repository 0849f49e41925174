"""Temporary directories: what is left behind is removed, what somebody owns or what is none of ours is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import owned_directories
from common.owned_directories import OwnedDirectory, remove_leftovers

PREFIX = "e3rl-test-"
OWNER = """
import sys
from pathlib import Path
from common.owned_directories import OwnedDirectory
directory = OwnedDirectory("e3rl-test-", Path(sys.argv[1]))
print(directory.path, flush=True)
sys.stdin.read()
"""


def test_a_directory_is_a_leftover_once_its_process_was_killed_and_not_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = Path(owner.stdout.readline().strip())
        (path / "weights").write_text("x")
        assert remove_leftovers(PREFIX, [tmp_path]) == []
        assert (path / "weights").exists()
        owner.kill()
        owner.wait()
    assert remove_leftovers(PREFIX, [tmp_path]) == [path]
    assert not path.exists()


def test_two_owners_in_one_directory_leave_each_other_alone(tmp_path: Path) -> None:
    first, second = OwnedDirectory(PREFIX, tmp_path), OwnedDirectory(PREFIX, tmp_path)
    assert first.path != second.path
    assert remove_leftovers(PREFIX, [tmp_path]) == []
    first.remove()
    first.remove()
    assert remove_leftovers(PREFIX, [tmp_path]) == []
    assert list(tmp_path.iterdir()) == [second.path]
    second.remove()


def test_only_its_user_may_enter_or_read(tmp_path: Path) -> None:
    directory = OwnedDirectory(PREFIX, tmp_path)
    os.close(directory.create("weights"))
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert (directory.path / "weights").stat().st_mode & 0o777 == 0o600
    directory.remove()


def test_no_name_that_is_there_already_is_written_to(tmp_path: Path) -> None:
    directory = OwnedDirectory(PREFIX, tmp_path)
    (tmp_path / "elsewhere").write_text("kept")
    (directory.path / "link").symlink_to(tmp_path / "elsewhere")
    (directory.path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(FileExistsError):
            directory.create(name)
    directory.remove()
    assert (tmp_path / "elsewhere").read_text() == "kept"


def test_links_files_and_other_names_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "data").touch()
    (tmp_path / f"{PREFIX}link").symlink_to(other)
    (tmp_path / f"{PREFIX}file").touch()
    assert remove_leftovers(PREFIX, [tmp_path, tmp_path / "missing"]) == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["other", "data", f"{PREFIX}link", f"{PREFIX}file"]
    )


def test_another_users_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{PREFIX}a").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remove_leftovers(PREFIX, [tmp_path]) == []
    monkeypatch.undo()
    assert remove_leftovers(PREFIX, [tmp_path]) == [tmp_path / f"{PREFIX}a"]


def test_a_directory_that_was_taken_for_a_leftover_while_it_was_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = owned_directories.fcntl.flock, []

    def flock(file: int, how: int) -> None:
        if not removed:
            # Another process finds it before it is locked.
            removed.append(None)
            removed.extend(remove_leftovers(PREFIX, [tmp_path]))
        lock(file, how)

    monkeypatch.setattr(owned_directories.fcntl, "flock", flock)
    directory = OwnedDirectory(PREFIX, tmp_path)
    assert len(removed) == 2
    assert removed[1] != directory.path
    assert directory.path.is_dir()
    directory.remove()
