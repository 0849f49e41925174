"""Sockets of the two listeners, and uvicorn servers that leave signals to us."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from rollout_server.http.server.command_line import UsageError
from rollout_server.http.server.protocol import Protocol
from rollout_server.http.server.settings import ServerSettings

BACKLOG = 2048


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


class BoundServer(uvicorn.Server):
    """A uvicorn server on a bound socket; `accepting` is set once it listens."""

    def __init__(self, app: Any, sock: socket.socket, settings: ServerSettings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                backlog=BACKLOG,
                server_header=False,
                # A number with a fraction is as good for the loop's timer.
                timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type]
            )
        )
        self.accepting = asyncio.Event()
        self._sock = sock

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set and connections are done."""
        await self.serve(sockets=[self._sock])

    def abort(self) -> None:
        """End the connections that are left, whatever is still to be sent."""
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            raise UsageError(f"cannot listen on {address(self._sock)}: {error.strerror or error}") from error
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
