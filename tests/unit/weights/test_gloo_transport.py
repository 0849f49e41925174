"""The `gloo` transport, over real sockets: who comes late, dies or must begin again, and what arrives."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from common.config.run import SyncConfig
from common.weights import GlooUpdate, gloo_group
from common.weights.gloo_group import TransferInterrupted, buckets
from common.weights.weight_file import DamagedWeights
from learner.weights import gloo as sending
from learner.weights.gloo import GlooPublisher, address_of
from learner.weights.publisher import Parameters
from learner.weights.transports import publisher
from rollout_server.weights import gloo as receiving
from rollout_server.weights import receivers
from rollout_server.weights.receiver import Withdrawn
from rollout_server.weights.receivers import Receivers
from tests.weights import parameters, parameters_of, received

LOCAL = "127.0.0.1"
BUCKET = 2**16


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "RETRY_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(sending, "JOIN_SECONDS", 0.3)


@contextmanager
def sender(replicas: int, deadline_seconds: float = 20.0) -> Iterator[GlooPublisher]:
    one = GlooPublisher(LOCAL, replicas, BUCKET, deadline_seconds)
    try:
        yield one
    finally:
        one.close()


def begun(one: GlooPublisher, version: int, given: Parameters) -> GlooUpdate:
    update = one.begin(version, given)
    assert isinstance(update, GlooUpdate)
    return update


def large(seed: int, size: int = 2**19) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size // 16, 4, generator=generator) for name in "abcd"}


async def test_all_replicas_receive_while_it_is_gathered() -> None:
    tensors = large(1)
    slow = parameters_of(tensors)
    seen = threading.Event()
    gather = slow.gather

    @contextmanager
    def gathered(name: str) -> Iterator[Tensor]:
        with gather(name) as tensor:
            if name == "d":
                assert seen.wait(10.0), "nothing was sent before all was gathered"
            yield tensor

    slow = Parameters(slow.shapes, gathered)
    with sender(3) as one:
        update = begun(one, 5, slow)
        publishing = asyncio.create_task(asyncio.to_thread(one.publish, 5, slow))
        broadcast, calls = receiving.Group.broadcast, []

        def watched(group: receiving.Group, data: Tensor) -> torch.distributed.Work:
            calls.append(data.numel())
            if len(calls) > 6:
                seen.set()
            return broadcast(group, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(receiving.Group, "broadcast", watched)
            arrived = await asyncio.gather(*(received(update) for _ in range(3)))
        written = await publishing
        async with Receivers().receiving(update, 10.0) as late:
            assert late.checksum == written.checksum
    for weights in arrived:
        assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())


async def test_a_replica_that_comes_later_gets_the_newest_from_memory() -> None:
    with sender(2) as one:
        for version in (1, 2):
            given = parameters(version)
            update = begun(one, version, given)
            one.publish(version, given)
            await asyncio.gather(received(update), received(update))
            one.keep_only(version)
        restarted = await received(update)
        assert bool((restarted["a"] == 2.0).all())


async def test_a_lost_replica_is_waited_for_once() -> None:
    with sender(3) as one:
        seconds = []
        for version in (1, 2):
            given = parameters(version)
            update = begun(one, version, given)
            one.publish(version, given)
            started = time.monotonic()
            await asyncio.gather(received(update), received(update))
            seconds.append(time.monotonic() - started)
        assert seconds[0] > sending.JOIN_SECONDS > seconds[1]


DYING = """
import asyncio, os, sys, time
from common.weights import GlooUpdate
from rollout_server.weights import gloo as receiving
from rollout_server.weights.receivers import Receivers
broadcast, calls = receiving.Group.broadcast, []
def dying(group, data):
    calls.append(data)
    if len(calls) == 4:
        print("half-way", flush=True)
        HOW
    return broadcast(group, data)
receiving.Group.broadcast = dying
update = GlooUpdate.model_validate_json(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
async def main():
    async with Receivers().receiving(update, 20.0):
        pass
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "time.sleep(60)"], ids=["killed", "hangs"])
async def test_a_replica_that_dies_half_way_does_not_hold_up_the_others(how: str) -> None:
    tensors = large(2)
    given = parameters_of(tensors)
    with sender(3, deadline_seconds=12.0) as one:
        update = begun(one, 1, given)
        one.publish(1, given)
        code = DYING.replace("HOW", how)
        command = [sys.executable, "-c", code, update.model_dump_json()]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as dying:
            assert dying.stdin is not None
            assert dying.stdout is not None
            assert dying.stdout.readline() == "ready\n"
            dying.stdin.write("go\n")
            dying.stdin.flush()
            started = time.monotonic()
            arrived = await asyncio.gather(received(update), received(update))
            assert time.monotonic() - started < 12.0
            assert dying.stdout.readline() == "half-way\n"
            dying.kill()
    for weights in arrived:
        assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())


