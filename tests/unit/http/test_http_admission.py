"""How long a request may wait, who is next, and what ends it: a full queue, the deadline, a client that leaves."""

import asyncio
import json
from typing import Any

import pytest

from tests.stub_replica import ERASING, StubReplica, StubServer, saying, until


async def test_a_full_queue_is_a_429_with_retry_after() -> None:
    gate = asyncio.Event()
    replica = StubReplica(saying("a"), gate)
    async with asyncio.timeout(30.0), StubServer(replica, max_concurrent_responses=1, max_waiting_requests=1) as server:
        answers = asyncio.as_completed([server.post(prompt="a") for _ in range(4)])
        refused = [await next(answers) for _ in range(2)]
        gate.set()
        served = [await answer for answer in answers]
    assert [answer.status_code for answer in refused] == [429, 429]
    assert [answer.status_code for answer in served] == [200, 200]
    assert int(refused[0].headers["retry-after"]) >= 1
    assert refused[0].json()["error"]["type"] == "rate_limit_error"


async def test_clients_take_turns() -> None:
    """A client with one request is not behind all of another client's."""
    order: list[str] = []
    gate = asyncio.Event()
    async with StubServer(StubReplica(saying("a"), gate), max_concurrent_responses=1) as server:
        admission = server.service.admission

        async def ask(name: str) -> None:
            await server.client.post(
                "/v1/completions", json={"model": "stub", "prompt": name}, headers={"authorization": f"Bearer {name}"}
            )
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(ask("many"))
            await until(lambda: admission.waiting == 5)
            group.create_task(ask("one"))
            await until(lambda: admission.waiting == 6)
            gate.set()
    assert order.index("one") <= 2


async def test_the_deadline_is_a_504_and_in_a_stream_an_error_event() -> None:
    replica = StubReplica(lambda request: list(ERASING), gate=asyncio.Event(), said_before_gate=2)
    async with StubServer(replica, request_seconds=0.5) as server:
        whole = await server.post(prompt="a")
        chunks = await server.stream(prompt="a")
    assert whole.status_code == 504
    assert chunks[-1]["error"]["code"] == "deadline_exceeded"
    assert replica.under_way == 0


@pytest.mark.parametrize("also_cancelled", [False, True], ids=["uvicorn", "ray-serve"])
async def test_a_disconnect_cancels_the_generation(also_cancelled: bool) -> None:
    """Over ASGI itself: the client leaves while nothing is being sent. Ray Serve then cancels the call too."""
    replica = StubReplica(saying("a", "b"), gate=asyncio.Event())
    async with StubServer(replica) as server:
        body = json.dumps({"model": "stub", "prompt": "a", "stream": True}).encode()
        left = asyncio.Event()
        messages = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError(f"nothing was to be sent: {message}")

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "http_version": "1.1",
            "scheme": "http",
        }
        call = asyncio.create_task(server.app(scope, receive, send))
        await until(lambda: replica.under_way > 0)
        left.set()
        if also_cancelled:
            await until(lambda: replica.under_way == 0)
            call.cancel()
        async with asyncio.timeout(1.0):
            await asyncio.wait([call])
        assert call.cancelled() == also_cancelled
        assert not server.service.under_way
        assert replica.under_way == 0
        assert server.service.admission.busy == 0
        assert "e3rl_disconnects_total 1.0" in (await server.client.get("/metrics")).text


async def test_a_server_that_is_stopping_refuses_new_requests() -> None:
    gate = asyncio.Event()
    replica = StubReplica(saying("a"), gate)
    async with StubServer(replica) as server:
        call = asyncio.create_task(server.post(prompt="a"))
        await until(lambda: replica.under_way > 0)
        stopping = asyncio.create_task(server.service.stop(5.0))
        await asyncio.sleep(0)
        refused, ready = await server.post(prompt="a"), await server.client.get("/ready")
        gate.set()
        await stopping
        answer = await call
    assert (refused.status_code, ready.status_code, answer.status_code) == (503, 503, 200)
    assert "shutting down" in refused.json()["error"]["message"]
