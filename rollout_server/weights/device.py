"""The receiving side of `nccl` and `ipc`: vLLM's workers receive; this process tells them what the learner calls for.

Weights cannot wait in a GPU's memory until the engine pauses, so they are loaded as they arrive. What arrived is
compared with what was sent before the engine serves it. Neither transport has run on a GPU.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError, DistStoreError

from common.weights.gloo_group import TransferInterrupted
from common.weights.rendezvous import FINISH, INIT, START, UPDATE, Callee
from common.weights.updates import IpcUpdate, NcclUpdate
from common.weights.weight_file import DamagedWeights
from rollout_server.weights.receiver import Arrived

CONNECT_SECONDS = 15.0

Connect = Callable[[dict[str, Any]], Awaitable[None]]
"""Starts the transfer engines of a replica's workers."""


class Arriving(Arrived):
    """Weights that arrive while they are loaded."""

    def __init__(self, update: NcclUpdate | IpcUpdate, callee: Callee) -> None:
        super().__init__({}, "")
        self._update = update
        self._callee = callee
        self._sent = ""

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        while True:
            call = await asyncio.to_thread(self._callee.next, UPDATE, FINISH)
            if call.name == FINISH:
                self._sent, self._finish = call.info["checksum"], call
                return
            yield {"transport": self._update.transport, "info": call.info}
            self._callee.done(call)

    def compare(self, received: list[str]) -> str:
        for checksum in received:
            if checksum != self._sent:
                raise DamagedWeights(f"weights with checksum {checksum} arrived, {self._sent} was sent")
        self._callee.done(self._finish)
        return self._sent


@asynccontextmanager
async def arriving(
    update: NcclUpdate | IpcUpdate, connect: Connect, workers: int, deadline: float
) -> AsyncIterator[Arriving]:
    """Take part in an update; within the block the learner waits for this replica to load.

    Raises:
        TransferInterrupted: the learner does not answer, or not in time.
    """
    callee = await asyncio.to_thread(_join, update, workers, deadline)
    try:
        call = await asyncio.to_thread(callee.next, INIT)
        info = call.info | ({"rank_offset": callee.seat.rank} if "rank_offset" in call.info else {})
        await connect({"transport": update.transport, "info": info})
        callee.done(call)
        start = await asyncio.to_thread(callee.next, START)
        callee.done(start)
        yield Arriving(update, callee)
    except BaseException as error:
        callee.fail(f"{type(error).__name__}: {error}")
        raise


def _join(update: NcclUpdate | IpcUpdate, workers: int, deadline: float) -> Callee:
    seconds = max(0.1, min(CONNECT_SECONDS, deadline - time.monotonic()))
    try:
        store = TCPStore(
            update.address,
            update.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except (DistNetworkError, DistStoreError) as error:
        raise TransferInterrupted(f"the learner does not answer at {update.place} within {seconds:.0f} s") from error
    return Callee(store, workers, deadline)
