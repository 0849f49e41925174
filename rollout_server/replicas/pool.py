"""The pool: routes groups to replicas, restarts those that die and keeps all on the same weights."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from common.weights import WeightUpdate
from rollout_server.replicas.errors import NoReplicaReady, VersionNotNewer, WeightsNotLoaded
from rollout_server.replicas.member import Member
from rollout_server.replicas.replica import EngineFacts, Replica, ReplicaLost

log = logging.getLogger("e3rl.replicas")
MAX_REASON_CHARACTERS = 500
MAX_VERSION = 2**63 - 1
RESTART_PAUSE_SECONDS = 1.0


class Kept(Protocol):
    """Weights that can be loaded again, whatever becomes of the checkpoint that they are from."""

    def path(self) -> str:
        """Where a replica finds the file now."""
        ...


class Pool:
    """The replicas of a training run or of a server.

    `update`, `kept`: the newest weights that any replica has loaded. A restarted replica gets them before it is given
    requests, and one that did not load them is restarted, so that the versions that are served never fall.
    """

    def __init__(
        self, replicas: list[Replica], *, start_seconds: float, sync_seconds: float, probe_seconds: float
    ) -> None:
        self.members = [Member(number, replica) for number, replica in enumerate(replicas)]
        self.facts: EngineFacts | None = None
        self.update: WeightUpdate | None = None
        self.kept: Kept | None = None
        self.paused: str | None = None
        self.max_restarts_in_a_row = 5
        self._start_seconds = start_seconds
        self._sync_seconds = sync_seconds
        self._probe_seconds = probe_seconds
        self._newest_served = 0
        self._newest_tried = 0
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()
        self._probing: asyncio.Task[list[str | None]] | None = None
        self.moved = time.monotonic()
        """When an engine was last seen to have made a step, or a pause, a sync or a restart ended."""

    async def start(self) -> EngineFacts:
        """Start all replicas; the first failure raises."""
        async with asyncio.timeout(self._start_seconds):
            facts = await asyncio.gather(*(member.replica.start() for member in self.members))
        self.facts = facts[0]
        for member, known in zip(self.members, facts, strict=True):
            member.version = known.version
            member.error = None
        self._newest_served = self._newest_tried = facts[0].version
        return facts[0]

    @property
    def version(self) -> int:
        """The oldest version that is served; if nothing is, the oldest that is held."""
        return min(member.version for member in self.ready or self.members)

    @property
    def is_held(self) -> bool:
        """Whether nothing is to be expected of the engines: they are paused, or get weights."""
        return self.paused is not None or self._changing.locked()

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.error is None]

    def choose(self, responses: int) -> Member:
        """The replica with the fewest responses, which are now counted as its own: give back with `leave`.

        Raises:
            NoReplicaReady: with the reason of each.
        """
        ready = self.ready
        if not ready:
            reasons = "; ".join(map(str, self.members))
            final = all(member.gave_up for member in self.members)
            raise NoReplicaReady(f"no replica is ready: {reasons}", final=final)
        member = min(ready, key=lambda candidate: candidate.responses)
        member.responses += responses
        return member

    def leave(self, member: Member, responses: int) -> None:
        """What `choose` counted has ended."""
        member.responses -= responses

    def lost(self, member: Member) -> None:
        """A call found the replica dead: restart it, once however many calls find so."""
        self._restart_soon(member, "died and is being restarted")

    def _restart_soon(self, member: Member, why: str) -> None:
        if member.number not in self._restarting and not member.gave_up:
            member.error = why
            log.error("replica %d %s", member.number, why)
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
            member.gave_up = True
        finally:
            del self._restarting[member.number]

    async def _restart_once(self, member: Member) -> None:
        """Weights may change meanwhile, so the last step is taken under the lock that changes them."""
        async with asyncio.timeout(self._start_seconds):
            facts = await member.replica.start()
        async with self._changing:
            member.version = facts.version
            member.checksum = None
            if self.update is not None and self.kept is not None:
                await self._load(member, self.update.model_copy(update={"path": self.kept.path()}))
                if member.sync_error is not None:
                    raise ReplicaLost(member.sync_error)
            if self.paused is not None:
                async with asyncio.timeout(self._sync_seconds):
                    await member.replica.pause(self.paused)
            member.error = None
            self.moved = time.monotonic()

    async def probe(self, member: Member) -> str | None:
        """Why a replica is not ready; None if it answers."""
        if member.error is not None:
            return member.error
        try:
            async with asyncio.timeout(self._probe_seconds):
                use = await member.replica.probe()
        except TimeoutError:
            return f"did not answer within {self._probe_seconds:g} s"
        except ReplicaLost:
            self.lost(member)
            return member.error
        except Exception as error:
            log.exception("the probe of replica %d failed", member.number)
            return f"could not be probed: {type(error).__name__}"
        if use.steps != member.use.steps:
            self.moved = time.monotonic()
        member.use = use
        return None

    async def probe_all(self) -> list[str | None]:
        """`probe` of each replica. Who asks meanwhile gets the same answer: asking often costs no engine time."""
        if self._probing is None:
            self._probing = asyncio.create_task(self._probe_all())
            self._probing.add_done_callback(self._probed)
        return await asyncio.shield(self._probing)

    async def _probe_all(self) -> list[str | None]:
        return list(await asyncio.gather(*(self.probe(member) for member in self.members)))

    def _probed(self, _: "asyncio.Task[list[str | None]]") -> None:
        self._probing = None

    def check_version(self, version: int | None) -> None:
        """Raises `VersionNotNewer` if weights of this version cannot be the next ones."""
        if version is not None and version < self._newest_served:
            raise VersionNotNewer(
                f"version {self._newest_served} has been served, and versions never fall: not {version}"
            )

    async def sync(self, update: WeightUpdate, kept: Kept, version: int | None) -> WeightUpdate:
        """Load `update` into all replicas as `version`, or as the next one. A pause lasts on.

        Returns once every replica that serves holds it; those that are restarting are waited for.

        Raises:
            VersionNotNewer: the version is not newer than what has been served.
            WeightsNotLoaded: with what each replica said that does not hold the weights. If another one does, it will
                be restarted with them.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._sync_seconds
        while True:
            async with self._changing:
                numbered = update.model_copy(update={"version": self._number(update, version)})
                if running := self._running():
                    await self._load_all(running, numbered, kept)
                    break
            await self._restarted(deadline, numbered)
        await self._restarted(deadline, numbered)
        return numbered

    def _running(self) -> list[Member]:
        """All that can be given weights, those without complete ones too."""
        return [m for m in self.members if m.number not in self._restarting and not m.gave_up]

    def _number(self, update: WeightUpdate, version: int | None) -> int:
        if version is None:
            if self._newest_tried >= MAX_VERSION:
                raise VersionNotNewer(f"version {MAX_VERSION} was the last one that there is")
            return self._newest_tried + 1
        self.check_version(version)
        known = self.update
        again = known is not None and (known.version, known.checksum) == (version, update.checksum)
        if version == self._newest_served and not again:
            raise VersionNotNewer(f"version {version} has been served with other weights")
        return version

    async def _load_all(self, members: list[Member], update: WeightUpdate, kept: Kept) -> None:
        self._newest_tried = max(self._newest_tried, update.version)
        await asyncio.gather(*(self._load(member, update) for member in members))
        failed = [member for member in members if member.sync_error is not None]
        if len(failed) < len(members):
            self.update, self.kept = update, kept
            for member in failed:
                self._restart_soon(member, f"did not load version {update.version} and is being restarted with it")
        if failed:
            reasons = "; ".join(f"replica {m.number}: {m.sync_error}" for m in failed)
            raise WeightsNotLoaded(f"weights were not loaded: {reasons}", may_come=False)

    async def _restarted(self, deadline: float, update: WeightUpdate) -> None:
        """Wait for all that are restarting. Raises `WeightsNotLoaded`: some are not back in time, or none is."""
        loop = asyncio.get_running_loop()
        while self._restarting and loop.time() < deadline:
            tasks = list(self._restarting.values())
            await asyncio.wait(tasks, timeout=deadline - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        late = [member for member in self.members if member.number in self._restarting]
        if not late and not self._running():
            late = self.members
        if late:
            reasons = "; ".join(map(str, late))
            raise WeightsNotLoaded(f"version {update.version} is not everywhere: {reasons}", may_come=True)

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
            member.checksum = None
            if member.number not in self._restarting:
                member.error = "holds no complete weights: its last sync failed"
            if isinstance(error, ReplicaLost):
                self.lost(member)
        else:
            member.sync_error = None
            member.version = update.version
            self._newest_served = max(self._newest_served, update.version)
            if member.number not in self._restarting:
                member.error = None
        self.moved = time.monotonic()
        member.sync_seconds = loop.time() - started

    async def watch(self, every_seconds: float) -> None:
        """Probe the replicas until cancelled, so that a dead one is restarted before a request finds it."""
        while True:
            await asyncio.sleep(every_seconds)
            await self.probe_all()

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
            self.moved = time.monotonic()

    async def _on_all(self, call: Callable[[Replica], Awaitable[None]]) -> None:
        """Pause or resume the replicas, those without weights too. A restart does it to those that are dead."""

        async def on_one(member: Member) -> None:
            try:
                await call(member.replica)
            except ReplicaLost:
                if member.error is None:
                    self.lost(member)

        async with asyncio.timeout(self._sync_seconds):
            await asyncio.gather(*map(on_one, self._running()))

    async def close(self) -> None:
        """Stop all replicas."""
        for task in (*self._restarting.values(), *((self._probing,) if self._probing else ())):
            task.cancel()
        await asyncio.gather(*(m.replica.close() for m in self.members), return_exceptions=True)


def _why(error: Exception, update: WeightUpdate) -> str:
    """Why weights were not loaded, for the operator: one line, without the path of the file."""
    if isinstance(error, TimeoutError):
        return "not within the deadline"
    text = " ".join(str(error).replace(update.place, "the file").split())
    return f"{type(error).__name__}: {text[:MAX_REASON_CHARACTERS]}"
