"""The pool as the training loop sees it: groups of responses in, finished ones out, weights to all."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from common import metrics as names
from common.config.run import EngineConfig, InFlight, RunConfig
from common.out_of_memory import engine_advice, ran_out_of_memory
from common.packed import PackedResponse
from common.trajectory import ResponseRequest
from common.weights import ReplicaSync, SyncReport, WeightUpdate
from rollout_server.engine.errors import GenerationAborted
from rollout_server.replicas.errors import NoReplicaReady, StartFailed, WeightsNotLoaded
from rollout_server.replicas.member import Member
from rollout_server.replicas.placement import Placement
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.ray_actor import RayReplica
from rollout_server.replicas.record import Record
from rollout_server.replicas.replica import NoWeights, Priors, ReplicaLost
from rollout_server.replicas.resubmission import on_replicas, requests_again

log = logging.getLogger("e3rl.replicas")
START_MARGIN_SECONDS = 10.0
STATE_SECONDS = 60.0
PROBE_SECONDS = 5.0
WATCH_SECONDS = 5.0
CLOSE_SECONDS = 15.0
FRUITLESS_LOSSES = 8
"""A group that loses its replica so often in a row, and gets no further meanwhile, is what the replicas die of."""


class ReplicaError(RuntimeError):
    """Responses cannot be generated, or weights not be loaded, any more; the message says why, replica by replica."""


@dataclass(slots=True)
class _Response:
    """One response of a group under way. `record`: what is known of it should its replica be lost."""

    request: ResponseRequest
    finished: bool = False
    record: Record = field(default_factory=Record)


class PoolRollouts:
    """Implements `common.interfaces.Rollouts` with a `Pool` of Ray actors. Needs a connected Ray cluster."""

    def __init__(self, pool: Pool | None = None, engine: EngineConfig | None = None) -> None:
        self._engine = engine or EngineConfig()
        self._placement: Placement | None = None
        self._pool = pool or Pool([], start_seconds=1.0, sync_seconds=1.0, probe_seconds=1.0)
        self._in_flight: InFlight = "recompute"
        self._watching: asyncio.Task[None] | None = None
        self._taken: dict[str, int] = {}

    async def start(self, config: RunConfig, log_directory: Path) -> None:
        """Start the replicas; `log_directory` receives what vLLM prints.

        Raises:
            ReplicaError: a replica did not start, with its own message.
            NoRoomForReplicas: the cluster has too few GPUs or CPUs.
        """
        self._engine = engine = config.rollout.engine
        self._in_flight = config.sync.in_flight
        self._placement = placement = Placement(engine)
        self._pool = pool = Pool(
            [
                RayReplica(n, config.model, engine, 0, placement, log_directory / f"replica_{n}.log")
                for n in range(engine.replicas)
            ],
            start_seconds=engine.start_seconds + START_MARGIN_SECONDS,
            sync_seconds=config.sync.deadline_seconds,
            probe_seconds=PROBE_SECONDS,
            stall_seconds=engine.stall_seconds,
            response_seconds=engine.response_seconds,
        )
        pool.max_restarts_in_a_row = engine.max_restarts
        try:
            await pool.start()
        except StartFailed as failed:
            raise ReplicaError(f"replica {failed.number} could not start: {_cause(failed.error, engine)}") from failed
        except TimeoutError:
            raise ReplicaError(f"the replicas did not start within {engine.start_seconds:g} s") from None
        self.watch(min(WATCH_SECONDS, engine.stall_seconds / 4, engine.response_seconds / 4))

    def watch(self, every_seconds: float) -> None:
        """Look every so often whether replicas live and get on."""
        self._watching = asyncio.create_task(self._pool.watch(every_seconds))

    async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        """Generate all groups, each on the replica with the fewest responses under way.

        Responses may wait for places, however many they are. What is watched is whether replicas get on.

        Raises:
            ReplicaError: no replica is left, or those that generate a group die of it.
        """
        finished: asyncio.Queue[PackedResponse | asyncio.Task[None]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._group(group, finished)) for group in groups]
        for task in tasks:
            task.add_done_callback(finished.put_nowait)
        unfinished = len(tasks)
        try:
            while unfinished:
                item = await finished.get()
                if isinstance(item, PackedResponse):
                    yield item
                else:
                    item.result()
                    unfinished -= 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _group(
        self, group: Sequence[ResponseRequest], finished: "asyncio.Queue[PackedResponse | asyncio.Task[None]]"
    ) -> None:
        responses = [_Response(request) for request in group]
        tries = 0
        fruitless = known_before = 0

        def left() -> list[_Response]:
            return [response for response in responses if not response.finished]

        async def generate(member: Member, losses: int) -> None:
            nonlocal tries
            while True:
                tries += 1
                try:
                    await self._generate(member, left(), tries - 1, finished)
                    return
                except GenerationAborted:
                    if self._in_flight == "abort":
                        for response in left():
                            response.record.clear()
                except NoWeights as error:
                    # Its last sync failed: the pool restarts it with the weights.
                    raise ReplicaLost(str(error)) from error

        def lost(error: ReplicaLost, losses: int) -> None:
            nonlocal fruitless, known_before
            known = sum(response.finished + len(response.record.parts) for response in responses)
            fruitless = 0 if known > known_before else fruitless + 1
            known_before = known
            if fruitless >= FRUITLESS_LOSSES:
                raise ReplicaError(
                    f"group {group[0].group_id} lost its replica {fruitless} times in a row without getting on: {error}"
                )

        try:
            await on_replicas(self._pool, lambda: len(left()), generate, lost, waits=True)
        except NoReplicaReady as error:
            advice = engine_advice(self._engine, ran_out_of_memory(str(error)))
            raise ReplicaError(f"{error} ({advice})") from error

    async def _generate(
        self,
        member: Member,
        responses: list[_Response],
        number: int,
        finished: "asyncio.Queue[PackedResponse | asyncio.Task[None]]",
    ) -> None:
        """Generate what is left of a group on `member`, the first time or again; the first failure ends it."""
        requests = [response.request for response in responses]
        if number:
            requests = requests_again([(r.request, *r.record.attempts()) for r in responses], number)
        tasks = [
            asyncio.create_task(self._respond(member, response, request, finished))
            for response, request in zip(responses, requests, strict=True)
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _respond(
        self,
        member: Member,
        response: _Response,
        request: ResponseRequest,
        finished: "asyncio.Queue[PackedResponse | asyncio.Task[None]]",
    ) -> None:
        # Nothing is ever judged of a plain response: it begins anew.
        record = response.record if request.policy is not None else None
        answer = await member.replica.generate_packed(request, record)
        member.progressed = time.monotonic()
        response.finished = True
        answer.group_id = response.request.group_id
        finished.put_nowait(answer)

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> SyncReport:
        """Load `update` into every replica at once; see `Rollouts.sync`.

        Raises:
            ReplicaError: no replica holds it, with what each of them said.
        """
        started = time.perf_counter()
        try:
            holding = await self._pool.publish(update, deadline_seconds, self._in_flight)
        except WeightsNotLoaded as error:
            raise ReplicaError(str(error)) from error
        return SyncReport(
            version=update.version,
            seconds=time.perf_counter() - started,
            bytes=update.bytes,
            replicas=[
                ReplicaSync(replica=m.number, version=m.version, checksum=m.checksum or "", seconds=m.sync_seconds)
                for m in holding
            ],
        )

    async def state(self) -> list[Any]:
        """What replicas have learnt of the thresholds, for a checkpoint; of a lost one, what it last said."""
        await asyncio.gather(*map(self._ask_priors, self._pool.ready))
        known: Priors = next((member.priors for member in self._pool.members if member.priors), {})
        return [known if member.priors is None else member.priors for member in self._pool.members]

    async def _ask_priors(self, member: Member) -> None:
        restarts = member.restarts
        try:
            async with asyncio.timeout(STATE_SECONDS):
                member.priors = await member.replica.priors()
        except (ReplicaLost, TimeoutError) as error:
            log.warning("replica %d does not say what it has learnt: %s", member.number, error)
            self._pool.lost(member, restarts=restarts)

    async def restore(self, state: list[Any]) -> None:
        """Take over a checkpoint's state, whatever the number of replicas that gave it: see `shared_out`."""
        if not state:
            return
        members = self._pool.members
        for member, priors in zip(members, shared_out(state, len(members)), strict=True):
            member.priors = priors
        await asyncio.gather(*map(self._give_priors, self._pool.ready))

    async def _give_priors(self, member: Member) -> None:
        restarts = member.restarts
        try:
            async with asyncio.timeout(STATE_SECONDS):
                await member.replica.restore_priors(member.priors or {})
        except (ReplicaLost, TimeoutError) as error:
            log.warning("replica %d does not take statistics over: %s", member.number, error)
            self._pool.lost(member, restarts=restarts)

    def take_counts(self) -> dict[str, int]:
        """Restarts and resubmissions since the last call."""
        counts = {
            names.REPLICA_RESTARTS: sum(member.restarts for member in self._pool.members),
            names.RESUBMISSIONS: self._pool.resubmissions,
        }
        before, self._taken = self._taken, counts
        return {name: count - before.get(name, 0) for name, count in counts.items()}

    async def close(self) -> None:
        """Stop the replicas: politely first, then by force."""
        if self._watching is not None:
            self._watching.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._pool.close()
        if self._placement is not None:
            self._placement.release()


def shared_out(state: Sequence[Priors], replicas: int) -> list[Priors]:
    """The statistics of some replicas for another number of them: each has those of one, in turn.

    Statistics are kept by kind of response. What that one does not know comes from the first that does, so that no
    kind is lost.
    """
    known: Priors = {}
    for one in reversed(state):
        known |= one
    return [known | state[number % len(state)] for number in range(replicas)]


def _cause(error: Exception, engine: EngineConfig) -> str:
    cause = error.__cause__ if isinstance(error, ReplicaLost) and isinstance(error.__cause__, RayActorError) else error
    text = f"{type(cause).__name__}: {cause}"
    certain = ran_out_of_memory(text)
    # A process that the kernel killed for its memory says nothing of it, nor does vLLM of its engine's death.
    if certain or isinstance(cause, RayActorError) or type(cause).__name__ == "EngineDeadError":
        text += f" ({engine_advice(engine, certain)})"
    return text
