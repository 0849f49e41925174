"""`/ready` says when nothing gets on, and only then; metrics say what is taken of what there is."""

import asyncio
import time
from typing import Any

import pytest

from rollout_server.replicas.use import EngineUse
from tests.stub_replica import StubReplica, StubServer, saying, until

LONG_AGO = 1000.0


async def ready(server: StubServer) -> tuple[int, str]:
    answer = await server.client.get("/ready")
    return answer.status_code, answer.json().get("error", {}).get("message", "")


def let_time_pass(server: StubServer) -> None:
    """Nothing has moved for long."""
    server.service.admission.moved -= LONG_AGO
    server.replicas.moved -= LONG_AGO


async def test_a_server_that_has_lost_its_places_is_not_ready_though_its_replica_answers() -> None:
    async with StubServer(StubReplica(saying("a")), max_concurrent_responses=4) as server:
        await server.service.admission.acquire("a client that is forgotten", 4)
        assert (await ready(server))[0] == 200, "it may be generating"
        let_time_pass(server)
        # Clients that come, wait and leave are no progress.
        for _ in range(3):
            waiting = asyncio.create_task(server.post(prompt="a"))
            await until(lambda: server.service.admission.waiting == 1)
            status, message = await ready(server)
            assert (status, "4 of 4 places are taken and 1 requests wait" in message) == (503, True)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await until(lambda: server.service.admission.waiting == 0)
        assert (await ready(server))[0] == 503
        stalled = float(await metric(server, "e3rl_stalled_seconds"))
        assert LONG_AGO <= stalled < LONG_AGO + 60.0
        server.service.admission.release(4)
        assert (await ready(server))[0] == 200
        assert (await server.post(prompt="a")).status_code == 200


async def test_an_engine_that_makes_steps_gets_on_however_long_its_responses_take() -> None:
    gate = asyncio.Event()
    replica = StubReplica(saying("a"), gate)
    async with StubServer(replica, max_concurrent_responses=1) as server:
        calls = [asyncio.create_task(server.post(prompt="a")) for _ in range(3)]
        await until(lambda: server.service.admission.waiting == 2)
        for steps in range(1, 4):
            let_time_pass(server)
            replica.use = EngineUse(steps=steps)
            assert (await ready(server))[0] == 200
        let_time_pass(server)
        assert (await ready(server))[0] == 503
        gate.set()
        await asyncio.gather(*calls)
        let_time_pass(server)
        assert await ready(server) == (200, ""), "idle"


async def test_what_is_paused_or_gets_weights_has_not_stalled() -> None:
    gate = asyncio.Event()
    async with StubServer(StubReplica(saying("a"), gate)) as server:
        call = asyncio.create_task(server.post(prompt="a"))
        await until(lambda: server.service.admission.busy == 1)
        await server.admin.post("/pause", json={"mode": "keep"})
        let_time_pass(server)
        assert (await ready(server))[0] == 200
        await server.admin.post("/resume")
        assert (await ready(server))[0] == 200, "just resumed"
        let_time_pass(server)
        async with server.replicas._changing:
            assert (await ready(server))[0] == 200
        assert (await ready(server))[0] == 503
        gate.set()
        await call


async def metric(server: StubServer, name: str) -> str:
    lines = (await server.client.get("/metrics")).text.splitlines()
    (line,) = [line for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return line.rpartition(" ")[2]


async def test_metrics_tell_what_is_taken_now() -> None:
    gate = asyncio.Event()
    replica = StubReplica(saying("a"), gate)
    async with StubServer(replica, max_concurrent_responses=8) as server:
        call = asyncio.create_task(server.post(prompt="a", n=3))
        await until(lambda: server.service.admission.busy == 3)
        for busy in (2, 0):
            replica.use = EngineUse(steps=1, slots=8, slots_in_use=busy, kv_blocks=100, kv_blocks_in_use=5 * busy)
            names = (
                "places",
                "places_in_use",
                "monitor_slots",
                "monitor_slots_in_use",
                "kv_blocks",
                "kv_blocks_in_use",
            )
            values = [float(await metric(server, f"e3rl_{name}")) for name in names]
            assert values == [8, 3, 8, busy, 100, 5 * busy]
        gate.set()
        await call


async def test_many_who_ask_cost_the_engine_one_probe_and_one_that_hangs_holds_nobody_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = StubReplica(saying("a"))
    asked, answers = 0, asyncio.Event()

    async def probe() -> Any:
        nonlocal asked
        asked += 1
        await answers.wait()
        return EngineUse(kv_blocks=7)

    monkeypatch.setattr(replica, "probe", probe)
    monkeypatch.setattr("rollout_server.http.routes.service_routes.FRESH_SECONDS", 0.1)
    async with StubServer(replica) as server:
        started = time.monotonic()
        scrapes = await asyncio.gather(*(server.client.get("/metrics") for _ in range(20)))
        assert time.monotonic() - started < 0.9, "less than the probe's own deadline"
        assert ({scrape.status_code for scrape in scrapes}, asked) == ({200}, 1)
        assert (await ready(server))[0] == 503
        answers.set()
        assert await metric(server, "e3rl_kv_blocks") == "7.0"
        answers.clear()
