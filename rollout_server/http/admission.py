"""Who may generate now: a bounded queue that is fair between clients."""

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass

from rollout_server.http.errors import ApiError


@dataclass(slots=True)
class _Waiting:
    weight: int
    admitted: asyncio.Future[None]


class Admission:
    """Hands out `capacity` places, one a response, and lets at most `max_waiting` requests wait for theirs.

    Clients take turns: each one's requests are admitted in order, and a client with many does not delay another with
    few. A request that needs more places than there are takes all of them.
    """

    def __init__(self, capacity: int, max_waiting: int) -> None:
        self._capacity = capacity
        self._free = capacity
        self._max_waiting = max_waiting
        self._queues: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        self.waiting = 0

    @property
    def busy(self) -> int:
        """Places that are taken."""
        return self._capacity - self._free

    async def acquire(self, client: str, responses: int) -> int:
        """Wait for places; returns how many were taken, for `release`.

        Raises:
            ApiError: 429, too many requests wait already.
        """
        weight = min(responses, self._capacity)
        if not self._queues and weight <= self._free:
            self._free -= weight
            return weight
        if self.waiting >= self._max_waiting:
            raise ApiError(
                429,
                f"{self.waiting} requests are waiting already; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        entry = _Waiting(weight, asyncio.get_running_loop().create_future())
        self._queues.setdefault(client, deque()).append(entry)
        self.waiting += 1
        try:
            await entry.admitted
        except BaseException:
            if entry.admitted.done() and not entry.admitted.cancelled():
                self.release(weight)
            else:
                self._forget(client, entry)
            raise
        return weight

    def release(self, weight: int) -> None:
        """Give places back."""
        self._free += weight
        self._admit()

    def _forget(self, client: str, entry: _Waiting) -> None:
        queue = self._queues[client]
        queue.remove(entry)
        self.waiting -= 1
        if not queue:
            del self._queues[client]
        self._admit()

    def _admit(self) -> None:
        """Admit in turn. A request that does not fit yet is waited for, or small ones would starve it."""
        while self._queues:
            client, queue = next(iter(self._queues.items()))
            entry = queue[0]
            if entry.weight > self._free:
                return
            queue.popleft()
            self.waiting -= 1
            self._free -= entry.weight
            if queue:
                self._queues.move_to_end(client)
            else:
                del self._queues[client]
            entry.admitted.set_result(None)
