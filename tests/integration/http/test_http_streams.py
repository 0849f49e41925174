"""Live stream with retractions, commit stream and whole answer are the same text, over random requests."""

import asyncio
import random
from typing import Any

import httpx

from tests.http_server import ServerProcess, events, texts

CASES = 200
AT_A_TIME = 16
PROMPTS = ("Hello", "naïve café", "日本語の", "a 😀 b", "x = 1\n", "")


def random_request(number: int) -> dict[str, Any]:
    """A short request in which every segment is erased at least once."""
    draw = random.Random(number)
    length = draw.randint(1, 6)
    segmentation: dict[str, Any] = {"mode": "fixed", "length": length}
    if draw.random() < 0.3:
        segmentation = {"mode": "delimiter", "delimiter": draw.choice("aeX\x01"), "max_length": length + 2}
    # Prompts by bytes, so that some end within a character.
    prompt = [draw.randrange(256) for _ in range(draw.randint(1, 12))]
    request: dict[str, Any] = {
        "prompt": prompt if draw.random() < 0.5 else draw.choice(PROMPTS) or prompt,
        "max_tokens": draw.randint(1, 20),
        "n": draw.choice((1, 1, 1, 2, 3)),
        "temperature": draw.choice((0.7, 1.0, 1.6)),
        "seed": number,
        "ignore_eos": draw.random() < 0.5,
        "return_token_ids": True,
        "erasure": {
            "segmentation": segmentation,
            "threshold": 0,
            "max_erasures": draw.randint(1, 2),
            "regeneration_budget": 10.0,
        },
    }
    if draw.random() < 0.5:
        characters = [chr(draw.randrange(32, 127)) for _ in range(12)] + ["\ufffd"]
        request["stop"] = [*draw.sample(characters, 3), "\ufffd" + draw.choice(characters)]
    if draw.random() < 0.2:
        request["logprobs"] = 0
    return request


async def all_ways(client: httpx.AsyncClient, model: str, number: int) -> tuple[dict[str, Any], list[Any], list[Any]]:
    request = {"model": model, **random_request(number)}
    whole = await client.post("/v1/completions", json=request)
    assert whole.status_code == 200, whole.text
    streams = []
    for mode in ("commit", "live"):
        streamed = {**request, "stream": True, "erasure": {**request["erasure"], "stream": mode}}
        answer = await client.post("/v1/completions", json=streamed)
        assert answer.status_code == 200, answer.text
        streams.append(list(events(iter(answer.text.split("\n")))))
    return whole.json(), streams[0], streams[1]


async def test_live_with_retractions_is_commit_is_the_whole_answer(server: ServerProcess) -> None:
    limit = asyncio.Semaphore(AT_A_TIME)
    retracted = stopped = 0

    async def one(client: httpx.AsyncClient, number: int) -> Any:
        async with limit:
            return number, await all_ways(client, server.model, number)

    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
        answers = await asyncio.gather(*(one(client, number) for number in range(CASES)))
    for number, (whole, commit, live) in answers:
        choices = whole["choices"]
        expected = [choice["text"] for choice in choices]
        assert texts(commit, len(choices)) == expected, f"commit stream of request {number}"
        assert texts(live, len(choices)) == expected, f"live stream of request {number}"
        for chunks in (commit, live):
            assert tokens(chunks, len(choices)) == [choice["token_ids"] for choice in choices], f"request {number}"
        for choice in choices:
            check_segments(choice)
        reports = [choice["erasure"] for choice in choices]
        for chunks in (commit, live):
            streamed = [repeatable(report_of(chunks, index)) for index in range(len(choices))]
            assert streamed == [repeatable(report) for report in reports], f"request {number}"
        assert sum(report["erased_tokens"] for report in reports) > 0
        retracted += sum("retract" in str(choice.get("erasure")) for chunk in live for choice in chunk["choices"])
        stopped += sum(choice["finish_reason"] == "stop" for choice in choices)
    assert retracted > CASES
    assert stopped > CASES // 10


def tokens(chunks: list[dict[str, Any]], choices: int) -> list[list[int]]:
    """Token ids of a stream, with retractions applied."""
    result: list[list[int]] = [[] for _ in range(choices)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            erasure = choice.get("erasure") or {}
            if erasure.get("event") == "erase":
                kept = len(result[choice["index"]]) - erasure["retract_tokens"]
                del result[choice["index"]][kept:]
            result[choice["index"]] += choice["token_ids"]
    return result


def report_of(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """The report in a choice's last chunk."""
    finished = [
        choice
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index and choice["finish_reason"]
    ]
    assert len(finished) == 1
    report: dict[str, Any] = dict(finished[0]["erasure"])
    assert report.pop("event") == "finish"
    return report


def repeatable(report: dict[str, Any]) -> list[Any]:
    """What of a report does not depend on earlier requests, as baselines do, or on what is in the prefix cache."""
    counts = [report["policy_version"], report["generated_tokens"], report["erased_tokens"]]
    names = ("index", "attempt", "start", "end", "verdict", "text", "token_ids")
    return counts + [[segment[name] for name in names] for segment in report["segments"]]


def check_segments(choice: dict[str, Any]) -> None:
    """Accepted segments are the response; attempts are numbered; erased ones do not count."""
    segments = choice["erasure"]["segments"]
    accepted = [segment for segment in segments if segment["verdict"] == "accepted"]
    assert [token for segment in accepted for token in segment["token_ids"]] == choice["token_ids"]
    assert "".join(segment["text"] for segment in accepted) == choice["text"]
    assert [segment["index"] for segment in accepted] == list(range(len(accepted)))
    erased = sum(s["end"] - s["start"] for s in segments if s["verdict"] == "erased")
    assert choice["erasure"]["erased_tokens"] == erased
    assert choice["erasure"]["generated_tokens"] == erased + len(choice["token_ids"])
