"""uvicorn's HTTP/1.1 protocol with what it lacks: deadlines, HTTP/1.0, and errors as JSON. Run with uvicorn 0.54."""

import asyncio
import json
import sys
import uuid
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from rollout_server.http.openai.errors import bad_request

HEADER_SECONDS = 30.0
MAX_RECEIVED_HEADER_BYTES = 256 * 1024
"""More than `LimitBody` allows, so that a request a little over the limit is still answered with 431."""
LINGER_SECONDS = 2.0
"""How long what a client still sends of a body is thrown away, after an answer that did not wait for it."""
STALLED_SECONDS = 600.0
"""A client that takes nothing of its answer for so long is gone. A trainer may be busy between two lines of it."""


class Cycle(RequestResponseCycle):
    """A request and its answer. An answer without a length ends with its connection if the client knows HTTP/1.0."""

    async def send(self, message: Any) -> None:
        starts = message["type"] == "http.response.start" and not self.response_started
        if starts and self.more_body:
            # What is left of the request would be taken for the next one, or keep the connection for ever.
            self.keep_alive = False
        is_bounded = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
        if starts and self.scope["http_version"] == "1.0" and not is_bounded:
            self.chunked_encoding = False
            self.expected_content_length = sys.maxsize
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            if self.scope["http_version"] == "1.0" and self.expected_content_length > 2**62:
                self.expected_content_length = len(message.get("body", b""))
            if self.more_body:
                # The protocol closes, after it has thrown away what still comes.
                self.keep_alive = True
        await super().send(message)


class Protocol(HttpToolsProtocol):
    """One connection. What a client does not send or take in time ends it."""

    _in_headers = True
    _lingers = False
    _received = 0
    _timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._lingers or self.transport.is_closing():
            return
        if not self._in_headers and self._is_answered():
            self._expect_headers()
        if self._in_headers:
            self._received += len(data)
            if self._received > MAX_RECEIVED_HEADER_BYTES:
                self._drop()
                return
        super().data_received(data)

    def eof_received(self) -> None:
        if self._lingers:
            self._drop()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_headers:
            self._expect_headers()

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows a chunked body is no header of ours, and must not grow without limit.
        if self._in_headers:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.__class__ = Cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if self.cycle.more_body and not self.pipeline and not self.transport.is_closing():
            self._linger()
        super().on_response_complete()
        if self._lingers:
            self._unset_keepalive_if_required()

    def timeout_keep_alive_handler(self) -> None:
        self._drop()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_stall_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer to what is not HTTP. In the middle of another answer there is no place for one."""
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and not cycle.response_complete:
            if cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        error = bad_request("what was received is not a valid HTTP request", code="invalid_http")
        body = json.dumps(error.body()).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {uuid.uuid4().hex}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._linger()

    def _is_answered(self) -> bool:
        """Whether the last request, if there was one, has its whole answer."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _linger(self) -> None:
        """Close, but read on for a moment: closed at once, the client might lose the answer before it has read it."""
        self._lingers = True
        self._stop_timer()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self._drop)

    def _expect_headers(self) -> None:
        self._in_headers = True
        self._received = 0
        self._stop_timer()
        self._timer = self.loop.call_later(HEADER_SECONDS, self._headers_are_late)

    def _headers_are_late(self) -> None:
        """Not while a request before them is answered, since nothing is read then."""
        if self.pipeline or not self._is_answered():
            self._timer = self.loop.call_later(HEADER_SECONDS, self._headers_are_late)
        else:
            self._drop()

    def _watch_stall(self) -> None:
        """Look whether the client has taken something since the last look."""
        unsent = self.transport.get_write_buffer_size()
        if self._stall_timer is not None and unsent >= self._unsent:
            self._stop_stall_timer()
            self.transport.abort()
            return
        self._unsent = unsent
        self._stall_timer = self.loop.call_later(STALLED_SECONDS, self._watch_stall)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _drop(self) -> None:
        """Close once what was written is sent, which a client that takes nothing of it does not put off for ever."""
        self._stop_timer()
        self.transport.close()
        if self._stall_timer is None:
            self._watch_stall()
