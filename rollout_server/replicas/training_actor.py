"""One replica: a Ray actor around an erasable engine."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config.run import EngineConfig, ModelConfig
from common.packed import PackedResponse
from common.trajectory import ResponseRequest, Trajectory
from common.weights import ReplicaSync, WeightUpdate
from rollout_server.replicas.packing import packed

if TYPE_CHECKING:
    from rollout_server.engine.engine import ErasableEngine


class RolloutActor:
    """Generates groups of responses and takes weights. `RolloutPool` makes a Ray actor of it.

    `replica`: its number in the pool. `log`: the file that receives what this process and vLLM's print.
    """

    def __init__(self, replica: int, log: Path) -> None:
        _redirect_output(log)
        self._replica = replica
        self._engine: ErasableEngine | None = None

    async def start(self, model: ModelConfig, engine: EngineConfig, version: int) -> int:
        """Start vLLM on the weights in the model's directory, which count as `version`; returns the process id."""
        from rollout_server.engine.engine import ErasableEngine

        self._engine = await ErasableEngine.start(model, engine, version=version)
        return os.getpid()

    async def generate(self, requests: Sequence[ResponseRequest]) -> AsyncIterator[PackedResponse]:
        """Generate a group; yields each response as it finishes. The first failure cancels the others."""
        tasks = [asyncio.create_task(self._packed(request)) for request in requests]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _packed(self, request: ResponseRequest) -> PackedResponse:
        return packed(await self._generate(request), request, self._started().llm.get_tokenizer())

    async def _generate(self, request: ResponseRequest) -> Trajectory:
        engine = self._started()
        if not request.stop:
            return await engine.generate(request)
        from rollout_server.engine.stopping import generate_until_stop

        tokenizer: Any = engine.llm.get_tokenizer()
        return await generate_until_stop(engine, tokenizer.backend_tokenizer, request)

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> ReplicaSync:
        """Load new weights; raises `WeightSyncError` if they did not arrive as sent."""
        started = time.perf_counter()
        checksum = await self._started().sync(update, deadline_seconds)
        seconds = time.perf_counter() - started
        return ReplicaSync(replica=self._replica, version=update.version, checksum=checksum, seconds=seconds)

    async def counters(self) -> dict[str, int]:
        """What the replica's monitor holds."""
        return await self._started().counters()

    async def priors(self) -> dict[str, list[list[float]]]:
        """Statistics of earlier groups."""
        return await self._started().priors()

    async def restore_priors(self, priors: dict[str, list[list[float]]]) -> None:
        """Take over the statistics of a checkpoint."""
        await self._started().restore_priors(priors)

    async def close(self) -> None:
        """Stop vLLM."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.close()

    def _started(self) -> "ErasableEngine":
        if self._engine is None:
            raise RuntimeError(f"replica {self._replica} has not been started")
        return self._engine


def _redirect_output(log: Path) -> None:
    """Send stdout and stderr to `log`, for this process and those that it starts."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
