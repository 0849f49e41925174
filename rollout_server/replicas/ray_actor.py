"""A replica in a Ray actor. What is said of its responses travels in batches, one Ray call for all responses."""

import asyncio
import itertools
import logging
import os
import pickle
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayError

from common.config.run import EngineConfig, InFlight, ModelConfig
from common.packed import PackedResponse, TokenArrays
from common.slices import Slices
from common.trajectory import Attempt, ResponseRequest, Trajectory
from common.weights import WeightUpdate
from rollout_server.engine.cores import chosen_threads, threads_per_engine
from rollout_server.engine.listener import Listener, PromptScores, TopLogprobs
from rollout_server.replicas.packing import Shelf, referenced
from rollout_server.replicas.placement import Placement
from rollout_server.replicas.record import Record, Recorder
from rollout_server.replicas.replica import EngineFacts, Priors, ReplicaLost
from rollout_server.replicas.use import EngineUse

log = logging.getLogger("e3rl.replicas")
POLL_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""A poll that brings not even an empty answer for so long has lost its actor."""
PATIENCE_SECONDS = 0.5
"""How long events wait that nobody waits for."""
CLOSE_SECONDS = 12.0
"""What an actor has to end its engine in: one that hangs is killed by it after some seconds, and by nobody else."""

Event = tuple[int, str, Any]
"""Key of the response, what happened, and its arguments."""

Hearing = Literal["nothing", "judgements", "tokens"]
"""What is to be said of a response before it is finished."""

Finished = Trajectory | PackedResponse


class EventQueue:
    """Events that wait to be fetched."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._some = asyncio.Event()
        self._waking: asyncio.TimerHandle | None = None

    def put(self, event: Event, *, urgent: bool = True) -> None:
        """Events that are not urgent go with the next one that is, or after `PATIENCE_SECONDS`."""
        self._events.append(event)
        if urgent:
            self._some.set()
        elif self._waking is None:
            self._waking = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._some.set)

    async def take(self, seconds: float) -> list[Event]:
        """All events; waits for the first at most so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._some.wait()
        self._some.clear()
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
        events, self._events = self._events, []
        return events


class _Teller:
    """A listener that puts what it hears into the actor's queue."""

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
    """Runs a `LocalReplica` in a process of its own. `output`: the file that gets what it and vLLM print."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, version: int, output: Path | None) -> None:
        if output is not None:
            _redirect_output(output)
        from rollout_server.replicas.local import LocalReplica

        self._replica = LocalReplica(model, engine, version)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._queue = EventQueue()
        self._shelf = Shelf()

    async def start(self) -> EngineFacts:
        return await self._replica.start()

    async def submit(self, key: int, request: ResponseRequest, hearing: Hearing) -> None:
        """Begin a response; how it goes on is among the events."""
        teller = None if hearing == "nothing" else _Teller(key, self._queue, wants_tokens=hearing == "tokens")
        self._begin(key, self._replica.generate(request, teller))

    async def submit_packed(self, key: int, request: ResponseRequest, recorded: bool) -> None:
        """Begin a response for training."""
        recorder = Recorder(lambda part: self._queue.put((key, "record", part), urgent=False)) if recorded else None
        self._begin(key, self._replica.generate_heard(request, recorder))

    def _begin(self, key: int, response: Coroutine[Any, Any, Finished]) -> None:
        self._tasks[key] = asyncio.create_task(self._respond(key, response))

    async def _respond(self, key: int, response: Coroutine[Any, Any, Finished]) -> None:
        try:
            finished = await response
            if isinstance(finished, PackedResponse):
                finished = self._shelf.header(key, finished)
        except Exception as error:
            self._queue.put((key, "failed", _portable(error)))
        else:
            self._queue.put((key, "finished", finished))
        finally:
            del self._tasks[key]

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> PromptScores:
        return await self._replica.score(prompt_token_ids, top, cache_salt)

    async def take(self, key: int) -> tuple[None, TokenArrays]:
        """What a response's header lacks. To be called with two results."""
        return self._shelf.take(key)

    async def cancel(self, key: int) -> None:
        """End a response; no error if it has ended."""
        self._shelf.discard(key)
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()

    async def events(self, seconds: float) -> list[Event]:
        """What happened since the last call."""
        return await self._queue.take(seconds)

    async def probe(self) -> EngineUse:
        return await self._replica.probe()

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        return await self._replica.sync(update, deadline_seconds, in_flight)

    async def priors(self) -> Priors:
        return await self._replica.priors()

    async def restore_priors(self, priors: Priors) -> None:
        await self._replica.restore_priors(priors)

    async def reset_prefix_cache(self) -> bool:
        return await self._replica.reset_prefix_cache()

    async def pause(self, mode: str) -> None:
        await self._replica.pause(mode)

    async def resume(self) -> None:
        await self._replica.resume()

    async def close(self) -> None:
        await self._replica.close()

    async def node(self) -> str:
        """The id of the node that the actor runs on."""
        return str(ray.get_runtime_context().get_node_id())


