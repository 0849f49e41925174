"""The buffer between generation and training: scored groups, as they finish, none older than the bound."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from common.packed import Group
from learner.environments.rewards import Tally
from learner.loop.ledger import Draw, Ledger


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A turn's responses with their rewards.

    `version`: the oldest policy that sampled a token of theirs. Responses from sample `first_treated` on were treated.
    """

    draw: Draw
    group: Group
    version: int
    first_treated: int
    tally: Tally


@dataclass(frozen=True, slots=True)
class Taken:
    """What one step trains, in the order of the turns, and what was dropped while it was waited for.

    `version`: of the policy that the step changes. `depth`: scored groups that were left.
    """

    version: int
    groups: list[ScoredGroup]
    dropped: list[ScoredGroup]
    depth: int

    @property
    def staleness(self) -> list[int]:
        """Of each group, in versions."""
        return [self.version - group.version for group in self.groups]


class Buffer:
    """Holds scored groups until the trainer takes them, and holds generation up where there are enough.

    At most `capacity` turns are under way: in flight, scored here, or in training. No turn is begun that would come
    after the `groups_left` that are still to be trained.
    """

    def __init__(self, ledger: Ledger, max_staleness: int, groups_per_step: int, groups_left: int) -> None:
        self.capacity = (max_staleness + 1) * groups_per_step
        self._ledger = ledger
        self._max_staleness = max_staleness
        self._groups_left = groups_left
        self._groups: list[ScoredGroup] = []
        self._is_closed = False
        self._failure: BaseException | None = None
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()

    def __len__(self) -> int:
        return len(self._groups)

    def has_room(self, turns: int) -> bool:
        """Whether so many turns may be drawn now."""
        limit = min(self.capacity, self._groups_left)
        return not self._is_closed and self._ledger.outstanding + turns <= limit

    async def room(self, turns: int) -> None:
        """Wait until there is room. It has no deadline: training, which makes room, has one for all that it does."""
        while not self.has_room(turns):
            self._room.clear()
            await self._room.wait()

    def close(self) -> None:
        """There is no room until `open`."""
        self._is_closed = True

    def open(self) -> None:
        """Undo `close`."""
        self._is_closed = False
        self._room.set()

    def put(self, group: ScoredGroup) -> None:
        """Add a group that was in flight. Raises RuntimeError if more are under way than there may be."""
        self._ledger.score(group.draw.number)
        if self._ledger.outstanding > self.capacity:
            raise RuntimeError(f"{self._ledger.outstanding} groups are under way, more than {self.capacity}")
        self._groups.append(group)
        self._arrived.set()

    def fail(self, error: BaseException) -> None:
        """Nothing more will arrive, because of `error`; who takes gets it."""
        self._failure = self._failure or error
        self._arrived.set()

    def ended(self, producing: "asyncio.Task[None]") -> None:
        """What fills the buffer has ended; nobody waits for it any longer."""
        if not producing.cancelled():
            self.fail(producing.exception() or RuntimeError("generation ended"))

    def check(self) -> None:
        """Raise what `fail` was told."""
        if self._failure is not None:
            raise self._failure

    async def take(self, count: int, version: int) -> Taken:
        """The `count` oldest of the groups that are here, as soon as there are so many.

        What is older than the bound is dropped, its turns wait again. A group that was dropped before is waited for
        while it can still be trained, so that a prompt whose responses take long is not put off for ever. The wait
        needs no deadline: generation has one for its responses, and rewards have theirs. Raises what `fail` was told.
        """
        dropped: list[ScoredGroup] = []
        while True:
            self.check()
            dropped += self.drop_stale(version)
            if (groups := self.take_now(count, version)) is not None:
                return Taken(version, groups, dropped, len(self._groups))
            self._arrived.clear()
            await self._arrived.wait()

    def take_now(self, count: int, version: int) -> list[ScoredGroup] | None:
        """What `take` returns, in the order of the turns; None if it has to wait."""
        if len(self._groups) < count or self._ledger.awaited(version - self._max_staleness):
            return None
        oldest_first = sorted(self._groups, key=lambda group: (group.version, group.draw.number))
        taken, self._groups = oldest_first[:count], oldest_first[count:]
        taken.sort(key=lambda group: group.draw.number)
        self._ledger.take(group.draw.number for group in taken)
        return taken

    def drop_stale(self, version: int) -> list[ScoredGroup]:
        """Take out what must not change the policy `version` any more."""
        oldest = version - self._max_staleness
        dropped = [group for group in self._groups if group.version < oldest]
        if dropped:
            self._groups = [group for group in self._groups if group.version >= oldest]
            for group in dropped:
                self._ledger.drop(group.draw.number)
            self._room.set()
        return dropped

    def trained(self, groups: Sequence[ScoredGroup]) -> None:
        """What was taken has been trained, and the policy that came of it is published."""
        self._ledger.train(group.draw.number for group in groups)
        self._groups_left -= len(groups)
        self._room.set()
