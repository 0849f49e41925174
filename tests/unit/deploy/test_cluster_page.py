"""docs/cluster.md names what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_files_that_the_page_names_exist():
    named = set(re.findall(r"\b((?:deploy|tests)/[\w./]+\w)", PAGE)) | {
        f"docs/{link}" for link in re.findall(r"\]\((\w+\.md)", PAGE)
    }
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_file_for_a_cluster_is_on_the_page():
    files = [path for folder in ("kuberay", "ray") for path in (ROOT / "deploy" / folder).iterdir()]
    for path in [*files, ROOT / "deploy/slurm/train.sh", ROOT / "deploy/Dockerfile", ROOT / "deploy/await_nodes.py"]:
        assert str(path.relative_to(ROOT)) in PAGE


def test_variables_of_the_slurm_script_are_on_the_page_with_their_defaults():
    script = (ROOT / "deploy" / "slurm" / "train.sh").read_text()
    defaults = dict(re.findall(r"\$\{(E3RL_\w+):-(\d+)\}", script))
    assert len(defaults) == 4
    for name, default in defaults.items():
        line = next(line for line in PAGE.splitlines() if line.startswith("| `E3RL_") and name in line)
        assert default in line
