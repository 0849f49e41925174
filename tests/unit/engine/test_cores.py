"""How many threads an engine gets: what the machine, the affinity and control groups leave, shared by the replicas."""

import os
from pathlib import Path

import pytest

from common.config.run import EngineConfig
from rollout_server.engine import cores
from rollout_server.http.server.serve import engine_threads
from rollout_server.http.server.settings import ServerSettings
from rollout_server.replicas.ray_actor import actor_environment


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of this process's own making; 8 cores in its affinity."""
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(cores, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "groups").mkdir()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, 8),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "900000 100000\n", "a/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/not/here\n", {"cpu.max": "400000 100000\n"}, 4),
        ("3:cpu,cpuacct:/a\n2:m:/b\n", {"cpu/a/cpu.cfs_quota_us": "500000", "cpu/a/cpu.cfs_period_us": "100000"}, 5),
        ("3:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_the_cores_that_a_process_may_use(groups: Path, membership: str, files: dict[str, str], expected: int) -> None:
    write(groups / "cgroup", membership)
    for name, text in files.items():
        write(groups / "groups" / name, text)
    assert cores.available_cores() == expected


@pytest.mark.parametrize(("replicas", "threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (100, 1)])
@pytest.mark.usefixtures("groups")
def test_replicas_share_the_cores(replicas: int, threads: int) -> None:
    assert engine_threads(ServerSettings(model="x", replicas=replicas)) == threads


@pytest.mark.usefixtures("groups")
def test_what_the_user_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_threads(ServerSettings(model="x", threads=3)) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert engine_threads(ServerSettings(model="x")) == 5
    assert engine_threads(ServerSettings(model="x", threads=5)) == 5
    with pytest.raises(ValueError, match="--threads is 3, but OMP_NUM_THREADS is 5"):
        ServerSettings(model="x", threads=3)


@pytest.mark.usefixtures("groups")
def test_training_shares_the_cores_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(**engine: int) -> str:
        return actor_environment(EngineConfig(**engine))["OMP_NUM_THREADS"]  # type: ignore[arg-type]

    assert [given(), given(replicas=2), given(replicas=100), given(threads=5)] == ["8", "4", "1", "5"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [given(), given(threads=5)] == ["3", "5"]
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert given() == "8", "a job's driver has 1 from Ray, whatever the user wants"
