"""A server without its Ray cluster says so in one line, and soon."""

import socket
import time

import pytest

from rollout_server.replicas import ray_cluster
from rollout_server.replicas.ray_cluster import NoCluster, connect


def test_an_address_where_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(NoCluster, match=rf"no Ray cluster answers at 127.0.0.1:{port}: Connection refused"):
        connect(f"127.0.0.1:{port}")


def test_an_address_where_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_SECONDS", 1.0)
    started = time.monotonic()
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, pytest.raises(NoCluster, match=r"no Ray cluster answers at .*: not within 1 s"):
        connect(f"127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - started < 10.0


def test_a_start_of_ray_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.\n  Some of\tRay's processes failed.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(NoCluster) as caught:
        connect(None)
    expected = "The current node timed out during startup. Some of Ray's processes failed."
    assert str(caught.value) == f"Ray did not start on this machine: {expected}"


def test_a_cluster_that_somebody_else_has_started_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster.ray, "init", lambda **options: asked.append(options["address"]))
    connect(None)
    assert asked == ["local"]
