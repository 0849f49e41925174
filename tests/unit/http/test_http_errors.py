"""What is wrong with a request, or with the server, is an error in OpenAI's shape that says so."""

import json
from typing import Any

import pytest

from rollout_server.http.openai.encoders import CompletionEncoder
from rollout_server.http.openai.schema.service import ErrorAnswer
from tests.stub_replica import StubReplica, StubServer, erasing_server, saying

WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"promt": "a"}, "promt", "unknown"),
    ({"prompt": "a", "erasure": {"kapa": 1}}, "erasure.kapa", "unknown"),
    ({"prompt": "a", "erasure": {"weights": {"bass": 1}}}, "erasure.weights.bass", "unknown"),
    ({"prompt": "a", "erasure": {"segmentation": {"mode": "fixed", "len": 1}}}, "erasure.segmentation.len", "unknown"),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown"),
    ({"prompt": "a", "delimiter": "x"}, "delimiter", "unknown"),
    ({"prompt": "a", "int": 1}, "int", "unknown"),
    ({"prompt": "a", "": 1}, '""', "unknown"),
    ({"prompt": "a", "erasure": {"delimiter": "x"}}, "erasure.delimiter", "unknown"),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "fixed", "delimiter": "x"}}},
        "erasure.segmentation.delimiter",
        "unknown",
    ),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "delimiter", "delimiter": ""}}},
        "erasure.segmentation.delimiter",
        "at least 1",
    ),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "delimiter", "delimiter": []}}},
        "erasure.segmentation.delimiter",
        "at least 1",
    ),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "delimiter", "delimiter": ["x"] * 17}}},
        "erasure.segmentation.delimiter",
        "at most 16",
    ),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "delimiter", "delimiter": ["a", ""]}}},
        "erasure.segmentation.delimiter",
        "at least 1",
    ),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "delimiter", "delimiter": ["a", 1]}}},
        "erasure.segmentation.delimiter",
        "valid string",
    ),
    (
        {"prompt": "a", "erasure": {"segmentation": {"mode": "delimiter", "delimiter": ["é" * 64] * 9}}},
        "erasure.segmentation.delimiter",
        "1152 bytes together",
    ),
    ({"prompt": "a", "erasure": {"gamma": 10.0, "max_erasures": 1000}}, "erasure", "gamma x max_erasures"),
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
    ({"prompt": ["a", "a" * 1100]}, "prompt[1]", "has 1100 tokens"),
    ({"prompt": "a", "stream_options": {}}, None, "stream_options can only"),
    ({"prompt": "a", "stop": [""]}, "stop", "at least 1"),
    ({"prompt": "a", "erasure": {"max_erasures": -1}}, "erasure.max_erasures", "greater"),
    ({"prompt": "a", "erasure": {"segmentation": {"mode": "words"}}}, "erasure.segmentation", "fixed"),
    ({"prompt": "a", "erasure": {"stream": "never"}}, "erasure.stream", "commit"),
    ({"prompt": ["a"] * 1000, "n": 128}, "n", "128000 responses"),
]


@pytest.mark.parametrize(("body", "param", "text"), WRONG, ids=[json.dumps(body)[:60] for body, _, _ in WRONG])
async def test_what_is_wrong_is_a_400_that_names_it(body: dict[str, Any], param: str | None, text: str) -> None:
    async with erasing_server() as server:
        answer = await server.post(**body)
    error = ErrorAnswer.model_validate_json(answer.text).error
    assert answer.status_code == 400
    assert error.type == "invalid_request_error"
    assert error.param == param
    assert text in error.message


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"max_tokens": 2000}, "max_tokens", "together 2003"),
        ({"groups": [{"prompt_id": "p", "prompt_token_ids": [1] * 1100}]}, "groups[0].prompt_token_ids", "1100 tokens"),
        ({"erasure": {"stream": "live"}}, None, "erasure.stream"),
        ({"erasure": {"return_segments": False}}, None, "erasure.return_segments"),
        (
            {"groups": [{"prompt_id": "p", "prompt_token_ids": [1], "erasable": 1}], "erasure": {"enabled": False}},
            None,
            "groups[0].erasable",
        ),
    ],
)
async def test_what_is_wrong_with_rollouts_is_a_400_that_names_it(
    body: dict[str, Any], param: str | None, text: str
) -> None:
    request = {"groups": [{"prompt_id": "p", "prompt_token_ids": [1, 2]}], "max_tokens": 4, **body}
    async with erasing_server() as server:
        answer = await server.post("/v1/rollouts", **request)
    error = ErrorAnswer.model_validate_json(answer.text).error
    assert (answer.status_code, error.param) == (400, param)
    assert text in error.message


