"""A replica in the server's own process: tokens reach the HTTP stream without another hop."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from common.config.run import EngineConfig, InFlight, ModelConfig
from common.packed import PackedResponse
from common.trajectory import ResponseRequest, Trajectory
from common.weights import WeightUpdate
from rollout_server.engine.engine import ErasableEngine
from rollout_server.engine.errors import CannotSample, EngineClosed, RecordLost, WeightSyncError
from rollout_server.engine.listener import Listener, PromptScores
from rollout_server.engine.stopping import generate_until_stop
from rollout_server.replicas.packing import packed
from rollout_server.replicas.record import Record, Recorder
from rollout_server.replicas.replica import EngineFacts, NoWeights, Priors, ReplicaLost, RequestRefused
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

    async def generate_packed(self, request: ResponseRequest, record: Record | None) -> PackedResponse:
        return await self.generate_heard(request, None if record is None else Recorder(record.parts.append))

    async def generate_heard(self, request: ResponseRequest, listener: Listener | None) -> PackedResponse:
        """As `generate_packed`; `listener` hears of judgements."""
        engine = self.engine
        tokenizer: Any = engine.llm.get_tokenizer()
        with self._translated(engine):
            if request.stop:
                trajectory = await generate_until_stop(engine, tokenizer.backend_tokenizer, request, listener)
            else:
                trajectory = await engine.generate(request, listener)
        return packed(trajectory, request, tokenizer)

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
        with self._translated(engine):
            await engine.check_health()
            return EngineUse.of(await engine.counters())

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        return await self.engine.sync(update, deadline_seconds, in_flight)

    async def priors(self) -> Priors:
        with self._translated(self.engine):
            return await self.engine.priors()

    async def restore_priors(self, priors: Priors) -> None:
        with self._translated(self.engine):
            await self.engine.restore_priors(priors)

    async def reset_prefix_cache(self) -> bool:
        with self._translated(self.engine):
            return await self.engine.reset_prefix_cache()

    async def pause(self, mode: str) -> None:
        with self._translated(self.engine):
            await self.engine.pause(mode)

    async def resume(self) -> None:
        with self._translated(self.engine):
            await self.engine.resume()

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
