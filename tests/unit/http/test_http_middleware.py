"""What holds for every route: keys, longest bodies and headers, request ids, spans."""

import socket
import time
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from rollout_server.http.openai.schema.service import ErrorAnswer
from rollout_server.http.server import tracing as tracing_module
from rollout_server.http.server.logs import FIELDS
from rollout_server.http.server.tracing import Tracing, otlp_tracing
from tests.stub_replica import ERASING, erasing_server

JSON = {"content-type": "application/json"}


async def test_every_route_but_health_needs_a_key() -> None:
    keys = ("first-key-123", "second-key-456")
    async with erasing_server(api_key=keys) as server:
        for client, app in ((server.client, server.app), (server.admin, server.admin_app)):
            operations = [
                (method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods
            ]
            assert len(operations) >= 5
            for method, path in [*operations, ("GET", "/openapi.json"), ("GET", "/nothing")]:
                for header in ({}, {"authorization": "Bearer wrong-key-000"}, {"authorization": "Basic first-key-123"}):
                    answer = await client.request(method, path, headers=header)
                    assert answer.status_code == (200 if path == "/health" else 401), (method, path)
                for key in keys:
                    answer = await client.request(method, path, headers={"authorization": f"Bearer {key}"})
                    assert answer.status_code != 401
                    assert key not in answer.text
        assert "first-key-123" not in repr(server.settings)
        assert isinstance(server.settings.api_key[0], SecretStr)


async def test_bodies_and_headers_have_limits() -> None:
    async def chunked() -> Any:
        for _ in range(5):
            yield b"x" * 1000

    async with erasing_server(max_body_bytes=2048) as server:
        long = await server.post(prompt="a" * 3000)
        without_length = await server.client.post("/v1/completions", content=chunked(), headers=JSON)
        headers = await server.client.get("/health", headers={"x-long": "a" * 40_000})
    assert (long.status_code, without_length.status_code, headers.status_code) == (413, 413, 431)
    for answer in (long, without_length, headers):
        ErrorAnswer.model_validate_json(answer.text)


async def test_request_ids_are_taken_over_if_they_are_harmless() -> None:
    async with erasing_server() as server:
        given = await server.client.get("/health", headers={"x-request-id": "abc-1"})
        odd = await server.client.get("/health", headers={"x-request-id": "a b\t{}"})
        metrics = await server.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert given.headers["x-request-id"] == "abc-1"
    assert odd.headers["x-request-id"] != "a b\t{}"
    assert 'request_id="' in metrics.text


async def test_the_log_names_request_route_and_user(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "e3rl.http"):
        async with erasing_server() as server:
            await server.post(prompt="a", user="bob")
            await server.client.get("/v1/models")
    (named, unnamed) = [getattr(record, FIELDS) for record in caplog.records if record.message == "request"]
    assert (named["route"], named["status"], named["user"]) == ("/v1/completions", "200", "bob")
    assert (unnamed["route"], "user" in unnamed) == ("/v1/models", False)


async def test_a_span_for_the_request_and_one_for_each_attempt() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with erasing_server(tracing=tracing) as server:
        body = {"model": "stub", "prompt": "a"}
        await server.client.post("/v1/completions", json=body, headers={"traceparent": parent})
    tracing.close()
    spans = exporter.get_finished_spans()
    request = next(span for span in spans if span.name == "POST /v1/completions")
    attempts = [span for span in spans if span.name == "attempt"]
    assert f"{request.context.trace_id:032x}" == parent.split("-")[1]
    assert [(s.attributes or {})["e3rl.verdict"] for s in attempts] == [verdict for verdict, _ in ERASING]
    assert all(span.parent is not None and span.parent.span_id == request.context.span_id for span in attempts)
    for span in attempts:
        times = [request.start_time, span.start_time, span.end_time, request.end_time]
        assert times == sorted(time for time in times if time is not None)


def test_a_collector_that_never_answers_does_not_keep_the_server_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing_module, "CLOSE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracing = otlp_tracing(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        tracing.request("GET", {}, time.time_ns()).end()
        started = time.monotonic()
        tracing.close()
        assert 0.1 < time.monotonic() - started < 2.0
