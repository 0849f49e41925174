"""The `host` transport: what a replica receives, which file stays how long, and machines that share no memory."""

import asyncio
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.weights import HostUpdate
from common.weights.weight_file import DamagedWeights
from learner.weights import host as sending
from learner.weights.host import HostPublisher, remove_weight_leftovers, weight_directory
from rollout_server.weights import host as receiving
from rollout_server.weights.receiver import NotReachable
from rollout_server.weights.receivers import Receivers
from tests.weights import published, received


@pytest.fixture(autouse=True)
def shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sending, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def publish(publisher: HostPublisher, version: int, size: int = 5) -> HostUpdate:
    update = published(publisher, version, size)
    assert isinstance(update, HostUpdate)
    return update


async def test_each_version_stays_until_the_next_is_everywhere(shared_memory: Path) -> None:
    publisher = HostPublisher()
    first = publish(publisher, 1)
    publisher.keep_only(1)
    second = publish(publisher, 2, size=7)
    for update in (first, second):
        assert all(bool((t == update.version).all()) for t in (await received(update)).values())
    publisher.keep_only(2)
    with pytest.raises(NotReachable):
        await received(first)
    # The third is written into the memory of the first.
    third = publish(publisher, 3)
    assert third.file_id == first.file_id
    publisher.discard(3)
    with pytest.raises(NotReachable):
        await received(third)
    assert (await received(second))["a"].shape == (7, 3)
    with pytest.raises(NotReachable):
        await received(first)
    publisher.close()
    publisher.close()
    assert not list(shared_memory.iterdir())


def test_names_cannot_be_guessed_and_nobody_else_may_read() -> None:
    one, other = HostPublisher(), HostPublisher()
    updates = [publish(publisher, 1) for publisher in (one, other)]
    assert len({Path(update.path).parent for update in updates}) == 2
    for update in updates:
        assert stat.S_IMODE(os.stat(update.path).st_mode) == 0o600
    one.close()
    assert Path(updates[1].path).exists()
    other.close()


async def test_damage_is_named_and_nothing_is_handed_on() -> None:
    publisher = HostPublisher()
    update = publish(publisher, 1)
    with open(update.path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01")
    receivers = Receivers()
    with pytest.raises(DamagedWeights, match="tensor b is not what was sent"):
        async with receivers.receiving(update, 10.0):
            pytest.fail("damaged weights arrived")
    assert receivers.retries == 1
    publisher.close()


async def test_a_transient_error_is_met_by_one_more_try(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = HostPublisher()
    update = publish(publisher, 1)
    verify, calls = receiving.verify, []

    def flaky(path: str, checksum: str, *, in_memory: bool) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise OSError("Stale file handle")
        verify(path, checksum, in_memory=in_memory)

    monkeypatch.setattr(receiving, "verify", flaky)
    receivers = Receivers()
    async with receivers.receiving(update, 10.0):
        assert receivers.retries == 1
    publisher.close()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"path": "/nowhere/v1.safetensors"}, "this machine"),
        ({"path": "/nowhere/v1.safetensors", "boot_id": "another"}, "another machine"),
        # The same path by chance, and another file there.
        ({"file_id": (1, 2)}, "this machine"),
        ({"boot_id": "another"}, "another machine"),
    ],
)
async def test_memory_that_is_not_shared_is_refused_with_the_transports_to_use(
    change: dict[str, object], where: str
) -> None:
    publisher = HostPublisher()
    update = publish(publisher, 1).model_copy(update=change)
    with pytest.raises(NotReachable, match=f"on {where}.*'disk'.*'gloo'"):
        await received(update)
    publisher.close()


KILLED = """
import os, sys, tempfile
from pathlib import Path
import learner.weights.host as sending
sending.SHARED_MEMORY = Path(sys.argv[1])
tempfile.tempdir = sys.argv[1]
from tests.unit.weights.test_host_transport import HostPublisher, publish
print(publish(HostPublisher(), 1).path, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_learner_left_is_removed_and_a_live_ones_files_are_not(shared_memory: Path) -> None:
    live = HostPublisher()
    update = publish(live, 1)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(shared_memory)], capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert left.exists(), killed.stderr
    remove_weight_leftovers()
    assert not left.parent.exists()
    assert Path(update.path).exists()
    live.close()


def test_weights_that_fit_nowhere_are_refused_with_the_room_there_is() -> None:
    with pytest.raises(OSError, match=r"no room for .* MB of weights: .* MB free"):
        weight_directory(2**60)


def test_without_shared_memory_the_directory_for_temporary_files_is_used(
    shared_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SHARED_MEMORY", shared_memory / "missing")
    assert weight_directory(1) == shared_memory


async def test_who_waits_no_longer_keeps_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = HostPublisher()
    update = publish(publisher, 1)
    monkeypatch.setattr(receiving, "verify", lambda path, checksum, in_memory: time.sleep(0.2))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), Receivers().receiving(update, 10.0):
            pytest.fail("received in no time")
    publisher.close()
