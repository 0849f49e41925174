"""A cluster that can't be reached or does not start ends the run in time, with one line that says which."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from learner.run import cluster
from learner.run.cluster import check_reachable, ray_cluster, start_local
from learner.run.errors import PartError
from tests.configs import run_config


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def unused_port() -> int:
    with listening() as port:
        return port


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_nothing_listens_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    address = f"{prefix}127.0.0.1:{unused_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with (
        pytest.raises(
            PartError, match=rf"^Ray: no Ray cluster answers at RAY_ADDRESS='{address}': Connection refused$"
        ),
        ray_cluster(run_config(), tmp_path),
    ):
        pass
    assert time.monotonic() - began < 5.0


@pytest.mark.parametrize("address", ["no-such-host.invalid:6379", "127.0.0.1:99999"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(PartError, match=f"RAY_ADDRESS='{address}'"):
        check_reachable(address)


def test_a_port_that_is_no_cluster_s_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2.0)
    before = psutil.Process().children()
    with listening() as port:
        began = time.monotonic()
        with pytest.raises(PartError, match=rf"no Ray cluster answers at RAY_ADDRESS='127\.0\.0\.1:{port}' within 2 s"):
            check_reachable(f"127.0.0.1:{port}")
        assert time.monotonic() - began < 10.0
    new = [child for child in psutil.Process().children() if child not in before]
    assert not [child for child in new if child.status() != psutil.STATUS_ZOMBIE]


def test_a_start_that_takes_ray_too_long_is_tried_again_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[str] = []
    left: list[subprocess.Popen[bytes]] = []

    def init(address: str, _temp_dir: str, **options: Any) -> None:
        starts.append(address)
        code = "import time; print('ready', flush=True); time.sleep(60)"
        process = subprocess.Popen([sys.executable, "-c", code, _temp_dir], stdout=subprocess.PIPE)
        # A process that has only just been started does not show its command line yet.
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        left.append(process)
        if len(starts) < succeeding:
            raise Exception("The current node timed out during startup. This could happen")

    monkeypatch.setattr(ray, "init", init)
    succeeding = 2
    start_local(run_config(), tmp_path / "session")
    assert starts == ["local"] * 2
    succeeding = 99
    with pytest.raises(
        PartError, match=r"^Ray: can't start Ray on this machine: The current node timed out.*\d+ cores"
    ):
        start_local(run_config(), tmp_path / "other")
    assert starts == ["local"] * 5
    # What the failed starts left is gone; the second start's is the cluster's.
    assert [psutil.pid_exists(process.pid) for process in left] == [False, True, False, False, False]
    left[1].kill()
    for process in left:
        process.wait()


def test_a_start_that_never_ends_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "START_SECONDS", 0.2)
    monkeypatch.setattr(ray, "init", lambda **options: time.sleep(30.0))
    with pytest.raises(PartError, match="Ray did not start on this machine within 0 s"):
        start_local(run_config(), tmp_path / "session")
