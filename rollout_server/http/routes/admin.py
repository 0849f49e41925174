"""The admin listener: weights, pause, resume."""

import asyncio
import time
from pathlib import Path

import torch
from fastapi import FastAPI, Request

from common.weights import WeightUpdate
from rollout_server.http.openai.errors import ApiError
from rollout_server.http.openai.openapi import errors, takes
from rollout_server.http.openai.schema.service import (
    CacheReset,
    LastSync,
    PauseRequest,
    PauseState,
    ReplicaWeights,
    ResumeRequest,
    Synced,
    SyncRequest,
    Weights,
)
from rollout_server.http.routes.base_app import base_app
from rollout_server.http.routes.body import read_body
from rollout_server.http.routes.service import Service
from rollout_server.replicas.member import Member
from rollout_server.weights.checkpoints import Shapes, prepare_update, tensor_shapes
from rollout_server.weights.kept_weights import KeptWeights, remove_kept_leftovers


class WeightLoader:
    """Loads checkpoints into all replicas, one at a time.

    `config`: the served model's, and `source` where it lies, a directory or a name on the hub; `dtype`: what engines
    hold.
    """

    def __init__(self, service: Service, config: dict[str, object], source: str, dtype: torch.dtype) -> None:
        self._service = service
        self._config = config
        self._shapes = _shapes(source, config)
        self._dtype = dtype
        self._kept: KeptWeights | None = None
        self._loading = asyncio.Lock()
        remove_kept_leftovers()

    async def load(self, request: SyncRequest) -> Synced:
        """Load a checkpoint.

        Raises:
            CheckpointRefused: the directory is no checkpoint of this model. NoRoom: it cannot be converted.
            VersionNotNewer: for a version that has been served. WeightsNotLoaded: a replica failed.
        """
        started = time.perf_counter()
        try:
            async with self._loading:
                update = await self._load(request)
        except BaseException:
            self._service.metrics.syncs.labels("failed").inc()
            raise
        self._service.metrics.syncs.labels("loaded").inc()
        seconds = time.perf_counter() - started
        return Synced(
            policy_version=update.version,
            checksum=update.checksum,
            seconds=seconds,
            bytes=update.bytes,
            gigabytes_per_second=update.bytes / seconds / 1e9,
            replicas=[_weights(member) for member in self._service.replicas.members],
        )

    async def _load(self, request: SyncRequest) -> WeightUpdate:
        replicas = self._service.replicas
        replicas.newest.check(request.policy_version)
        update, kept = await asyncio.to_thread(prepare_update, request.path, self._config, self._shapes, self._dtype)
        try:
            return await replicas.sync(update, kept, request.policy_version)
        finally:
            # The file is what a restarted replica loads, so it stays until another takes its place.
            if replicas.newest.kept is kept:
                self.close()
                self._kept = kept
            else:
                kept.close()

    def close(self) -> None:
        """Give up what restarted replicas would load."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def admin_app(service: Service, loader: WeightLoader) -> FastAPI:
    """The app of the admin listener."""
    description = "Weights, pause and resume of the replicas."
    app = base_app(service, "E3RL administration", description, bodies=[SyncRequest, PauseRequest])

    @app.get("/weights", responses=errors(), summary="What each replica holds")
    async def weights() -> Weights:
        return Weights(replicas=[_weights(member) for member in service.replicas.members])

    @app.post(
        "/weights/sync",
        response_model=Synced,
        responses=errors(400, 409, 503, 504),
        openapi_extra=takes(SyncRequest),
        summary="Load a checkpoint into all replicas",
    )
    async def sync(request: Request) -> Synced:
        return await loader.load(await read_body(request, SyncRequest))

    @app.post(
        "/pause",
        response_model=PauseState,
        responses=errors(400, 503, 504),
        openapi_extra=takes(PauseRequest),
        summary="Stop generating",
    )
    async def pause(request: Request) -> PauseState:
        body = await read_body(request, PauseRequest)
        try:
            await service.replicas.pause(body.mode)
        except TimeoutError:
            text = f"responses are still under way after {service.settings.sync_seconds:g} s; no new ones until /resume"
            raise ApiError(504, text, code="deadline_exceeded") from None
        return PauseState(paused=True, mode=body.mode)

    @app.post("/reset_prefix_cache", responses=errors(503, 504), summary="Forget cached prefixes")
    async def reset_prefix_cache() -> CacheReset:
        try:
            return CacheReset(success=await service.replicas.reset_prefix_cache())
        except TimeoutError:
            raise ApiError(504, "the replicas did not answer in time", code="deadline_exceeded") from None

    @app.post("/resume", responses=errors(503, 504), summary="Go on after a pause")
    async def resume(request: Request) -> PauseState:
        await read_body(request, ResumeRequest)
        try:
            await service.replicas.resume()
        except TimeoutError:
            raise ApiError(504, "the replicas did not resume in time", code="deadline_exceeded") from None
        return PauseState(paused=False, mode=None)

    return app


def _shapes(source: str, config: dict[str, object]) -> Shapes | None:
    """Of a served model in a directory of safetensors files; the engine checks checkpoints of others."""
    if not any(Path(source).glob("*.safetensors")):
        return None
    return tensor_shapes(Path(source), config)


def _weights(member: Member) -> ReplicaWeights:
    last = None
    if member.synced:
        last = LastSync(
            seconds=member.sync_seconds,
            bytes=member.sync_bytes,
            gigabytes_per_second=member.sync_bytes / max(member.sync_seconds, 1e-9) / 1e9,
            error=member.sync_error,
        )
    return ReplicaWeights(
        replica=member.number,
        policy_version=member.version,
        checksum=member.checksum,
        error=member.error,
        non_finite_version=member.non_finite_version,
        last_sync=last,
    )
