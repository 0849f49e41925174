"""A server with a short deadline, a short queue, a key and a trace collector; and limits of one with the defaults."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.http_server import FIRST_TOKENS, Background, ServerProcess, events, running_server
from tests.otlp_collector import Collector, attributes, running_collector

KEY = "a-key-nobody-may-see"
PROMPT = "a prompt nobody may see"
SECONDS = 4.0
PLACES = 4
STOP_SECONDS = 20.0
ERASING = {"threshold": 0, "max_erasures": 1, "segmentation": {"mode": "fixed", "length": 4}, "regeneration_budget": 9}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def narrow(collector: Collector, http_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The collector is gone when the server ends, which must end all the same."""
    flags = ["--request-seconds", str(SECONDS), "--max-waiting-requests", "1", "--num-gpu-blocks-override", "768"]
    flags += ["--max-concurrent-responses", str(PLACES), "--otlp-endpoint", collector.url]
    variables = {"E3RL_API_KEY": KEY, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with running_server(http_model, tmp_path_factory.mktemp("narrow"), *flags, **variables) as server:
        yield server
        collector.stop()
        server.complete(max_tokens=1)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < STOP_SECONDS


@contextmanager
def paused(server: ServerProcess) -> Iterator[None]:
    """Whatever is asked meanwhile takes as long as it must for the test."""
    assert server.admin_client.post("/pause", json={"mode": "keep"}).status_code == 200
    try:
        yield
    finally:
        assert server.admin_client.post("/resume").status_code == 200


def in_background(server: ServerProcess, **body: Any) -> Background[httpx.Response]:
    return Background(lambda: server.post("/v1/completions", prompt=PROMPT, ignore_eos=True, **body))


def test_the_deadline_ends_answers_and_streams_and_frees_their_blocks(narrow: ServerProcess) -> None:
    begun = narrow.metric(FIRST_TOKENS)
    whole = in_background(narrow, max_tokens=900, n=2, erasure=ERASING)
    stream = in_background(narrow, max_tokens=900, stream=True, erasure={**ERASING, "stream": "live"})
    narrow.wait_for(FIRST_TOKENS, begun + 2)
    with paused(narrow):
        held = in_background(narrow, max_tokens=2, stream=True).result(2 * SECONDS)
        answer, chunks = whole.result(1.0), list(events(iter(stream.result(1.0).text.split("\n"))))
    assert answer.status_code == held.status_code == 504
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert f"{SECONDS:g} s" in error["message"]
    assert [chunk["error"] for chunk in chunks if "error" in chunk] == [chunks[-1]["error"]] == [error]
    narrow.settle()


def test_a_full_queue_is_a_429_and_those_who_wait_get_their_turn(narrow: ServerProcess) -> None:
    with paused(narrow):
        first = in_background(narrow, max_tokens=2, n=PLACES)
        narrow.wait_for("e3rl_responses_active", PLACES)
        second = in_background(narrow, max_tokens=2)
        narrow.wait_for("e3rl_requests_waiting", 1)
        refused = [narrow.post("/v1/completions", prompt=PROMPT, stream=stream) for stream in (False, True)]
    for answer in refused:
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error"
    assert [call.result().status_code for call in (first, second)] == [200, 200]
    narrow.settle()


def test_n_has_a_limit_that_can_be_reached(server: ServerProcess) -> None:
    """128 is more than the server generates at a time."""
    answer = server.complete(max_tokens=3, n=128, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))
    assert answer["usage"]["completion_tokens"] == 3 * 128
    for body in ({"prompt": "a", "n": 129}, {"prompt": ["a"] * 9, "n": 128}):
        refused = server.post("/v1/completions", **body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    server.settle()


def test_a_body_may_have_4_mib_and_no_more(server: ServerProcess) -> None:
    body = json.dumps({"model": server.model, "prompt": "a"}).encode()
    longest = body + b" " * (4 * 2**20 - len(body))
    headers = {"content-type": "application/json"}
    assert server.client.post("/v1/completions", content=longest, headers=headers).status_code == 200
    for content in (longest + b" ", iter([longest, b" "])):
        refused = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers, timeout=60.0)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "body_too_long"


@pytest.mark.parametrize("stream", [None, "commit", "live"])
def test_the_collector_gets_a_span_for_a_request_and_one_below_for_each_attempt(
    narrow: ServerProcess, collector: Collector, stream: str | None
) -> None:
    request_id = f"traced-{stream}"
    erasure = {**ERASING, **({"stream": stream} if stream else {})}
    body = {"model": narrow.model, "prompt": PROMPT, "max_tokens": 12, "n": 2, "ignore_eos": True, "erasure": erasure}
    answer = narrow.client.post(
        "/v1/completions",
        json={**body, "stream": stream is not None},
        headers={"x-request-id": request_id, "traceparent": PARENT},
    )
    assert answer.status_code == 200, answer.text
    span = collector.wait_for_request(request_id)
    _, trace_id, parent_id, _ = PARENT.split("-")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace_id, parent_id)
    assert (span.name, span.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    assert attributes(span)["http.route"] == "/v1/completions"
    assert attributes(span)["http.response.status_code"] == 200
    below = collector.children(span)
    for choice in range(2):
        attempts = [attributes(child) for child in below if attributes(child)["e3rl.choice"] == choice]
        assert [(a["e3rl.segment"], a["e3rl.attempt"], a["e3rl.verdict"]) for a in attempts] == [
            (segment, attempt, ("erased", "accepted")[attempt]) for segment in range(3) for attempt in range(2)
        ]
        assert {a["e3rl.tokens"] for a in attempts} == {4}
        assert {a["e3rl.threshold"] for a in attempts if a["e3rl.verdict"] == "erased"} == {0.0}
    for child in below:
        assert child.name == "attempt"
        assert child.trace_id == span.trace_id
        assert span.start_time_unix_nano <= child.start_time_unix_nano <= child.end_time_unix_nano
        assert child.end_time_unix_nano <= span.end_time_unix_nano


def test_traces_hold_failures_but_neither_keys_nor_texts(narrow: ServerProcess, collector: Collector) -> None:
    bad = narrow.client.post(
        "/v1/completions", json={"model": narrow.model, "prompt": PROMPT, KEY: 1}, headers={"x-request-id": "bad"}
    )
    refused = httpx.get(f"{narrow.admin}/weights?{KEY}", headers={"x-request-id": "no-key"})
    statuses = {
        name: attributes(collector.wait_for_request(name))["http.response.status_code"] for name in ("bad", "no-key")
    }
    assert statuses == {"bad": bad.status_code, "no-key": refused.status_code} == {"bad": 400, "no-key": 401}
    for body in collector.bodies:
        assert KEY.encode() not in body
        assert PROMPT.encode() not in body


def test_a_collector_that_is_down_hinders_nobody(narrow: ServerProcess, collector: Collector) -> None:
    with collector.down():
        for number in range(20):
            answer = narrow.client.post(
                "/v1/completions",
                json={"model": narrow.model, "prompt": PROMPT, "max_tokens": 1},
                headers={"x-request-id": f"down-{number}"},
            )
            assert answer.status_code == 200
            assert answer.elapsed.total_seconds() < SECONDS / 2
    assert attributes(collector.wait_for_request("down-0"))["http.response.status_code"] == 200
