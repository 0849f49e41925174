"""The Ray cluster of a run: a local one of its own, or the one that RAY_ADDRESS names."""

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from common.config.run import RunConfig
from learner.errors import PartError

log = logging.getLogger(__name__)

START_SECONDS = 120.0
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
        with _connected(address=address):
            yield
        return
    _remove_leftovers()
    session = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=_temporary_directory()))
    try:
        with _connected(
            address="local",
            # A replica asks for one CPU, a learner rank for none. Ray starts a process for each CPU at once, needed
            # or not, so it gets no more.
            num_cpus=config.rollout.engine.replicas,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=str(session),
        ):
            yield
    finally:
        _keep_logs(session, log_directory / "ray")
        shutil.rmtree(session, ignore_errors=True)


@contextmanager
def _connected(address: str, **options: Any) -> Iterator[None]:
    import ray

    with _deadline(START_SECONDS, f"Ray ({address})"):
        try:
            ray.init(
                address=address,
                namespace=f"e3rl-{os.getpid()}",
                log_to_driver=False,
                configure_logging=False,
                **options,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PartError("Ray", f"can't start or reach a cluster at {address!r}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """Interrupt a blocking call in the main thread when its time is up."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise PartError("Ray", f"{what} did not start within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _temporary_directory() -> str:
    chosen = tempfile.gettempdir()
    return chosen if len(chosen) <= LONGEST_TEMPORARY_PATH else "/tmp"


def _remove_leftovers() -> None:
    """Delete what runs that were killed left behind: directories that name a process which is no more."""
    for path in Path(_temporary_directory()).glob(f"{PREFIX}*"):
        owner = path.name.removeprefix(PREFIX).split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _keep_logs(session: Path, destination: Path) -> None:
    """Copy the logs that hold anything; Ray's own directory goes with the cluster."""
    try:
        for source in session.glob("session_*/logs/*"):
            if source.is_file() and not source.is_symlink() and source.stat().st_size:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, destination / source.name)
    except OSError as error:
        log.warning("Ray's logs were not kept: %s", error)
