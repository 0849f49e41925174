"""Routes of both listeners over stub replicas: shapes of answers, errors, keys, limits, losses of replicas."""

import asyncio
import json
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import SecretStr

from rollout_server.http.replicas import ReplicaLost
from rollout_server.http.schema.chat import ChatChunk, ChatCompletion
from rollout_server.http.schema.completion import Completion, CompletionChunk
from rollout_server.http.schema.service import ErrorAnswer
from rollout_server.http.tracing import Tracing
from tests.http_server import events, texts
from tests.stub_replica import StubReplica, StubServer, saying

ERASING = [("accepted", "Ünd "), ("erased", "€wro"), ("erased", "ng😀"), ("accepted", "right"), ("accepted", ".")]


def stub(**settings: Any) -> StubServer:
    return StubServer(StubReplica(lambda request: list(ERASING)), **settings)


async def stream(server: StubServer, route: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    answer = await server.post(route, stream=True, **body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream"
    return list(events(iter(answer.text.split("\n"))))


async def test_a_completion_is_what_the_schema_says() -> None:
    async with stub() as server:
        answer = await server.post(prompt="Hi", n=2, return_token_ids=True, logprobs=0)
    completion = Completion.model_validate_json(answer.text)
    assert [choice.text for choice in completion.choices] == ["Ünd right."] * 2
    choice = completion.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.token_ids is not None
    assert choice.token_ids[-1] == 256
    assert choice.logprobs is not None
    assert len(choice.logprobs.tokens) == len(choice.token_ids)
    report = choice.erasure
    assert report.policy_version == 7
    assert report.segments is not None
    assert [(s.index, s.attempt, s.verdict, s.text) for s in report.segments] == [
        (0, 0, "accepted", "Ünd "),
        (1, 0, "erased", "€wro"),
        (1, 1, "erased", "ng😀"),
        (1, 2, "accepted", "right"),
        (2, 0, "accepted", "."),
    ]
    assert report.segments[0].threshold is None
    assert report.erased_tokens == len("€wrong😀".encode())
    assert report.generated_tokens == report.erased_tokens + len(choice.token_ids)
    assert completion.usage.completion_tokens == 2 * len(choice.token_ids)
    assert completion.usage.completion_tokens_details.erased_tokens == 2 * report.erased_tokens
    assert completion.usage.prompt_tokens == 2


async def test_commit_and_live_streams_give_the_same_text() -> None:
    async with stub() as server:
        commit = await stream(server, prompt="Hi")
        live = await stream(server, prompt="Hi", erasure={"stream": "live"}, stream_options={"include_usage": True})
    for chunk in [*commit, *live]:
        CompletionChunk.model_validate(chunk)
    assert texts(commit, 1) == texts(live, 1) == ["Ünd right."]
    assert not any((c.get("erasure") or {}).get("event") == "erase" for chunk in commit for c in chunk["choices"])
    retracted = [
        (c["erasure"]["segment"], c["erasure"]["attempt"], c["erasure"]["retract_characters"])
        for chunk in live
        for c in chunk["choices"]
        if (c.get("erasure") or {}).get("event") == "erase"
    ]
    assert retracted == [(1, 0, len("€wro")), (1, 1, len("ng😀"))]
    assert live[-1]["choices"] == []
    assert live[-1]["usage"]["completion_tokens"] == len("Ünd right.".encode()) + 1
    assert all(chunk["usage"] is None for chunk in live[:-1])


async def test_chat_streams_begin_with_the_role() -> None:
    async with stub() as server:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        chunks = await stream(server, "/v1/chat/completions", messages=messages, max_tokens=20)
        whole = await server.post("/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2)
    for chunk in chunks:
        ChatChunk.model_validate(chunk)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert texts(chunks, 1) == ["Ünd right."]
    completion = ChatCompletion.model_validate_json(whole.text)
    assert completion.choices[0].message.content == "Ünd right."
    entry = completion.choices[0].logprobs.content[0]  # type: ignore[union-attr]
    assert [top.logprob for top in entry.top_logprobs] == [-0.5, -1.0]


@pytest.mark.parametrize(("stop", "text"), [("wro", "Ünd right."), ("d ri", "Ün"), (["t.", "gh"], "Ünd ri")])
@pytest.mark.parametrize("mode", ["commit", "live"])
async def test_stop_strings_count_in_committed_text_only(stop: Any, text: str, mode: str) -> None:
    async with stub() as server:
        whole = Completion.model_validate_json(
            (await server.post(prompt="Hi", stop=stop, return_token_ids=True)).text
        ).choices[0]
        chunks = await stream(server, prompt="Hi", stop=stop, erasure={"stream": mode})
    assert whole.text == text
    assert whole.finish_reason == "stop"
    assert texts(chunks, 1) == [text]
    accepted = [segment for segment in whole.erasure.segments or [] if segment.verdict == "accepted"]
    assert "".join(segment.text for segment in accepted) == text
    assert [token for segment in accepted for token in segment.token_ids] == whole.token_ids


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"promt": "a"}, "promt", "unknown"),
    ({"prompt": "a", "erasure": {"kapa": 1}}, "erasure.kapa", "unknown"),
    ({"prompt": "a", "erasure": {"weights": {"bass": 1}}}, "erasure.weights.bass", "unknown"),
    ({"prompt": "a", "erasure": {"segmentation": {"mode": "fixed", "len": 1}}}, "erasure.segmentation.len", "unknown"),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown"),
    ({}, "prompt", "required"),
    ({"prompt": ""}, "prompt", "at least 1"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": ["a", 1]}, "prompt", "valid string"),
    ({"prompt": [320]}, "prompt", "below 320"),
    ({"prompt": [[1], [400]]}, "prompt[1]", "below 320"),
    ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "a", "n": 129}, "n", "less than or equal to 128"),
    ({"prompt": "a", "n": "1"}, "n", "valid integer"),
    ({"prompt": "a", "n": True}, "n", "valid integer"),
    ({"prompt": "a", "temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"prompt": "a", "temperature": 0}, "erasure.retry_temperature", "retry_temperature"),
    ({"prompt": "a", "temperature": 0, "erasure": {"kappa": 1}}, "erasure.retry_temperature", "retry_temperature"),
    ({"prompt": "a", "max_tokens": 1024}, "max_tokens", "1 tokens and the response at most 1024"),
    ({"prompt": "a" * 1100}, "prompt", "has 1100 tokens"),
    ({"prompt": "a", "stream_options": {}}, None, "stream_options can only"),
    ({"prompt": "a", "stop": [""]}, "stop", "at least 1"),
    ({"prompt": "a", "erasure": {"max_erasures": -1}}, "erasure.max_erasures", "greater"),
    ({"prompt": "a", "erasure": {"segmentation": {"mode": "words"}}}, "erasure.segmentation", "fixed"),
    ({"prompt": "a", "erasure": {"stream": "never"}}, "erasure.stream", "commit"),
    ({"prompt": ["a"] * 1000, "n": 128}, "n", "128000 responses"),
]


@pytest.mark.parametrize(("body", "param", "text"), WRONG, ids=[json.dumps(body)[:60] for body, _, _ in WRONG])
async def test_what_is_wrong_is_a_400_that_names_it(body: dict[str, Any], param: str | None, text: str) -> None:
    async with stub() as server:
        answer = await server.post(**body)
    error = ErrorAnswer.model_validate_json(answer.text).error
    assert answer.status_code == 400
    assert error.type == "invalid_request_error"
    assert error.param == param
    assert text in error.message


@pytest.mark.parametrize(
    "raw",
    [b"{", b"[]", b"null", b"\xff", b'{"model":"stub","prompt":"a","temperature":NaN}', b"[" * 5000, b'"\\ud800"'],
)
async def test_what_is_no_json_object_is_a_400(raw: bytes) -> None:
    async with stub() as server:
        answer = await server.client.post("/v1/completions", content=raw)
    assert answer.status_code == 400
    ErrorAnswer.model_validate_json(answer.text)


async def test_unknown_models_routes_and_methods() -> None:
    async with stub() as server:
        model = await server.post(model="/etc/passwd", prompt="a")
        route = await server.client.get("/v2/nothing")
        method = await server.client.delete("/v1/models")
        slash = await server.client.get("/v1/models/")
        admin = [await server.client.request(m, p) for m, p in (("GET", "/weights"), ("POST", "/pause"))]
    assert (model.status_code, model.json()["error"]["param"]) == (404, "model")
    assert "/etc" not in model.text
    assert method.status_code == 405
    assert method.headers["allow"] == "GET"
    for answer in (model, route, method, slash, *admin):
        ErrorAnswer.model_validate_json(answer.text)
    assert {answer.status_code for answer in (route, slash, *admin)} == {404}


async def test_bodies_and_headers_have_limits() -> None:
    async def chunked() -> Any:
        for _ in range(5):
            yield b"x" * 1000

    async with stub(max_body_bytes=2048) as server:
        long = await server.post(prompt="a" * 3000)
        without_length = await server.client.post("/v1/completions", content=chunked())
        headers = await server.client.get("/health", headers={"x-long": "a" * 40_000})
    assert (long.status_code, without_length.status_code, headers.status_code) == (413, 413, 431)
    for answer in (long, without_length, headers):
        ErrorAnswer.model_validate_json(answer.text)


async def test_every_route_but_health_needs_a_key() -> None:
    keys = ("first-key-123", "second-key-456")
    async with stub(api_key=keys) as server:
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


async def test_a_full_queue_is_a_429_with_retry_after() -> None:
    replica = StubReplica(saying("a"), delay=0.2)
    async with StubServer(replica, max_concurrent_responses=1, max_waiting_requests=1) as server:
        answers = await asyncio.gather(*(server.post(prompt="a") for _ in range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


async def test_clients_take_turns() -> None:
    """A client with one request is not behind all of another client's."""
    order: list[str] = []
    replica = StubReplica(saying("a"), delay=0.02)
    async with StubServer(replica, max_concurrent_responses=1) as server:

        async def ask(name: str) -> None:
            await server.client.post(
                "/v1/completions", json={"model": "stub", "prompt": name}, headers={"authorization": f"Bearer {name}"}
            )
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for _ in range(6):
                group.create_task(ask("many"))
            await asyncio.sleep(0.005)
            group.create_task(ask("one"))
    assert order.index("one") <= 2


async def test_the_deadline_is_a_504_and_in_a_stream_an_error_event() -> None:
    replica = StubReplica(lambda request: list(ERASING), delay=0.2)
    async with StubServer(replica, request_seconds=0.5) as server:
        whole = await server.post(prompt="a")
        chunks = await stream(server, prompt="a")
    assert whole.status_code == 504
    assert chunks[-1]["error"]["code"] == "deadline_exceeded"
    assert replica.under_way == 0


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


async def test_an_unexpected_failure_is_a_500_without_its_cause() -> None:
    replica = StubReplica(saying("a"))
    replica.failures = [ValueError("secret at /private/model")]
    async with StubServer(replica) as server:
        answer = await server.post(prompt="a")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


async def test_erasure_off_goes_through_plain_generation_with_vllms_seeds() -> None:
    replica = StubReplica(saying("plain"))
    async with StubServer(replica) as server:
        answer = await server.post(prompt=["a", "b"], n=3, seed=5, erasure={"enabled": False})
        chunks = await stream(server, prompt="a", erasure={"enabled": False, "stream": "live"}, stop="ai")
    assert [r.seed for r in replica.requests[:6]] == [5, 6, 7, 5, 6, 7]
    assert all(r.policy is None for r in replica.requests)
    assert len({r.group_id for r in replica.requests[:6]}) == 2
    assert [c["index"] for c in answer.json()["choices"]] == list(range(6))
    assert answer.json()["choices"][0]["erasure"]["segments"] == []
    assert texts(chunks, 1) == ["pl"]


async def test_what_an_erasure_object_leaves_out_is_the_servers_policy() -> None:
    replica = StubReplica(saying("a"))
    policy = {"kappa": 0.25, "segmentation": {"mode": "fixed", "length": 9}, "retry_temperature": 0.5, "threshold": 3}
    async with StubServer(replica, erasure=policy) as server:
        for erasure in (None, {"gamma": 0.4}, {"threshold": None, "segmentation": {"mode": "delimiter"}}):
            await server.post(prompt="a", **({"erasure": erasure} if erasure else {}))
    first, second, third = (request.policy for request in replica.requests)
    assert first == server.settings.erasure
    assert second is not None
    assert (second.kappa, second.gamma, second.threshold) == (0.25, 0.4, 3)
    assert third is not None
    assert (third.threshold, third.segmentation.mode, third.retry_temperature) == (None, "delimiter", 0.5)


async def test_rollouts_are_a_line_for_each_trajectory() -> None:
    async with stub() as server:
        groups = [{"prompt_id": "p", "prompt_token_ids": [1, 2], "n": 3, "erasable": 1, "seed": 4}]
        answer = await server.client.post("/v1/rollouts", json={"groups": groups, "max_tokens": 30})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(line["sample"] for line in lines) == [0, 1, 2]
    assert all(line["text"] == "Ünd right." for line in lines)
    replica = server.replicas.members[0].replica
    assert isinstance(replica, StubReplica)
    assert [(r.erasable, r.seed) for r in replica.requests] == [(True, 4), (False, 5), (False, 6)]


async def test_request_ids_are_taken_over_if_they_are_harmless() -> None:
    async with stub() as server:
        given = await server.client.get("/health", headers={"x-request-id": "abc-1"})
        odd = await server.client.get("/health", headers={"x-request-id": "a b\t{}"})
        metrics = await server.client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert given.headers["x-request-id"] == "abc-1"
    assert odd.headers["x-request-id"] != "a b\t{}"
    assert 'request_id="' in metrics.text


async def test_admin_routes() -> None:
    async with stub() as server:
        weights = (await server.admin.get("/weights")).json()
        paused = await server.admin.post("/pause", json={"mode": "wait"})
        wrong = await server.admin.post("/pause", json={"mode": "nap"})
        resumed = await server.admin.post("/resume")
        nowhere = await server.admin.post("/weights/sync", json={"path": "/nowhere/secret"})
        public = [await server.admin.post("/v1/completions", json={}), await server.admin.get("/metrics")]
    assert weights == {"replicas": [{"replica": 0, "policy_version": 0, "checksum": None, "last_sync": None}]}
    assert paused.json() == {"paused": True, "mode": "wait"}
    assert wrong.status_code == 400
    assert resumed.json() == {"paused": False, "mode": None}
    assert nowhere.status_code == 400
    assert "secret" not in nowhere.text
    assert {answer.status_code for answer in public} == {404}


async def test_the_openapi_schema_is_complete() -> None:
    async with stub() as server:
        for app in (server.app, server.admin_app):
            schema = app.openapi()
            text = json.dumps(schema)
            for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
                assert name in schema["components"]["schemas"], name
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    assert "422" not in operation["responses"]
                    assert "401" in operation["responses"], path
                    body = operation.get("requestBody")
                    if body is not None:
                        name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                        assert schema["components"]["schemas"][name]["examples"]
    _numbers_are_bounded(server.app.openapi()["components"]["schemas"])


def _numbers_are_bounded(schemas: dict[str, Any]) -> None:
    """Every number in a request has a lower and an upper bound."""
    seen: set[str] = set()

    def visit(node: Any, place: str) -> None:
        if isinstance(node, list):
            for child in node:
                visit(child, place)
        elif isinstance(node, dict):
            if "$ref" in node:
                name = node["$ref"].rpartition("/")[2]
                if name not in seen:
                    seen.add(name)
                    visit(schemas[name], name)
                return
            if node.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & set(node), place
                assert {"maximum", "exclusiveMaximum"} & set(node), place
            for key, child in node.items():
                if key not in ("examples", "default"):
                    visit(child, f"{place}.{key}")

    for root in ("CompletionRequest", "ChatRequest", "RolloutRequest"):
        visit({"$ref": root}, root)


async def test_a_template_that_refuses_is_a_400_and_so_is_none() -> None:
    messages = [{"role": "user", "content": "a"}]
    async with stub() as server:
        server.service.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        refused = await server.post("/v1/chat/completions", messages=messages)
        server.service.tokenizer.chat_template = None
        none = await server.post("/v1/chat/completions", messages=messages)
    assert (refused.status_code, none.status_code) == (400, 400)
    assert "roles must alternate" in refused.json()["error"]["message"]
    assert none.json()["error"]["code"] == "no_chat_template"


async def test_a_disconnect_cancels_the_generation() -> None:
    """Over ASGI itself: the client leaves while nothing is being sent."""
    replica = StubReplica(saying("a", "b"), delay=5.0)
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
        while not replica.under_way:
            await asyncio.sleep(0.01)
        left.set()
        async with asyncio.timeout(1.0):
            await call
        assert replica.under_way == 0
        assert server.service.admission.busy == 0
        assert "e3rl_disconnects_total 1.0" in (await server.client.get("/metrics")).text


async def test_a_span_for_the_request_and_one_for_each_attempt() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(exporter)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with StubServer(StubReplica(lambda request: list(ERASING)), tracing=tracing) as server:
        body = {"model": "stub", "prompt": "a"}
        await server.client.post("/v1/completions", json=body, headers={"traceparent": parent})
    tracing.close()
    spans = exporter.get_finished_spans()
    request = next(span for span in spans if span.name == "POST /v1/completions")
    attempts = [span for span in spans if span.name == "attempt"]
    assert f"{request.context.trace_id:032x}" == parent.split("-")[1]
    assert [(s.attributes or {})["e3rl.verdict"] for s in attempts] == [verdict for verdict, _ in ERASING]
    assert all(span.parent is not None and span.parent.span_id == request.context.span_id for span in attempts)
    assert all(request.start_time <= span.start_time <= span.end_time <= request.end_time for span in attempts)  # type: ignore[operator]


EVENTS = sum(len(text.encode()) + 1 for _, text in ERASING) + 1
"""What the stub says of `ERASING`: its tokens, the one that ends it, and a judgement of each attempt."""


def erasures(chunks: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Segment, attempt and characters of each retraction in a stream of one choice."""
    events = [choice.get("erasure") or {} for chunk in chunks for choice in chunk["choices"]]
    return [(e["segment"], e["attempt"], e["retract_characters"]) for e in events if e.get("event") == "erase"]


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The one choice of a stream, with retractions applied to its text, tokens and log-probs."""
    text, token_ids, logprobs = "", [], []
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        erasure = choice.get("erasure") or {}
        if erasure.get("event") == "erase":
            text = text[: len(text) - erasure["retract_characters"]]
            token_ids = token_ids[: len(token_ids) - erasure["retract_tokens"]]
            logprobs = logprobs[: len(token_ids)]
        text += choice["text"]
        token_ids += choice["token_ids"]
        known = choice["logprobs"] or {"tokens": [], "text_offset": []}
        logprobs += list(zip(known["tokens"], known["text_offset"], strict=True))
    last = chunks[-2]["choices"][0]
    return {
        "text": text,
        "token_ids": token_ids,
        "logprobs": logprobs,
        "usage": chunks[-1]["usage"],
        "finish_reason": last["finish_reason"],
        "segments": last["erasure"]["segments"],
    }


@pytest.mark.parametrize("stop", [None, "wro", "d ri", ["t.", "gh"]])
async def test_a_response_whose_replica_dies_at_any_moment_goes_on_as_if_it_had_not(stop: Any) -> None:
    body: dict[str, Any] = {"prompt": "Hi", "return_token_ids": True, "logprobs": 0}
    body |= {} if stop is None else {"stop": stop}
    streamed = {**body, "stream_options": {"include_usage": True}}
    replica = StubReplica(lambda request: list(ERASING))
    undisturbed: dict[str, Any] = {}
    async with StubServer(replica) as server:
        server.replicas.max_restarts_in_a_row = 1
        for dies_after in (None, *range(EVENTS + 1)):
            for mode in ("whole", "without tokens", "commit", "live"):
                replica.dies_after = [] if dies_after is None else [dies_after]
                if mode == "whole":
                    answer = Completion.model_validate_json((await server.post(**body)).text)
                    known: Any = (answer.choices[0].model_copy(update={"erasure": None}), answer.usage)
                    known += (segments(answer),)
                elif mode == "without tokens":
                    plain = await server.post(**{name: value for name, value in body.items() if name != "logprobs"})
                    answer = Completion.model_validate_json(plain.text)
                    known = (answer.choices[0].text, answer.choices[0].token_ids, segments(answer))
                else:
                    known = joined(await stream(server, **streamed, erasure={"stream": mode}))
                assert known == undisturbed.setdefault(mode, known), f"{mode}, {dies_after}"
        metrics = (await server.client.get("/metrics")).text
    deaths = int(float(metrics.split("\ne3rl_resubmissions_total ")[1].split()[0]))
    cut_short = undisturbed["commit"]["text"] != "Ünd right."
    # A replica that dies after a stop string was found is not missed.
    assert 20 < deaths < 4 * (EVENTS + 1) if cut_short else deaths == 4 * (EVENTS + 1)
    assert cut_short == (stop not in (None, "wro"))
    assert undisturbed["commit"] == undisturbed["live"]


def segments(completion: Completion) -> list[Any]:
    """The attempts that the one choice of a completion reports."""
    return completion.choices[0].erasure.segments or []


async def test_a_live_stream_takes_back_what_a_dead_replica_left_unjudged() -> None:
    """And only that: "€w" of the first attempt at the second segment is said twice."""
    replica = StubReplica(lambda request: list(ERASING))
    replica.dies_after = [len("Ünd ".encode()) + 1 + len("€w".encode())]
    async with StubServer(replica) as server:
        chunks = await stream(server, prompt="Hi", erasure={"stream": "live"})
        metrics = (await server.client.get("/metrics")).text
    assert texts(chunks, 1) == ["Ünd right."]
    assert erasures(chunks) == [(1, 0, len("€w")), (1, 0, len("€wro")), (1, 1, len("ng😀"))]
    first, second = replica.requests
    assert [attempt.verdict for attempt in second.resume_from] == ["accepted"]
    assert (second.group_size, second.group_id != first.group_id) == (1, True)
    assert "e3rl_resubmissions_total 1.0" in metrics
    assert chunks[-1]["choices"][0]["erasure"]["reused_prefix_tokens"] == 3 * len("Ünd ".encode())


async def test_of_a_group_only_what_is_unfinished_goes_to_another_replica() -> None:
    """Of three responses the first has its answer, the second lost only its answer, the third lost half of it."""
    replica = StubReplica(lambda request: [("accepted", text) for text in ("ab", "cd", "ef")[: request.sample + 1]])
    replica.dies_after = [100, 7, 100]
    async with StubServer(replica) as server:
        groups = [{"prompt_id": "p", "prompt_token_ids": [1], "n": 3, "seed": 4}]
        answer = await server.client.post("/v1/rollouts", json={"groups": groups, "max_tokens": 30})
    lines = sorted((json.loads(line) for line in answer.text.splitlines()), key=lambda line: line["sample"])
    assert [line["text"] for line in lines] == ["ab", "abcd", "abcdef"]
    assert len({line["group_id"] for line in lines}) == 1
    assert [line["reused_prefix_tokens"] for line in lines] == [0, 0, 4]
    resumed = [(r.sample, len(r.resume_from), r.group_size) for r in replica.requests[3:]]
    assert resumed == [(1, 2, 1), (2, 2, 1)]


async def test_plain_responses_begin_anew_unless_they_were_shown() -> None:
    replica = StubReplica(saying("plain"))
    plain = {"prompt": "a", "erasure": {"enabled": False}}
    async with StubServer(replica) as server:
        replica.dies_after = [3]
        whole = await server.post(**plain)
        replica.dies_after = [3]
        chunks = await stream(server, **plain)
    assert whole.json()["choices"][0]["text"] == "plain"
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["p", "l", "a"]
    assert chunks[-1]["error"]["message"] == "the replica that generated this response died"


async def test_a_response_that_loses_too_many_replicas_is_a_503() -> None:
    replica = StubReplica(saying("ab", "cd"))
    replica.dies_after = [1, 3, 0, 2]
    async with StubServer(replica) as server:
        answer = await server.post(prompt="a")
        replica.dies_after = [1, 3, 0]
        enough = await server.post(prompt="a")
    assert answer.status_code == 503
    assert enough.json()["choices"][0]["text"] == "abcd"
