"""Waits until the Ray cluster at RAY_ADDRESS has so many nodes: `RAY_ADDRESS=HOST:PORT python deploy/await_nodes.py
--nodes 4 --seconds 600`.

Exit status 0: it has them. 1: it has not after so many seconds, or the process `--while-pid` has ended.
"""

import argparse
import os
import socket
import subprocess
import sys
import time

PROBE_SECONDS = 45.0
"""What Ray has to answer in. Its own attempts to connect can go on for minutes, so a process of its own makes them."""
PROBE = (
    "import ray; ray.init(log_to_driver=False, configure_logging=False, logging_level='ERROR'); "
    "print(sum(node['Alive'] for node in ray.nodes()))"
)
PAUSE_SECONDS = 1.0


def alive_nodes(address: str) -> int:
    """Nodes of the cluster at `address`; 0 if nothing answers there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5.0).close()
        environment = os.environ | {"RAY_ADDRESS": address}
        command = [sys.executable, "-c", PROBE]
        probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    if probe.returncode:
        print(probe.stderr.strip().splitlines()[-1:], file=sys.stderr, flush=True)
        return 0
    return int(probe.stdout.split()[-1])


def runs(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and that nobody has asked about."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--while-pid", type=int, help="the process that starts them")
    options = parser.parse_args()
    address = os.environ.get("RAY_ADDRESS", "")
    if not address.rpartition(":")[2].isdecimal():
        parser.error(f"RAY_ADDRESS is {address!r}; it must be HOST:PORT")
    deadline = time.monotonic() + options.seconds
    found = 0
    while time.monotonic() < deadline:
        if options.while_pid is not None and not runs(options.while_pid):
            print(f"error: what starts the nodes has ended; {found} of {options.nodes} were there", file=sys.stderr)
            return 1
        found = alive_nodes(address)
        if found >= options.nodes:
            return 0
        time.sleep(PAUSE_SECONDS)
    print(f"error: {found} of {options.nodes} nodes after {options.seconds:g} s at {address}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
