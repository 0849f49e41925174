"""HTTP itself, over sockets: lengths, HTTP/1.0, what is not HTTP, and clients that are slow on purpose."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from rollout_server.http.server import protocol
from rollout_server.http.server.listeners import BoundServer, bind
from tests.stub_replica import ERASING, StubReplica, StubServer, saying, until

TYPE = "content-type: application/json\r\n"


class Connection:
    """A client that writes bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, text: str | bytes) -> None:
        self.writer.write(text.encode() if isinstance(text, str) else text)

    def ask(self, body: Any, version: str = "1.1", extra: str = "") -> None:
        raw = json.dumps({"model": "stub", **body})
        head = f"POST /v1/completions HTTP/{version}\r\nhost: localhost\r\n{TYPE}{extra}content-length: {len(raw)}\r\n"
        self.send(f"{head}\r\n{raw}")

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and, if it has a length, body."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        return int(first.split()[1]), headers, body

    async def rest(self) -> bytes:
        """What comes until the server closes."""
        return await self.reader.read()


@asynccontextmanager
async def listening(replica: StubReplica | None = None, **settings: Any) -> AsyncIterator[tuple[StubServer, Any]]:
    """A server on a free port, and a function that connects to it; all within 20 s."""
    replica = replica or StubReplica(lambda request: list(ERASING))
    writers: list[asyncio.StreamWriter] = []
    async with asyncio.timeout(20.0), StubServer(replica, port=0, admin_port=0, **settings) as server:
        public, admin = bind(server.settings)
        admin.close()
        listener = BoundServer(server.app, public, server.settings)
        running = asyncio.create_task(listener.run_until_stopped())
        await listener.accepting.wait()

        async def connect(limit: int = 2**16) -> Connection:
            reader, writer = await asyncio.open_connection(*public.getsockname(), limit=limit)
            writers.append(writer)
            return Connection(reader, writer)

        yield server, connect
        for writer in writers:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()
        listener.should_exit = True
        await running


async def test_whole_answers_have_a_length_and_leave_the_connection_open() -> None:
    async with listening() as (_, connect):
        client = await connect()
        for _ in range(2):
            client.ask({"prompt": "a"})
            status, headers, body = await client.answer()
            assert (status, "transfer-encoding" in headers) == (200, False)
            assert json.loads(body)["choices"][0]["text"] == "Ünd right."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunks(stream: bool) -> None:
    async with listening() as (_, connect):
        client = await connect()
        client.ask({"prompt": "a", "stream": stream}, version="1.0")
        _, headers, body = await client.answer()
        body += await client.rest()
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"}\n\ndata: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"][0]["text"] == "Ünd right."


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /h\xc3\xa9alth HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT localhost:80 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\nnot a length\r\n",
    ],
)
async def test_what_is_not_http_is_a_400_in_json_and_closes(raw: bytes) -> None:
    async with listening() as (_, connect):
        client = await connect()
        client.send(raw)
        status, headers, body = await client.answer()
        assert await client.rest() == b""
    assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_nonsense_behind_a_request_does_not_get_into_its_answer() -> None:
    gate = asyncio.Event()
    async with listening(StubReplica(saying("a", "b"), gate, 1)) as (server, connect):
        client = await connect()
        client.ask({"prompt": "a", "stream": True})
        await client.answer()
        client.send("nonsense\r\n\r\n")
        with suppress(ConnectionError):
            assert b"HTTP/1.1 400" not in await client.rest()
        await until(lambda: not server.service.under_way)


