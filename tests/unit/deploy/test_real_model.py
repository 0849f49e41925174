"""What `make real-model` does without a package index, and with a directory that is there already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.http_server import ROOT

SCRIPT = ROOT / "deploy" / "real_model.py"


def make(output: Path) -> "subprocess.CompletedProcess[str]":
    """Run the script where pip finds nothing."""
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
    )


def test_without_an_index_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    ended = make(tmp_path / "models" / "real")
    assert ended.returncode == 1
    assert "pip could not fetch the packages" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in (tmp_path / "models").iterdir()] in ([], [".real.lock"])


def test_what_is_not_its_own_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    ended = make(tmp_path)
    assert ended.returncode == 1
    assert "holds something else" in ended.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", [None, "truncated", "missing", "other recipe"])
def test_only_a_complete_directory_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import real_model

    (tmp_path / "weights").write_text("1234")
    recipe = "other" if damage == "other recipe" else real_model.recipe()
    (tmp_path / real_model.STAMP).write_text(json.dumps({"recipe": recipe, "sizes": {"weights": 4}}))
    if damage == "truncated":
        (tmp_path / "weights").write_text("12")
    elif damage == "missing":
        (tmp_path / "weights").unlink()
    assert real_model.is_complete(tmp_path) == (damage is None)
