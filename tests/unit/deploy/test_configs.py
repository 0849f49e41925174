"""Configurations for GPUs ask for as many as their machines have, and for a transport that reaches them.

That each is a valid configuration is checked with the others in tests/unit/common.
"""

import re
from pathlib import Path

import pytest
import yaml

from common.config import load_config

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "deploy" / "configs"
GPUS_PER_MACHINE = 8


def machines_of(path: Path) -> int:
    """By the file's own header."""
    header = re.search(r"for (one machine|(\d+) machines) with 8 GPUs", path.read_text())
    assert header, path
    return int(header[2] or 1)


@pytest.mark.parametrize("name", ["qwen3_4b_deepmath", "qwen3_8b_deepmath", "qwen3_8b_deepmath_4_nodes"])
def test_a_configuration_fills_its_machines(name: str):
    path = CONFIGS / f"{name}.yaml"
    config, machines = load_config(path), machines_of(path)
    assert config.rollout.engine.replicas + config.learner.ranks == machines * GPUS_PER_MACHINE
    assert (config.sync.transport == "host") == (machines == 1)


def test_examples_start_the_configuration_on_as_many_machines_as_it_is_for():
    script = (ROOT / "deploy" / "slurm" / "train.sh").read_text()
    nodes, config = re.search(r"sbatch --nodes=(\d+) \S+ --config (\S+)", script).groups()
    assert int(nodes) == machines_of(ROOT / config)
    cluster = (ROOT / "deploy" / "ray" / "cluster.yaml").read_text()
    config = re.search(r"--config (\S+)", cluster)[1]
    assert 1 + yaml.safe_load(cluster)["max_workers"] == machines_of(ROOT / config), "the head has GPUs, too"
