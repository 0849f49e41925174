"""Completions, chats and rollouts over stub replicas: what is answered, whole and streamed."""

import json
from typing import Any

import pytest

from rollout_server.http.openai.schema.base import MAX_SEED
from rollout_server.http.openai.schema.chat import ChatChunk, ChatCompletion
from rollout_server.http.openai.schema.completion import Completion, CompletionChunk
from tests.http_server import texts
from tests.stub_replica import EXHAUSTED, StubReplica, StubServer, erasing_server, saying


async def test_a_completion_is_what_the_schema_says() -> None:
    async with erasing_server() as server:
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
    async with erasing_server() as server:
        commit = await server.stream(prompt="Hi")
        live = await server.stream(prompt="Hi", erasure={"stream": "live"}, stream_options={"include_usage": True})
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


async def test_an_attempt_that_is_kept_in_the_end_is_what_every_answer_holds() -> None:
    async with StubServer(StubReplica(lambda request: list(EXHAUSTED))) as server:
        whole = Completion.model_validate_json((await server.post(prompt="Hi", return_token_ids=True, logprobs=1)).text)
        commit = await server.stream(prompt="Hi")
        live = await server.stream(prompt="Hi", erasure={"stream": "live"}, return_token_ids=True)
        groups = [{"prompt_id": "p", "prompt_token_ids": [1]}]
        lines = await server.client.post("/v1/rollouts", json={"groups": groups, "max_tokens": 30})
        metrics = (await server.client.get("/metrics")).text
    choice = whole.choices[0]
    assert choice.text == texts(commit, 1)[0] == texts(live, 1)[0] == "Ünd right€.!"
    assert [(s.index, s.attempt, s.verdict, s.text) for s in choice.erasure.segments or []] == [
        (0, 0, "accepted", "Ünd "),
        (0, 1, "erased", "€wro"),
        (1, 0, "accepted", "ri"),
        (2, 0, "erased", "ng😀"),
        (2, 1, "accepted", "ght€"),
        (2, 2, "erased", "x"),
        (3, 0, "accepted", "."),
        (4, 0, "accepted", "!"),
        (4, 1, "erased", "?!"),
    ]
    erased = len("€wrong😀x?!".encode())
    tokens = len("Ünd right€.!".encode()) + 1
    assert whole.usage.completion_tokens == tokens == len(choice.token_ids or [])
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [server.service.texts[token] for token in choice.token_ids or []]
    assert choice.erasure.erased_tokens == whole.usage.completion_tokens_details.erased_tokens == erased
    assert choice.erasure.generated_tokens == tokens + erased
    events = [c.get("erasure") or {} for chunk in live for c in chunk["choices"]]
    assert [(e["segment"], e["attempt"], e["retract_characters"]) for e in events if e.get("event") == "erase"] == [
        (0, 0, 4), (0, 1, 4), (2, 0, 3), (2, 1, 4), (2, 2, 1), (4, 0, 1), (4, 1, 2),
    ]  # fmt: skip
    assert not any((c.get("erasure") or {}).get("event") == "erase" for chunk in commit for c in chunk["choices"])
    (line,) = map(json.loads, lines.text.splitlines())
    assert line["text"] == "Ünd right€.!"
    assert [a["verdict"] for a in line["attempts"]] == [s.verdict for s in choice.erasure.segments or []]
    assert "e3rl_erasures_total 28.0" in metrics
    assert "e3rl_restorations_total 12.0" in metrics


async def test_chat_streams_begin_with_the_role() -> None:
    async with erasing_server() as server:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        chunks = await server.stream("/v1/chat/completions", messages=messages, max_tokens=20)
        whole = await server.post("/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2)
    for chunk in chunks:
        ChatChunk.model_validate(chunk)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert texts(chunks, 1) == ["Ünd right."]
    completion = ChatCompletion.model_validate_json(whole.text)
    assert completion.choices[0].message.content == "Ünd right."
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -1.0]


@pytest.mark.parametrize(("stop", "text"), [("wro", "Ünd right."), ("d ri", "Ün"), (["t.", "gh"], "Ünd ri")])
@pytest.mark.parametrize("mode", ["commit", "live"])
async def test_stop_strings_count_in_committed_text_only(stop: Any, text: str, mode: str) -> None:
    async with erasing_server() as server:
        whole = Completion.model_validate_json(
            (await server.post(prompt="Hi", stop=stop, return_token_ids=True)).text
        ).choices[0]
        chunks = await server.stream(prompt="Hi", stop=stop, erasure={"stream": mode})
    assert whole.text == text
    assert whole.finish_reason == "stop"
    assert texts(chunks, 1) == [text]
    accepted = [segment for segment in whole.erasure.segments or [] if segment.verdict == "accepted"]
    assert "".join(segment.text for segment in accepted) == text
    assert [token for segment in accepted for token in segment.token_ids] == whole.token_ids


async def test_erasure_off_goes_through_plain_generation_with_vllms_seeds() -> None:
    replica = StubReplica(saying("plain"))
    async with StubServer(replica) as server:
        answer = await server.post(prompt=["a", "b"], n=3, seed=5, erasure={"enabled": False})
        chunks = await server.stream(prompt="a", erasure={"enabled": False, "stream": "live"}, stop="ai")
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
    async with erasing_server() as server:
        groups = [{"prompt_id": "p", "prompt_token_ids": [1, 2], "n": 3, "erasable": 1, "seed": 4}]
        answer = await server.client.post("/v1/rollouts", json={"groups": groups, "max_tokens": 30})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(line["sample"] for line in lines) == [0, 1, 2]
    assert all(line["text"] == "Ünd right." for line in lines)
    replica = server.replicas.members[0].replica
    assert isinstance(replica, StubReplica)
    assert [(r.erasable, r.seed) for r in replica.requests] == [(True, 4), (False, 5), (False, 6)]


async def test_groups_of_one_prompt_are_not_the_same_responses_twice() -> None:
    async with erasing_server() as server:
        groups = [{"prompt_id": name, "prompt_token_ids": [1, 2], "n": 2} for name in "ab"]
        for seed in (7, MAX_SEED):
            await server.client.post("/v1/rollouts", json={"groups": groups, "max_tokens": 30, "seed": seed})
    replica = server.replicas.members[0].replica
    assert isinstance(replica, StubReplica)
    assert sorted(r.seed for r in replica.requests[:4]) == [7, 8, 9, 10]
    largest = [r.seed for r in replica.requests[4:] if r.seed is not None]
    assert len(set(largest)) == 4
    assert max(largest) < 2**63
