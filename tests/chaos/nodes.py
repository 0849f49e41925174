"""A Ray cluster of several nodes on this machine: a raylet each, with ports, workers and an object store of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS = 120.0
OBJECT_STORE_BYTES = 2**27


class Node:
    """`ray start --block` in a process group of its own."""

    def __init__(self, log: Path, variables: dict[str, str], *arguments: str) -> None:
        self.log = log
        command = [RAY, "start", "--block", "--disable-usage-stats"]
        command += ["--object-store-memory", str(OBJECT_STORE_BYTES), *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=variables, start_new_session=True, text=True
            )

    def wait_until_started(self) -> None:
        """Fails with what Ray printed if the node is not up in `START_SECONDS`."""
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (printed := self.log.read_text()):
            assert self.process.poll() is None, printed
            assert time.monotonic() < deadline, f"no node within {START_SECONDS:g} s:\n{printed}"
            time.sleep(0.2)

    @property
    def raylet(self) -> psutil.Process:
        """The node's own process, which starts and ends all of its workers."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if child.name() == "raylet")

    def kill(self) -> None:
        """The node is gone from one moment to the next, with all that ran on it."""
        family = [psutil.Process(self.process.pid)]
        family += family[0].children(recursive=True)
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=10.0)
        self.process.wait(10.0)

    def stop(self) -> None:
        """An ordinary end."""
        self.process.terminate()
        try:
            self.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.kill()


class LocalCluster:
    """A head without CPUs of its own, and nodes with one each."""

    def __init__(self, directory: Path, temporary: Path, variables: dict[str, str]) -> None:
        self._directory = directory
        self.temporary = temporary
        self.variables = variables
        self._started = 0
        self.port = free_port()
        self.head = self._start("--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false",
                                "--temp-dir", str(temporary))  # fmt: skip
        self.nodes: list[Node] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self) -> Node:
        """One more node with one CPU."""
        node = self._start("--address", self.address, "--num-cpus", "1")
        self.nodes.append(node)
        return node

    def replace(self, node: Node) -> None:
        """Another node in the place of one that is gone."""
        self.nodes.remove(node)
        self.add()

    def processes(self) -> list[psutil.Process]:
        """All that runs on the cluster."""
        found = []
        for node in (self.head, *self.nodes):
            if psutil.pid_exists(node.process.pid):
                found += psutil.Process(node.process.pid).children(recursive=True)
        return found

    def stop(self) -> None:
        for node in (*self.nodes, self.head):
            node.stop()

    def _start(self, *arguments: str) -> Node:
        self._started += 1
        node = Node(self._directory / f"node_{self._started}.log", self.variables, *arguments)
        node.wait_until_started()
        return node


@contextmanager
def local_cluster(directory: Path, nodes: int) -> Iterator[LocalCluster]:
    """A cluster with `nodes` beside its head; `directory` receives what they print."""
    variables = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.urandom(32).hex(),
        "OMP_NUM_THREADS": "1",
        # A node that does not answer is given up after some 10 s.
        "RAY_health_check_initial_delay_ms": "5000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "5",
    }
    # Ray's sockets lie below this directory, and their paths may not be long.
    temporary = Path(tempfile.mkdtemp(prefix="e3rl-chaos-", dir="/tmp"))
    cluster = LocalCluster(directory, temporary, variables)
    try:
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        cluster.stop()
        kill_processes_of(str(temporary))
        shutil.rmtree(temporary, ignore_errors=True)


def kill_processes_of(text: str) -> None:
    """End every process that names `text` in its command line, but this one."""
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(text in part for part in process.cmdline()):
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            continue


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
