"""The Slurm script with real Ray nodes: two on this machine, started through a stand-in for srun."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.slurm import SCRIPT, allocation, executable

SECONDS = 300.0
TOOLS = Path(sys.executable).parent

DRIVER = '''
"""In place of learner.train: works on both nodes, kills the worker's raylet, and works on both nodes again."""
import os, sys, time
import psutil, ray

def nodes() -> set:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

@ray.remote(num_cpus=1)
def where() -> str:
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

def work() -> None:
    used = ray.get([where.options(scheduling_strategy="SPREAD").remote() for _ in range(2)], timeout=60)
    assert set(used) == nodes() and len(nodes()) == 2, (used, nodes())

assert sys.argv[1:] == ["-m", "learner.train", "--config", "my.yaml", "--resume", "auto"], sys.argv
ray.init(log_to_driver=False)
work()
before = nodes()
mine = [
    process for process in psutil.process_iter()
    if process.name() == "raylet" and any(os.environ["RAY_TEMPORARY"] in part for part in process.cmdline())
]
[worker] = [process for process in mine if "--head" not in process.cmdline()]
worker.kill()
deadline = time.monotonic() + 120
# For a while both may be there: the new one, and the one of which it is not yet known that it is gone.
while (nodes() == before or len(nodes()) != 2) and time.monotonic() < deadline:
    time.sleep(0.2)
work()
print("worked before and after", flush=True)
'''


@pytest.mark.timeout(2 * SECONDS)
def test_nodes_start_come_back_when_killed_and_end(tmp_path: Path):
    job = os.getpid()
    environment = allocation(tmp_path, nodes=2, job=job)
    environment.pop("RAY_ADDRESS", None)
    (tmp_path / "driver.py").write_text(DRIVER)
    executable(tmp_path / ".venv" / "bin" / "ray", f'#!/bin/bash\nexec {TOOLS / "ray"} "$@"\n')
    executable(
        tmp_path / ".venv" / "bin" / "python",
        f'#!/bin/bash\n[[ $2 != learner.train ]] || set -- {tmp_path / "driver.py"} "$@"\nexec {sys.executable} "$@"\n',
    )
    output = tmp_path / "output"
    with output.open("w") as log:
        process = subprocess.Popen(
            [SCRIPT, "--config", "my.yaml"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        assert process.wait(SECONDS) == 0, output.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert "worked before and after" in output.read_text()
    assert "the Ray worker on" in output.read_text()
    assert not Path(f"/tmp/ray-{job}").exists()
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0
    assert not (tmp_path / "requeued").exists()
