"""The receiving side of `gloo`: buckets into a file in this process's memory, which vLLM's workers then map."""

import os
import time
from collections import deque
from datetime import timedelta

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistNetworkError, DistStoreError

from common.weights.gloo_group import (
    DISCARDED,
    TICKETS,
    Group,
    TransferInterrupted,
    address_towards,
    buckets,
    called,
    no_checksum,
    ticket_key,
)
from common.weights.updates import GlooUpdate
from common.weights.weight_file import MemoryFile, verify
from rollout_server.weights.receiver import Arrived, Withdrawn

IN_FLIGHT = 2
CONNECT_SECONDS = 15.0


class GlooReceiver:
    """Keeps its last group: other members may still read from it what it has received."""

    def __init__(self) -> None:
        self._group: Group | None = None

    def receive(self, update: GlooUpdate, deadline: float) -> Arrived:
        """Take part in a round, and compare what arrived with what was sent.

        Raises:
            Withdrawn: the learner sends this version no more.
            TransferInterrupted: it was not all received in time.
            DamagedWeights: it is not what was sent.
        """
        store = _store(update, deadline)
        file = os.memfd_create("e3rl-weights")
        try:
            memory = MemoryFile(file)
            memory.resize(update.file_bytes)
            try:
                checksum = self._fill(memory.bytes, update, store, deadline)
            except (RuntimeError, TransferInterrupted) as error:
                # RuntimeError is what gloo and the store raise.
                if (why := _discarded(store)) is not None:
                    raise Withdrawn(f"the learner sends no more: {why}") from error
                raise TransferInterrupted(
                    f"weights of version {update.version} from {update.address} stopped half-way: {error}"
                ) from error
            path = f"/proc/{os.getpid()}/fd/{file}"
            verify(path, checksum, in_memory=True)
        except BaseException:
            os.close(file)
            raise
        return Arrived({"path": path}, checksum, lambda: os.close(file))

    def _fill(self, data: torch.Tensor, update: GlooUpdate, store: TCPStore, deadline: float) -> str:
        """Receive into `data`; the checksum that was sent."""
        ticket = store.add(TICKETS, 1)
        left = deadline - time.monotonic()
        if left <= 0.0:
            raise TransferInterrupted("no time is left")
        store.wait([ticket_key(ticket)], timedelta(seconds=left))
        seat = called(store, ticket)
        address = address_towards(update.address, update.port)
        seconds = max(0.1, min(update.stall_seconds, deadline - time.monotonic()))
        self._group = group = Group(store, seat, address, seconds)
        under_way: deque[torch.distributed.Work] = deque()
        try:
            for start, end in buckets(update.file_bytes, update.header_bytes, update.bucket_bytes):
                if time.monotonic() > deadline:
                    raise TransferInterrupted("no time is left")
                under_way.append(group.broadcast(data[start:end]))
                if len(under_way) == IN_FLIGHT:
                    under_way.popleft().wait()
            checksum = no_checksum()
            under_way.append(group.broadcast(checksum))
            while under_way:
                under_way.popleft().wait()
        except BaseException:
            group.abort()
            raise
        return bytes(checksum.tolist()).decode("ascii", "replace")


def _store(update: GlooUpdate, deadline: float) -> TCPStore:
    seconds = max(0.1, min(CONNECT_SECONDS, deadline - time.monotonic()))
    try:
        return TCPStore(
            update.address,
            update.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except (DistNetworkError, DistStoreError) as error:
        raise TransferInterrupted(
            f"the learner does not answer at {update.address}:{update.port} within {seconds:.0f} s: is this the "
            "network that sync.network_interface names, and does a firewall let any port pass?"
        ) from error


def _discarded(store: TCPStore) -> str | None:
    """Why the learner gave the version up, if it did and still answers."""
    try:
        return store.get(DISCARDED).decode() if store.check([DISCARDED]) else None
    except RuntimeError:
        return None
