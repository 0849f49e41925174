"""Who may generate now: a bounded queue that is fair between clients."""

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass

from rollout_server.http.openai.errors import ApiError


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request in a queue. `is_admitted`: its places are taken, whether or not its task has learnt of it yet."""

    client: str
    weight: int
    wake: asyncio.Future[None]
    is_admitted: bool = False


class Admission:
    """Hands out `capacity` places, one a response, and lets at most `max_waiting` requests wait for theirs.

    Clients take turns: each one's requests are admitted in order, and a client with many does not delay another with
    few. A request that needs more places than there are takes all of them.

    Whoever is admitted holds its places from then on. A request that is cancelled gives them back itself, at the
    latest when its task next runs; one that is cancelled before it is admitted takes none.
    """

    def __init__(self, capacity: int, max_waiting: int) -> None:
        self.capacity = capacity
        self._free = capacity
        self._max_waiting = max_waiting
        self._queues: OrderedDict[str, dict[_Waiting, None]] = OrderedDict()
        self.waiting = 0
        self.moved = time.monotonic()
        """When places were last taken or given back."""

    @property
    def busy(self) -> int:
        """Places that are taken."""
        return self.capacity - self._free

    async def acquire(self, client: str, responses: int) -> int:
        """Wait for places; returns how many were taken, for `release`.

        Raises:
            ApiError: 429, too many requests wait already.
        """
        weight = min(responses, self.capacity)
        if not self._queues and weight <= self._free:
            self._take(weight)
            return weight
        if self.waiting >= self._max_waiting:
            raise ApiError(
                429,
                f"{self.waiting} requests are waiting already; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        entry = _Waiting(client, weight, asyncio.get_running_loop().create_future())
        self._queues.setdefault(client, {})[entry] = None
        self.waiting += 1
        try:
            await entry.wake
        except BaseException:
            # The future does not tell: it may be cancelled before, and its task after, the places were taken.
            if entry.is_admitted:
                self.release(weight)
            else:
                self._drop(entry)
                self._admit()
            raise
        return weight

    def release(self, weight: int) -> None:
        """Give places back."""
        if not 0 <= weight <= self.busy:
            raise ValueError(f"{weight} places cannot be given back: {self.busy} are taken")
        self._free += weight
        self.moved = time.monotonic()
        self._admit()

    def _take(self, weight: int) -> None:
        self._free -= weight
        self.moved = time.monotonic()

    def _drop(self, entry: _Waiting) -> None:
        """Take a request out of its queue, if it is in there."""
        queue = self._queues.get(entry.client, {})
        if entry not in queue:
            return
        del queue[entry]
        self.waiting -= 1
        if not queue:
            del self._queues[entry.client]

    def _admit(self) -> None:
        """Admit in turn. A request that does not fit yet is waited for, or small ones would starve it."""
        while self._queues:
            client, queue = next(iter(self._queues.items()))
            entry = next(iter(queue))
            if entry.wake.done():
                # Cancelled, and its task has not run since: it must get no places and costs its client no turn.
                self._drop(entry)
                continue
            if entry.weight > self._free:
                return
            self._drop(entry)
            if client in self._queues:
                self._queues.move_to_end(client)
            self._take(entry.weight)
            entry.is_admitted = True
            entry.wake.set_result(None)
