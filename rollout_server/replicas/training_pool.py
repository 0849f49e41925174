"""The replicas of a run: routes groups, gathers trajectories as they finish, sends weights to all."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from common.config.run import EngineConfig, RunConfig
from common.out_of_memory import engine_advice, ran_out_of_memory
from common.packed import PackedResponse
from common.trajectory import ResponseRequest
from common.weights import ReplicaSync, SyncReport, WeightUpdate
from rollout_server.engine.cores import chosen_threads, threads_per_engine
from rollout_server.replicas.training_actor import RolloutActor

CLOSE_SECONDS = 15.0
STATE_SECONDS = 60.0
SYNC_MARGIN_SECONDS = 10.0
"""What the pool waits beyond a sync's own deadline, so that the replica's error arrives and not a time-out."""


class ReplicaError(RuntimeError):
    """A replica died, failed or did not answer in time; the message names it."""


class RolloutPool:
    """Implements `common.interfaces.Rollouts` with Ray actors. Needs a connected Ray cluster."""

    def __init__(self) -> None:
        self._replicas: list[Any] = []
        self._outstanding: list[int] = []
        self._progressed: list[float] = []
        self._engine = EngineConfig()

    async def start(self, config: RunConfig, log_directory: Path) -> None:
        """Start the replicas; `log_directory` receives what vLLM prints.

        Raises:
            ReplicaError: a replica did not start, with its own message, or the cluster has GPUs, but too few.
        """
        self._engine = engine = config.rollout.engine
        gpus = int(ray.cluster_resources().get("GPU", 0.0))
        if 0 < gpus < engine.replicas:
            raise ReplicaError(f"the cluster has {gpus} GPUs, fewer than rollout.engine.replicas ({engine.replicas})")
        environment = _actor_environment(engine)
        actor_class = ray.remote(RolloutActor)
        for number in range(engine.replicas):
            actor = actor_class.options(
                num_cpus=0 if gpus else 1,
                num_gpus=1 if gpus else 0,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
            ).remote(number, log_directory / f"replica_{number}.log")
            self._replicas.append(actor)
        self._outstanding = [0] * engine.replicas
        self._progressed = [0.0] * engine.replicas
        starts = [r.start.remote(config.model, engine, 0) for r in self._replicas]
        await self._all(starts, engine.start_seconds + SYNC_MARGIN_SECONDS, "start")

    async def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        """Generate all groups, each on the replica with the fewest responses under way.

        Responses may wait for places, however many they are. What is watched is a replica's progress.

        Raises:
            ReplicaError: a replica failed, or finished none of its responses within `response_seconds`.
        """
        finished: asyncio.Queue[PackedResponse | asyncio.Task[None]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._generate_group(group, finished)) for group in groups]
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

    async def _generate_group(
        self, group: Sequence[ResponseRequest], finished: "asyncio.Queue[PackedResponse | asyncio.Task[None]]"
    ) -> None:
        number = self._outstanding.index(min(self._outstanding))
        if not self._outstanding[number]:
            self._progressed[number] = time.monotonic()
        self._outstanding[number] += len(group)
        stream = self._replicas[number].generate.options(num_returns="streaming").remote(list(group))
        try:
            for _ in group:
                finished.put_nowait(await self._next(number, stream, group[0].group_id))
        except (RayActorError, RayTaskError) as error:
            raise ReplicaError(f"replica {number} failed: {_cause(error, self._engine)}") from error
        finally:
            self._outstanding[number] -= len(group)

    async def _next(self, number: int, stream: Any, group_id: str) -> PackedResponse:
        """A group's next response, for which it may wait as long as its replica finishes others.

        Whether the engine has taken a response, or lets it wait for a place or for KV blocks, is not known here. But
        of those it has taken each finishes within `response_seconds`: so one of them does, or the replica is stuck.
        """
        waiting = asyncio.ensure_future(_awaited(stream))
        seconds = self._engine.response_seconds
        try:
            while not waiting.done():
                left = self._progressed[number] + seconds - time.monotonic()
                if left <= 0.0:
                    raise ReplicaError(
                        f"replica {number} finished none of its {self._outstanding[number]} responses within "
                        f"{seconds:g} s (rollout.engine.response_seconds), group {group_id} waits for one"
                    )
                await asyncio.wait({waiting}, timeout=left)
            response = waiting.result()
            self._progressed[number] = time.monotonic()
            return response
        finally:
            if not waiting.done():
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> SyncReport:
        """Load `update` into every replica at once; see `Rollouts.sync`."""
        started = time.perf_counter()
        calls = [replica.sync.remote(update, deadline_seconds) for replica in self._replicas]
        replicas: list[ReplicaSync] = await self._all(calls, deadline_seconds + SYNC_MARGIN_SECONDS, "sync weights")
        seconds = time.perf_counter() - started
        return SyncReport(version=update.version, seconds=seconds, bytes=update.bytes, replicas=replicas)

    async def state(self) -> list[Any]:
        """What replicas have learnt of the thresholds, one entry each, for a checkpoint."""
        return await self._all([r.priors.remote() for r in self._replicas], STATE_SECONDS, "give its statistics")

    async def restore(self, state: list[Any]) -> None:
        """Take over a checkpoint's state, whatever the number of replicas that gave it: see `shared_out`."""
        if not state:
            return
        given = shared_out(state, len(self._replicas))
        calls = [r.restore_priors.remote(s) for r, s in zip(self._replicas, given, strict=True)]
        await self._all(calls, STATE_SECONDS, "take statistics over")

    async def close(self) -> None:
        """Stop the replicas: politely first, then by force."""
        calls = [replica.close.remote() for replica in self._replicas]
        if calls:
            await asyncio.wait([asyncio.create_task(_settled(call)) for call in calls], timeout=CLOSE_SECONDS)
        for replica in self._replicas:
            ray.kill(replica, no_restart=True)
        self._replicas.clear()

    async def _all(self, calls: list[Any], seconds: float, purpose: str) -> list[Any]:
        """Results of one call to each replica; the first failure or the deadline raises with the replica's number."""
        results = []
        deadline = asyncio.get_running_loop().time() + seconds
        for number, call in enumerate(calls):
            try:
                async with asyncio.timeout_at(deadline):
                    results.append(await call)
            except TimeoutError:
                raise ReplicaError(f"replica {number} did not {purpose} within {seconds:g} s") from None
            except (RayActorError, RayTaskError) as error:
                raise ReplicaError(f"replica {number} could not {purpose}: {_cause(error, self._engine)}") from error
        return results