@pytest.mark.parametrize(
    "erasure",
    [{"max_erasures": 0}, {"regeneration_budget": 0}, {"regeneration_budget": 0.1}, {"enabled": False}],
    ids=json.dumps,
)
async def test_temperature_0_needs_no_retry_temperature_where_nothing_can_be_erased(erasure: dict[str, Any]) -> None:
    async with StubServer(StubReplica(saying("a"))) as server:
        answer = await server.post(prompt="a", temperature=0, max_tokens=9, erasure=erasure)
        groups = [{"prompt_id": "p", "prompt_token_ids": [1]}]
        rollouts = {"groups": groups, "max_tokens": 9, "temperature": 0}
        trajectories = await server.client.post("/v1/rollouts", json={**rollouts, "erasure": erasure})
        plain = [{**groups[0], "n": 2, "erasable": 0}]
        monitored = await server.client.post(
            "/v1/rollouts", json={**rollouts, "groups": plain, "erasure": {"kappa": 1}}
        )
        one_may = [*plain, {**plain[0], "erasable": 1}]
        refused = await server.client.post(
            "/v1/rollouts", json={**rollouts, "groups": one_may, "erasure": {"kappa": 1}}
        )
    assert [a.status_code for a in (answer, trajectories, monitored)] == [200, 200, 200]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "erasure.retry_temperature")


async def test_any_number_of_different_delimiters_is_served() -> None:
    async with erasing_server() as server:
        for number in range(200):
            delimiter: Any = f"x{number}" if number % 2 else [f"x{number}", "\n", ". "]
            erasure = {"segmentation": {"mode": "delimiter", "delimiter": delimiter}}
            assert (await server.post(prompt="a", erasure=erasure)).status_code == 200


async def test_what_can_not_be_encoded_is_an_error_and_no_broken_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise ValueError("Out of range float values are not JSON compliant")

    monkeypatch.setattr(CompletionEncoder, "whole", fail)
    async with erasing_server() as server:
        answer = await server.post(prompt="a")
    assert answer.status_code == 500
    assert ErrorAnswer.model_validate_json(answer.text).error.type == "server_error"


@pytest.mark.parametrize(
    "raw",
    [b"{", b"[]", b"null", b"\xff", b'{"model":"stub","prompt":"a","temperature":NaN}', b"[" * 5000, b'"\\ud800"'],
)
async def test_what_is_no_json_object_is_a_400(raw: bytes) -> None:
    async with erasing_server() as server:
        answer = await server.client.post("/v1/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    ErrorAnswer.model_validate_json(answer.text)


async def test_unknown_models_routes_and_methods() -> None:
    async with erasing_server() as server:
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


async def test_a_template_that_refuses_is_a_400_and_so_is_none() -> None:
    messages = [{"role": "user", "content": "a"}]
    async with erasing_server() as server:
        server.service.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        refused = await server.post("/v1/chat/completions", messages=messages)
        server.service.tokenizer.chat_template = None
        none = await server.post("/v1/chat/completions", messages=messages)
    assert (refused.status_code, none.status_code) == (400, 400)
    assert "roles must alternate" in refused.json()["error"]["message"]
    assert none.json()["error"]["code"] == "no_chat_template"


async def test_an_unexpected_failure_is_a_500_without_its_cause() -> None:
    replica = StubReplica(saying("a"))
    replica.failures = [ValueError("secret at /private/model")]
    async with StubServer(replica) as server:
        answer = await server.post(prompt="a")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]


@pytest.mark.parametrize("said", [0, 2], ids=["at once", "half way"])
@pytest.mark.parametrize("erasure", [{"enabled": False}, {}], ids=["plain", "erasable"])
async def test_logits_that_are_not_finite_are_one_error_everywhere(erasure: dict[str, Any], said: int) -> None:
    replica = StubReplica(saying("one ", "two ", "three"))
    replica.breaks_after = said
    async with StubServer(replica) as server:
        whole = await server.post(prompt="a", erasure=erasure)
        chat = await server.post("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], erasure=erasure)
        stream = await server.post(prompt="a", stream=True, erasure=erasure)
        group = {"prompt_id": "p", "prompt_token_ids": [1, 2], "n": 2}
        rollouts = await server.post("/v1/rollouts", groups=[group], max_tokens=30, erasure=erasure)
        metrics = (await server.client.get("/metrics")).text
        (weights,) = (await server.admin.get("/weights")).json()["replicas"]
    expected = {
        "message": "the weights of version 3 gave logits that are not finite, so the response was ended",
        "type": "server_error",
        "param": None,
        "code": "non_finite_logits",
    }
    for answer in (whole, chat):
        assert (answer.status_code, answer.json()) == (500, {"error": expected})
    if stream.status_code == 200:
        *_, last, done = [line for line in stream.text.split("\n") if line]
        assert (json.loads(last.removeprefix("data: ")), done) == ({"error": expected}, "data: [DONE]")
        assert said
    else:
        assert (stream.status_code, stream.json()) == (500, {"error": expected})
    assert json.loads(rollouts.text) == {"error": expected}, "a response that was ended is no trajectory"
    assert "e3rl_non_finite_logits_total 4.0" in metrics
    assert weights["non_finite_version"] == 3
