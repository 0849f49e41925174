"""The Slurm script's logic: what it starts, how often, when the job is queued again. Ray and Slurm are stand-ins."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.slurm import SCRIPT, allocation, executable

SECONDS = 20.0
JOB = 4321

RAY = """\
#!/usr/bin/env bash
if [[ $1 == get-auth-token ]]; then echo 0123456789abcdef; exit; fi
printf '%s %s %s\\n' "$RAY_AUTH_MODE" "$RAY_AUTH_TOKEN" "$*" >>"$FAKE/ray.log"
if [[ -e $FAKE/ray_fails && $2 == --head ]]; then exit 1; fi
echo $$ >>"$FAKE/ray.pids"
exec sleep 60
"""

# What the driver ends with each time it is started: a status, or "waits" for SIGTERM, or "hangs" and does not listen.
PYTHON = """\
#!/usr/bin/env bash
case "$1 $2" in
    '-c '*) echo 127.0.0.1; exit ;;
    deploy/await_nodes.py*)
        printf '%s\\n' "$*" >>"$FAKE/awaited"
        [[ ! -e $FAKE/ray_fails ]] || exit 1
        until [[ -s $FAKE/ray.pids && $(wc -l <"$FAKE/ray.pids") -ge $3 ]]; do sleep 0.02; done
        exit 0 ;;
esac
printf '%s %s\\n' "$RAY_ADDRESS" "$*" >>"$FAKE/trained"
ends=$(sed -n "$(wc -l <"$FAKE/trained")p" "$FAKE/ends")
case $ends in
    waits) trap 'exit 130' TERM ;;
    hangs) trap '' TERM ;;
    loses_ray) kill -KILL "$(head -n 1 "$FAKE/ray.pids")"; sleep 0.5; exit 1 ;;
    *) exit "$ends" ;;
esac
touch "$FAKE/under_way"
while :; do sleep 0.1; done
"""


class Job:
    """A job of Slurm's. `ends`: see `PYTHON`."""

    def __init__(self, place: Path, *ends: str, nodes: int = 2, **variables: str) -> None:
        self.place = place
        environment = allocation(place, nodes, JOB)
        executable(place / ".venv" / "bin" / "ray", RAY)
        executable(place / ".venv" / "bin" / "python", PYTHON)
        (place / "ends").write_text("\n".join(ends))
        command = [SCRIPT, "--config", "my.yaml", "--set", "rollout.stop=[a, b]"]
        with (place / "output").open("w") as output:
            self._process = subprocess.Popen(
                command, env=environment | variables, stdout=output, stderr=output, start_new_session=True
            )

    def lines(self, name: str) -> list[str]:
        path = self.place / name
        return path.read_text().splitlines() if path.exists() else []

    def signal(self, number: signal.Signals) -> None:
        """As Slurm does: to the script alone, once the driver is under way."""
        deadline = time.monotonic() + SECONDS
        while not (self.place / "under_way").exists():
            assert time.monotonic() < deadline, self.lines("output")
            time.sleep(0.05)
        self._process.send_signal(number)

    def status(self) -> int:
        """The script's exit status; fails if processes of it are left."""
        try:
            return self._process.wait(SECONDS)
        finally:
            left = list(processes_of_session(self._process.pid))
            for process in left:
                process.kill()
            assert not left, self.lines("output")


def processes_of_session(leader: int) -> Iterator[psutil.Process]:
    """Those that run: not what has ended and waits for init."""
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def test_a_run_is_started_on_a_cluster_of_all_nodes(tmp_path: Path):
    job = Job(tmp_path, "0", nodes=3)
    assert job.status() == 0
    address = f"127.0.0.1:{20000 + JOB % 4000}"
    assert job.lines("trained") == [
        f"{address} -m learner.train --config my.yaml --set rollout.stop=[a, b] --resume auto"
    ]
    head, *workers = job.lines("ray.log")
    assert head.startswith(
        f"token 0123456789abcdef start --head --node-ip-address=127.0.0.1 --port={20000 + JOB % 4000} "
    )
    assert len(workers) == 2
    assert all(f"start --address={address} --num-cpus=1 --num-gpus=0 " in worker for worker in workers)
    assert [re.search(r"--nodes (\d)", line)[1] for line in job.lines("awaited")] == ["1", "3"]
    starts = [line for line in job.lines("srun.log") if "node.sh" in line]
    assert "--nodes=1 --ntasks=1 --nodelist=node1 " in starts[0]
    assert "--nodes=2 --ntasks=2 --exclude=node1 " in starts[1]
    assert job.lines("requeued") == []


def test_no_fixed_port_is_among_those_of_rays_workers(tmp_path: Path):
    job = Job(tmp_path, "0", nodes=1)
    assert job.status() == 0
    ports = [int(port) for port in re.findall(r"port=(\d+)", job.lines("ray.log")[0])]
    assert len(set(ports)) == len(ports) == 4
    for port in ports:
        assert port == 0 or 19_999 < port < 32_768, "Ray's workers have 10002 to 19999, the system hands out from 32768"
    assert len(job.lines("ray.log")) == 1, "one node: there are no workers"


@pytest.mark.parametrize(
    ("ends", "status", "starts"),
    [
        (["1", "137", "0"], 0, 3),
        (["2"], 2, 1),
        (["1", "1", "1", "1", "0"], 1, 4),
    ],
    ids=["parts fail", "bad configuration", "always fails"],
)
def test_a_run_that_fails_is_continued_unless_it_cannot_be(tmp_path: Path, ends: list[str], status: int, starts: int):
    job = Job(tmp_path, *ends)
    assert job.status() == status
    assert len(job.lines("trained")) == starts
    assert job.lines("requeued") == []


def test_the_time_limit_stops_the_run_and_queues_the_job_again(tmp_path: Path):
    job = Job(tmp_path, "waits", SLURM_RESTART_COUNT="99")
    job.signal(signal.SIGUSR1)
    job.status()
    assert job.lines("requeued") == [str(JOB)]
    assert len(job.lines("trained")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_cancelled_job_stops_its_run_and_is_not_queued_again(tmp_path: Path, number: signal.Signals):
    job = Job(tmp_path, "waits")
    job.signal(number)
    assert job.status() == 130
    assert job.lines("requeued") == []
    assert len(job.lines("trained")) == 1


def test_a_driver_that_does_not_stop_is_killed_in_time_and_the_job_queued_again(tmp_path: Path):
    job = Job(tmp_path, "hangs", E3RL_STOP_SECONDS="1")
    job.signal(signal.SIGUSR1)
    job.status()
    assert job.lines("requeued") == [str(JOB)]


@pytest.mark.parametrize(("before", "again"), [("0", True), ("2", False)])
def test_a_lost_cluster_queues_the_job_again_so_many_times(tmp_path: Path, before: str, again: bool):
    job = Job(tmp_path, "loses_ray", E3RL_REQUEUES="2", SLURM_RESTART_COUNT=before)
    assert job.status() == 1
    assert len(job.lines("trained")) == 1
    assert job.lines("requeued") == [str(JOB)] * again


def test_a_head_that_does_not_start_queues_the_job_again(tmp_path: Path):
    (tmp_path / "ray_fails").touch()
    job = Job(tmp_path, "0")
    assert job.status() == 1
    assert job.lines("requeued") == [str(JOB)]
    assert job.lines("trained") == []


def test_what_slurm_must_say_is_asked_for(tmp_path: Path):
    job = Job(tmp_path, "0", SLURM_CPUS_PER_TASK="")
    assert job.status() != 0
    assert "give --cpus-per-task" in "\n".join(job.lines("output"))
