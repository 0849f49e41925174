"""The admin listener's routes, and what the public one does while replicas are lost."""

import asyncio

from rollout_server.replicas.replica import ReplicaLost
from tests.stub_replica import StubReplica, StubServer, erasing_server, saying, until


async def test_admin_routes() -> None:
    async with erasing_server() as server:
        weights = (await server.admin.get("/weights")).json()
        paused = await server.admin.post("/pause", json={"mode": "wait"})
        wrong = await server.admin.post("/pause", json={"mode": "nap"})
        strange = await server.admin.post("/resume", json={"mode": "wait"})
        resumed = await server.admin.post("/resume")
        nowhere = await server.admin.post("/weights/sync", json={"path": "/nowhere/secret"})
        public = [await server.admin.post("/v1/completions", json={}), await server.admin.get("/metrics")]
    (held,) = weights["replicas"]
    assert held == {
        "replica": 0,
        "policy_version": 0,
        "checksum": None,
        "error": None,
        "non_finite_version": None,
        "last_sync": None,
    }
    assert paused.json() == {"paused": True, "mode": "wait"}
    assert wrong.status_code == 400
    assert (strange.status_code, strange.json()["error"]["param"]) == (400, "mode")
    assert resumed.json() == {"paused": False, "mode": None}
    assert nowhere.status_code == 400
    assert "secret" not in nowhere.text
    assert {answer.status_code for answer in public} == {404}


async def test_a_lost_replica_is_restarted_and_its_requests_are_answered() -> None:
    replica = StubReplica(saying("fine"))
    replica.failures = [ReplicaLost("killed"), ReplicaLost("killed")]
    async with StubServer(replica) as server:
        answers = await asyncio.gather(*(server.post(prompt="a", n=2) for _ in range(3)))
        assert [answer.json()["choices"][0]["text"] for answer in answers] == ["fine"] * 3
        metrics = (await server.client.get("/metrics")).text
    assert "e3rl_replica_restarts 1.0" in metrics
    assert replica.calls.count("start") == 2


async def test_without_a_replica_requests_are_a_503_and_ready_says_why() -> None:
    replica = StubReplica(saying("a"))
    async with StubServer(replica) as server:
        server.replicas.members[0].error = "died and could not be restarted 5 times"
        answer, ready = await server.post(prompt="a"), await server.client.get("/ready")
        health = await server.client.get("/health")
    assert (answer.status_code, ready.status_code, health.status_code) == (503, 503, 200)
    assert "replica 0 died" in ready.json()["error"]["message"]
    assert ready.json()["replicas"] == [
        {"replica": 0, "ready": False, "error": "died and could not be restarted 5 times"}
    ]


async def test_a_pause_reaches_replicas_without_weights_and_those_that_come_back() -> None:
    """Or the next sync would set them going, and after a resume leave them paused."""
    replica, other = StubReplica(saying("a")), StubReplica(saying("b"))
    async with StubServer(replica, other) as server:
        server.replicas.members[0].error = "holds no complete weights: its last sync failed"
        other.pause_failures = [ReplicaLost("killed")]
        assert (await server.admin.post("/pause", json={"mode": "wait"})).status_code == 200
        await until(lambda: other.calls.count("pause wait") == 2)
        assert (await server.admin.post("/resume")).status_code == 200
    assert replica.calls == ["start", "pause wait", "resume", "close"]
    assert other.calls == ["start", "pause wait", "start", "pause wait", "resume", "close"]
