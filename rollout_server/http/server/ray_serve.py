"""The endpoint as a Ray Serve deployment: the public app behind Serve's proxies, the admin listener beside it."""

import asyncio
import logging
import signal
import sys
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayError
from starlette.types import Message, Receive, Scope, Send

from rollout_server.http.routes.admin import admin_app
from rollout_server.http.routes.public import public_app
from rollout_server.http.server.command_line import UsageError
from rollout_server.http.server.listeners import BoundServer, address, bind, bind_admin, url
from rollout_server.http.server.logs import configure
from rollout_server.http.server.phases import Phases
from rollout_server.http.server.serve import (
    STOP_SIGNALS,
    WATCH_SECONDS,
    banner,
    end_listeners,
    engine_threads,
    kept_signal_handlers,
    request_seconds,
    settle,
    start_service,
)
from rollout_server.http.server.settings import ServerSettings
from rollout_server.replicas.ray_cluster import NoCluster, connect

log = logging.getLogger("e3rl.server")
DEPLOYMENT = "e3rl"
MAX_ONGOING = 100_000
"""Serve's own limit is out of the way: the endpoint's queue answers with 429 itself."""
POLL_SECONDS = 0.2
"""How often Serve looks whether a replica that it stops still has requests."""
FOR_SERVE = {
    "port": "http_options.port",
    "ray_address": "the cluster that the file is given to",
    "serve": "always so",
}
"""Settings that a config file of Serve's has in another place."""


class _Entrance:
    """The app that Serve is given before there is a service; requests go to the one that is set later."""

    app: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Serve's proxy adds this header itself.
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        if scope["type"] == "http":
            await _Entrance.app(scope, receive, sending)


@serve.deployment(name=DEPLOYMENT, max_ongoing_requests=MAX_ONGOING)
@serve.ingress(_Entrance())
class Endpoint:
    """One process of the endpoint, which holds the replicas and the admin listener. Its log is among Ray's."""

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]
        phases = Phases()
        configure(settings.log_format, settings.log_level)
        admin = bind_admin(settings)
        self._settings = settings
        self._service, self._loader = await start_service(settings, phases)
        self._admin = BoundServer(admin_app(self._service, self._loader), admin, settings)
        self._serving = asyncio.create_task(self._admin.run_until_stopped())
        self._watching = asyncio.create_task(self._service.replicas.watch(WATCH_SECONDS))
        self._addresses = url(settings.host, settings.port), address(admin)
        self._seconds = phases.seconds
        _Entrance.app = public_app(self._service)
        settle()

    async def banner(self) -> str:
        """What is printed when the server is ready."""
        return banner(self._settings, self._service, *self._addresses, self._seconds)

    async def stop(self) -> None:
        """Refuse new requests, finish or cancel those under way. Serve alone would cut them off."""
        await self._service.stop(request_seconds(self._settings))

    async def __del__(self) -> None:
        self._admin.should_exit = True
        await self.stop()
        await end_listeners([self._admin], [self._serving])
        self._watching.cancel()
        await self._service.replicas.close()
        self._loader.close()
        if self._service.tracing is not None:
            self._service.tracing.close()


def run_on_serve(settings: ServerSettings, phases: Phases) -> int:
    """Deploy, print when ready, and wait for SIGTERM or SIGINT; returns the process's exit code."""
    try:
        public, admin = bind(settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    known = {"port": public.getsockname()[1], "threads": engine_threads(settings)}
    settings = settings.model_copy(update=known)
    public.close()
    admin.close()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        phases.begin("connecting to Ray")
        with kept_signal_handlers():
            connect(settings.ray_address)
        phases.begin("starting the deployment, whose log is among Ray's")
        handle = _deploy(settings)
        print(handle.banner.remote().result(timeout_s=60.0), flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _stop(settings)
        return 0
    except NoCluster as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(f"error: the deployment did not start: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        # Serve would start a cluster to shut down.
        if ray.is_initialized():
            serve.shutdown()


def _deploy(settings: ServerSettings) -> Any:
    """The handle of the deployment, once it is ready."""
    serve.start(
        http_options={"host": settings.host, "port": settings.port, "request_timeout_s": settings.request_seconds + 30}
    )
    return serve.run(_application(settings), name=DEPLOYMENT, route_prefix="/")


def application(arguments: dict[str, Any]) -> serve.Application:
    """The endpoint for a config file of Ray Serve, as `serve deploy` and KubeRay's RayService read it.

    `arguments`, the file's `args`, are settings of the server; those that they leave out come from the environment.

    Raises:
        ValueError: a setting is wrong, or Serve's to decide.
    """
    for name, place in FOR_SERVE.items():
        if name in arguments:
            raise ValueError(f"args.{name}: with a config file of Ray Serve this is {place}")
    settings = ServerSettings(**arguments)
    return _application(settings.model_copy(update={"threads": engine_threads(settings)}))


def _application(settings: ServerSettings) -> serve.Application:
    # Ray's own default is a thread for each CPU that an actor asks for.
    threads = {"OMP_NUM_THREADS": str(settings.threads)}
    resources: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": threads}}
    if settings.replicas == 1 and ray.cluster_resources().get("GPU"):
        # The engine is in this process, and Ray hides the GPUs that a process has not asked for.
        resources["num_gpus"] = 1
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": settings.shutdown_seconds,
        "graceful_shutdown_wait_loop_s": POLL_SECONDS,
        "ray_actor_options": resources,
    }
    # A type checker does not see what the decorators make of a class.
    deployment = cast(serve.Deployment, Endpoint).options(**options)
    return deployment.bind(settings)


def _stop(settings: ServerSettings) -> None:
    """Let the requests of a deployment that is ready come to their end."""
    application = serve.status().applications.get(DEPLOYMENT)
    if application is None or application.status != "RUNNING":
        return
    try:
        seconds = settings.shutdown_seconds
        serve.get_app_handle(DEPLOYMENT).stop.remote().result(timeout_s=seconds)
    except (RayError, TimeoutError):
        log.warning("requests under way could not be ended in good order", exc_info=True)
