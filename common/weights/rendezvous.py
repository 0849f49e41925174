"""How the learner leads replicas through an update whose weights go from device to device.

vLLM's own engines move the weights. What they call on the other side travels over a store of the learner's: the
learner numbers its calls, each replica does what the next one says and acknowledges it.
"""

import json
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store

from common.weights.gloo_group import TICKETS, Seat, TransferInterrupted, call, called, ticket_key

WORKERS = "workers"
FAILED = "failed"
INIT, START, UPDATE, FINISH = "init", "start", "update", "finish"
POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Call:
    """What the learner asks for."""

    number: int
    name: str
    info: dict[str, Any]


def seat_all(store: Store, expected: int, join_seconds: float, deadline: float) -> tuple[int, int]:
    """Wait for replicas and seat them: how many came, and the ranks there are, of which the learner is rank 0.

    A replica of several workers gets as many ranks, and is told the first.

    Raises:
        TimeoutError: none came.
    """
    first: float | None = None
    while True:
        tickets = store.add(TICKETS, 0)
        now = time.monotonic()
        if tickets and first is None:
            first = now
        if tickets >= expected or (first is not None and now - first >= join_seconds):
            break
        if now >= deadline:
            raise TimeoutError("no replica came to receive weights")
        time.sleep(POLL_SECONDS)
    workers = [int(store.get(f"{WORKERS}/{ticket}")) for ticket in range(1, tickets + 1)]
    rank = 1
    for ticket, count in enumerate(workers, start=1):
        call(store, ticket, Seat(1, rank, 1 + sum(workers)))
        rank += count
    return tickets, 1 + sum(workers)


class Caller:
    """The learner's end. Implements the calls of vLLM's `VLLMWeightSyncClient`; each returns when all have done it.

    `checksum`: gives the checksum of what was sent, once all of it was.
    """

    def __init__(self, store: Store, replicas: int, deadline: float) -> None:
        self._store = PrefixStore("calls", store)
        self._replicas = replicas
        self._deadline = deadline
        self._number = 0
        self.checksum = ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call(INIT, init_info)

    def start_weight_update(self) -> None:
        self._call(START, {})

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict)
        self._call(UPDATE, update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call(FINISH, {"checksum": self.checksum})

    def _call(self, name: str, info: dict[str, Any]) -> None:
        self._number += 1
        self._store.set(f"call/{self._number}", json.dumps([name, info]))
        while self._store.add(f"done/{self._number}", 0) < self._replicas:
            if self._store.check([FAILED]):
                raise RuntimeError(f"a replica failed: {self._store.get(FAILED).decode()}")
            if time.monotonic() >= self._deadline:
                raise TimeoutError(f"not every replica answered '{name}' in time")
            time.sleep(POLL_SECONDS)


class Callee:
    """A replica's end."""

    def __init__(self, store: Store, workers: int, deadline: float) -> None:
        self._store = PrefixStore("calls", store)
        self._deadline = deadline
        self._number = 0
        ticket = store.add(TICKETS, 1)
        store.set(f"{WORKERS}/{ticket}", str(workers))
        self._wait(store, ticket_key(ticket), "a place")
        self.seat = called(store, ticket)

    def next(self, *names: str) -> Call:
        """The next call, which must be one of `names`.

        Raises:
            TransferInterrupted: none came in time, or another one.
        """
        self._number += 1
        key = f"call/{self._number}"
        self._wait(self._store, key, " or ".join(names))
        name, info = json.loads(self._store.get(key))
        if name not in names:
            raise TransferInterrupted(f"the learner called '{name}', not {' or '.join(names)}")
        return Call(self._number, name, info)

    def done(self, done: Call) -> None:
        """This replica has done it."""
        self._store.add(f"done/{done.number}", 1)

    def fail(self, why: str) -> None:
        """The learner need not wait for this replica."""
        self._store.set(FAILED, why)

    def _wait(self, store: Store, key: str, what: str) -> None:
        left = self._deadline - time.monotonic()
        try:
            store.wait([key], timedelta(seconds=max(left, 0.001)))
        except RuntimeError as error:
            raise TransferInterrupted(f"the learner gave no call for {what} in time: {error}") from error
