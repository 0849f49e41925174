"""The endpoint as a Ray Serve deployment: the public app behind Serve's proxies, the admin listener beside it."""

import asyncio
import signal
import sys
import time
from typing import Any, cast

from ray import serve
from starlette.types import Receive, Scope, Send

from rollout_server.http.admin import admin_app
from rollout_server.http.app import public_app
from rollout_server.http.command_line import UsageError
from rollout_server.http.listeners import Listener, address, bind
from rollout_server.http.ray_replica import connect
from rollout_server.http.serve import LAST_WORDS_SECONDS, WATCH_SECONDS, banner, start_service
from rollout_server.http.settings import ServerSettings

DEPLOYMENT = "e3rl"
MAX_ONGOING = 100_000
"""Serve's own limit is out of the way: the endpoint's queue answers with 429 itself."""


class _Entrance:
    """The app that Serve is given before there is a service; requests go to the one that is set later."""

    app: Any = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Entrance.app(scope, receive, send)


@serve.deployment(name=DEPLOYMENT, max_ongoing_requests=MAX_ONGOING)
@serve.ingress(_Entrance())
class Endpoint:
    """One process of the endpoint, which holds the replicas and the admin listener."""

    async def __init__(self, settings: ServerSettings) -> None:  # type: ignore[misc]
        started = time.monotonic()
        public, admin = bind(settings.model_copy(update={"port": 0}))
        public.close()
        self._settings = settings
        self._service, loader = await start_service(settings)
        seconds = settings.shutdown_seconds + LAST_WORDS_SECONDS
        self._admin = Listener(admin_app(self._service, loader), admin, seconds)
        self._tasks = [
            asyncio.create_task(self._admin.run_until_stopped()),
            asyncio.create_task(self._service.replicas.watch(WATCH_SECONDS)),
        ]
        self._addresses = f"http://{settings.host}:{settings.port}", address(admin)
        self._seconds = time.monotonic() - started
        _Entrance.app = public_app(self._service)

    async def banner(self) -> str:
        """What is printed when the server is ready."""
        return banner(self._settings, self._service, *self._addresses, self._seconds)

    async def __del__(self) -> None:
        self._admin.should_exit = True
        await self._service.stop(self._settings.shutdown_seconds)
        await self._service.replicas.close()
        for task in self._tasks:
            task.cancel()


def run_on_serve(settings: ServerSettings) -> int:
    """Deploy, print when ready, and wait for SIGTERM or SIGINT; returns the process's exit code."""
    try:
        sockets = bind(settings)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for sock in sockets:
        sock.close()
    connect(settings.ray_address)
    serve.start(
        http_options={"host": settings.host, "port": settings.port, "request_timeout_s": settings.request_seconds + 30}
    )
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": settings.shutdown_seconds + LAST_WORDS_SECONDS,
        "ray_actor_options": {"num_cpus": 1},
    }
    try:
        # A type checker does not see what the decorators make of a class.
        deployment = cast(serve.Deployment, Endpoint).options(**options)
        handle = serve.run(deployment.bind(settings), name=DEPLOYMENT, route_prefix="/")
        print(handle.banner.remote().result(timeout_s=60.0), flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    except RuntimeError as error:
        print(f"error: the deployment did not start: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    finally:
        serve.shutdown()
    return 0