@pytest.mark.parametrize(("key", "path"), [("a-key-of-somebody", "/v1/completions"), (None, "/v1/completions")])
async def test_an_endless_body_after_an_error_ends_with_the_connection(
    key: str | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a client without a key, and of one that sends no JSON."""
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)
    async with listening(api_key=(key,) if key else ()) as (_, connect):
        client = await connect()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n"
        client.send(f"{head}\r\n1\r\na\r\n")
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (401 if key else 415, "close")
        started = asyncio.get_running_loop().time()
        with suppress(ConnectionError):
            while True:
                client.send("1\r\na\r\n")
                await client.writer.drain()
                await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - started < 3.0


async def test_headers_that_do_not_come_end_the_connection_first_and_between_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    async with listening() as (_, connect):
        silent, slow, second, blank = [await connect() for _ in range(4)]
        for client in (second, blank):
            client.send("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert (await client.answer())[0] == 200
        slow.send("GET /health HTTP/1.1\r\nhost: loc")
        second.send("GET /health")
        blank.send("\r\n")
        async with asyncio.timeout(5.0):
            assert [await client.rest() for client in (silent, slow, second, blank)] == [b""] * 4


async def test_a_request_that_waits_behind_another_is_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.2)
    gate = asyncio.Event()
    raw = json.dumps({"model": "stub", "prompt": "a"})
    ask = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{TYPE}content-length: {len(raw)}\r\n\r\n{raw}"
    async with listening(StubReplica(saying("a"), gate)) as (server, connect):
        client = await connect()
        client.send(ask + ask + ask[:30])
        await until(lambda: bool(server.service.under_way))
        await asyncio.sleep(4 * protocol.HEADER_SECONDS)
        gate.set()
        for _ in range(2):
            assert (await client.answer())[0] == 200
        client.send(ask[30:])
        assert (await client.answer())[0] == 200
        client.send(ask[:30])
        assert await client.rest() == b""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_slow_client_gets_all_of_its_answer_and_one_that_takes_nothing_is_left(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is written long before it is taken: a connection that is idle, or to be closed, has still to be emptied."""
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.4)
    length = 2**26

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(length)})

    async with listening(keep_alive_seconds=0.1) as (server, connect):
        server.app.router.mount("/much", app)  # type: ignore[arg-type]
        silent, slow = await connect(), await connect(2**22)
        silent.writer.transport.pause_reading()
        for client in (silent, slow):
            client.send(f"GET /much/ HTTP/{version}\r\nhost: localhost\r\n\r\n")
        received = 0
        while part := await slow.reader.read(2**22):
            received += len(part)
            await asyncio.sleep(0.02)
        assert received > length
        while not silent.writer.transport.is_closing():
            silent.send(" ")
            await asyncio.sleep(0.05)


async def test_an_idle_connection_is_kept_as_long_as_the_setting_says() -> None:
    async with listening(keep_alive_seconds=0.4) as (_, connect):
        client = await connect()
        client.send("GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await client.answer()
        started = asyncio.get_running_loop().time()
        assert await client.rest() == b""
        assert 0.3 < asyncio.get_running_loop().time() - started < 3.0


async def test_trailers_are_not_kept() -> None:
    async with listening() as (_, connect):
        client = await connect()
        raw = json.dumps({"model": "stub", "prompt": "a"})
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{TYPE}transfer-encoding: chunked\r\n"
        client.send(f"{head}\r\n{len(raw):x}\r\n{raw}\r\n0\r\nauthorization: Bearer x\r\nhost: elsewhere\r\n\r\n")
        assert (await client.answer())[0] == 200


async def test_a_client_that_takes_nothing_of_its_answer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is sent than sockets hold."""
    monkeypatch.setattr(protocol, "STALLED_SECONDS", 0.3)
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending = asyncio.create_task(send_much(send))
        while (await receive())["type"] != "http.disconnect":
            pass
        await sending
        left.set()

    async def send_much(send: Any) -> None:
        for _ in range(64):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})

    async with listening() as (server, connect):
        server.app.router.mount("/much", app)  # type: ignore[arg-type]
        silent, slow = await connect(), await connect()
        silent.writer.transport.pause_reading()
        for client in (silent, slow):
            client.send("GET /much/ HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received = 0
        while not left.is_set():
            received += len(await slow.reader.read(2**19))
            await asyncio.sleep(0.02)
        assert received < 2**26
        assert await slow.reader.readexactly(2**20)


async def test_head_is_get_without_a_body() -> None:
    async with listening() as (server, connect):
        for path in ("/health", "/v1/models", "/metrics", "/openapi.json", "/ready"):
            client = await connect()
            client.send(f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            head = (await client.rest()).decode()
            assert head.startswith("HTTP/1.1 200"), path
            assert head.endswith("\r\n\r\n"), path
            assert int(head.lower().split("content-length: ")[1].split("\r\n")[0]) > 0
        for answer in (await server.client.head("/v1/completions"), await server.client.get("/v1/completions")):
            assert answer.status_code == 405
        assert (await server.client.head("/nothing")).status_code == 404
        assert (await server.admin.head("/weights")).status_code == 200
