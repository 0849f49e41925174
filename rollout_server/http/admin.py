"""The admin listener: weights, pause, resume."""

import asyncio
import time
from pathlib import Path

import torch
from fastapi import FastAPI, Request

from common.weights import WeightUpdate
from rollout_server.http.base_app import base_app
from rollout_server.http.checkpoints import Shapes, prepare_update, tensor_shapes
from rollout_server.http.errors import ApiError, unavailable
from rollout_server.http.openapi import errors, read_body, takes
from rollout_server.http.replicas import Member, ReplicaLost
from rollout_server.http.schema.service import (
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
from rollout_server.http.service import Service


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
        self._written: Path | None = None

    async def load(self, request: SyncRequest) -> Synced:
        """Raises `ApiError`: 400 for a directory that is no checkpoint of this model, 503 if a replica failed."""
        replicas = self._service.replicas
        written: Path | None = None

        async def prepare() -> WeightUpdate:
            nonlocal written
            version = request.policy_version
            if version is None:
                version = max(member.version for member in replicas.members) + 1
            update, written = await asyncio.to_thread(
                prepare_update, request.path, self._config, self._shapes, self._dtype, version
            )
            return update

        started = time.perf_counter()
        try:
            update = await replicas.sync(prepare)
        except BaseException:
            self._service.metrics.syncs.labels("failed").inc()
            _remove(written)
            raise
        self._service.metrics.syncs.labels("loaded").inc()
        # The file is what a restarted replica loads, so it stays until another takes its place.
        _remove(self._written)
        self._written = written
        seconds = time.perf_counter() - started
        return Synced(
            policy_version=update.version,
            checksum=update.checksum,
            seconds=seconds,
            bytes=update.bytes,
            gigabytes_per_second=update.bytes / seconds / 1e9,
            replicas=[_weights(member) for member in replicas.members],
        )

    def close(self) -> None:
        """Remove what was written."""
        _remove(self._written)


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
        responses=errors(400, 503, 504),
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
        except ReplicaLost:
            raise unavailable("a replica died") from None

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
        non_finite_version=member.non_finite_version,
        last_sync=last,
    )


def _remove(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
