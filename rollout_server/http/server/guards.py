"""What is checked before a body is read: that the request comes from no other site's page, and that it is JSON."""

import ipaddress
import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rollout_server.http.openai.errors import ApiError
from rollout_server.http.server.middleware import header, headers, send_error

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(:\d{1,5})?", re.ASCII | re.IGNORECASE)
JSON = "application/json"
BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_local(host: str) -> bool:
    """Whether `host`, with or without a port, names this machine as only its own users can."""
    match = _HOST.fullmatch(host.strip())
    if match is None:
        return False
    name = match[1].lower().strip("[]").rstrip(".")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _is_local_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and is_local(parts.netloc)


class LocalOnly:
    """Refuses what a browser sends for a page of another site. For servers without a key: a key protects as well.

    A page can have a name of its own point to this machine (DNS rebinding), which `Host` shows, or send a form to
    it, which `Origin` shows.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _foreign(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await send_error(send, error)


def _foreign(scope: Scope) -> ApiError | None:
    for name, code, check in ((b"host", "foreign_host", is_local), (b"origin", "foreign_origin", _is_local_origin)):
        if not all(map(check, headers(scope, name))):
            return ApiError(
                403,
                f"the header {name.decode().title()} is not this machine's: a server without an API key answers only "
                "to localhost; start it with a key (E3RL_API_KEY) to use it under other names",
                code=code,
                headers={"Connection": "close"},
            )
    return None


class JsonOnly:
    """Refuses bodies that do not say that they are JSON, and compressed ones, before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _not_json(scope) if scope["type"] == "http" and scope["method"] not in BODILESS else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await send_error(send, error)


def _not_json(scope: Scope) -> ApiError | None:
    encodings = {part.strip().lower() for value in headers(scope, b"content-encoding") for part in value.split(",")}
    if encodings - {"identity", ""}:
        return ApiError(
            415,
            "Content-Encoding: bodies are taken as they are, not compressed",
            param="Content-Encoding",
            code="unsupported_encoding",
            headers={"Connection": "close", "Accept-Encoding": "identity"},
        )
    has_body = header(scope, b"transfer-encoding") or header(scope, b"content-length").strip() not in ("", "0")
    if not has_body:
        return None
    media_type, _, parameters = header(scope, b"content-type").partition(";")
    charset = re.search(r"charset\s*=\s*\"?([^\s;\"]+)", parameters, re.IGNORECASE)
    is_utf8 = charset is None or charset[1].lower() in ("utf-8", "utf8", "us-ascii")
    if media_type.strip().lower() == JSON and is_utf8:
        return None
    return ApiError(
        415,
        f"Content-Type: a body must be {JSON}, in UTF-8",
        param="Content-Type",
        code="unsupported_media_type",
        headers={"Connection": "close"},
    )


class HeadAsGet:
    """Answers `HEAD` as `GET`, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        # A copy, since the server still has to know that the method is HEAD.
        as_get = {**scope, "method": "GET"}

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            await self._app(as_get, receive, without_body)
        finally:
            if "route" in as_get:
                scope["route"] = as_get["route"]
