"""`deploy/await_nodes.py` where there is no cluster. With one it is tried by the Slurm script's tests."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "deploy" / "await_nodes.py"


def await_nodes(address: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, "--nodes", "2", *arguments]
    environment = os.environ | {"RAY_ADDRESS": address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


@pytest.fixture
def nobody() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_cluster_that_does_not_come_is_given_up_in_time(nobody: str):
    began = time.monotonic()
    result = await_nodes(nobody, "--seconds", "0.5")
    assert (result.returncode, result.stderr) == (1, f"error: 0 of 2 nodes after 0.5 s at {nobody}\n")
    assert time.monotonic() - began < 10


def test_a_cluster_whose_start_failed_is_not_waited_for(nobody: str):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    result = await_nodes(nobody, "--seconds", "1000", "--while-pid", str(ended.pid))
    ended.wait()
    assert result.returncode == 1
    assert "what starts the nodes has ended; 0 of 2 were there" in result.stderr


@pytest.mark.parametrize("address", ["", "auto", "head"])
def test_an_address_must_have_a_port(address: str):
    result = await_nodes(address, "--seconds", "1000")
    assert result.returncode == 2
    assert "it must be HOST:PORT" in result.stderr
