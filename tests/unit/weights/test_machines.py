"""Machines as network namespaces, each with addresses and a /dev/shm of its own: which transports reach across."""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SENDER = """
import sys
from common.config.run import SyncConfig
from learner.weights.transports import publisher
from tests.weights import published
for settings in ({"transport": "host"}, {"transport": "disk", "directory": sys.argv[1]}, {"transport": "gloo"}):
    sender = publisher(SyncConfig(**settings), 1, sys.argv[2])
    print(published(sender, 7).model_dump_json(), flush=True)
sys.stdin.readline()
"""
RECEIVER = """
import asyncio, sys
from pydantic import TypeAdapter
from common.weights import WeightUpdate
from tests.weights import received
for line in sys.stdin:
    update = TypeAdapter(WeightUpdate).validate_json(line)
    try:
        weights = asyncio.run(received(update))
        print(update.transport, sorted(weights), float(weights["b"].mean()), flush=True)
    except Exception as error:
        print(update.transport, type(error).__name__, error, flush=True)
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[tuple[list[str], list[str], str]]:
    """Commands that run on one machine and on another one, and the first one's address."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("needs root, ip and unshare")
    tag = secrets.token_hex(3)
    names = [f"e3rl-{tag}-{side}" for side in "ab"]
    links = [f"e3{tag}{side}" for side in "ab"]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        own_memory = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh"]
        yield (
            ["ip", "netns", "exec", names[0], *own_memory],
            ["ip", "netns", "exec", names[1], *own_memory],
            "10.213.7.1",
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_disk_and_gloo_reach_another_machine_and_host_says_so(
    machines: tuple[list[str], list[str], str], tmp_path: Path
) -> None:
    one, other, address = machines
    command = [*one, sys.executable, "-c", SENDER, str(tmp_path / "shared"), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        updates = "".join(sender.stdout.readline() for _ in range(3))
        receiver = subprocess.run(
            [*other, sys.executable, "-c", RECEIVER], input=updates, capture_output=True, text=True, timeout=120
        )
        sender.communicate("\n", timeout=60)
    host, disk, gloo = receiver.stdout.splitlines()
    assert host.startswith(
        "host NotReachable the learner, on this machine, put weights of version 7 into shared memory"
    )
    assert "'disk'" in host
    assert "'gloo'" in host
    assert disk == "disk ['a', 'b'] 7.0"
    assert gloo == "gloo ['a', 'b'] 7.0", receiver.stderr
    assert f'"address":"{address}"' in updates
