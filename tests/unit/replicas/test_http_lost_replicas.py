"""Replicas that die: responses go on from the last judged segment, and streams take back what was not judged."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from rollout_server.http.openai.schema.completion import Completion
from tests.http_server import texts
from tests.stub_replica import ERASING, EXHAUSTED, StubReplica, StubServer, saying

STOPS: dict[str, list[Any]] = {
    "erasing": [None, "wro", "d ri", ["t.", "gh"]],
    "exhausted": [None, "wro", "x", "d r", ["ght", "€"], "!"],
}
"""Of each script stop strings that are never there, erased, or in what is kept."""


def events_of(script: Sequence[tuple[str, str]]) -> int:
    """How much the stub says of a script: its tokens, the one that ends it, and a judgement of each attempt."""
    return sum(len(text.encode()) + 1 for _, text in script) + 1


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


SCRIPTS: dict[str, Sequence[tuple[str, str]]] = {"erasing": ERASING, "exhausted": EXHAUSTED}
WHOLE = {"erasing": "Ünd right.", "exhausted": "Ünd right€.!"}


@pytest.mark.parametrize(
    ("script", "stop"),
    [(name, stop) for name, stops in STOPS.items() for stop in stops],
)
async def test_a_response_whose_replica_dies_at_any_moment_goes_on_as_if_it_had_not(script: str, stop: Any) -> None:
    body: dict[str, Any] = {"prompt": "Hi", "return_token_ids": True, "logprobs": 0}
    body |= {} if stop is None else {"stop": stop}
    streamed = {**body, "stream_options": {"include_usage": True}}
    replica = StubReplica(lambda request: list(SCRIPTS[script]))
    undisturbed: dict[str, Any] = {}
    events = events_of(SCRIPTS[script])
    async with StubServer(replica) as server:
        server.replicas.max_restarts_in_a_row = 1
        for dies_after in (None, *range(events + 1)):
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
                    known = joined(await server.stream(**streamed, erasure={"stream": mode}))
                assert known == undisturbed.setdefault(mode, known), f"{mode}, {dies_after}"
        metrics = (await server.client.get("/metrics")).text
    deaths = int(float(metrics.split("\ne3rl_resubmissions_total ")[1].split()[0]))
    cut_short = undisturbed["commit"]["text"] != WHOLE[script]
    # A replica that dies after a stop string was found is not missed.
    assert 20 < deaths < 4 * (events + 1) if cut_short else deaths == 4 * (events + 1)
    assert cut_short == (stop not in (None, "wro", "x"))
    assert undisturbed["commit"] == undisturbed["live"]


def segments(completion: Completion) -> list[Any]:
    """The attempts that the one choice of a completion reports."""
    return completion.choices[0].erasure.segments or []


async def test_a_live_stream_takes_back_what_a_dead_replica_left_unjudged() -> None:
    """And only that: "€w" of the first attempt at the second segment is said twice."""
    replica = StubReplica(lambda request: list(ERASING))
    replica.dies_after = [len("Ünd ".encode()) + 1 + len("€w".encode())]
    async with StubServer(replica) as server:
        chunks = await server.stream(prompt="Hi", erasure={"stream": "live"})
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
        chunks = await server.stream(**plain)
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
