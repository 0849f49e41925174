"""The Ray cluster of a run: a local one of its own, or the one that RAY_ADDRESS names."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from common.config.run import RunConfig
from common.owned_directories import OwnedDirectory, remove_leftovers
from learner.run.errors import PartError

log = logging.getLogger(__name__)

START_SECONDS = 180.0
"""What a local cluster has to start in."""
CONNECT_SECONDS = 45.0
"""What a cluster that runs already has to answer in."""
PORT_SECONDS = 5.0
STARTS = 3
"""Ray gives up a start of its own after 30 s, which a busy machine may need: how often it is tried."""
OBJECT_STORE_BYTES = 256 * 1024**2
PREFIX = "e3rl-ray-"
LONGEST_TEMPORARY_PATH = 36
"""Ray puts UNIX sockets about 60 characters below its temporary directory, and their paths may have 107."""

ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Replicas and ranks are the run's work: by default Ray has every other process of the machine go before them.
    "RAY_worker_niceness": "0",
}


@contextmanager
def ray_cluster(config: RunConfig, log_directory: Path) -> Iterator[None]:
    """Connect to a Ray cluster for the time of the block; a local one ends with it, and its logs are kept.

    To be entered in the main thread, where a start that hangs can be interrupted.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_reachable(address)
        with _deadline(CONNECT_SECONDS, f"the cluster at RAY_ADDRESS={address!r} did not take this run"):
            _init(f"can't connect to the cluster at RAY_ADDRESS={address!r}", address=address)
        with _shut_down_at_end():
            yield
        return
    remove_leftovers(PREFIX, [_temporary_directory()])
    owned = OwnedDirectory(PREFIX, _temporary_directory())
    session = owned.path
    try:
        start_local(config, session)
        with _shut_down_at_end():
            yield
    finally:
        _kill_processes_of(session)
        _keep_logs(session, log_directory / "ray")
        owned.remove()


def start_local(config: RunConfig, session: Path) -> None:
    """Start a cluster of one node with its files in `session`. Raises PartError."""

    def start() -> None:
        _init(
            "can't start Ray on this machine",
            address="local",
            # A replica asks for one CPU, a learner rank for none. Ray starts a process for each CPU at once, needed
            # or not, so it gets no more.
            num_cpus=config.rollout.engine.replicas,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(session),
        )

    with _deadline(START_SECONDS, "Ray did not start on this machine"):
        for left in reversed(range(STARTS)):
            try:
                start()
                return
            except PartError as error:
                _kill_processes_of(session)
                if left == 0 or "timed out" not in str(error):
                    raise
                log.warning("%s; trying again", error)


def check_reachable(address: str) -> None:
    """Raise PartError within `CONNECT_SECONDS` unless a Ray cluster answers at `address`.

    Ray's own attempts to connect can go on for many minutes and can't be interrupted from Python: a process of its own
    makes the first one.
    """
    what = f"no Ray cluster answers at RAY_ADDRESS={address!r}"
    _check_port(address, what)
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)"
    # Else the process would count as the driver of the job that this one is.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    command = [sys.executable, "-c", code, address]
    try:
        probe = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CONNECT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise PartError("Ray", f"{what} within {CONNECT_SECONDS:g} s") from None
    if probe.returncode:
        lines = probe.stderr.strip().splitlines()
        raise PartError("Ray", f"{what}: {lines[-1] if lines else f'exit status {probe.returncode}'}")


def _check_port(address: str, what: str) -> None:
    """The quick answer for an address of the form HOST:PORT, perhaps with `ray://` before it."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PORT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise PartError("Ray", f"{what}: {getattr(error, 'strerror', None) or error}") from error


def _init(what: str, **options: Any) -> None:
    import ray

    try:
        ray.init(namespace=f"e3rl-{os.getpid()}", log_to_driver=False, configure_logging=False, **options)
    except PartError:
        _forget(ray.shutdown)
        raise
    except Exception as error:
        # Ray raises a plain Exception for a start that takes too long.
        _forget(ray.shutdown)
        reason = " ".join(str(error).split()) or type(error).__name__
        busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
        raise PartError("Ray", f"{what}: {reason} (load averages of its {os.cpu_count()} cores: {busy})") from error


def _forget(shutdown: Callable[[], None]) -> None:
    """Take back what a failed start left in this process, without hiding why it failed."""
    try:
        shutdown()
    except Exception as error:
        log.warning("Ray could not be shut down after a failed start: %s", error)


@contextmanager
def _shut_down_at_end() -> Iterator[None]:
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def _kill_processes_of(session: Path) -> None:
    """End what is left of a cluster whose files lie in `session`."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(session) in part for part in process.cmdline()):
                process.kill()
                left.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(left, timeout=5.0)


@contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """Interrupt a blocking call in the main thread when its time is up."""

    began = time.monotonic()

    def expire(number: int, frame: FrameType | None) -> None:
        raise PartError("Ray", f"{what} within {time.monotonic() - began:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _temporary_directory() -> Path:
    chosen = tempfile.gettempdir()
    return Path(chosen if len(chosen) <= LONGEST_TEMPORARY_PATH else "/tmp")


def _keep_logs(session: Path, destination: Path) -> None:
    """Copy the logs that hold anything; Ray's own directory goes with the cluster."""
    try:
        for source in session.glob("session_*/logs/*"):
            if source.is_file() and not source.is_symlink() and source.stat().st_size:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, destination / source.name)
    except OSError as error:
        log.warning("Ray's logs were not kept: %s", error)
