"""What `nccl` and `ipc` have in common on the sending side: vLLM's own trainer engine, led over a store.

Neither transport has run on a GPU. Tests drive both sides up to the collective call and the memory handle.
"""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from common.weights.checksum import combined, device_digest, type_name
from common.weights.rendezvous import Caller, seat_all
from common.weights.updates import IpcUpdate, NcclUpdate
from common.weights.weight_file import WrittenWeights
from learner.weights.publisher import Parameters

JOIN_SECONDS = 3.0


class TrainerEngine(Protocol):
    """What is used of vLLM's `TrainerWeightTransferEngine`."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


Connect = Callable[[Caller, Any, int], TrainerEngine]
"""Makes the engine of a caller, a `WeightSource` and the number of ranks; replicas are led through its start."""


class DevicePublisher:
    """Implements `Publisher`. Nothing is kept: a replica that comes later waits for the next version."""

    def __init__(
        self,
        update: type[NcclUpdate] | type[IpcUpdate],
        connect: Connect,
        address: str,
        replicas: int,
        deadline_seconds: float,
    ) -> None:
        self._update = update
        self._connect = connect
        self._address = address
        self._replicas = replicas
        self._seconds = deadline_seconds
        self._stores: dict[int, TCPStore] = {}

    def begin(self, version: int, parameters: Parameters) -> NcclUpdate | IpcUpdate:
        self._stores.clear()
        store = TCPStore(
            self._address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=self._seconds)
        )
        self._stores[version] = store
        return self._update(
            version=version, checksum="", bytes=parameters.bytes, address=self._address, port=store.port
        )

    def publish(self, version: int, parameters: Parameters) -> WrittenWeights:
        """Lead all replicas through the update.

        Raises:
            TimeoutError: a replica did not take part to the end in time; the group was taken apart.
        """
        deadline = time.monotonic() + self._seconds
        store = self._stores[version]
        replicas, ranks = seat_all(store, self._replicas, JOIN_SECONDS, deadline)
        caller = Caller(store, replicas, deadline)
        source = _source(parameters, caller)
        engine = self._connect(caller, source, ranks)
        try:
            _within(engine.send_weights, deadline, f"sending weights of version {version} to {replicas} replicas")
        finally:
            engine.shutdown()
        return WrittenWeights(caller.checksum, len(parameters.shapes), parameters.bytes, source.not_finite)

    def keep_only(self, version: int) -> None:
        for other in [other for other in self._stores if other != version]:
            del self._stores[other]

    def discard(self, version: int) -> None:
        self._stores.pop(version, None)

    def close(self) -> None:
        self._stores.clear()


def _source(parameters: Parameters, caller: Caller) -> Any:
    """The parameters as vLLM's engines take them. The caller knows their checksum once they were sent."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        not_finite: str | None = None
        largest_bytes = max((shape.bytes for shape in parameters.shapes), default=0)

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(shape.name, shape.dtype, shape.shape) for shape in parameters.shapes]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            sent = {}
            for shape, tensor in parameters:
                tensor = tensor.detach().contiguous()
                sent[shape.name] = type_name(shape.dtype), shape.shape, device_digest(tensor)
                if self.not_finite is None and tensor.numel() and not bool(tensor.isfinite().all()):
                    self.not_finite = shape.name
                yield shape.name, tensor
            # Replicas compare with it, and give up what must not be loaded.
            caller.checksum = combined(sent) if self.not_finite is None else f"{self.not_finite} is not finite"

    return Source()


def _within(work: Callable[[], None], deadline: float, what: str) -> None:
    """A collective call ends by itself only if all take part: wait for it in time, not for ever."""
    failures: list[BaseException] = []
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.accelerator.set_device_index(device)
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="e3rl-device-send", daemon=True)
    thread.start()
    thread.join(max(deadline - time.monotonic(), 0.0))
    if thread.is_alive():
        raise TimeoutError(f"{what} did not end in time")
    if failures:
        raise failures[0]
