"""The endpoint as a Ray Serve deployment, from its start to its end: one, because a start takes half a minute."""

import time
from pathlib import Path
from typing import Any

import httpx

from tests.http_server import Background, ServerProcess, events, running_server, texts
from tests.otlp_collector import Collector, attributes, running_collector

KEY = "a-key-for-the-deployment"
ERASING = {"threshold": 0, "max_erasures": 1, "segmentation": {"mode": "fixed", "length": 4}, "regeneration_budget": 9}
LONG: dict[str, Any] = {
    "prompt": "Hello",
    "max_tokens": 1000,
    "n": 8,
    "ignore_eos": True,
    "erasure": {"enabled": False},
}
SHUTDOWN_SECONDS = 2


def test_a_deployment_serves_and_ends_in_good_order(http_model: Path, tmp_path: Path) -> None:
    flags = ["--serve", "--shutdown-seconds", str(SHUTDOWN_SECONDS), "--num-gpu-blocks-override", "768"]
    with running_collector() as collector:
        flags += ["--otlp-endpoint", collector.url]
        with running_server(http_model, tmp_path, *flags, E3RL_API_KEY=KEY) as server:
            check_keys(server)
            check_generation(server)
            check_other_routes(server)
            check_administration(server, http_model)
            for stream in (True, False):
                check_disconnect(server, stream)
            check_end(server)
        check_traces(collector)
    assert KEY not in server.log.read_text()


def check_keys(server: ServerProcess) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    for base, route in ((server.url, "/v1/models"), (server.url, "/nothing"), (server.admin, "/weights")):
        for headers in ({}, {"authorization": "Bearer another-key"}):
            refused = httpx.get(base + route, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def check_generation(server: ServerProcess) -> None:
    request: dict[str, Any] = {"prompt": "Hello", "max_tokens": 17, "n": 3, "seed": 1, "ignore_eos": True}
    whole = server.complete(**request, erasure=ERASING)
    assert whole["usage"]["completion_tokens_details"]["erased_tokens"] == 3 * 17
    for mode in ("commit", "live"):
        answer = server.post("/v1/completions", **request, stream=True, erasure={**ERASING, "stream": mode})
        assert answer.headers["content-type"] == "text/event-stream"
        chunks = list(events(iter(answer.text.split("\n"))))
        assert texts(chunks, 3) == [choice["text"] for choice in whole["choices"]]
        retracts = any("retract_characters" in (c.get("erasure") or {}) for chunk in chunks for c in chunk["choices"])
        assert retracts == (mode == "live")
    messages = [{"role": "user", "content": "Hello"}]
    assert server.post("/v1/chat/completions", messages=messages, max_tokens=4).json()["choices"][0]["message"]
    unknown = server.post("/v1/completions", prompt="Hello", promt="Hello")
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "promt")


def check_other_routes(server: ServerProcess) -> None:
    assert [model["id"] for model in server.client.get("/v1/models").json()["data"]] == [server.model]
    assert server.client.get("/ready").json()["status"] == "ready"
    assert server.metric("e3rl_erased_tokens_total") > 0
    assert server.metric("vllm:generation_tokens_total") > 0
    assert server.client.get("/nothing").json()["error"]["code"] == "unknown_url"
    given = server.client.get("/v1/models", headers={"x-request-id": "from-the-test"})
    assert given.headers.get_list("x-request-id") == ["from-the-test"]


def check_administration(server: ServerProcess, model: Path) -> None:
    synced = server.admin_client.post("/weights/sync", json={"path": str(model.parent / "other")})
    assert synced.status_code == 200, synced.text
    held = server.admin_client.get("/weights").json()["replicas"]
    assert [(replica["policy_version"], replica["checksum"]) for replica in held] == [(1, synced.json()["checksum"])]
    assert server.complete(max_tokens=2)["choices"][0]["erasure"]["policy_version"] == 1
    assert server.admin_client.post("/pause", json={"mode": "wait"}).json() == {"paused": True, "mode": "wait"}
    call = Background(lambda: server.complete(max_tokens=2))
    assert call.is_pending()
    assert server.admin_client.post("/resume").json() == {"paused": False, "mode": None}
    assert call.result()["choices"]


def check_disconnect(server: ServerProcess, stream: bool) -> None:
    before = server.metric("e3rl_disconnects_total")
    client = httpx.Client(base_url=server.url, headers=server.client.headers, timeout=1.0)
    try:
        with client.stream("POST", "/v1/completions", json={"model": server.model, **LONG, "stream": stream}):
            server.wait_for("e3rl_responses_active", 8)
    except httpx.ReadTimeout:
        assert not stream
    client.close()
    server.settle()
    assert server.metric("e3rl_disconnects_total") == before + 1


def check_end(server: ServerProcess) -> None:
    """A request that is too long for the time left ends with the error."""
    body = {"model": server.model, **LONG, "n": 32, "stream": True}
    headers = dict(server.client.headers)
    call = Background(lambda: httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60.0))
    server.wait_for("e3rl_responses_active", 32)
    started = time.monotonic()
    code = server.stop()
    assert time.monotonic() - started < SHUTDOWN_SECONDS + 25
    chunks = list(events(iter(call.result(5.0).text.split("\n"))))
    assert "shutting down" in chunks[-1]["error"]["message"]
    assert code == 0


def check_traces(collector: Collector) -> None:
    """What was not sent before the end was sent then."""
    routes = [attributes(span).get("http.route") for span in collector.spans]
    assert routes.count("/weights/sync") == 1
    erased = [span for span in collector.spans if attributes(span).get("e3rl.verdict") == "erased"]
    of_check_generation = [span for span in erased if attributes(span).get("e3rl.threshold") == 0.0]
    assert len(of_check_generation) == 3 * 3 * 5, "requests, choices, segments"
