"""The cluster file of `ray up`, by the installed Ray's own schema and defaults."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "deploy" / "ray" / "cluster.yaml"
RAYS_WORKERS = range(10_002, 20_000)

CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown field": lambda config: config.update(max_worker=3),
    "no command": lambda config: config.update(head_start_ray_commands="ray start"),
    "wrong type": lambda config: config.update(idle_timeout_minutes="5"),
}


def cluster() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def start_commands() -> list[str]:
    return [command for role in ("head", "worker") for command in cluster()[f"{role}_start_ray_commands"]]


def test_ray_takes_the_file_with_its_defaults():
    config = prepare_config(cluster())
    validate_config(config)
    [kind] = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(cluster()["provider"]["worker_ips"])


@pytest.mark.parametrize("change", CHANGES)
def test_ray_refuses_a_file_that_is_wrong(change: str):
    config = cluster()
    CHANGES[change](config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(copy.deepcopy(config)))


def test_commands_are_bash_and_their_options_are_rays():
    ray = Path(sys.executable).with_name("ray")
    described = subprocess.run([ray, "start", "--help"], capture_output=True, text=True, check=True).stdout
    for command in start_commands() + cluster()["setup_commands"]:
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
        for option in re.findall(r"(--[a-z-]+)[= ]", command):
            assert re.search(rf"^\s+{option}\b", described, re.MULTILINE), option


def test_ports_are_none_of_rays_workers_and_every_start_asks_for_the_token():
    starts = [command for command in start_commands() if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        ports = [int(port) for port in re.findall(r"(?:port=|:)(\d+)", command)]
        assert ports
        assert not set(ports) & set(RAYS_WORKERS)
