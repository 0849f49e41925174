"""Weight transports up to the point where vLLM loads, against a plain copy and a plain broadcast of the same bytes."""

import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore

from common.config.run import DEFAULT_BUCKET_BYTES
from common.weights import GlooUpdate, HostUpdate
from common.weights.gloo_group import Group, Seat
from learner.weights.gloo import GlooPublisher
from learner.weights.host import HostPublisher
from rollout_server.weights.receivers import Receivers
from tests.benchmarks.report import Finding
from tests.weights import parameters_of

LOCAL = "127.0.0.1"
LAYERS = 16
LAYER_ELEMENTS = 8 * 2**20
ROUNDS = 5
SECONDS = 120.0


def measure_weights(directory: Path) -> list[Finding]:
    """`host` against memcpy, `gloo` against a broadcast over the loopback interface."""
    torch.set_num_threads(1)
    tensors = {f"layer{number}": torch.randn(LAYER_ELEMENTS // 1024, 1024) for number in range(LAYERS)}
    return [_host(tensors), _gloo(tensors)]


def _host(tensors: dict[str, torch.Tensor]) -> Finding:
    parameters = parameters_of(tensors)
    copies = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    publisher = HostPublisher()
    receive: list[float] = []

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    def sync(version: int) -> None:
        update = publisher.begin(version, parameters)
        assert isinstance(update, HostUpdate)
        update = update.model_copy(update={"checksum": publisher.publish(version, parameters).checksum})
        began = time.perf_counter()
        asyncio.run(_receive(update))
        receive.append(time.perf_counter() - began)
        publisher.keep_only(version)

    try:
        # The first two versions get their memory from the kernel; later ones are written where earlier ones were.
        sync(1), sync(2), copy()
        rounds = [(_timed(copy), _timed(lambda n=number: sync(n))) for number in range(3, 3 + ROUNDS)]
    finally:
        publisher.close()
    detail = (
        f"of which {statistics.median(receive) * 1e3:.0f} ms are the replica's comparison; vLLM's loading comes after"
    )
    return _finding("host: memcpy / publish and verify", rounds, parameters.bytes, detail)


def _gloo(tensors: dict[str, torch.Tensor]) -> Finding:
    parameters = parameters_of(tensors)
    publisher = GlooPublisher(LOCAL, 1, DEFAULT_BUCKET_BYTES, SECONDS)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=_receiver, args=(theirs,))
    receiver.start()
    store = TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    flat = torch.cat([tensor.view(torch.uint8).view(-1) for tensor in tensors.values()])
    try:
        ours.send((store.port, flat.numel()))
        group = Group(store, Seat(0, 0, 2), LOCAL, SECONDS)

        def broadcast() -> None:
            ours.send("broadcast")
            group.broadcast(flat).wait()
            assert ours.recv() == "arrived"

        def sync(version: int) -> None:
            update = publisher.begin(version, parameters)
            ours.send(update)
            publisher.publish(version, parameters)
            assert ours.recv() == "arrived"
            publisher.keep_only(version)

        broadcast(), sync(1)
        rounds = [(_timed(broadcast), _timed(lambda n=number: sync(n))) for number in range(2, 2 + ROUNDS)]
    finally:
        ours.send(None)
        receiver.join(SECONDS)
        publisher.close()
    detail = "gathered, sent, received and compared; the other a broadcast from memory into memory, nothing compared"
    return _finding("gloo: plain broadcast / publish, receive and verify", rounds, parameters.bytes, detail)


def _receiver(pipe: Connection) -> None:
    """Another process: takes part in what it is told to."""
    torch.set_num_threads(1)
    port, size = pipe.recv()
    store = TCPStore(LOCAL, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    group = Group(store, Seat(0, 1, 2), LOCAL, SECONDS)
    flat = torch.empty(size, dtype=torch.uint8)
    while (what := pipe.recv()) is not None:
        if isinstance(what, GlooUpdate):
            asyncio.run(_receive(what))
        else:
            group.broadcast(flat).wait()
        pipe.send("arrived")


async def _receive(update: HostUpdate | GlooUpdate) -> None:
    async with Receivers().receiving(update, SECONDS):
        pass


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _finding(name: str, rounds: list[tuple[float, float]], size: int, detail: str) -> Finding:
    """The median of the rounds' ratios: what the plain way takes over what the transport takes."""
    ratios = [plain / ours for plain, ours in rounds]
    plain, ours = (size / statistics.median(side) / 1e9 for side in zip(*rounds, strict=True))
    spread = f"rounds {min(ratios):.2f} to {max(ratios):.2f}"
    text = f"{ours:.2f} against {plain:.2f} GB/s for {size / 2**20:.0f} MB, {spread}; {detail}"
    return Finding(name, statistics.median(ratios), 0.5, text)
