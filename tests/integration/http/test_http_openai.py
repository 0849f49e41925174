"""The official client, unchanged: completions, chat, streams, errors as its exception classes."""

from typing import Any

import httpx
import openai
import pytest

from tests.http_server import ServerProcess

ERASURE = {"segmentation": {"mode": "fixed", "length": 4}, "threshold": 0, "max_erasures": 1}
"""The threshold is a number: under the server's adaptive one, what other tests generated would change the answers."""


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="not needed", max_retries=0)


def test_completion(client: openai.OpenAI, server: ServerProcess) -> None:
    answer = client.completions.create(
        model=server.model,
        prompt="Hello",
        max_tokens=12,
        n=2,
        seed=3,
        logprobs=2,
        extra_body={"erasure": ERASURE, "ignore_eos": True, "return_token_ids": True},
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    for choice in answer.choices:
        extra: dict[str, Any] = choice.model_extra or {}
        assert choice.finish_reason == "length"
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or []) == len(extra["token_ids"]) == 12
        assert extra["erasure"]["erased_tokens"] == 12
        assert [s["verdict"] for s in extra["erasure"]["segments"]] == ["erased", "accepted"] * 3


@pytest.mark.parametrize("mode", ["commit", "live"])
def test_completion_stream(client: openai.OpenAI, server: ServerProcess, mode: str) -> None:
    request: dict[str, Any] = {"model": server.model, "prompt": "Hello", "max_tokens": 12, "seed": 3}
    extra: dict[str, Any] = {"erasure": {**ERASURE, "stream": mode}}
    whole = client.completions.create(**request, extra_body=extra).choices[0]
    text, reasons = "", []
    for chunk in client.completions.create(**request, extra_body=extra, stream=True):
        choice = chunk.choices[0]
        erasure = (choice.model_extra or {}).get("erasure") or {}
        text = text[: len(text) - erasure.get("retract_characters", 0)] + choice.text
        reasons.append(choice.finish_reason)
    assert text == whole.text
    assert [reason for reason in reasons if reason] == [whole.finish_reason]


def test_chat(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    request: dict[str, Any] = {
        "model": server.model, "messages": messages, "seed": 1, "max_completion_tokens": 10,
        "extra_body": {"erasure": ERASURE},
    }  # fmt: skip
    answer = client.chat.completions.create(**request, logprobs=True, top_logprobs=3, n=2)
    assert [choice.message.role for choice in answer.choices] == ["assistant"] * 2
    for choice in answer.choices:
        assert choice.logprobs is not None
        for entry in choice.logprobs.content or []:
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].logprob >= entry.logprob
    chunks = list(client.chat.completions.create(**request, n=2, stream=True, stream_options={"include_usage": True}))
    for choice in answer.choices:
        pieces = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(pieces) == choice.message.content
    assert chunks[-1].usage == answer.usage


def test_log_probs_of_live_chunks_are_those_of_the_whole_answer(server: ServerProcess) -> None:
    request: dict[str, Any] = {"prompt": "Hello", "max_tokens": 8, "seed": 5, "logprobs": 1, "ignore_eos": True}
    whole = server.complete(**request, erasure=ERASURE)["choices"][0]
    answer = server.post("/v1/completions", **request, stream=True, erasure={**ERASURE, "stream": "live"})
    from tests.http_server import events

    logprobs: list[float] = []
    offsets: list[int] = []
    for chunk in events(iter(answer.text.split("\n"))):
        choice = chunk["choices"][0]
        if (choice.get("erasure") or {}).get("event") == "erase":
            del logprobs[-4:], offsets[-4:]
        if choice["logprobs"]:
            logprobs += choice["logprobs"]["token_logprobs"]
            offsets += choice["logprobs"]["text_offset"]
    assert logprobs == pytest.approx(whole["logprobs"]["token_logprobs"], abs=1e-4)
    assert offsets == whole["logprobs"]["text_offset"]


