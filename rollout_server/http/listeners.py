"""Sockets of the two listeners, and uvicorn servers that leave signals to us."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rollout_server.http.command_line import UsageError
from rollout_server.http.settings import ServerSettings

BACKLOG = 2048
HEADER_SECONDS = 30.0
MAX_RECEIVED_HEADER_BYTES = 256 * 1024
"""More than `LimitBody` allows, so that a request a little over the limit is still answered with 431."""


def bind(settings: ServerSettings) -> tuple[socket.socket, socket.socket]:
    """Bound sockets of the public and the admin listener. Nothing is accepted before they listen.

    Raises:
        UsageError: an address is taken or not this machine's.
    """
    public = _bind("--port", settings.host, settings.port)
    try:
        return public, bind_admin(settings)
    except BaseException:
        public.close()
        raise


def bind_admin(settings: ServerSettings) -> socket.socket:
    """The bound socket of the admin listener; raises as `bind` does."""
    return _bind("--admin-port", settings.admin_host, settings.admin_port)


def _bind(flag: str, host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"{flag} {port}: the port is in use on {host}; choose another (0: any)") from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return sock


def address(sock: socket.socket) -> str:
    """The URL of a listener."""
    return url(*sock.getsockname()[:2])


def url(host: str, port: int) -> str:
    """The URL of a listener on a host and a port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class BoundedHeaders(HttpToolsProtocol):
    """uvicorn's protocol, with limits on the bytes and the time that a request's headers may take."""

    _in_headers = True
    _received = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_headers:
            self._received += len(data)
            if self._received > MAX_RECEIVED_HEADER_BYTES:
                self._drop()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._received = 0
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._drop)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        self._stop_timer()
        self.transport.close()


class Listener(uvicorn.Server):
    """A uvicorn server on a bound socket; `accepting` is set once it listens."""

    def __init__(self, app: Any, sock: socket.socket, shutdown_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHeaders,
                log_config=None,
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                server_header=False,
                timeout_graceful_shutdown=int(shutdown_seconds) + 1,
            )
        )
        self.accepting = asyncio.Event()
        self._sock = sock

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set and connections are done."""
        await self.serve(sockets=[self._sock])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            raise UsageError(f"cannot listen on {address(self._sock)}: {error.strerror or error}") from error
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
