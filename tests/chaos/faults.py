"""What can go wrong, each kind a function that makes it happen in a run under way."""

import logging
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.nodes import LocalCluster
from tests.chaos.training import Training

log = logging.getLogger("e3rl.chaos")
HANG_SECONDS = 20.0
"""How long a node does not answer."""
FULL_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Scene:
    """Where faults happen. `disk`: a file system of the run's own, if there is one that may be filled."""

    cluster: LocalCluster
    training: Training
    disk: Path | None
    draw: random.Random


Fault = Callable[[Scene], str]
"""Makes the fault happen; returns what was hit, for the report."""


def replica_killed(scene: Scene) -> str:
    """A replica's actor dies, and its engine with it."""
    return _kill(scene, "ray::ReplicaActor")


def engine_killed(scene: Scene) -> str:
    """vLLM's engine process dies under a replica that lives on."""
    return _kill(scene, "VLLM::EngineCor")


def engine_hangs(scene: Scene) -> str:
    """An engine stops to work without an error, and stays so."""
    process = _pick(scene, "VLLM::EngineCor")
    process.send_signal(signal.SIGSTOP)
    return f"process {process.pid}"


def rank_killed(scene: Scene) -> str:
    """A learner rank dies."""
    return _kill(scene, "ray::LearnerRank")


def driver_killed(scene: Scene) -> str:
    """The driver dies, and is started again with the same command."""
    scene.training.kill()
    scene.training.start()
    return "the driver"


def driver_stopped(scene: Scene) -> str:
    """The driver is told to end, as by a scheduler, and is started again with the same command."""
    status = scene.training.stop()
    scene.training.start()
    return f"the driver, which ended with status {status}"


def node_killed(scene: Scene) -> str:
    """A node dies with all that runs on it; another one joins."""
    node = scene.draw.choice(scene.cluster.nodes)
    node.kill()
    scene.cluster.replace(node)
    return f"node of process {node.process.pid}"


def node_cut_off(scene: Scene) -> str:
    """A node does not answer for longer than the cluster waits; its processes go on for that time."""
    node = scene.draw.choice(scene.cluster.nodes)
    raylet = node.raylet
    raylet.send_signal(signal.SIGSTOP)
    time.sleep(HANG_SECONDS)
    raylet.send_signal(signal.SIGCONT)
    # The cluster has given it up: a raylet that finds so ends itself.
    psutil.wait_procs([raylet], timeout=HANG_SECONDS)
    node.kill()
    scene.cluster.replace(node)
    return f"node of process {node.process.pid}, for {HANG_SECONDS:g} s"


def disk_full(scene: Scene) -> str:
    """The run's file system has no room for a moment."""
    if scene.disk is None:
        raise RuntimeError("there is no file system that may be filled")
    filler = scene.disk / "filler"
    free = os.statvfs(scene.disk)
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - 4096, 1))
        time.sleep(FULL_SECONDS)
    finally:
        filler.unlink(missing_ok=True)
    return f"for {FULL_SECONDS:g} s"


KINDS: dict[str, Fault] = {
    "replica killed": replica_killed,
    "engine killed": engine_killed,
    "engine hangs": engine_hangs,
    "rank killed": rank_killed,
    "driver killed": driver_killed,
    "driver stopped": driver_stopped,
    "node killed": node_killed,
    "node cut off": node_cut_off,
    "disk full": disk_full,
}


def _kill(scene: Scene, name: str) -> str:
    process = _pick(scene, name)
    process.kill()
    return f"process {process.pid}"


def _pick(scene: Scene, name: str) -> psutil.Process:
    """One of the cluster's processes of this name; waits for one, since another fault may just have taken them."""
    deadline = time.monotonic() + scene.training.patience
    while True:
        found = []
        for process in scene.cluster.processes():
            try:
                title = " ".join(process.cmdline())
                if name in title and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                    found.append(process)
            except psutil.Error:
                continue
        if found:
            return scene.draw.choice(sorted(found, key=lambda process: process.pid))
        if time.monotonic() > deadline:
            raise AssertionError(f"there is no {name} after {scene.training.patience:g} s")
        scene.training.keep_alive()
        time.sleep(0.5)