def test_stop(client: openai.OpenAI, server: ServerProcess) -> None:
    request: dict[str, Any] = {"model": server.model, "prompt": "Hello", "max_tokens": 40, "seed": 2}
    request["extra_body"] = {"erasure": ERASURE}
    whole = client.completions.create(**request).choices[0].text
    stop = whole[10:12]
    cut = client.completions.create(**request, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_what_clients_always_send_and_trainers_ask_for(client: openai.OpenAI, server: ServerProcess) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {
            "name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]  # fmt: skip
    answer = client.chat.completions.create(
        model=server.model, messages=messages, tools=[tool], tool_choice="auto", parallel_tool_calls=True, store=False,
        metadata={"run": "1"}, service_tier="auto", presence_penalty=0.2, frequency_penalty=0, logit_bias={"65": 2},
        logprobs=False, response_format={"type": "text"}, seed=3, max_completion_tokens=30, stop=None, n=2,
        extra_body={
            "erasure": ERASURE, "return_token_ids": True, "min_tokens": 8, "stop_token_ids": [*range(32)],
            "repetition_penalty": 1.1, "skip_special_tokens": False, "include_stop_str_in_output": True,
        },
    )  # fmt: skip
    assert (answer.model_extra or {})["prompt_token_ids"]
    for choice in answer.choices:
        extra: dict[str, Any] = choice.model_extra or {}
        assert len(extra["token_ids"]) >= 8
        assert not {*range(32)} & set(extra["token_ids"][:-1])
        assert extra["erasure"]["erased_tokens"] > 0
        if choice.finish_reason == "stop":
            assert extra["stop_reason"] in (None, *range(32))
    scored = client.completions.create(
        model=server.model, prompt="Hello", max_tokens=0, echo=True, logprobs=1, best_of=1, logit_bias={}, suffix=None
    )
    logprobs = scored.choices[0].logprobs
    assert logprobs is not None
    assert scored.choices[0].text == "Hello"
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 5
    schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["yes", "no"]}}}
    constrained = client.chat.completions.create(
        model=server.model, messages=messages, response_format=schema, extra_body={"erasure": {"enabled": False}}
    )
    assert constrained.choices[0].message.content in ('"yes"', '"no"')
    with pytest.raises(openai.BadRequestError, match=r"erasure\.enabled to false"):
        client.chat.completions.create(model=server.model, messages=messages, response_format=schema)


UNUSABLE: dict[str, Any] = {
    "no type": {"type": "nonsense"},
    "a broken pattern": {"type": "string", "pattern": "([a"},
    "a reference to nothing": {"$ref": "#/$defs/none"},
    "what nothing fulfils": {"type": "integer", "minimum": 5, "maximum": 1},
    "deep nesting": {"type": "array", "items": {}},
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_schema_costs_nobody_else_anything(server: ServerProcess, name: str) -> None:
    schema = UNUSABLE[name]
    if name == "deep nesting":
        for _ in range(60):
            schema = {"type": "array", "items": schema}
    answer = server.post(
        "/v1/completions",
        prompt="a",
        max_tokens=4,
        response_format={"type": "json_schema", "json_schema": {"schema": schema}},
        erasure={"enabled": False},
    )
    assert answer.status_code in (200, 400), answer.text
    assert server.complete("a", max_tokens=2)["choices"]


def test_models(client: openai.OpenAI, server: ServerProcess) -> None:
    assert [model.id for model in client.models.list()] == [server.model]


def test_errors_are_the_clients_exceptions(client: openai.OpenAI, server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=server.model, prompt="a", extra_body={"erasure": {"kapa": 1}})
    assert bad.value.param == "erasure.kapa"
    assert bad.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="has 2000 tokens"):
        client.completions.create(model=server.model, prompt="a" * 2000)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).completions.create(
            model=server.model, prompt="a", max_tokens=900, extra_body={"ignore_eos": True}
        )


def test_request_ids_reach_header_and_log(server: ServerProcess) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"X-Request-Id": "from-the-test"})
    assert answer.headers["x-request-id"] == "from-the-test"
    server.wait_for_log('"request_id": "from-the-test"')
