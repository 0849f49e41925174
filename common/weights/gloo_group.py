"""The process group over which `gloo` sends weights: what both sides must do alike.

Replicas take a ticket in the learner's store. The learner calls those that have come together into a round, which has
a group of its own: the learner is rank 0 of it. Who comes later, or must receive once more, is in a later round. So no
group outlives one sending, and a replica that dies is missed by one round only.
"""

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from common.weights.checksum import DIGITS

TICKETS = "tickets"
DISCARDED = "discarded"
"""In the store: how many tickets were taken, and why the learner gave a version up."""


class TransferInterrupted(Exception):
    """Weights stopped to arrive half-way."""


@dataclass(frozen=True, slots=True)
class Seat:
    """What a ticket is called to: its round, its rank there and how many ranks there are, the learner included."""

    round: int
    rank: int
    size: int


def ticket_key(ticket: int) -> str:
    return f"ticket/{ticket}"


def call(store: Store, ticket: int, seat: Seat) -> None:
    """Let the replica with this ticket know of its seat."""
    store.set(ticket_key(ticket), json.dumps(asdict(seat)))


def called(store: Store, ticket: int) -> Seat:
    """The seat of a ticket that was called."""
    return Seat(**json.loads(store.get(ticket_key(ticket))))


class Group:
    """One member of a round's group; made by all of them together.

    `address`: this machine's, on the network that the others reach. `seconds`: for any one bucket.
    """

    def __init__(self, store: Store, seat: Seat, address: str, seconds: float) -> None:
        # torch's stubs know little of what its process groups can do.
        backend: Any = ProcessGroupGloo
        options = backend._Options()
        options._devices = [backend.create_device(hostname=address)]
        options._timeout = timedelta(seconds=seconds)
        self._group: Any = backend(PrefixStore(f"round/{seat.round}", store), seat.rank, seat.size, options)

    def broadcast(self, data: torch.Tensor) -> torch.distributed.Work:
        """Send bytes as rank 0, or receive them; under way until its `wait` returns or raises RuntimeError."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        work: torch.distributed.Work = self._group.broadcast([data], options)
        return work

    def abort(self) -> None:
        """Whoever waits for this member learns of it."""
        self._group.abort()


def buckets(file_bytes: int, header_bytes: int, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """The parts of a weight file in the order in which they travel.

    The header comes last once more: it is complete when everything else was gathered.
    """
    for start in range(0, file_bytes, bucket_bytes):
        yield start, min(start + bucket_bytes, file_bytes)
    yield 0, header_bytes


def no_checksum() -> torch.Tensor:
    """Room for a checksum, which follows the weights."""
    return torch.zeros(DIGITS, dtype=torch.uint8)


def address_towards(host: str, port: int) -> str:
    """This machine's address on the network over which it reaches `host`."""
    kind, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: a datagram's socket is told by its route which address it has.
        probe.connect(target)
        return str(probe.getsockname()[0])
