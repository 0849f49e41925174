"""The sending side of `gloo`: rank 0 broadcasts buckets to all replicas while it gathers the rest.

What is gathered is kept in this process's memory until every replica holds a later version: a replica that restarts
receives it from there, while the ranks train on.
"""

import logging
import os
import threading
import time
from collections import deque
from datetime import timedelta

import psutil
import torch
from torch._C._distributed_c10d import TCPStore

from common.weights.gloo_group import DISCARDED, TICKETS, Group, Seat, buckets, call
from common.weights.updates import GlooUpdate
from common.weights.weight_file import MemoryFile, WeightWriter, WrittenWeights
from learner.weights.publisher import Parameters

log = logging.getLogger(__name__)

JOIN_SECONDS = 3.0
"""How long a round waits for the replicas that took part the last time, once the first has come."""
POLL_SECONDS = 0.01
IN_FLIGHT = 2
"""Buckets that are under way at once."""
STALLS_PER_DEADLINE = 4.0
"""A member that does not move for a quarter of the deadline is given up, so that the others can begin again."""


class GlooPublisher:
    """Implements `Publisher`. `replicas`: how many are expected; `address`: this machine's, as replicas reach it."""

    def __init__(self, address: str, replicas: int, bucket_bytes: int, deadline_seconds: float) -> None:
        self._address = address
        self._expected = replicas
        self._bucket_bytes = bucket_bytes
        self._deadline_seconds = deadline_seconds
        self._sendings: dict[int, _Sending] = {}
        self._spare: MemoryFile | None = None

    def begin(self, version: int, parameters: Parameters) -> GlooUpdate:
        self.discard(version)
        if self._sendings:
            # A replica that is lost is waited for once.
            self._expected = max(1, self._sendings[max(self._sendings)].last_round)
        memory, self._spare = self._spare or MemoryFile(os.memfd_create("e3rl-weights")), None
        sending = _Sending(
            memory, parameters, self._expected, self._address, self._bucket_bytes, self._deadline_seconds
        )
        self._sendings[version] = sending
        return GlooUpdate(
            version=version,
            checksum="",
            bytes=parameters.bytes,
            address=self._address,
            port=sending.store.port,
            header_bytes=sending.writer.header_bytes,
            bucket_bytes=self._bucket_bytes,
            file_bytes=sending.writer.total_bytes,
            stall_seconds=sending.stall_seconds,
        )

    def publish(self, version: int, parameters: Parameters) -> WrittenWeights:
        return self._sendings[version].gather(parameters)

    def keep_only(self, version: int) -> None:
        for other in [other for other in self._sendings if other != version]:
            self.discard(other)

    def discard(self, version: int) -> None:
        if version in self._sendings:
            sending = self._sendings.pop(version)
            if sending.close(f"version {version} was given up, or a later one is everywhere") and self._spare is None:
                self._spare = sending.memory
            else:
                os.close(sending.memory.file)

    def close(self) -> None:
        for version in list(self._sendings):
            self.discard(version)
        if self._spare is not None:
            os.close(self._spare.file)
            self._spare = None


class _Sending:
    """One version, its store and the thread that serves it. `last_round`: how many replicas took part last."""

    def __init__(
        self,
        memory: MemoryFile,
        parameters: Parameters,
        expected: int,
        address: str,
        bucket_bytes: int,
        deadline_seconds: float,
    ) -> None:
        self.memory = memory
        self.last_round = expected
        self.stall_seconds = deadline_seconds / STALLS_PER_DEADLINE
        self.store = TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=deadline_seconds)
        )
        self._address = address
        self._bucket_bytes = bucket_bytes
        self._deadline_seconds = deadline_seconds
        self.writer = WeightWriter(memory, parameters.shapes)
        self._checksum: str | None = None
        self._complete = threading.Event()
        self._closed = threading.Event()
        self._group: Group | None = None
        self._thread = threading.Thread(target=self._serve, name="e3rl-gloo", daemon=True)
        self._thread.start()

    def gather(self, parameters: Parameters) -> WrittenWeights:
        with self.writer:
            for _, tensor in parameters:
                self.writer.add(tensor)
            written = self.writer.finish()
        if written.not_finite is None:
            self._checksum = written.checksum
            self._complete.set()
        else:
            self.writer.fail()
        return written

    def close(self, why: str) -> bool:
        """Stop sending; whether nothing is sent any more from this memory."""
        self.store.set(DISCARDED, why)
        self._closed.set()
        self.writer.fail()
        group = self._group
        if group is not None:
            group.abort()
        self._thread.join(self.stall_seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        """Rounds, one after the other, for as long as the version is kept."""
        seated, number = 0, 0
        while (tickets := self._gathered_tickets(seated)) is not None:
            number += 1
            size = tickets - seated + 1
            for rank, ticket in enumerate(range(seated + 1, tickets + 1), start=1):
                call(self.store, ticket, Seat(number, rank, size))
            seated = tickets
            try:
                self._send(Seat(number, 0, size))
            except (RuntimeError, TimeoutError) as error:
                if self._closed.is_set():
                    return
                log.warning("round %d of sending weights failed, with %d replicas: %s", number, size - 1, error)
                self._abort()
                # Those that are left come again.
                self.last_round = max(1, size - 2)
            else:
                self.last_round = size - 1

    def _gathered_tickets(self, seated: int) -> int | None:
        """How many tickets are taken once all that are expected have come, or enough time went by; None at the end."""
        first: float | None = None
        while not self._closed.wait(POLL_SECONDS):
            tickets = self.store.add(TICKETS, 0)
            if tickets == seated:
                continue
            first = first or time.monotonic()
            if tickets - seated >= self.last_round or time.monotonic() - first >= JOIN_SECONDS:
                return tickets
        return None

    def _send(self, seat: Seat) -> None:
        deadline = time.monotonic() + self._deadline_seconds
        self._group = group = Group(self.store, seat, self._address, self.stall_seconds)
        data = self.memory.bytes
        under_way: deque[torch.distributed.Work] = deque()
        parts = list(buckets(self.writer.total_bytes, self.writer.header_bytes, self._bucket_bytes))
        for number, (start, end) in enumerate(parts):
            if number == len(parts) - 1:
                self._wait_until_complete(deadline)
            else:
                self.writer.wait_for(end, deadline)
            under_way.append(group.broadcast(data[start:end]))
            if len(under_way) == IN_FLIGHT:
                under_way.popleft().wait()
        assert self._checksum is not None
        checksum = torch.tensor(list(self._checksum.encode()), dtype=torch.uint8)
        under_way.append(group.broadcast(checksum))
        while under_way:
            under_way.popleft().wait()

    def _wait_until_complete(self, deadline: float) -> None:
        while not self._complete.wait(POLL_SECONDS):
            if self._closed.is_set():
                raise RuntimeError("the weights were given up")
            if time.monotonic() > deadline:
                raise TimeoutError("the weights were not gathered in time")

    def _abort(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this machine. Raises ValueError if it has none."""
    found = psutil.net_if_addrs()
    for address in found.get(interface, ()):
        if address.family.name == "AF_INET":
            return str(address.address)
    raise ValueError(f"sync.network_interface {interface!r} has no IPv4 address; there are {', '.join(sorted(found))}")
