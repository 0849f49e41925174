"""A replica in the server's own process: tokens reach the HTTP stream without another hop."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from common.config.run import EngineConfig, ModelConfig
from common.trajectory import ResponseRequest, Trajectory
from common.weights import WeightUpdate
from rollout_server.engine.engine import ErasableEngine
from rollout_server.engine.errors import CannotSample, EngineClosed, RecordLost, WeightSyncError
from rollout_server.engine.listener import Listener, PromptScores
from rollout_server.replicas.replica import EngineFacts, NoWeights, ReplicaLost, RequestRefused
from rollout_server.replicas.use import EngineUse

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class LocalReplica:
    """Implements `Replica` around an `ErasableEngine`."""

    def __init__(self, model: ModelConfig, engine: EngineConfig, version: int) -> None:
        self._model = model
        self._config = engine
        self._version = version
        self._engine: ErasableEngine | None = None

    async def start(self) -> EngineFacts:
        await self.close()
        self._engine = await ErasableEngine.start(self._model, self._config, version=self._version)
        return engine_facts(self._engine)

    async def generate(self, request: ResponseRequest, listener: Listener | None) -> Trajectory:
        engine = self.engine
        with self._translated(engine):
            return await engine.generate(request, listener)

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> PromptScores:
        engine = self.engine
        with self._translated(engine):
            return await engine.score(prompt_token_ids, top, cache_salt)

    @contextmanager
    def _translated(self, engine: ErasableEngine) -> Iterator[None]:
        """What goes wrong in `engine`, as the errors that `Replica` names."""
        try:
            yield
        except EngineDeadError as error:
            raise ReplicaLost("the engine died") from error
        except EngineClosed as error:
            raise ReplicaLost(str(error)) from error
        except RecordLost as error:
            if engine is self._engine:
                raise
            raise ReplicaLost("the engine died") from error
        except WeightSyncError as error:
            raise NoWeights(str(error)) from error
        except CannotSample as error:
            raise RequestRefused(str(error)) from error

    async def probe(self) -> EngineUse:
        engine = self.engine
        try:
            await engine.check_health()
            return EngineUse.of(await engine.counters())
        except EngineDeadError as error:
            raise ReplicaLost("the engine died") from error

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> str:
        return await self.engine.sync(update, deadline_seconds)

    async def reset_prefix_cache(self) -> bool:
        try:
            return await self.engine.reset_prefix_cache()
        except EngineDeadError as error:
            raise ReplicaLost("the engine died") from error

    async def pause(self, mode: str) -> None:
        try:
            await self.engine.pause(mode)
        except EngineDeadError as error:
            raise ReplicaLost("the engine died") from error

    async def resume(self) -> None:
        try:
            await self.engine.resume()
        except EngineDeadError as error:
            raise ReplicaLost("the engine died") from error

    async def close(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            with suppress(EngineDeadError):
                await engine.close()

    @property
    def engine(self) -> ErasableEngine:
        """The engine; raises `ReplicaLost` while there is none."""
        if self._engine is None:
            raise ReplicaLost("the engine is not running")
        return self._engine


def engine_facts(engine: ErasableEngine) -> EngineFacts:
    """What the server must know of a started engine."""
    config: Any = engine.llm.model_config
    defaults = config.get_diff_sampling_param()
    return EngineFacts(
        version=engine.version,
        max_length=engine.max_length,
        eos_token_ids=engine.eos_token_ids,
        vocabulary=config.get_vocab_size(),
        defaults={name: defaults[name] for name in SAMPLING_DEFAULTS if name in defaults},
        sentinel_ids=engine.sentinel_ids,
    )
