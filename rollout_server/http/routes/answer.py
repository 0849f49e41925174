"""The response that generates: waits for places, generates, sends; ends when the client leaves or time is up."""

import asyncio
import logging
import time
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from common.slices import joined
from common.trajectory import ResponseRequest
from common.weights import NonFiniteLogits
from rollout_server.http.openai.encoders import Encoder
from rollout_server.http.openai.errors import ApiError, unavailable
from rollout_server.http.routes.choices import Generation, MakeChoice
from rollout_server.http.routes.service import Service
from rollout_server.http.routes.translation import translated
from rollout_server.http.server.admission import Admission
from rollout_server.http.server.logs import FIELDS
from rollout_server.http.server.middleware import REQUEST_ID, STARTED, send_error

log = logging.getLogger("e3rl.http")
LAST_WORDS_SECONDS = 2.0
"""How long an error may take to reach a client that reads slowly."""


class _Places:
    """What a request was admitted with. It is given back once, as soon as all is generated: sending needs no places."""

    def __init__(self, admission: Admission, places: int) -> None:
        self._admission = admission
        self._places = places

    def give_back(self) -> None:
        places, self._places = self._places, 0
        if places:
            self._admission.release(places)


class GenerationAnswer(Response):
    """Answers with what `groups` generate, in the form of `encoder`."""

    def __init__(
        self,
        service: Service,
        client: str,
        groups: list[list[ResponseRequest]],
        make_choice: MakeChoice,
        encoder: Encoder,
        *,
        streams: bool,
    ) -> None:
        super().__init__()
        self._service = service
        self._client = client
        self._groups = groups
        self._make_choice = make_choice
        self._encoder = encoder
        self._streams = streams
        self._started = False
        self._generation: Generation | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._work(scope, send))
        gone = asyncio.create_task(_disconnect(receive))
        self._service.under_way.add(work)
        # Not below: Serve tells of a client that left with a message and then, in the middle of `finally`, cancels too.
        work.add_done_callback(self._service.under_way.discard)
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                self._service.metrics.disconnects.inc()
        except asyncio.CancelledError:
            # Ray Serve tells of a client that left by cancelling too.
            if not work.done():
                self._service.metrics.disconnects.inc()
            raise
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, scope: Scope, send: Send) -> None:
        seconds = self._service.settings.request_seconds
        deadline = asyncio.get_running_loop().time() + seconds - (time.perf_counter() - scope[STARTED])
        try:
            async with asyncio.timeout_at(deadline):
                await self._generate(send)
        except TimeoutError:
            error = ApiError(504, f"the request took longer than {seconds:g} s", code="deadline_exceeded")
            await self._fail(send, error)
        except asyncio.CancelledError:
            if not self._service.stopping:
                raise
            await self._fail(send, _shutting_down())
        except Exception as error:
            if isinstance(error, NonFiniteLogits):
                self._service.metrics.non_finite.inc()
            await self._fail(send, _api_error(error, scope[REQUEST_ID]))
        finally:
            if self._generation is not None:
                await self._generation.forget()

    async def _generate(self, send: Send) -> None:
        service = self._service
        if service.draining:
            raise _shutting_down()
        responses = sum(map(len, self._groups))
        places = _Places(service.admission, await service.admission.acquire(self._client, responses))
        generation = Generation(service.replicas, self._make_choice, places.give_back, self._streams)
        self._generation = generation
        try:
            await generation.take(self._groups)
            if self._streams:
                await self._stream(generation, send)
            else:
                await generation.finish()
                # First: what fails here must still be answered with an error.
                body = await joined(self._encoder.whole(generation.choices))
                await self._start(send, "application/json", len(body))
                await send({"type": "http.response.body", "body": body})
        finally:
            places.give_back()
            service.count(generation)

    async def _stream(self, generation: Generation, send: Send) -> None:
        # Closed at once, whatever ends it: what is left to the garbage collector generates until then.
        async with aclosing(generation.chunks()) as batches:
            async for batch in batches:
                if not self._started:
                    await self._start(send, self._encoder.media_type)
                pieces = (piece for choice, chunk in batch for piece in self._encoder.chunk(choice, chunk))
                body = await joined(pieces)
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": self._encoder.end(generation.choices)})

    async def _start(self, send: Send, media_type: str, length: int | None = None) -> None:
        self._started = True
        headers = [(b"content-type", media_type.encode())]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        if self._streams:
            headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _fail(self, send: Send, error: ApiError) -> None:
        """Answer with an error, in the stream if it has begun. A client that does not read is left alone."""
        try:
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                if self._started and self._streams:
                    await send({"type": "http.response.body", "body": self._encoder.error(error)})
                elif not self._started:
                    await send_error(send, error)
        except TimeoutError:
            log.warning("a client does not read the error it was sent: %s", error)


def _shutting_down() -> ApiError:
    return unavailable("the server is shutting down")


async def _disconnect(receive: Receive) -> None:
    """Returns when the client is gone."""
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await receive()


def _api_error(error: Exception, request_id: str) -> ApiError:
    """What the client is told; what it is not told goes to the log."""
    answer = translated(error)
    if answer is not None:
        return answer
    log.error("generation failed", exc_info=error, extra={FIELDS: {"request_id": request_id}})
    return ApiError(500, f"internal error; the server's log has it under request id {request_id}", code="internal")
