"""The server process: start the replicas, then both listeners; stop them in good order."""

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import torch

from common.config.run import EngineConfig, ModelConfig
from common.sentinels import NoSentinelsError, model_sentinels
from rollout_server.engine.cores import available_cores, chosen_threads, threads_per_engine
from rollout_server.http.routes.admin import WeightLoader, admin_app
from rollout_server.http.routes.public import public_app
from rollout_server.http.routes.service import Service
from rollout_server.http.server.command_line import UsageError
from rollout_server.http.server.listeners import BoundServer, address, bind
from rollout_server.http.server.logs import configure
from rollout_server.http.server.model_files import read_model
from rollout_server.http.server.phases import Phases
from rollout_server.http.server.settings import ServerSettings
from rollout_server.http.server.tracing import otlp_tracing
from rollout_server.replicas.pool import Pool
from rollout_server.replicas.replica import Replica

log = logging.getLogger("e3rl.server")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
WATCH_SECONDS = 5.0
END_SECONDS = 8.0
"""What is kept of `shutdown_seconds` for what comes after the requests: last words, connections, replicas."""
CONNECTION_SECONDS = 2.0
"""What connections have to take the last of their answers."""
LEAST_SECONDS = 10.0
"""A server that has not ended so long after SIGTERM, or after `shutdown_seconds` if that is more, is killed."""


def request_seconds(settings: ServerSettings) -> float:
    """What requests under way have after SIGTERM before they are cancelled."""
    return max(settings.shutdown_seconds - END_SECONDS, settings.shutdown_seconds / 2)


class StartError(Exception):
    """The replicas did not start; the message is one line."""


def configs(settings: ServerSettings, model: dict[str, Any]) -> tuple[ModelConfig, EngineConfig]:
    """The engine's configuration, as training has it."""
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    return (
        ModelConfig(
            path=model["source"],
            revision=settings.revision,
            dtype=dtype,
            max_length=model["max_length"],
            trust_remote_code=settings.trust_remote_code,
            sentinel_ids=settings.sentinel_ids,
        ),
        EngineConfig(
            replicas=settings.replicas,
            max_concurrent_responses=settings.max_concurrent_responses,
            kv_cache_gib=settings.kv_cache_gib,
            num_gpu_blocks_override=settings.num_gpu_blocks_override,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enforce_eager=settings.enforce_eager,
            start_seconds=settings.start_seconds,
            response_seconds=settings.request_seconds,
            threads=engine_threads(settings),
            log_stats=settings.engine_metrics,
        ),
    )


def engine_threads(settings: ServerSettings) -> int:
    """CPU threads of a replica: what the user says, else a replica's share of the cores."""
    return settings.threads or chosen_threads() or threads_per_engine(settings.replicas)


def _warn_of_threads(settings: ServerSettings, threads: int) -> None:
    cores = available_cores()
    if threads * settings.replicas > cores:
        text = "%d replicas with %d threads each on %d cores: threads that wait for others make it many times slower"
        log.warning(text, settings.replicas, threads, cores)


@contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Put handlers back afterwards: Ray, when it starts a cluster, installs one that kills all of it at SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def make_replicas(settings: ServerSettings, model: ModelConfig, engine: EngineConfig, phases: Phases) -> list[Replica]:
    """One replica in this process, or several as Ray actors. Raises StartError if there is no Ray."""
    if settings.replicas == 1:
        from rollout_server.replicas.local import LocalReplica

        return [LocalReplica(model, engine, settings.policy_version)]
    from rollout_server.replicas.placement import Placement
    from rollout_server.replicas.ray_actor import RayReplica
    from rollout_server.replicas.ray_cluster import NoCluster, connect

    phases.begin("connecting to Ray")
    with kept_signal_handlers():
        try:
            connect(settings.ray_address)
        except NoCluster as error:
            raise StartError(str(error)) from error
    placement = Placement(engine)
    return [RayReplica(n, model, engine, settings.policy_version, placement) for n in range(settings.replicas)]


async def start_service(settings: ServerSettings, phases: Phases) -> tuple[Service, WeightLoader]:
    """Start the replicas and what stands in front of them.

    Raises:
        UsageError: the model cannot be found or read, or has no token ids for sentinels.
        StartError: a replica did not start.
    """
    phases.begin(f"reading the configuration and the tokenizer of {settings.name}")
    model, tokenizer = await asyncio.to_thread(read_model, settings)
    model_config, engine_config = configs(settings, model)
    try:
        await asyncio.to_thread(model_sentinels, model_config)
    except NoSentinelsError as error:
        raise UsageError(str(error)) from error
    replicas = Pool(
        make_replicas(settings, model_config, engine_config, phases),
        start_seconds=settings.start_seconds,
        sync_seconds=settings.sync_seconds,
        probe_seconds=settings.probe_seconds,
    )
    tracing = otlp_tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
    service = Service(settings, replicas, tokenizer, tracing)
    many = "the engine" if settings.replicas == 1 else f"{settings.replicas} replicas"
    _warn_of_threads(settings, engine_config.threads or 1)
    phases.begin(f"starting {many}: weights in {model_config.dtype}, KV cache, {engine_config.threads} threads each")
    try:
        await replicas.start()
    except Exception as error:
        await replicas.close()
        log.debug("start failed", exc_info=True)
        raise StartError(f"the model did not start: {' '.join(str(error).split()) or type(error).__name__}") from error
    loader = WeightLoader(service, model, settings.model, getattr(torch, model_config.dtype))
    return service, loader


