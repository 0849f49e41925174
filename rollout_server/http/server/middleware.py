"""What every request of a listener goes through: an id, a log line and metrics, the key, the limits."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from pydantic import SecretStr
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http.openai.errors import ApiError
from rollout_server.http.server.logs import FIELDS
from rollout_server.http.server.metrics import ServerMetrics
from rollout_server.http.server.tracing import Tracing

log = logging.getLogger("e3rl.http")
REQUEST_ID = "e3rl.request_id"
STARTED = "e3rl.started"
SPAN = "e3rl.span"
USER = "e3rl.user"
MAX_HEADER_BYTES = 32 * 1024
OPEN_ROUTES = frozenset({"/health"})
_USABLE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def header(scope: Scope, name: bytes) -> str:
    """A request header's value, the first if there are several; empty if there is none."""
    return next(iter(headers(scope, name)), "")


def headers(scope: Scope, name: bytes) -> list[str]:
    """All values of a request header."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with an error."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class Observe:
    """Outermost: gives a request its id, and once it is answered a log line, metrics and a span."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, tracing: Tracing | None) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given if _USABLE_ID.fullmatch(given) else uuid.uuid4().hex
        started = time.perf_counter()
        scope[REQUEST_ID] = request_id
        scope[STARTED] = started
        if self._tracing is not None:
            headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            scope[SPAN] = self._tracing.request(scope["method"], headers, time.time_ns())
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", scope[REQUEST_ID].encode())]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._finished(scope, status, scope[REQUEST_ID], time.perf_counter() - started)

    def _finished(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        result = str(status) if status else "disconnected"
        exemplar = {"request_id": request_id[:64]}
        self._metrics.requests.labels(route, result).inc(exemplar=exemplar)
        self._metrics.request_seconds.labels(route).observe(seconds, exemplar=exemplar)
        fields = {
            "request_id": request_id,
            "method": scope["method"],
            "route": route,
            "status": result,
            "seconds": round(seconds, 4),
        }
        if scope.get(USER) is not None:
            fields["user"] = scope[USER]
        level = logging.DEBUG if route in ("/health", "/ready", "/metrics") else logging.INFO
        log.log(level, "request", extra={FIELDS: fields})
        span = scope.get(SPAN)
        if span is not None:
            span.update_name(f"{scope['method']} {route}")
            span.set_attributes(
                {"http.route": route, "http.response.status_code": status, "e3rl.request_id": request_id}
            )
            span.end()


class Authenticate:
    """Asks for a key on every route but `OPEN_ROUTES`, also on those that do not exist.

    Digests are compared, each in constant time and always all of them.
    """

    def __init__(self, app: ASGIApp, keys: tuple[SecretStr, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or not self._digests or scope["path"] in OPEN_ROUTES
        if is_open or self._accepts(header(scope, b"authorization")):
            await self._app(scope, receive, send)
        else:
            await send_error(
                send,
                ApiError(
                    401,
                    "a valid API key is needed: send the header Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
                ),
            )

    def _accepts(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


class LimitBody:
    """Refuses large headers and bodies, and bodies that do not arrive in time, before a route sees them.

    The whole body is read here: one without a content length is measured as it arrives.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await send_error(send, error)
            return
        if body is None:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left."""
        if sum(len(key) + len(value) for key, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"headers are longer than {MAX_HEADER_BYTES} bytes", code="headers_too_long")
        length = header(scope, b"content-length")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_long()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message: Any = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_bytes:
                        raise self._too_long()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._seconds:g} s",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None

    def _too_long(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than {self._max_bytes} bytes",
            code="body_too_long",
            headers={"Connection": "close"},
        )
