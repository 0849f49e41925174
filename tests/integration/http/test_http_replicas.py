"""Two replicas in Ray actors: answers, weights on both, and the loss of one under load."""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.http_server import Background, ServerProcess, events, running_server, texts

ERASURE = {"segmentation": {"mode": "fixed", "length": 5}, "threshold": 0, "max_erasures": 1}
BEST = {**ERASURE, "max_erasures": 2, "on_exhaustion": "best", "regeneration_budget": 10}


@pytest.fixture(scope="module")
def pair(http_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("pair")
    flags = ("--replicas", "2", "--max-concurrent-responses", "16")
    with running_server(http_model, directory, *flags, RAY_USAGE_STATS_ENABLED="0") as server:
        yield server


def engine_processes(server: ServerProcess) -> list[psutil.Process]:
    """vLLM's engine processes of the server's replicas."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if "EngineCore" in "".join(child.cmdline()[:1]) or "EngineCor" in child.name()]


@pytest.mark.parametrize("erasure", [ERASURE, BEST], ids=["last", "best"])
def test_streams_through_actors_are_the_whole_answer(pair: ServerProcess, erasure: dict[str, Any]) -> None:
    request: dict[str, Any] = {"prompt": "Hello", "max_tokens": 17, "n": 3, "seed": 1, "ignore_eos": True}
    choices = pair.complete(**request, erasure=erasure)["choices"]
    whole = [choice["text"] for choice in choices]
    for mode in ("commit", "live"):
        answer = pair.post("/v1/completions", **request, stream=True, erasure={**erasure, "stream": mode})
        assert texts(list(events(iter(answer.text.split("\n")))), 3) == whole
    kept = {s["attempt"] for choice in choices for s in choice["erasure"]["segments"] if s["verdict"] == "accepted"}
    assert kept == ({0, 1, 2} if erasure is BEST else {1})
    stopped = pair.complete(**request, erasure=erasure, stop=whole[0][3:5])["choices"][0]
    assert stopped["text"] == whole[0][: whole[0].index(whole[0][3:5])]


def test_prompts_are_scored_and_parameters_refused_through_actors(pair: ServerProcess) -> None:
    scored = pair.complete("Hello", max_tokens=4, seed=1, echo=True, logprobs=1, erasure=ERASURE)["choices"][0]
    only = pair.complete("Hello", max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert only["logprobs"]["token_logprobs"] == scored["logprobs"]["token_logprobs"][:5]
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    refused = pair.post("/v1/completions", prompt="a", response_format=schema, erasure={"enabled": False})
    assert refused.status_code == 400, refused.text
    assert pair.admin_client.post("/reset_prefix_cache").json() == {"success": True}


def test_pauses_reach_both_replicas(pair: ServerProcess) -> None:
    body: dict[str, Any] = {"prompt": "Hello", "n": 8, "ignore_eos": True, "erasure": ERASURE}
    calls = [Background(lambda: pair.post("/v1/completions", **body, max_tokens=900)) for _ in range(2)]
    pair.wait_for("e3rl_responses_active", 16)
    assert pair.admin_client.post("/pause", json={"mode": "abort"}).status_code == 200
    assert [call.result(5.0).status_code for call in calls] == [503, 503]
    calls = [Background(lambda: pair.post("/v1/completions", **body, max_tokens=4)) for _ in range(2)]
    assert all(call.is_pending() for call in calls)
    assert pair.admin_client.post("/resume").status_code == 200
    assert [call.result().status_code for call in calls] == [200, 200]


def requests(model: str) -> list[dict[str, Any]]:
    """Long requests of every kind, with seeds and a verdict that no other response has a part in."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "return_token_ids": True}
    kinds: list[dict[str, Any]] = [
        {},
        {"stream": True},
        {"stream": True, "erasure": {**ERASURE, "stream": "live"}},
        {"stream": True, "erasure": {**ERASURE, "stream": "live"}, "logprobs": 1, "n": 2},
    ]
    return [{**body, "erasure": ERASURE, "seed": 10 * i, **kinds[i % len(kinds)]} for i in range(24)]


def committed(answer: httpx.Response) -> list[tuple[Any, ...]]:
    """Of each choice of an answer: its text, tokens and accepted segments."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        choices = answer.json()["choices"]
        return [(c["text"], c["token_ids"], accepted(c["erasure"])) for c in choices]
    chunks = list(events(iter(answer.text.split("\n"))))
    count = 1 + max(choice["index"] for chunk in chunks for choice in chunk["choices"])
    token_ids: list[list[int]] = [[] for _ in range(count)]
    offsets: list[list[int]] = [[] for _ in range(count)]
    reports: dict[int, list[Any]] = {}
    retracted: list[int] = []
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        place, erasure = choice["index"], choice.get("erasure") or {}
        if erasure.get("event") == "erase":
            retracted.append(erasure["retract_tokens"])
            del token_ids[place][len(token_ids[place]) - erasure["retract_tokens"] :]
            del offsets[place][len(token_ids[place]) :]
        elif erasure.get("event") == "finish":
            reports[place] = accepted(erasure)
        token_ids[place] += choice["token_ids"]
        offsets[place] += (choice["logprobs"] or {}).get("text_offset", [])
    assert all(offset == sorted(offset) for offset in offsets)
    # No more is taken back than the segment under way, and what followed it before its judgement was heard of.
    assert max(retracted, default=0) <= 10
    return [(text, token_ids[place], reports[place]) for place, text in enumerate(texts(chunks, count))]


def accepted(report: dict[str, Any]) -> list[Any]:
    """The accepted segments of a report; each one's erased attempt came before it."""
    attempts = [(s["index"], s["attempt"], s["verdict"]) for s in report["segments"]]
    assert attempts == [(i, a, verdict) for i in range(40) for a, verdict in enumerate(("erased", "accepted"))]
    names = ("index", "start", "end", "text", "token_ids")
    return [[s[name] for name in names] for s in report["segments"] if s["verdict"] == "accepted"]


async def kill_half_way(server: ServerProcess, engines: int) -> None:
    """Kill an engine under requests of every kind: their answers are those of undisturbed ones."""
    before = server.metric("e3rl_erasures_total")
    resubmitted = server.metric("e3rl_resubmissions_total")
    async with httpx.AsyncClient(base_url=server.url, timeout=240.0) as client:

        def ask_all() -> list[asyncio.Task[httpx.Response]]:
            return [asyncio.create_task(client.post("/v1/completions", json=body)) for body in requests(server.model)]

        undisturbed = await asyncio.gather(*ask_all())
        erasures = server.metric("e3rl_erasures_total") - before
        calls = ask_all()
        while server.metric("e3rl_erasures_total") - before < 1.4 * erasures:
            await asyncio.sleep(0.05)
        victims = engine_processes(server)
        assert len(victims) == engines
        os.kill(victims[0].pid, signal.SIGKILL)
        answers = await asyncio.gather(*calls)
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    for answer, other in zip(answers, undisturbed, strict=True):
        assert committed(answer) == committed(other)
    assert server.metric("e3rl_erasures_total") - before == 2 * erasures, "an attempt was judged twice"
    assert server.metric("e3rl_resubmissions_total") - resubmitted >= len(answers) // 4


async def test_a_killed_replica_loses_no_request_and_comes_back_with_the_weights(
    pair: ServerProcess, http_model: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(http_model.parent / "other", tmp_path / "checkpoint")
    synced = pair.admin_client.post("/weights/sync", json={"path": str(checkpoint)})
    assert synced.status_code == 200, synced.text
    shutil.rmtree(checkpoint)
    checksum = synced.json()["checksum"]
    await kill_half_way(pair, engines=2)
    assert pair.metric("e3rl_replica_restarts") <= 1
    deadline = time.monotonic() + 240.0
    while pair.metric("e3rl_replicas_ready") < 2:
        assert time.monotonic() < deadline, pair.client.get("/ready").text
        await asyncio.sleep(0.5)
    weights = pair.admin_client.get("/weights").json()["replicas"]
    assert [weight["checksum"] for weight in weights] == [checksum] * 2
    assert {weight["policy_version"] for weight in weights} == {1}
    assert pair.metric("e3rl_replica_restarts") == 1
    again = pair.complete(max_tokens=5, n=4)
    assert {choice["erasure"]["policy_version"] for choice in again["choices"]} == {1}


async def test_a_server_whose_only_engine_is_killed_answers_all_requests(
    http_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with running_server(http_model, tmp_path_factory.mktemp("alone")) as server:
        await kill_half_way(server, engines=1)
        assert server.metric("e3rl_replica_restarts") == 1
