"""The Ray cluster of a server: one that is there, or a new one on this machine."""

import os
import socket
import subprocess
import sys
from typing import Any

import ray

PORT_SECONDS = 5.0
CONNECT_SECONDS = 45.0
"""What a cluster that runs already has to answer in."""


class NoCluster(Exception):
    """There is no Ray to work with; the message is one line."""


def connect(address: str | None) -> None:
    """Connect to a Ray cluster: the given one, that of `RAY_ADDRESS`, or a new one on this machine.

    Raises:
        NoCluster: none answers there, or none starts here.
    """
    if ray.is_initialized():
        return
    given = address or os.environ.get("RAY_ADDRESS")
    # Without an address Ray would join any cluster that somebody has started on this machine.
    options: dict[str, Any] = {"address": "local", "num_cpus": max(os.cpu_count() or 1, 64), "include_dashboard": False}
    what = "Ray did not start on this machine"
    if given:
        options = {"address": given}
        what = f"no Ray cluster answers at {given}"
        _check_answers(given, what)
    try:
        ray.init(log_to_driver=False, **options)
    except Exception as error:
        # Ray raises a plain Exception for a start that takes too long.
        raise NoCluster(f"{what}: {_line(error)}") from error


def _check_answers(address: str, what: str) -> None:
    """Connect in a process of its own first: Ray's attempts can go on for minutes, and Python can't interrupt them."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    try:
        if separator and port.isdecimal():
            socket.create_connection((host.strip("[]"), int(port)), timeout=PORT_SECONDS).close()
        code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)"
        command = [sys.executable, "-c", code, address]
        probe = subprocess.run(command, capture_output=True, text=True, timeout=CONNECT_SECONDS, check=False)
    except (OSError, OverflowError, subprocess.TimeoutExpired) as error:
        raise NoCluster(f"{what}: {_line(error)}") from error
    if probe.returncode:
        last = probe.stderr.strip().splitlines()[-1:]
        raise NoCluster(f"{what}: {last[0] if last else f'exit status {probe.returncode}'}")


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not within {CONNECT_SECONDS:g} s"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
