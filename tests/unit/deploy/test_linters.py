"""Shell scripts and the Dockerfile pass their linters, and the linters find what is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOLS = Path(sys.executable).parent
SCRIPTS = sorted([*(ROOT / "deploy").rglob("*.sh"), ROOT / ".ci" / "run"])
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def complaints(tool: str, *files: Path) -> str:
    """What the linter prints; empty if it has nothing to say."""
    result = subprocess.run([TOOLS / tool, *files], capture_output=True, text=True, timeout=60)
    assert bool(result.returncode) == bool(result.stdout), result.stderr
    return result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_passes_shellcheck(script: Path):
    assert complaints("shellcheck", script) == ""


def test_the_dockerfile_passes_hadolint():
    assert complaints("hadolint", DOCKERFILE) == ""


def test_make_lint_runs_the_same_tools_on_the_same_files():
    printed = subprocess.run(["make", "--dry-run", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    linted = {ROOT / file for line in printed.splitlines() if "bin/shellcheck" in line for file in line.split()[1:]}
    assert linted == set(SCRIPTS)
    assert "bin/hadolint deploy/Dockerfile" in printed


def test_linters_find_faults(tmp_path: Path):
    script, image = tmp_path / "faulty.sh", tmp_path / "Dockerfile"
    script.write_text("#!/bin/bash\ncd $1\nrm -r $2/*\n")
    image.write_text(DOCKERFILE.read_text().replace("FROM python:3.12-slim-bookworm", "FROM python:latest"))
    assert "SC2164" in complaints("shellcheck", script)
    assert "DL3007" in complaints("hadolint", image)


def test_the_image_copies_what_is_there():
    copies = re.findall(r"^COPY (\S+) ", DOCKERFILE.read_text(), re.MULTILINE)
    assert copies == ["deploy/locks/${TARGET}.txt", "."]
    for target in ("cpu", "gpu"):
        assert (ROOT / copies[0].replace("${TARGET}", target)).is_file()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".venv", "runs"} <= set(ignored), "neither belongs into an image"
