"""The pool: routes groups to replicas, restarts those that die and keeps all on the same weights."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from common.config.run import InFlight
from common.weights import HostUpdate, WeightUpdate
from rollout_server.replicas.errors import NoReplicaReady, StartFailed, WeightsNotLoaded
from rollout_server.replicas.member import Member
from rollout_server.replicas.newest import Kept, Newest, why_not
from rollout_server.replicas.replica import EngineFacts, Replica, ReplicaLost
from rollout_server.weights.receiver import NotReachable

log = logging.getLogger("e3rl.replicas")
RESTART_PAUSE_SECONDS = 1.0
SYNC_MARGIN_SECONDS = 10.0
"""What a sync is waited for beyond its own deadline, so that the replica's error arrives and not a time-out."""


class Pool:
    """The replicas of a training run or of a server.

    A restarted replica gets the newest weights before it is given requests, and one that did not load them is
    restarted, so that the versions that are served never fall. With `stall_seconds` a replica is restarted whose engine
    makes no step for so long though it has responses, and with `response_seconds` one that finishes none of them.
    `resubmissions`: of groups whose replica was lost.
    """

    def __init__(
        self,
        replicas: list[Replica],
        *,
        start_seconds: float,
        sync_seconds: float,
        probe_seconds: float,
        stall_seconds: float | None = None,
        response_seconds: float | None = None,
    ) -> None:
        self.members = [Member(number, replica) for number, replica in enumerate(replicas)]
        self.facts: EngineFacts | None = None
        self.newest = Newest()
        self.paused: str | None = None
        self.max_restarts_in_a_row = 5
        self._start_seconds = start_seconds
        self._sync_seconds = sync_seconds
        self._probe_seconds = probe_seconds
        self._stall_seconds = stall_seconds
        self._response_seconds = response_seconds
        self.resubmissions = 0
        self._news = asyncio.Event()
        self._restarting: dict[int, asyncio.Task[None]] = {}
        self._changing = asyncio.Lock()
        self._probing: asyncio.Task[list[str | None]] | None = None
        self.moved = time.monotonic()
        """When an engine was last seen to have made a step, or a pause, a sync or a restart ended."""

    async def start(self) -> EngineFacts:
        """Start all replicas; the first failure raises."""
        async with asyncio.timeout(self._start_seconds):
            facts = await asyncio.gather(*map(_started, self.members))
        self.facts = facts[0]
        for member, known in zip(self.members, facts, strict=True):
            member.version = known.version
            member.error = None
            member.has_moved()
        self.newest.served = self.newest.tried = facts[0].version
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
        if not member.responses:
            member.has_moved()
        member.responses += responses
        return member

    async def chosen(self, responses: int) -> Member:
        """As `choose`, but waits while a replica may come back. Who waited first is served first.

        Raises:
            NoReplicaReady: and none ever will be.
        """
        while True:
            try:
                return self.choose(responses)
            except NoReplicaReady as error:
                if error.final:
                    raise
            await self._news.wait()

    def _tell(self) -> None:
        """Wake those that wait for a replica to come back, or to be given up."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def leave(self, member: Member, responses: int) -> None:
        """What `choose` counted has ended."""
        member.responses -= responses

    def lost(self, member: Member, why: str = "died", *, restarts: int | None = None) -> None:
        """A call found the replica dead: restart it, once however many calls find so.

        `restarts`: of the replica when the call began, if it may hear of its end after it was restarted.
        """
        if restarts is not None and restarts != member.restarts:
            return
        self._restart_soon(member, f"{why} and is being restarted")

    def _restart_soon(self, member: Member, why: str) -> None:
        if member.number not in self._restarting and not member.gave_up:
            member.error = why
            log.error("replica %d %s", member.number, why)
            self._restarting[member.number] = asyncio.create_task(self._restart(member))

    async def _restart(self, member: Member) -> None:
        try:
            reason = "no restart is allowed"
            for number in range(1, self.max_restarts_in_a_row + 1):
                member.restarts += 1
                try:
                    await self._restart_once(member)
                except Exception as error:
                    reason = why_not(error, self.newest.update)
                    member.error = f"died and restart {number} failed with {type(error).__name__}"
                    log.exception("restart %d of replica %d failed", number, member.number)
                    await asyncio.sleep(RESTART_PAUSE_SECONDS * 2**number)
                else:
                    log.info("replica %d is back with policy version %d", member.number, member.version)
                    return
            member.error = f"died and could not be restarted {self.max_restarts_in_a_row} times; last: {reason}"
            member.gave_up = True
        finally:
            del self._restarting[member.number]
            self._tell()

    async def _restart_once(self, member: Member) -> None:
        """Weights may change meanwhile, so the last step is taken under the lock that changes them."""
        async with asyncio.timeout(self._start_seconds):
            facts = await member.replica.start()
        async with self._changing:
            member.version = facts.version
            member.checksum = None
            if (update := self.newest.to_load) is not None:
                await self._load(member, update, self._sync_seconds)
                if member.sync_error is not None:
                    raise ReplicaLost(member.sync_error)
            priors = member.priors or next((other.priors for other in self.members if other.priors), None)
            if priors:
                async with asyncio.timeout(self._sync_seconds):
                    await member.replica.restore_priors(priors)
            if self.paused is not None:
                async with asyncio.timeout(self._sync_seconds):
                    await member.replica.pause(self.paused)
            member.error = None
            member.has_moved()
            self.moved = time.monotonic()

    async def probe(self, member: Member) -> str | None:
        """Why a replica is not ready; None if it answers."""
        if member.error is not None:
            return member.error
        restarts = member.restarts
        try:
            async with asyncio.timeout(self._probe_seconds):
                use = await member.replica.probe()
        except TimeoutError:
            return f"did not answer within {self._probe_seconds:g} s"
        except ReplicaLost:
            self.lost(member, restarts=restarts)
            return member.error
        except Exception as error:
            log.exception("the probe of replica %d failed", member.number)
            return f"could not be probed: {type(error).__name__}"
        if use.steps != member.use.steps:
            self.moved = member.moved = time.monotonic()
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
                numbered = update.model_copy(update={"version": self.newest.number(update, version)})
                if running := self._running():
                    await self._load_all(running, numbered, kept)
                    break
            await self._restarted(deadline, numbered)
        await self._restarted(deadline, numbered)
        return numbered

    def _running(self) -> list[Member]:
        """All that can be given weights, those without complete ones too."""
        return [m for m in self.members if m.number not in self._restarting and not m.gave_up]

    async def _load_all(self, members: list[Member], update: WeightUpdate, kept: Kept) -> None:
        self.newest.tried = max(self.newest.tried, update.version)
        await asyncio.gather(*(self._load(member, update, self._sync_seconds) for member in members))
        failed = [member for member in members if member.sync_error is not None]
        if len(failed) < len(members):
            self.newest.take(update, kept)
            for member in failed:
                self._restart_soon(member, f"did not load version {update.version} and is being restarted with it")
        if failed:
            reasons = "; ".join(f"replica {m.number}: {m.sync_error}" for m in failed)
            raise WeightsNotLoaded(f"weights were not loaded: {reasons}", may_come=False)

    async def publish(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> list[Member]:
        """Load `update` into all replicas; returns those that hold it, at least one.

        Whatever replica lacks it is restarted and gets it before it serves again; it is not waited for. Until the next
        call returns, `update` must be there to be loaded. The version may be any.

        Raises:
            WeightsNotLoaded: no replica holds it within the deadline, none could load it though it lived, or one can
                never reach it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + deadline_seconds
        async with self._changing:
            self.newest.take(update, None)
            running = self._running()
            await asyncio.gather(*(self._load(member, update, deadline_seconds, in_flight) for member in running))
            failed = [member for member in running if member.sync_error is not None]
            all_failed = len(failed) == len(running) and not any(m.number in self._restarting for m in failed)
            # Another machine stays another machine.
            hopeless = isinstance(update, HostUpdate) and any(m.unreachable for m in failed)
            if failed and (all_failed or hopeless):
                reasons = "; ".join(f"replica {m.number}: {m.sync_error}" for m in failed)
                raise WeightsNotLoaded(f"weights were not loaded: {reasons}", may_come=False)
            for member in failed:
                self._restart_soon(member, f"did not load version {update.version} and is being restarted with it")
        while not (holding := [m for m in self.ready if m.checksum is not None and m.version == update.version]):
            if loop.time() > deadline or all(member.gave_up for member in self.members):
                reasons = "; ".join(map(str, self.members))
                raise WeightsNotLoaded(f"no replica holds version {update.version}: {reasons}", may_come=False)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
        return holding

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

    async def _load(
        self, member: Member, update: WeightUpdate, seconds: float, in_flight: InFlight = "recompute"
    ) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        member.synced = True
        member.sync_bytes = update.bytes
        try:
            async with asyncio.timeout(seconds + SYNC_MARGIN_SECONDS):
                member.checksum = await member.replica.sync(update, seconds, in_flight)
        except Exception as error:
            log.exception("replica %d did not load policy version %d", member.number, update.version)
            member.sync_error = why_not(error, update)
            member.unreachable = isinstance(error, NotReachable)
            member.checksum = None
            if member.number not in self._restarting:
                member.error = "holds no complete weights: its last sync failed"
            if isinstance(error, ReplicaLost):
                self.lost(member)
        else:
            member.sync_error = None
            member.version = update.version
            self.newest.served = max(self.newest.served, update.version)
            if member.number not in self._restarting:
                member.error = None
        self.moved = time.monotonic()
        member.has_moved()
        member.sync_seconds = loop.time() - started

    async def watch(self, every_seconds: float) -> None:
        """Probe the replicas until cancelled, so that a dead one is restarted before a request finds it."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(every_seconds)
            # While this process stands still it hears of nothing, which says nothing of the replicas.
            late = time.monotonic() - began - every_seconds
            for member in self.members:
                member.moved += late
                member.progressed += late
            await self.probe_all()
            self._restart_the_stuck()

    def _restart_the_stuck(self) -> None:
        """Restart replicas that have responses and do not get on with them."""
        now = time.monotonic()
        for member in [] if self.is_held else self.ready:
            if not member.responses:
                continue
            if self._stall_seconds is not None and now - member.moved > self._stall_seconds:
                self.lost(member, f"made no step for {now - member.moved:.0f} s with {member.responses} responses")
            elif self._response_seconds is not None and now - member.progressed > self._response_seconds:
                waited = now - member.progressed
                self.lost(member, f"finished none of its {member.responses} responses within {waited:.0f} s")

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
            for member in self.members:
                member.has_moved()

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


async def _started(member: Member) -> EngineFacts:
    try:
        return await member.replica.start()
    except Exception as error:
        raise StartFailed(member.number, error) from error
