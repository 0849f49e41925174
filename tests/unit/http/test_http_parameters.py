"""Parameters of OpenAI's and vLLM's clients: what is accepted, what it does, and what is refused with a reason."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from openai.resources.chat.completions import Completions as OpenAIChat
from openai.resources.completions import Completions as OpenAICompletions
from transformers import PreTrainedTokenizerFast

from rollout_server.http.openai.schema.chat import ChatChunk, ChatCompletion
from rollout_server.http.openai.schema.chat_request import ChatRequest
from rollout_server.http.openai.schema.completion import Completion, CompletionChunk, CompletionRequest
from rollout_server.http.openai.schema.neutral import NEUTRAL
from rollout_server.http.openai.schema.service import ErrorAnswer
from tests.http_server import texts
from tests.models import byte_tokenizer
from tests.stub_replica import EOS, StubReplica, StubServer, erasing_server, saying

DOCUMENTATION = Path(__file__).parents[3] / "docs/http_api.md"
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"

NEUTRAL_VALUES: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "min_tokens": 0,
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "priority": 0,
    "vllm_xargs": {},
    "truncate_prompt_tokens": None,
    "allowed_token_ids": None,
    "user": "me",
}
NEUTRAL_OF_CHAT: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": None,
    "store": False,
    "metadata": {"run": "7"},
    "service_tier": "auto",
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "chat_template_kwargs": {},
    "add_generation_prompt": True,
    "echo": False,
    "reasoning_effort": None,
    "verbosity": None,
    "web_search_options": None,
}
NEUTRAL_OF_COMPLETIONS: dict[str, Any] = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None}


async def test_values_without_effect_change_nothing() -> None:
    replica = StubReplica(saying("a"))
    async with StubServer(replica) as server:
        for route, body, neutral in (
            ("/v1/completions", {"prompt": "a"}, NEUTRAL_OF_COMPLETIONS),
            (CHAT, {"messages": USER}, NEUTRAL_OF_CHAT),
        ):
            plain = await server.post(route, **body)
            given = await server.post(route, **body, **NEUTRAL_VALUES, **neutral)
            assert given.status_code == 200, given.text
            assert given.json()["choices"] == plain.json()["choices"]
    for plain_request, request in zip(replica.requests[::2], replica.requests[1::2], strict=True):
        same = {"prompt_id": plain_request.prompt_id, "group_id": plain_request.group_id}
        assert request.model_copy(update=same) == plain_request


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"tool_choice": "required"}, "tool_choice", "cannot be forced"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "cannot be forced"),
    (CHAT, {"store": True}, "store", "stores no answers"),
    (CHAT, {"chat_template": "{{ 1 }}"}, "chat_template", "a template is a program"),
    (CHAT, {"echo": True}, "echo", "continue_final_message"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities", "text only"),
    (CHAT, {"prompt_cache_retention": "24h"}, "prompt_cache_retention", "memory only"),
    (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "", "cannot hold 'tokenize'"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "", "exclude each other"),
    (CHAT, {"max_tokens": 0}, "", "scores a prompt"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, "", "not available when stream"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "erasure.enabled to false"),
    (CHAT, {"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"nam": 1}}}, "response_format.json_schema.nam",
     "unknown"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"title": "x" * 20_000}}}},
     "response_format.json_schema", "at most 16384"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0]", "content is required"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "tool_call_id": "x"}]}, "messages[0]", "role tool"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "text"),
    ("/v1/completions", {"best_of": 2}, "", "best_of (2) must be n (1)"),
    ("/v1/completions", {"suffix": "end"}, "suffix", "not between two texts"),
    ("/v1/completions", {"use_beam_search": True}, "use_beam_search", "no beam search"),
    ("/v1/completions", {"priority": -1}, "priority", "take turns"),
    ("/v1/completions", {"vllm_xargs": {"e3rl": "{}"}}, "vllm_xargs", "engine"),
    ("/v1/completions", {"max_tokens": 0}, "", "scores a prompt"),
    ("/v1/completions", {"min_tokens": 20, "max_tokens": 10}, "min_tokens", "exceeds the 10 tokens"),
    ("/v1/completions", {"stop_token_ids": [320]}, "stop_token_ids", "below 320"),
    ("/v1/completions", {"allowed_token_ids": [7, 320]}, "allowed_token_ids", "below 320"),
    ("/v1/completions", {"allowed_token_ids": []}, "allowed_token_ids", "at least 1"),
    ("/v1/completions", {"allowed_token_ids": [EOS], "min_tokens": 1}, "allowed_token_ids", "no token is left"),
    ("/v1/completions", {"allowed_token_ids": [318, 319]}, "allowed_token_ids", "no token is left"),
    ("/v1/completions", {"allowed_token_ids": [64], "bad_words": ["a"]}, "allowed_token_ids", "no token is left"),
    ("/v1/completions", {"logit_bias": {"320": 1}}, "logit_bias", "below 320"),
    ("/v1/completions", {"logit_bias": {"-1": 1}}, "logit_bias.-1", "pattern"),
    ("/v1/completions", {"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
    ("/v1/completions", {"bad_words": [" "]}, "bad_words[0]", "pattern"),
    ("/v1/completions", {"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2"),
    ("/v1/completions", {"repetition_penalty": 0}, "repetition_penalty", "greater"),
    ("/v1/completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "no prompt"),
    ("/v1/completions", {"truncate_prompt_tokens": 1025}, "truncate_prompt_tokens", "length of 1024"),
    ("/v1/completions", {"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
    ("/v1/completions", {"prompt": "a" * 900, "prompt_logprobs": 20, "n": 64}, "prompt_logprobs", "1209600 log-probs"),
    ("/v1/completions", {"request_id": "a\nb"}, "request_id", "pattern"),
]  # fmt: skip


@pytest.mark.parametrize(("route", "body", "param", "text"), REFUSED, ids=[json.dumps(r[1])[:60] for r in REFUSED])
async def test_what_is_refused_says_why(route: str, body: dict[str, Any], param: str, text: str) -> None:
    async with erasing_server() as server:
        answer = await server.post(route, **({"messages": USER} if route == CHAT else {"prompt": "a"}) | body)
    assert answer.status_code == 400, answer.text
    error = ErrorAnswer.model_validate_json(answer.text).error
    assert error.param == (param or None)
    assert text in error.message


@pytest.mark.parametrize(
    ("ours", "theirs"), [(ChatRequest, OpenAIChat), (CompletionRequest, OpenAICompletions)], ids=["chat", "completions"]
)
def test_every_parameter_of_the_openai_client_is_known(ours: Any, theirs: Any) -> None:
    of_the_client = {"self", "extra_body", "extra_headers", "extra_query", "timeout"}
    assert inspect.signature(theirs.create).parameters.keys() - of_the_client <= ours.model_fields.keys()


def test_what_is_refused_is_in_the_documentation_with_its_reason() -> None:
    text = DOCUMENTATION.read_text()
    for request in (ChatRequest, CompletionRequest):
        for name, field in request.model_json_schema()["properties"].items():
            if NEUTRAL in field:
                assert f"| `{name}` |" in text, name
                assert field[NEUTRAL] in text, name


async def test_what_a_response_is_sampled_with_reaches_the_engine() -> None:
    replica = StubReplica(saying("a"))
    async with StubServer(replica) as server:
        answer = await server.post(
            prompt="a", stop_token_ids=[5, 5, 6], min_tokens=2, presence_penalty=1, frequency_penalty=-1,
            repetition_penalty=1.5, logit_bias={"7": 3}, allowed_token_ids=[1, 2], bad_words=["x"], cache_salt="s",
        )  # fmt: skip
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}
        await server.post(prompt="a", response_format=schema, erasure={"enabled": False})
    assert answer.status_code == 200, answer.text
    extras = replica.requests[0].extras
    assert (extras.stop_token_ids, extras.min_tokens, extras.logit_bias) == ((5, 6), 2, {7: 3.0})
    assert (extras.presence_penalty, extras.frequency_penalty, extras.repetition_penalty) == (1.0, -1.0, 1.5)
    assert (extras.allowed_token_ids, extras.bad_words, extras.cache_salt) == ((1, 2), ("x",), "s")
    assert json.loads(replica.requests[1].extras.json_schema or "") == {"type": "array"}


async def test_prompt_token_ids_come_with_return_token_ids_and_once_in_a_stream() -> None:
    async with erasing_server() as server:
        whole = await server.post(prompt=["Hi", "x"], n=2, return_token_ids=True)
        chunks = await server.stream(prompt=["Hi", "x"], n=2, return_token_ids=True)
        chat = await server.post(CHAT, messages=USER, n=2, return_token_ids=True)
        chat_chunks = await server.stream(CHAT, messages=USER, n=2, return_token_ids=True)
        without = await server.post(prompt="Hi")
    hi, x = server.service.tokenizer("Hi")["input_ids"], server.service.tokenizer("x")["input_ids"]
    completion = Completion.model_validate_json(whole.text)
    assert [choice.prompt_token_ids for choice in completion.choices] == [hi, hi, x, x]
    told: dict[int, list[Any]] = {}
    for chunk in chunks:
        CompletionChunk.model_validate(chunk)
        for choice in chunk["choices"]:
            told.setdefault(choice["index"], []).append(choice.get("prompt_token_ids"))
    assert [told[index][0] for index in range(4)] == [hi, hi, x, x]
    assert all(later is None for one in told.values() for later in one[1:])
    prompt = server.service.tokenizer("Hi\n")["input_ids"]
    assert ChatCompletion.model_validate_json(chat.text).prompt_token_ids == prompt
    for chunk in chat_chunks:
        ChatChunk.model_validate(chunk)
    assert [chunk.get("prompt_token_ids") for chunk in chat_chunks] == [prompt] + [None] * (len(chat_chunks) - 1)
    assert "prompt_token_ids" not in without.text


@pytest.mark.parametrize("mode", ["commit", "live"])
async def test_stop_reasons(mode: str) -> None:
    gh = byte_tokenizer(64)("gh")["input_ids"]
    async with erasing_server() as server:

        async def ask(**body: Any) -> tuple[Any, str, str]:
            choice = (await server.post(prompt="Hi", **body)).json()["choices"][0]
            chunks = await server.stream(prompt="Hi", **body, erasure={"stream": mode})
            assert texts(chunks, 1) == [choice["text"]]
            assert chunks[-1]["choices"][0]["stop_reason"] == choice["stop_reason"]
            return choice["stop_reason"], choice["finish_reason"], choice["text"]

        assert await ask() == (None, "stop", "Ünd right.")
        assert await ask(stop="gh") == ("gh", "stop", "Ünd ri")
        assert await ask(stop="gh", include_stop_str_in_output=True) == ("gh", "stop", "Ünd righ")
        assert await ask(stop=["gh"], min_tokens=len("Ünd righ".encode())) == (None, "stop", "Ünd right.")
        assert await ask(stop=["ght"], min_tokens=len("Ünd righ".encode())) == ("ght", "stop", "Ünd ri")
        assert await ask(ignore_eos=True) == (None, "length", "Ünd right.")
    assert len(gh) == 2


async def test_a_token_that_ends_a_response_is_its_reason_and_has_no_text() -> None:
    full_stop = byte_tokenizer(64)(".")["input_ids"][0]
    replica = StubReplica(saying("plain."))
    replica.ends = False
    async with StubServer(replica) as server:
        for erasure in ({"enabled": False}, {}):
            hidden = await server.post(prompt="a", stop_token_ids=[full_stop], erasure=erasure, return_token_ids=True)
            shown = await server.post(
                prompt="a", stop_token_ids=[full_stop], erasure=erasure, include_stop_str_in_output=True
            )
            choice = hidden.json()["choices"][0]
            assert (choice["text"], choice["stop_reason"], choice["finish_reason"]) == ("plain", full_stop, "stop")
            assert choice["token_ids"][-1] == full_stop
            assert shown.json()["choices"][0]["text"] == "plain."


async def test_special_tokens_are_shown_on_request() -> None:
    replica = StubReplica(saying("a"))
    async with StubServer(replica) as server:
        for body, text in (
            ({}, "a"),
            ({"include_stop_str_in_output": True}, "a"),
            ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "a<|end|>"),
            ({"ignore_eos": True, "skip_special_tokens": False, "spaces_between_special_tokens": False}, "a"),
        ):
            assert (await server.post(prompt="x", **body)).json()["choices"][0]["text"] == text


async def test_continuous_usage_counts_what_each_choice_has() -> None:
    async with erasing_server() as server:
        for mode in ("commit", "live"):
            options = {"include_usage": True, "continuous_usage_stats": True}
            chunks = await server.stream(prompt="Hi", stream_options=options, erasure={"stream": mode})
            counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
            assert counts[-1] == counts[-2] == len("Ünd right.".encode()) + 1
            assert (sorted(counts) == counts) == (mode == "commit")
            assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)


async def test_the_body_names_the_request_unless_a_header_does() -> None:
    async with erasing_server() as server:
        body = await server.post(prompt="a", request_id="mine")
        both = await server.client.post(
            "/v1/completions",
            json={"model": "stub", "prompt": "a", "request_id": "mine"},
            headers={"x-request-id": "h"},
        )
    assert (body.json()["id"], body.headers["x-request-id"]) == ("cmpl-mine", "mine")
    assert (both.json()["id"], both.headers["x-request-id"]) == ("cmpl-h", "h")


@pytest.mark.parametrize(("side", "kept"), [(None, "cde"), ("left", "cde"), ("right", "abc")])
async def test_prompts_are_truncated(side: str | None, kept: str) -> None:
    replica = StubReplica(saying("a"))
    async with StubServer(replica) as server:
        await server.post(prompt="abcde", truncate_prompt_tokens=3, truncation_side=side)
        fits = await server.post(prompt="a" * 2000, truncate_prompt_tokens=-1, max_tokens=24)
    assert fits.json()["usage"]["prompt_tokens"] == 1024 - 24 - 1
    assert replica.requests[0].prompt_token_ids == server.service.tokenizer(kept)["input_ids"]


async def test_a_prompt_is_scored_without_generating() -> None:
    replica = StubReplica(saying("never"))
    async with StubServer(replica) as server:
        echo = await server.post(prompt=["abc", "d€"], max_tokens=0, echo=True, logprobs=2)
        scores = await server.post(prompt="abc", max_tokens=0, prompt_logprobs=0)
        chat = await server.post(CHAT, messages=USER, max_tokens=0, prompt_logprobs=1)
        stream = await server.stream(prompt="abc", max_tokens=0, echo=True, logprobs=0)
    assert replica.requests == []
    completion = Completion.model_validate_json(echo.text)
    first, second = completion.choices
    assert (first.text, second.text, first.finish_reason) == ("abc", "d€", "length")
    assert first.logprobs is not None
    assert first.logprobs.tokens == ["a", "b", "c"]
    assert first.logprobs.token_logprobs == [None, -1.0, -2.0]
    assert first.logprobs.text_offset == [0, 1, 2]
    assert first.logprobs.top_logprobs[0] is None
    assert completion.usage.completion_tokens == 0
    known = Completion.model_validate_json(scores.text).choices[0].prompt_logprobs
    assert known is not None
    assert known[0] is None
    assert [entry.logprob for place in known[1:] for entry in (place or {}).values()] == [-1.0, -2.0]
    answer = ChatCompletion.model_validate_json(chat.text)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == 3
    assert texts(stream, 1) == ["abc"]
    for chunk in stream:
        CompletionChunk.model_validate(chunk)


@pytest.mark.parametrize("mode", ["commit", "live"])
async def test_echo_comes_before_the_answer_and_its_log_probs(mode: str) -> None:
    async with erasing_server() as server:
        body: dict[str, Any] = {"prompt": [[72, 257, 73]], "echo": True, "logprobs": 0}
        whole = (await server.post(**body)).json()["choices"][0]
        chunks = await server.stream(**body, erasure={"stream": mode})
        plain = (await server.post(prompt=[72, 257, 73], logprobs=0)).json()["choices"][0]
    assert whole["text"] == "ij" + plain["text"]
    assert texts(chunks, 1) == [whole["text"]]
    count = len(plain["logprobs"]["tokens"])
    assert whole["logprobs"]["tokens"] == ["i", "<|pad|>", "j", *plain["logprobs"]["tokens"]]
    start = len("i<|pad|>j")
    assert whole["logprobs"]["text_offset"][-count:] == [start + place for place in plain["logprobs"]["text_offset"]]
    offsets = [o for chunk in chunks for c in chunk["choices"] if c["logprobs"] for o in c["logprobs"]["text_offset"]]
    assert offsets[-1] == whole["logprobs"]["text_offset"][-1]


async def test_tokens_of_log_probs_are_named_by_their_ids_on_request() -> None:
    async with erasing_server() as server:
        answer = await server.post(prompt="a", logprobs=0, return_tokens_as_token_ids=True, return_token_ids=True)
    choice = answer.json()["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.x }}>{% endfor %}"
    "{% if not (loop.last and continue_final_message) %}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is false %}quick{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def rendered(server: StubServer) -> str:
    replica = server.replicas.members[0].replica
    assert isinstance(replica, StubReplica)
    tokenizer: PreTrainedTokenizerFast = server.service.tokenizer
    text: str = tokenizer.decode(replica.requests[-1].prompt_token_ids)
    return text


async def test_messages_tools_and_options_are_rendered_by_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "{"}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "q", "name": "Eve"},
        {"role": "assistant", "content": None, "tool_calls": [call, broken], "refusal": None},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    conversation = "[developer]a\nb|[user Eve]q|[assistant]<f 7><g >|[tool]r|"
    async with erasing_server() as server:
        server.service.tokenizer.chat_template = TEMPLATE
        for body, expected in (
            ({}, conversation + "[assistant]"),
            ({"add_generation_prompt": False}, conversation),
            ({"chat_template_kwargs": {"enable_thinking": False}}, conversation + "[assistant]quick"),
            ({"reasoning_effort": "none"}, conversation + "[assistant]quick"),
        ):
            answer = await server.post(CHAT, messages=messages, **body)
            assert answer.status_code == 200, answer.text
            assert rendered(server) == expected
        described = {"name": "f", "description": None, "parameters": {"type": "object"}}
        await server.post(CHAT, messages=USER, tools=[TOOL], tool_choice="auto")
        shown = json.loads(rendered(server).partition("\n")[0].removeprefix("TOOLS "))
        assert shown == [{"type": "function", "function": described}]
        tokens = await server.post("/tokenize", messages=messages)
        assert server.service.tokenizer.decode(tokens.json()["tokens"]) == conversation + "[assistant]"
        prefix = [*USER, {"role": "assistant", "content": "so"}]
        await server.post(CHAT, messages=prefix, continue_final_message=True)
        assert rendered(server).endswith("[assistant]so")


async def test_texts_and_tokens() -> None:
    async with erasing_server() as server:
        tokenized = (await server.post("/tokenize", prompt="hé", return_token_strs=True)).json()
        text = (await server.post("/detokenize", tokens=[*tokenized["tokens"], EOS])).json()
        both = await server.post("/tokenize", prompt="a", messages=USER)
        beyond = await server.post("/detokenize", tokens=[320])
    assert (tokenized["count"], tokenized["max_model_len"]) == (3, 1024)
    assert tokenized["token_strs"][0] == "h"
    assert text == {"prompt": "hé<|end|>"}
    assert (both.status_code, beyond.status_code) == (400, 400)


async def test_service_routes() -> None:
    async with erasing_server() as server:
        model = (await server.client.get("/v1/models/stub")).json()
        assert model == (await server.client.get("/v1/models")).json()["data"][0]
        assert (await server.client.get("/v1/models/other")).status_code == 404
        assert (await server.client.get("/version")).json() == {"version": "0.1.0"}
        for method in ("GET", "POST"):
            assert (await server.client.request(method, "/ping")).status_code == 200
        assert (await server.client.get("/load")).json() == {"server_load": 0}
        assert (await server.client.get("/is_paused")).json() == {"is_paused": False}
        await server.admin.post("/pause", json={"mode": "keep"})
        assert (await server.client.get("/is_paused")).json() == {"is_paused": True}
        await server.admin.post("/resume", json={})
        assert (await server.admin.post("/reset_prefix_cache")).json() == {"success": True}
        page = await server.client.get("/docs")
        assert "http" not in page.text.replace("http://www.w3.org", ""), "the page needs the internet"
        for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
            assert name in page.text
            assert len((await server.client.get(f"/docs/{name}")).content) > 100_000


@pytest.mark.parametrize("route", ["/docs", "/version", "/ping", "/load", "/is_paused", "/v1/models/stub"])
async def test_they_need_the_key(route: str) -> None:
    async with StubServer(StubReplica(saying("a")), api_key=["long-secret"]) as server:
        assert (await server.client.get(route)).status_code == 401
        key = {"authorization": "Bearer long-secret"}
        assert (await server.client.get(route, headers=key)).status_code == 200
