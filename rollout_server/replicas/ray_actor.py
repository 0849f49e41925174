"""A replica in a Ray actor. What its responses' listeners hear travels in batches, one Ray call for all responses."""

import asyncio
import itertools
import logging
import os
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from common.config.run import EngineConfig, ModelConfig
from common.slices import Slices
from common.trajectory import Attempt, ResponseRequest, Trajectory
from common.weights import WeightUpdate
from rollout_server.engine.cores import threads_per_engine
from rollout_server.engine.listener import Listener, PromptScores, TopLogprobs
from rollout_server.replicas.replica import EngineFacts, ReplicaLost
from rollout_server.replicas.use import EngineUse

log = logging.getLogger("e3rl.replicas")
POLL_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""A poll that brings not even an empty answer for so long has lost its actor."""
CLOSE_SECONDS = 6.0

Event = tuple[int, str, Any]
"""Key of the response, what happened, and its arguments."""


class EventQueue:
    """Events that wait to be fetched."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._some = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._some.set()

    async def take(self, seconds: float) -> list[Event]:
        """All events; waits for the first at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._some.wait()
        self._some.clear()
        events, self._events = self._events, []
        return events


class _Recorder:
    """A listener that puts what it hears into the actor's outbox."""

    def __init__(self, key: int, events: EventQueue, wants_tokens: bool) -> None:
        self.wants_tokens = wants_tokens
        self._key = key
        self._events = events

    def sampled(self, token_ids: list[int], logprobs: TopLogprobs | None) -> None:
        self._events.put((self._key, "sampled", (token_ids, logprobs)))

    def resumed(self, cached_tokens: int) -> None:
        self._events.put((self._key, "resumed", (cached_tokens,)))

    def judged(self, attempt: Attempt, final: bool) -> None:
        self._events.put((self._key, "judged", (attempt, final)))

    def restored(self, attempt: Attempt, kept: Attempt, final: bool) -> None:
        self._events.put((self._key, "restored", (attempt, kept, final)))


@ray.remote
class ReplicaActor:
    """Runs a `LocalReplica` in a process of its own."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, version: int) -> None:
        from rollout_server.replicas.local import LocalReplica

        self._replica = LocalReplica(model, engine, version)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._events = EventQueue()

    async def start(self) -> EngineFacts:
        return await self._replica.start()

    async def submit(self, key: int, request: ResponseRequest, listens: bool, wants_tokens: bool) -> None:
        """Begin a response; how it goes on is among the events."""
        listener = _Recorder(key, self._events, wants_tokens) if listens else None
        self._tasks[key] = asyncio.create_task(self._respond(key, request, listener))

    async def _respond(self, key: int, request: ResponseRequest, listener: _Recorder | None) -> None:
        try:
            trajectory = await self._replica.generate(request, listener)
        except Exception as error:
            self._events.put((key, "failed", _portable(error)))
        else:
            self._events.put((key, "finished", trajectory))
        finally:
            del self._tasks[key]

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> PromptScores:
        return await self._replica.score(prompt_token_ids, top, cache_salt)

    async def cancel(self, key: int) -> None:
        """End a response; no error if it has ended."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    async def events(self, seconds: float) -> list[Event]:
        """What happened since the last call."""
        return await self._events.take(seconds)

    async def probe(self) -> EngineUse:
        return await self._replica.probe()

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> str:
        return await self._replica.sync(update, deadline_seconds)

    async def reset_prefix_cache(self) -> bool:
        return await self._replica.reset_prefix_cache()

    async def pause(self, mode: str) -> None:
        await self._replica.pause(mode)

    async def resume(self) -> None:
        await self._replica.resume()

    async def close(self) -> None:
        await self._replica.close()

    async def process(self) -> int:
        """The actor's process id."""
        return os.getpid()


