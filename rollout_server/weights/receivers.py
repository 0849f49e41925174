"""Receiving an update by whichever transport it came."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.weights.gloo_group import TransferInterrupted
from common.weights.updates import DiskUpdate, GlooUpdate, HostUpdate, IpcUpdate, NcclUpdate, WeightUpdate
from common.weights.weight_file import DamagedWeights
from rollout_server.weights import disk, host
from rollout_server.weights.device import Connect, arriving
from rollout_server.weights.gloo import GlooReceiver
from rollout_server.weights.receiver import Arrived, NotReachable

log = logging.getLogger("e3rl.engine")

TRIES = 2
RETRY_PAUSE_SECONDS = 0.5
"""A network's file system may show a change that much later."""
TRANSIENT = (OSError, DamagedWeights, TransferInterrupted)


_Staged = HostUpdate | DiskUpdate | GlooUpdate
"""Updates that are received as a whole before the engine pauses."""


class Receivers:
    """Receives updates, one at a time. `retries`: how many had to be received again.

    `connect`: starts the transfer engines of the replica's `workers`, for weights that go from GPU to GPU.
    """

    def __init__(self, connect: Connect | None = None, workers: int = 1) -> None:
        self.retries = 0
        self._connect = connect
        self._workers = workers
        self._gloo = GlooReceiver()

    @asynccontextmanager
    async def receiving(self, update: WeightUpdate, deadline_seconds: float) -> AsyncIterator[Arrived]:
        """Bring the weights to this machine, while the engine generates; they are there within the block.

        A transient error is met by one more try.

        Raises:
            NotReachable: this replica can never get them by this transport.
            Withdrawn: the learner sends them no more.
            DamagedWeights, OSError, TransferInterrupted: they did not arrive as they were sent, twice.
        """
        deadline = time.monotonic() + deadline_seconds
        if isinstance(update, NcclUpdate | IpcUpdate):
            if self._connect is None:
                raise NotReachable(f"this replica takes no weights by {update.transport}")
            async with arriving(update, self._connect, self._workers, deadline) as one:
                yield one
            return
        receiving = asyncio.ensure_future(asyncio.to_thread(self._receive, update, deadline))
        try:
            arrived = await asyncio.shield(receiving)
        except asyncio.CancelledError:
            receiving.add_done_callback(_close)
            raise
        try:
            yield arrived
        finally:
            arrived.close()

    def _receive(self, update: _Staged, deadline: float) -> Arrived:
        for left in reversed(range(TRIES)):
            try:
                return self._receive_once(update, deadline)
            except TRANSIENT as error:
                if not left or time.monotonic() >= deadline:
                    raise
                self.retries += 1
                log.warning("weights of version %d are received once more: %s", update.version, error)
                time.sleep(RETRY_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    def _receive_once(self, update: _Staged, deadline: float) -> Arrived:
        match update:
            case HostUpdate():
                return host.receive(update, deadline)
            case DiskUpdate():
                return disk.receive(update, deadline)
            case GlooUpdate():
                return self._gloo.receive(update, deadline)


def _close(receiving: "asyncio.Future[Arrived]") -> None:
    """Nobody waits for them any more."""
    if not receiving.cancelled() and receiving.exception() is None:
        receiving.result().close()
