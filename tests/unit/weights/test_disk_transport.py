"""The `disk` transport: what a replica on another machine reads, full disks, and what stays how long."""

import errno
import os
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.config.run import SyncConfig
from common.weights import DiskUpdate
from common.weights.weight_file import DamagedWeights
from learner.weights import disk as sending
from learner.weights.disk import DiskPublisher
from learner.weights.transports import publisher
from rollout_server.weights import receivers
from tests.weights import parameters, published, received


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "RETRY_PAUSE_SECONDS", 0.0)


def publish(one: DiskPublisher, version: int, size: int = 5) -> DiskUpdate:
    update = published(one, version, size)
    assert isinstance(update, DiskUpdate)
    return update


async def test_each_version_stays_until_the_next_is_everywhere(tmp_path: Path) -> None:
    one = DiskPublisher(tmp_path / "made" / "shared")
    first = publish(one, 1)
    one.keep_only(1)
    second = publish(one, 2, size=7)
    for update in (first, second):
        assert all(bool((t == update.version).all()) for t in (await received(update)).values())
    one.keep_only(2)
    with pytest.raises(FileNotFoundError, match="does this machine see that directory"):
        await received(first)
    publish(one, 3)
    one.discard(3)
    assert (await received(second))["a"].shape == (7, 3)
    one.close()
    one.close()
    assert not list((tmp_path / "made" / "shared").iterdir())


async def test_a_file_has_its_name_once_it_is_complete(tmp_path: Path) -> None:
    one = DiskPublisher(tmp_path)
    update = one.begin(1, parameters(1))
    assert isinstance(update, DiskUpdate)
    assert not Path(update.path).exists()
    one.publish(1, parameters(1))
    assert [path.name for path in Path(update.path).parent.iterdir()] == ["v1.safetensors"]
    one.close()


def test_two_runs_share_a_directory(tmp_path: Path) -> None:
    one, other = DiskPublisher(tmp_path), DiskPublisher(tmp_path)
    mine, theirs = publish(one, 1), publish(other, 1)
    assert mine.path != theirs.path
    one.close()
    DiskPublisher(tmp_path).close()
    assert Path(theirs.path).exists()
    other.close()


def test_leftovers_of_this_machine_go_at_once_and_anothers_once_they_are_old(tmp_path: Path) -> None:
    mine, recent, old = (
        tmp_path / f"e3rl-weights-{name}" for name in (sending.boot_id()[:8] + "-a", "other-b", "other-c")
    )
    for path in (mine, recent, old):
        path.mkdir()
    long_ago = time.time() - 2 * sending.UNTOUCHED_SECONDS
    os.utime(old, (long_ago, long_ago))
    DiskPublisher(tmp_path).close()
    assert list(tmp_path.iterdir()) == [recent]


async def test_a_disk_that_fills_is_named_and_the_version_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = DiskPublisher(tmp_path)
    first = publish(one, 1)

    def full(file: int, data: memoryview, position: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        given = parameters(2)
        one.begin(2, given)
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=f"sync.directory {tmp_path} has no room for weights"):
            one.publish(2, given)
    monkeypatch.setattr(sending.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(OSError, match="are needed, 0 MB are free"):
        one.begin(2, parameters(2))
    assert [path.name for path in Path(first.path).parent.iterdir()] == ["v1.safetensors"]
    assert set(await received(first)) == {"a", "b"}
    one.close()


class _Usage:
    free = 0


async def test_damage_is_named(tmp_path: Path) -> None:
    one = DiskPublisher(tmp_path)
    update = publish(one, 1)
    with open(update.path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(DamagedWeights, match="tensor b is not what was sent"):
        await received(update)
    one.close()


def test_settings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="'disk' needs directory"):
        SyncConfig(transport="disk")
    with pytest.raises(ValidationError, match="directory is for transport disk, not for 'host'"):
        SyncConfig(directory="/shared")
    chosen = publisher(SyncConfig(transport="disk", directory=str(tmp_path)), 1, "127.0.0.1")
    assert isinstance(chosen, DiskPublisher)
    chosen.close()