def flipped(data: Tensor) -> None:
    data[data.numel() // 2] ^= 1


def swapped(data: Tensor) -> None:
    rows = data[: data.numel() // 32 * 32].view(2, -1)
    rows[[0, 1]] = rows[[1, 0]].clone()


@pytest.mark.parametrize("damage", [flipped, swapped])
async def test_damage_on_the_way_is_found_and_met_by_one_more_try(damage: Callable[[Tensor], None]) -> None:
    given = parameters_of(large(3))
    broadcast, left = receiving.Group.broadcast, [1]

    def hurting(group: receiving.Group, data: Tensor) -> torch.distributed.Work:
        """Damages the second bucket of the next `left` tries, where it is received."""
        work = broadcast(group, data)
        if left and data.storage_offset() == BUCKET and threading.current_thread().name != "e3rl-gloo":
            left.pop()
            work.wait()
            damage(data)
        return work

    with sender(1) as one, pytest.MonkeyPatch.context() as patch:
        update = begun(one, 1, given)
        one.publish(1, given)
        patch.setattr(receiving.Group, "broadcast", hurting)
        several = Receivers()
        async with several.receiving(update, 20.0):
            assert several.retries == 1
        left.extend([1, 1])
        with pytest.raises(DamagedWeights, match=r"tensor a is not what was sent"):
            await received(update)


async def test_weights_that_are_given_up_are_not_received_once_more() -> None:
    given = parameters_of({"a": torch.full((2**17,), float("nan"))})
    with sender(1) as one:
        update = begun(one, 1, given)
        receiving_it = asyncio.create_task(received(update))
        await asyncio.sleep(0.1)
        assert one.publish(1, given).not_finite == "a"
        one.discard(1)
        with pytest.raises((Withdrawn, TransferInterrupted)):
            await receiving_it


async def test_a_learner_that_does_not_answer_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "CONNECT_SECONDS", 0.5)
    with sender(1) as one:
        update = begun(one, 1, parameters(1))
    with socket.create_server((LOCAL, 0)) as server:
        gone = update.model_copy(update={"port": server.getsockname()[1]})
    started = time.monotonic()
    with pytest.raises(TransferInterrupted, match=r"the learner does not answer at 127\.0\.0\.1"):
        await received(gone)
    assert time.monotonic() - started < 10.0


async def test_weights_that_never_come_end_at_the_deadline() -> None:
    with sender(1) as one:
        update = begun(one, 1, parameters(1))
        started = time.monotonic()
        with pytest.raises(TransferInterrupted):
            async with Receivers().receiving(update, 1.0):
                pytest.fail("nothing was gathered")
        assert time.monotonic() - started < 4.0


def test_nothing_of_a_version_is_left_open() -> None:
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    with sender(1) as one:
        for version in range(3):
            given = parameters(version)
            begun(one, version, given)
            one.publish(version, given)
            one.keep_only(version)
    for _ in range(100):
        if threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= files + 2:
            return
        time.sleep(0.05)
    pytest.fail(f"{threading.enumerate()}, {len(os.listdir('/proc/self/fd')) - files} files")


@pytest.mark.parametrize(("size", "bucket"), [(1, 5), (5, 5), (6, 5), (100, 7)])
def test_buckets_cover_the_file_once_and_the_header_twice(size: int, bucket: int) -> None:
    parts = list(buckets(size, 1, bucket))
    assert parts[-1] == (0, 1)
    assert [place for start, end in parts[:-1] for place in range(start, end)] == list(range(size))


def test_the_interface_that_is_named_gives_the_address() -> None:
    assert address_of("lo") == LOCAL
    with pytest.raises(ValueError, match=r"'nope' has no IPv4 address; there are .*lo"):
        address_of("nope")
    assert gloo_group.address_towards(LOCAL, 1) == LOCAL
    chosen = publisher(SyncConfig(transport="gloo", network_interface="lo"), 1, "10.255.0.1")
    assert begun(chosen, 1, parameters(1)).address == LOCAL  # type: ignore[arg-type]
    chosen.close()
    with pytest.raises(ValidationError, match="bucket_bytes is for transport gloo, nccl, ipc, not for 'host'"):
        SyncConfig(bucket_bytes=2**20)