async def serve(settings: ServerSettings, phases: Phases) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    stop_seconds = LEAST_SECONDS

    def stop_now() -> None:
        if not stop.is_set():
            _kill_after(stop_seconds)
        stop.set()

    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop_now)
    public, admin = bind(settings)
    starting = asyncio.create_task(start_service(settings, phases))
    reminding = asyncio.create_task(phases.remind())
    stopping = asyncio.create_task(_wait(stop))
    waiting: set[asyncio.Task[Any]] = {starting, stopping}
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    reminding.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return
    service, loader = await starting
    stop_seconds = max(settings.shutdown_seconds, LEAST_SECONDS)
    listeners = [
        BoundServer(public_app(service), public, settings),
        BoundServer(admin_app(service, loader), admin, settings),
    ]
    running = [asyncio.create_task(listener.run_until_stopped()) for listener in listeners]
    watching = asyncio.create_task(service.replicas.watch(WATCH_SECONDS))
    ready = asyncio.create_task(_all_accepting(listeners))
    try:
        await asyncio.wait({ready, *running}, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            if task.done():
                task.result()
        settle()
        print(banner(settings, service, address(public), address(admin), phases.seconds), flush=True)
        await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
        log.info("stopping: %d requests are under way", len(service.under_way))
    finally:
        for listener in listeners:
            listener.should_exit = True
        await service.stop(request_seconds(settings))
        await end_listeners(listeners, running)
        watching.cancel()
        stopping.cancel()
        ready.cancel()
        await service.replicas.close()
        loader.close()
        if service.tracing is not None:
            service.tracing.close()


def settle() -> None:
    """What exists by now stays: the garbage collector need not look at it again while requests are served.

    It would take longer, in the event loop, than any request may.
    """
    gc.collect()
    gc.freeze()


async def end_listeners(listeners: list[BoundServer], running: list[asyncio.Task[None]]) -> None:
    """Wait for connections to take the last of their answers, then end them."""
    _, left = await asyncio.wait(running, timeout=CONNECTION_SECONDS)
    for listener in listeners:
        listener.abort()
    if left:
        await asyncio.wait(left, timeout=CONNECTION_SECONDS)
    await asyncio.gather(*(task for task in running if task.done()), return_exceptions=True)


def _kill_after(seconds: float) -> None:
    """End this process and those that it started, unless it has ended by itself in time."""

    def kill() -> None:
        log.error("the server did not end within %g s: it and its engines are killed", seconds)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(1)

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _all_accepting(listeners: list[BoundServer]) -> None:
    for listener in listeners:
        await listener.accepting.wait()


def named_token(tokenizer: Any, token_id: int) -> str:
    """A token id with its token's text, if it has a token."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return f"{token_id} (no token)" if token is None else f"{token_id} ({token})"


def banner(settings: ServerSettings, service: Service, public: str, admin: str, seconds: float) -> str:
    """What is printed when the server is ready."""
    policy = settings.erasure.model_dump_json(exclude_none=True) if settings.erasure_enabled else "off"
    rows = [
        ("ready", f"after {seconds:.1f} s"),
        ("public", public),
        ("admin", admin),
        ("model", settings.name),
        ("policy version", str(service.facts.version)),
        ("replicas", f"{settings.replicas} x {settings.max_concurrent_responses} responses at a time"),
        ("threads", f"{engine_threads(settings)} a replica, on {available_cores()} cores"),
        ("longest sequence", f"{service.facts.max_length} tokens"),
        ("sentinels", ", ".join(named_token(service.tokenizer, token) for token in service.facts.sentinel_ids)),
        ("erasure", policy),
        ("keys", str(len(settings.api_key)) if settings.api_key else "none needed"),
    ]
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


def run(settings: ServerSettings, phases: Phases) -> int:
    """Run the server; returns the process's exit code."""
    configure(settings.log_format, settings.log_level)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if settings.serve:
        from rollout_server.http.server.ray_serve import run_on_serve

        return run_on_serve(settings, phases)
    import uvloop

    try:
        uvloop.run(serve(settings, phases))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