def shared_out(state: Sequence[dict[str, Any]], replicas: int) -> list[dict[str, Any]]:
    """The statistics of some replicas for another number of them: each has those of one, in turn.

    Statistics are kept by kind of response. What that one does not know comes from the first that does, so that no
    kind is lost.
    """
    known: dict[str, Any] = {}
    for one in reversed(state):
        known |= one
    return [known | state[number % len(state)] for number in range(replicas)]


async def _awaited(stream: Any) -> PackedResponse:
    response: PackedResponse = await (await anext(stream))
    return response


async def _settled(call: Any) -> None:
    """Wait for a call whose failure no longer matters: the actor is killed next."""
    await asyncio.gather(call, return_exceptions=True)


def _cause(error: Exception, engine: EngineConfig) -> str:
    cause = getattr(error, "cause", None) or error
    text = f"{type(cause).__name__}: {cause}"
    certain = ran_out_of_memory(text)
    # A process that the kernel killed for its memory says nothing of it, nor does vLLM of its engine's death.
    if certain or isinstance(error, RayActorError) or type(cause).__name__ == "EngineDeadError":
        text += f" ({engine_advice(engine, certain)})"
    return text


def _actor_environment(engine: EngineConfig) -> dict[str, str]:
    threads = engine.threads or chosen_threads() or threads_per_engine(engine.replicas)
    return {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