def _portable(error: Exception) -> Exception:
    """The error as it can travel: without a traceback or a cause, and as another one if it cannot be pickled.

    An error that cannot would take all events with it that travel beside it.
    """
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _redirect_output(path: Path) -> None:
    """Send stdout and stderr to `path`, for this process and those that it starts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def actor_environment(engine: EngineConfig) -> dict[str, str]:
    """Environment of an actor's process: what of ours vLLM looks at, and threads.

    Ray's own default is a thread for each CPU that an actor asks for.
    """
    variables = ("HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    environment = {name: os.environ[name] for name in variables if name in os.environ}
    threads = engine.threads or chosen_threads() or threads_per_engine(engine.replicas * engine.tensor_parallel_size)
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
    return environment | {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": level}


class RayReplica:
    """Implements `Replica` with a `ReplicaActor`. `output`: the file that gets what the actor prints."""

    def __init__(
        self,
        number: int,
        model: ModelConfig,
        engine: EngineConfig,
        version: int,
        placement: Placement,
        output: Path | None = None,
    ) -> None:
        self._number = number
        self._arguments = (model, engine, version, output)
        self._engine = engine
        self._placement = placement
        self._actor: Any = None
        self._keys = itertools.count(1)
        self._responses: dict[int, tuple[Listener | Record | None, asyncio.Future[Any]]] = {}
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> EngineFacts:
        await self.close()
        self._actor = ReplicaActor.options(  # type: ignore[attr-defined]
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=10_000,
            runtime_env={"env_vars": actor_environment(self._engine)},
            **await self._placement.options(self._number),
        ).remote(*self._arguments)
        facts: EngineFacts = await self._call(self._actor.start.remote())
        self._polling = asyncio.create_task(self._poll())
        return facts

    async def generate(self, request: ResponseRequest, listener: Listener | None) -> Trajectory:
        trajectory: Trajectory = await self._generate("submit", request, listener, _hearing(listener))
        return trajectory

    async def generate_packed(self, request: ResponseRequest, record: Record | None) -> PackedResponse:
        response: PackedResponse = await self._generate("submit_packed", request, record, record is not None)
        return response

    async def _generate(
        self, method: str, request: ResponseRequest, listener: Listener | Record | None, hearing: Hearing | bool
    ) -> Any:
        """What `method` of the actor ends with; `listener` gets what is said before."""
        self._check_running()
        key = next(self._keys)
        finished: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._responses[key] = listener, finished
        actor = self._actor
        try:
            await self._call(getattr(actor, method).remote(key, request, hearing))
            result = await finished
            if isinstance(result, PackedResponse):
                return await self._call(referenced(result, key, actor.take))
            return result
        except asyncio.CancelledError:
            actor.cancel.remote(key)
            raise
        finally:
            del self._responses[key]
            if finished.done() and not finished.cancelled():
                # The failure of a response that nobody waits for any more is no news.
                finished.exception()

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
            log.warning("replica %d is lost: %s", self._number, str(error) or "it is silent")
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
        elif isinstance(listener, Record):
            listener.parts.append(value)
        elif listener is not None:
            getattr(listener, name)(*value)

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> PromptScores:
        self._check_running()
        scores: PromptScores = await self._call(self._actor.score.remote(prompt_token_ids, top, cache_salt))
        return scores

    async def probe(self) -> EngineUse:
        self._check_running()
        use: EngineUse = await self._call(self._actor.probe.remote())
        return use

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        self._check_running()
        checksum: str = await self._call(self._actor.sync.remote(update, deadline_seconds, in_flight))
        return checksum

    async def priors(self) -> Priors:
        self._check_running()
        priors: Priors = await self._call(self._actor.priors.remote())
        return priors

    async def restore_priors(self, priors: Priors) -> None:
        self._check_running()
        await self._call(self._actor.restore_priors.remote(priors))

    async def reset_prefix_cache(self) -> bool:
        self._check_running()
        return bool(await self._call(self._actor.reset_prefix_cache.remote()))

    async def pause(self, mode: str) -> None:
        self._check_running()
        await self._call(self._actor.pause.remote(mode))

    async def resume(self) -> None:
        self._check_running()
        await self._call(self._actor.resume.remote())

    async def node(self) -> str:
        """The id of the node that the replica runs on."""
        self._check_running()
        return str(await self._call(self._actor.node.remote()))

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

    def _check_running(self) -> None:
        if self._polling is None or self._polling.done():
            raise ReplicaLost(f"replica {self._number} is not running")

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


def _hearing(listener: Listener | None) -> Hearing:
    if listener is None:
        return "nothing"
    return "tokens" if listener.wants_tokens else "judgements"