def _portable(error: Exception) -> Exception:
    """The error without a traceback or a cause, which may not travel."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


class RayReplica:
    """Implements `Replica` with a `ReplicaActor`."""

    def __init__(self, number: int, model: ModelConfig, engine: EngineConfig, version: int) -> None:
        self._number = number
        self._arguments = (model, engine, version)
        self._engine = engine
        self._actor: Any = None
        self._keys = itertools.count(1)
        self._responses: dict[int, tuple[Listener | None, asyncio.Future[Trajectory]]] = {}
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> EngineFacts:
        await self.close()
        on_gpu = bool(ray.cluster_resources().get("GPU"))
        variables = ("HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL", "TOKENIZERS_PARALLELISM")
        environment = {name: os.environ[name] for name in variables if name in os.environ}
        if not on_gpu:
            # Ray's own default is a thread for each CPU that an actor asks for.
            environment["OMP_NUM_THREADS"] = str(self._engine.threads or threads_per_engine(self._engine.replicas))
        self._actor = ReplicaActor.options(  # type: ignore[attr-defined]
            num_cpus=0 if on_gpu else 1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=10_000,
            runtime_env={"env_vars": environment},
        ).remote(*self._arguments)
        facts: EngineFacts = await self._call(self._actor.start.remote())
        self._polling = asyncio.create_task(self._poll())
        return facts

    async def generate(self, request: ResponseRequest, listener: Listener | None) -> Trajectory:
        if self._polling is None or self._polling.done():
            raise ReplicaLost(f"replica {self._number} is not running")
        key = next(self._keys)
        finished: asyncio.Future[Trajectory] = asyncio.get_running_loop().create_future()
        self._responses[key] = listener, finished
        try:
            wants_tokens = listener is not None and listener.wants_tokens
            self._actor.submit.remote(key, request, listener is not None, wants_tokens)
            return await finished
        except asyncio.CancelledError:
            self._actor.cancel.remote(key)
            raise
        finally:
            del self._responses[key]

    async def _poll(self) -> None:
        """Fetch events and hand them on, until the actor is lost."""
        try:
            while True:
                async with asyncio.timeout(SILENCE_SECONDS):
                    events = await self._call(self._actor.events.remote(POLL_SECONDS))
                slices = Slices()
                for key, name, value in events:
                    self._take(key, name, value)
                    await slices.turn()
        except (ReplicaLost, TimeoutError) as error:
            log.warning("replica %d is lost: %s", self._number, error)
        finally:
            for _, finished in self._responses.values():
                if not finished.done():
                    finished.set_exception(ReplicaLost(f"replica {self._number} died"))

    def _take(self, key: int, name: str, value: Any) -> None:
        listener, finished = self._responses.get(key, (None, None))
        if finished is None or finished.done():
            return
        if name == "finished":
            finished.set_result(value)
        elif name == "failed":
            finished.set_exception(value)
        elif listener is not None:
            getattr(listener, name)(*value)

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> PromptScores:
        if self._polling is None or self._polling.done():
            raise ReplicaLost(f"replica {self._number} is not running")
        scores: PromptScores = await self._call(self._actor.score.remote(prompt_token_ids, top, cache_salt))
        return scores

    async def probe(self) -> EngineUse:
        if self._polling is None or self._polling.done():
            raise ReplicaLost(f"replica {self._number} is not running")
        use: EngineUse = await self._call(self._actor.probe.remote())
        return use

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> str:
        checksum: str = await self._call(self._actor.sync.remote(update, deadline_seconds))
        return checksum

    async def reset_prefix_cache(self) -> bool:
        return bool(await self._call(self._actor.reset_prefix_cache.remote()))

    async def pause(self, mode: str) -> None:
        await self._call(self._actor.pause.remote(mode))

    async def resume(self) -> None:
        await self._call(self._actor.resume.remote())

    async def close(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.gather(self._polling, return_exceptions=True)
            self._polling = None
        if self._actor is not None:
            actor, self._actor = self._actor, None
            with suppress(RayError, TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await actor.close.remote()
            ray.kill(actor, no_restart=True)

    async def _call(self, reference: Any) -> Any:
        try:
            return await reference
        except RayActorError as error:
            raise ReplicaLost(f"replica {self._number} died") from error
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, Exception):
                raise cause from error
            raise
