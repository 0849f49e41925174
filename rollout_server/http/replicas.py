"""Replicas of the model: one interface for an engine in this process and for Ray actors, and the set of them all."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.trajectory import ResponseRequest, Trajectory
from common.weights import WeightUpdate
from rollout_server.http.errors import ApiError, unavailable

if TYPE_CHECKING:
    from rollout_server.http.choice import PromptScores
    from rollout_server.rollback import Listener

log = logging.getLogger("e3rl.replicas")
MAX_REASON_CHARACTERS = 500
RESTART_PAUSE_SECONDS = 1.0


class ReplicaLost(Exception):
    """The replica is dead, or did not answer; of what it was generating only what listeners heard is left."""


class GenerationAborted(Exception):
    """The replica ended the response on purpose: a pause with mode `abort`, or a sync that failed."""


class NoWeights(Exception):
    """The replica's last sync failed, so it holds no complete weights."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a started engine says of itself. `defaults`: sampling parameters of the model's generation config.

    `sentinel_ids`: tokens that no monitored response can hold.
    """

    version: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    vocabulary: int
    defaults: dict[str, float]
    sentinel_ids: tuple[int, ...] = ()


class RequestRefused(Exception):
    """The engine cannot do what a request asks for; the message is for the client."""


class Replica(Protocol):
    """One copy of the model. Every call but `generate` has a deadline; `generate` has the request's."""

    async def start(self) -> EngineFacts:
        """Start or, after a loss, restart."""
        ...

    async def generate(self, request: ResponseRequest, listener: "Listener | None") -> Trajectory:
        """Raises `ReplicaLost` if the engine dies; cancelling frees what it holds.

        Without a listener nothing is known of a response that is lost; with one, what was judged.
        """
        ...

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> "PromptScores":
        """Log-probs and ranks of a prompt's tokens and of the `top` likeliest in their places."""
        ...

    async def probe(self) -> None:
        """Raises unless the engine answers."""
        ...

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> str:
        """Load weights; the checksum of what is then held. What is paused stays so."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; false while a request holds some."""
        ...

    async def pause(self, mode: str) -> None: ...

    async def resume(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Member:
    """A replica in the set. `error`: why it does not generate; null if it does.

    `non_finite_version`: the last weights here whose logits were not finite.
    """

    number: int
    replica: Replica
    error: str | None = "is starting"
    responses: int = 0
    version: int = 0
    checksum: str | None = None
    sync_seconds: float = 0.0
    sync_bytes: int = 0
    sync_error: str | None = None
    synced: bool = False
    restarts: int = 0
    non_finite_version: int | None = None


class ReplicaSet:
    """Routes groups to replicas, restarts those that die and keeps all on the same weights.

    A restarted replica gets the current weights before it is given requests.
    """

    def __init__(
        self, replicas: list[Replica], *, start_seconds: float, sync_seconds: float, probe_seconds: float
    ) -> None:
        self.members = [Member(number, replica) for number, replica in enumerate(replicas)]
        self.facts: EngineFacts | None = None
        self.update: WeightUpdate | None = None
        self.paused: str | None = None
        self.max_restarts_in_a_row = 5
        self._start_seconds = start_seconds
        self._sync_seconds = sync_seconds
        self._probe_seconds = probe_seconds
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()

    async def start(self) -> EngineFacts:
        """Start all replicas; the first failure raises."""
        async with asyncio.timeout(self._start_seconds):
            facts = await asyncio.gather(*(member.replica.start() for member in self.members))
        self.facts = facts[0]
        for member, known in zip(self.members, facts, strict=True):
            member.version = known.version
            member.error = None
        return facts[0]

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.error is None]

    def choose(self, responses: int) -> Member:
        """The replica with the fewest responses, which are now counted as its own: give back with `leave`.

        Raises:
            ApiError: 503, none is ready.
        """
        ready = self.ready
        if not ready:
            reasons = "; ".join(f"replica {member.number} {member.error}" for member in self.members)
            raise unavailable(f"no replica is ready: {reasons}")
        member = min(ready, key=lambda candidate: candidate.responses)
        member.responses += responses
        return member

    def leave(self, member: Member, responses: int) -> None:
        """What `choose` counted has ended."""
        member.responses -= responses

    def lost(self, member: Member) -> None:
        """A call found the replica dead: restart it, once however many calls find so."""
        if member.number not in self._restarting:
            member.error = "died and is being restarted"
            log.error("replica %d died; restarting it", member.number)
            self._restarting[member.number] = asyncio.create_task(self._restart(member))

    async def _restart(self, member: Member) -> None:
        try:
            for number in range(1, self.max_restarts_in_a_row + 1):
                member.restarts += 1
                try:
                    await self._restart_once(member)
                except Exception as error:
                    member.error = f"died and restart {number} failed with {type(error).__name__}"
                    log.exception("restart %d of replica %d failed", number, member.number)
                    await asyncio.sleep(RESTART_PAUSE_SECONDS * 2**number)
                else:
                    log.info("replica %d is back with policy version %d", member.number, member.version)
                    return
            member.error = f"died and could not be restarted {self.max_restarts_in_a_row} times"
        finally:
            del self._restarting[member.number]

    async def _restart_once(self, member: Member) -> None:
        """Weights may change meanwhile, so the last step is taken under the lock that changes them."""
        async with asyncio.timeout(self._start_seconds):
            facts = await member.replica.start()
        async with self._changing:
            member.version = facts.version
            if self.update is not None:
                await self._load(member, self.update)
                if member.sync_error is not None:
                    raise ReplicaLost(member.sync_error)
            if self.paused is not None:
                async with asyncio.timeout(self._sync_seconds):
                    await member.replica.pause(self.paused)
            member.error = None

    async def probe(self, member: Member) -> str | None:
        """Why a replica is not ready; None if it answers."""
        if member.error is not None:
            return member.error
        try:
            async with asyncio.timeout(self._probe_seconds):
                await member.replica.probe()
        except TimeoutError:
            return f"did not answer within {self._probe_seconds:g} s"
        except ReplicaLost:
            self.lost(member)
            return member.error
        return None

    async def sync(self, prepare: Callable[[], Awaitable[WeightUpdate]]) -> WeightUpdate:
        """Load what `prepare` makes into all replicas; raises unless each reports its checksum. A pause lasts on.

        Raises:
            ApiError: 503 with what each failed replica said.
        """
        async with self._changing:
            update = await prepare()
            running = [member for member in self.members if member.number not in self._restarting]
            await asyncio.gather(*(self._load(member, update) for member in running))
            failed = [member for member in running if member.sync_error is not None]
            if failed:
                reasons = "; ".join(f"replica {m.number}: {m.sync_error}" for m in failed)
                raise ApiError(503, f"weights were not loaded: {reasons}", code="weight_sync_failed")
            self.update = update
            return update

    async def _load(self, member: Member, update: WeightUpdate) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        member.synced = True
        member.sync_bytes = update.bytes
        try:
            async with asyncio.timeout(self._sync_seconds + self._probe_seconds):
                member.checksum = await member.replica.sync(update, self._sync_seconds)
        except Exception as error:
            log.exception("replica %d did not load policy version %d", member.number, update.version)
            member.sync_error = _why(error, update)
            member.error = "holds no complete weights: its last sync failed"
        else:
            member.sync_error = None
            member.version = update.version
            if member.number not in self._restarting:
                member.error = None
        member.sync_seconds = loop.time() - started

    async def watch(self, every_seconds: float) -> None:
        """Probe the replicas until cancelled, so that a dead one is restarted before a request finds it."""
        while True:
            await asyncio.sleep(every_seconds)
            await asyncio.gather(*(self.probe(member) for member in self.ready))

    async def reset_prefix_cache(self) -> bool:
        """Whether all replicas forgot their cached prefixes; a restart forgets those of the dead."""
        async with asyncio.timeout(self._sync_seconds):
            return all(await asyncio.gather(*(member.replica.reset_prefix_cache() for member in self.ready)))

    async def pause(self, mode: str) -> None:
        """Stop generating on all replicas; after a `TimeoutError` nothing new is generated either, until `resume`."""
        async with self._changing:
            self.paused = mode
            await self._on_all(lambda replica: replica.pause(mode))

    async def resume(self) -> None:
        """Go on after `pause`."""
        async with self._changing:
            self.paused = None
            await self._on_all(lambda replica: replica.resume())

    async def _on_all(self, call: Callable[[Replica], Awaitable[None]]) -> None:
        """Pause or resume the replicas, those without weights too. A restart does it to those that are dead."""

        async def on_one(member: Member) -> None:
            try:
                await call(member.replica)
            except ReplicaLost:
                if member.error is None:
                    self.lost(member)

        running = [member for member in self.members if member.number not in self._restarting]
        async with asyncio.timeout(self._sync_seconds):
            await asyncio.gather(*map(on_one, running))

    async def close(self) -> None:
        """Stop all replicas."""
        for task in list(self._restarting.values()):
            task.cancel()
        await asyncio.gather(*(m.replica.close() for m in self.members), return_exceptions=True)


def _why(error: Exception, update: WeightUpdate) -> str:
    """Why weights were not loaded, for the operator: one line, without the path of the file."""
    if isinstance(error, TimeoutError):
        return "not within the deadline"
    text = " ".join(str(error).replace(update.path, "the file").split())
    return f"{type(error).__name__}: {text[:MAX_REASON_CHARACTERS]}"
