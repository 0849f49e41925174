"""`nccl` and `ipc`: vLLM's own engines on both sides, on CPU tensors. Only the collective and the handle are stand-ins.

What a GPU does with them is not shown here.
"""

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer import ipc_engine, nccl_common, packed_tensor

from common.config.run import SyncConfig
from common.weights import WeightUpdate, weights_checksum
from common.weights.checksum import CHUNK_WORDS, device_digest
from common.weights.gloo_group import TransferInterrupted
from common.weights.weight_file import DamagedWeights
from learner.weights import device as sending
from learner.weights.publisher import Publisher
from learner.weights.transports import publisher
from rollout_server.weights import loading
from rollout_server.weights.loading import CheckedWeightTransfer
from rollout_server.weights.receiver import Arrived
from rollout_server.weights.receivers import Receivers
from tests.weights import parameters_of

TENSORS = {
    "a.weight": torch.randn(300, 70, generator=torch.Generator().manual_seed(0)),
    "norm": torch.randn(70, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "z": torch.arange(12.0).view(3, 4).t(),
}
SECONDS = 20.0


class Hub:
    """Stands for the wires between ranks: what rank 0 broadcasts, each other rank reads in order."""

    def __init__(self) -> None:
        self.queues: dict[int, queue.Queue[Tensor]] = {}
        self.damage: Callable[[Tensor], None] = lambda data: None
        self.sizes: list[int] = []

    def join(self, address: str, port: int, rank: int, world_size: int, device: Any) -> "Communicator":
        for other in range(1, world_size):
            self.queues.setdefault(other, queue.Queue())
        return Communicator(self, rank, world_size)


class Communicator:
    def __init__(self, hub: Hub, rank: int, size: int) -> None:
        self._hub, self._rank, self._size = hub, rank, size

    def broadcast(self, data: Tensor, src: int, stream: object = None) -> None:
        if self._rank == src:
            self._hub.sizes.append(data.numel())
            for other in range(1, self._size):
                sent = data.clone()
                self._hub.damage(sent)
                self._hub.queues[other].put(sent)
        else:
            data.copy_(self._hub.queues[self._rank].get(timeout=SECONDS))

    def destroy(self) -> None:
        return


class Stream:
    def synchronize(self) -> None:
        return


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    """vLLM's engines without a GPU: its streams do nothing, the collective goes over queues, a handle is a number."""
    wires = Hub()
    monkeypatch.setattr(nccl_common, "stateless_init_process_group", wires.join)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: [Stream()] * count)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="gpu"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    buffers: list[Tensor] = []
    empty = torch.empty

    def on_cpu(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return empty(*size, **options)

    def handle(buffer: Tensor) -> tuple[None, tuple[int, ...]]:
        buffers.append(buffer)
        return None, (len(buffers) - 1, 0, 0, 0, 0, 0, 7)

    def mapped(importer: object, handle: list[int]) -> Tensor:
        wires.damage(buffers[handle[0]])
        return buffers[handle[0]]

    monkeypatch.setattr(torch, "empty", on_cpu)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", handle)
    monkeypatch.setattr(ipc_engine.PackedBufferImporter, "rebuild", mapped)
    for name in ("initialize_layerwise_reload", "finalize_layerwise_reload"):
        monkeypatch.setattr(loading, name, lambda *_: None)
    monkeypatch.setattr(sending, "JOIN_SECONDS", 0.3)
    return wires


class Model(torch.nn.Module):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loaded.update((name, tensor.clone()) for name, tensor in weights)


class Worker:
    """One worker of a replica, with the transfer engine that vLLM gives it."""

    def __init__(self) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        self.model = Model()
        unused: Any = None
        self.engine = CheckedWeightTransfer(unused, config, torch.device("cuda", 0), self.model)
        self.receivers = Receivers(self._connect)

    async def _connect(self, info: dict[str, Any]) -> None:
        await asyncio.to_thread(self.engine.init_transfer_engine, self.engine.parse_init_info(info))

    async def sync(self, update: WeightUpdate, seconds: float = SECONDS) -> str:
        """As `ErasableEngine.sync` does it."""
        async with self._receiving(update, seconds) as arrived:
            self.engine.start_weight_update()
            async for part in arrived.parts():
                await asyncio.to_thread(self.engine.receive_weights, self.engine.parse_update_info(part))
            self.engine.finish_weight_update()
            return arrived.compare([self.engine.checksum()])

    @asynccontextmanager
    async def _receiving(self, update: WeightUpdate, seconds: float) -> AsyncIterator[Arrived]:
        async with self.receivers.receiving(update, seconds) as arrived:
            yield arrived


def sender(transport: str, replicas: int, deadline_seconds: float = SECONDS) -> Publisher:
    config = SyncConfig(transport=transport, bucket_bytes=2**16, deadline_seconds=deadline_seconds)  # type: ignore[arg-type]
    return publisher(config, replicas, "127.0.0.1")


@pytest.mark.parametrize(("transport", "replicas"), [("nccl", 3), ("ipc", 1)])
async def test_vllms_engines_bring_every_tensor_to_every_replica(hub: Hub, transport: str, replicas: int) -> None:
    one, workers = sender(transport, replicas), [Worker() for _ in range(replicas)]
    for version, factor in ((1, 1.0), (2, 3.0)):
        tensors = {name: tensor * factor for name, tensor in TENSORS.items()}
        given = parameters_of(tensors)
        update = one.begin(version, given)
        assert update.streams
        written, *held = await asyncio.gather(
            asyncio.to_thread(one.publish, version, given), *(worker.sync(update) for worker in workers)
        )
        one.keep_only(version)
        assert held == [written.checksum] * replicas
        assert written.not_finite is None
        for worker in workers:
            assert weights_checksum(worker.model.loaded) == weights_checksum(tensors)
    one.close()
    if transport == "nccl":
        assert len(hub.sizes) > 2, "packed into buckets"


def swapped_rows(data: Tensor) -> None:
    rows = data[: 2 * 280].view(2, -1)
    rows[[0, 1]] = rows[[1, 0]].clone()


@pytest.mark.parametrize("transport", ["nccl", "ipc"])
async def test_swapped_rows_are_found_before_they_are_served(hub: Hub, transport: str) -> None:
    one, worker, given = sender(transport, 1), Worker(), parameters_of(TENSORS)
    update = one.begin(1, given)
    hub.damage = swapped_rows
    publishing = asyncio.create_task(asyncio.to_thread(one.publish, 1, given))
    with pytest.raises(DamagedWeights, match="was sent"):
        await worker.sync(update)
    with pytest.raises(RuntimeError, match="a replica failed: DamagedWeights"):
        await publishing
    one.close()


async def test_a_value_that_is_not_finite_is_named_and_no_replica_serves_it(hub: Hub) -> None:
    given = parameters_of(TENSORS | {"b": torch.tensor([1.0, float("inf")])})
    one, worker = sender("nccl", 1), Worker()
    update = one.begin(1, given)
    publishing = asyncio.create_task(asyncio.to_thread(one.publish, 1, given))
    with pytest.raises(DamagedWeights, match="b is not finite was sent"):
        await worker.sync(update)
    with pytest.raises(RuntimeError, match="a replica failed"):
        await publishing
    one.close()


async def test_a_replica_that_does_not_come_or_goes_away_ends_the_sending_in_time(hub: Hub) -> None:
    given = parameters_of(TENSORS)
    one, worker = sender("nccl", 1, deadline_seconds=1.0), Worker()
    one.begin(1, given)
    with pytest.raises(TimeoutError, match="no replica came"):
        await asyncio.to_thread(one.publish, 1, given)
    update = one.begin(2, given)
    publishing = asyncio.create_task(asyncio.to_thread(one.publish, 2, given))
    async with worker.receivers.receiving(update, SECONDS):
        # It takes part and then loads nothing.
        with pytest.raises(TimeoutError):
            await publishing
    with pytest.raises(TransferInterrupted):
        await worker.sync(update, 0.5)
    one.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 3, 4 * CHUNK_WORDS - 1, 4 * CHUNK_WORDS, 100_001])
def test_the_devices_digest_knows_every_place(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    digest = device_digest(tensor)
    assert digest == device_digest(tensor.clone())
    assert digest != device_digest(torch.cat([tensor, torch.zeros(1, dtype=dtype)]))
    changes: list[Callable[[Tensor], Any]] = [
        lambda t: t[-1].neg_(),
        lambda t: t.__setitem__([0, -1], t[[-1, 0]]),
        lambda t: t.neg_(),
    ]
    for change in changes if size > 1 else ():
        changed = tensor.clone()
        change(changed)
        assert device_digest(changed) != digest
