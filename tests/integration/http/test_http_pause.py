"""Pauses of a real engine with responses under way: what ends, what waits, and what a weight sync changes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http_server import FIRST_TOKENS, Background, ServerProcess, events

ERASING = {"threshold": 0, "max_erasures": 1, "segmentation": {"mode": "fixed", "length": 4}, "regeneration_budget": 9}
POLICIES: tuple[dict[str, Any], ...] = ({"enabled": False}, ERASING, {**ERASING, "stream": "live"})


@pytest.fixture(autouse=True)
def _resumed(server: ServerProcess) -> Iterator[None]:
    """The server belongs to other tests too."""
    yield
    server.admin_client.post("/resume")


def pause(server: ServerProcess, mode: str) -> dict[str, Any]:
    answer = server.admin_client.post("/pause", json={"mode": mode})
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def in_background(server: ServerProcess, **body: Any) -> Background[httpx.Response]:
    return Background(lambda: server.post("/v1/completions", prompt="Hello", ignore_eos=True, **body))


def under_way(server: ServerProcess, **body: Any) -> list[Background[httpx.Response]]:
    """Whole answers, then streams, of each of `POLICIES`, all of which have begun to generate."""
    whole = [in_background(server, erasure=policy, **body) for policy in POLICIES]
    server.wait_for("e3rl_responses_active", len(POLICIES))
    begun = server.metric(FIRST_TOKENS)
    streams = [in_background(server, erasure=policy, stream=True, **body) for policy in POLICIES]
    server.wait_for(FIRST_TOKENS, begun + len(POLICIES))
    return whole + streams


def begun_stream(server: ServerProcess, **body: Any) -> Background[httpx.Response]:
    begun = server.metric(FIRST_TOKENS)
    call = in_background(server, erasure=ERASING, stream=True, **body)
    server.wait_for(FIRST_TOKENS, begun + 1)
    return call


def test_abort_ends_all_responses_with_an_error_and_frees_their_blocks(server: ServerProcess) -> None:
    calls = under_way(server, max_tokens=900)
    assert pause(server, "abort") == {"paused": True, "mode": "abort"}
    answers = [call.result(2.0) for call in calls]
    for whole, stream in zip(answers[:3], answers[3:], strict=True):
        assert whole.status_code == 503
        assert int(whole.headers["retry-after"]) >= 1
        error = whole.json()["error"]
        assert error["type"] == "service_unavailable_error"
        assert "aborted" in error["message"]
        if stream.status_code == 200:
            chunks = list(events(iter(stream.text.split("\n"))))
            assert [chunk["error"] for chunk in chunks if "error" in chunk] == [chunks[-1]["error"]] == [error]
        else:
            assert (stream.status_code, stream.json()["error"]) == (503, error)
    assert answers[3].status_code == answers[5].status_code == 200, "streams that had shown something"
    server.admin_client.post("/resume")
    server.settle()


def test_wait_finishes_what_is_under_way(server: ServerProcess) -> None:
    """Also responses that are erased during the pause, which need new requests to vLLM for that."""
    calls = under_way(server, max_tokens=100)
    assert pause(server, "wait") == {"paused": True, "mode": "wait"}
    answers = [call.result(2.0) for call in calls]
    for number, (whole, stream) in enumerate(zip(answers[:3], answers[3:], strict=True)):
        choice = whole.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        assert choice["erasure"]["erased_tokens"] == (100 if number else 0)
        last = list(events(iter(stream.text.split("\n"))))[-1]["choices"][0]
        assert last["finish_reason"] == "length"
    server.admin_client.post("/resume")
    server.settle()


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_nothing_new_is_generated_until_resume_whatever_happens_meanwhile(
    server: ServerProcess, http_model: Path, mode: str
) -> None:
    pause(server, mode)
    call = in_background(server, max_tokens=4)
    assert call.is_pending()
    assert pause(server, mode) == {"paused": True, "mode": mode}
    synced = server.admin_client.post("/weights/sync", json={"path": str(http_model)})
    assert synced.status_code == 200, synced.text
    assert call.is_pending(), "a weight sync ended the pause"
    assert server.client.get("/ready").status_code == 200
    assert server.metric("e3rl_responses_active") == 1
    resumed = server.admin_client.post("/resume")
    assert (resumed.status_code, resumed.json()) == (200, {"paused": False, "mode": None})
    answer = call.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["erasure"]["policy_version"] == synced.json()["policy_version"]
    server.settle()


def test_what_keep_froze_goes_on_or_is_ended_by_another_mode(server: ServerProcess, http_model: Path) -> None:
    frozen = begun_stream(server, max_tokens=100)
    pause(server, "keep")
    server.admin_client.post("/weights/sync", json={"path": str(http_model)})
    assert frozen.is_pending()
    pause(server, "wait")
    assert list(events(iter(frozen.result(2.0).text.split("\n"))))[-1]["choices"][0]["finish_reason"] == "length"
    server.admin_client.post("/resume")
    frozen = begun_stream(server, max_tokens=900)
    pause(server, "keep")
    pause(server, "abort")
    assert "aborted" in frozen.result(2.0).text
    server.admin_client.post("/resume")
    server.settle()


def test_resume_without_a_pause_and_modes_that_do_not_exist(server: ServerProcess) -> None:
    resumed = server.admin_client.post("/resume")
    assert (resumed.status_code, resumed.json()) == (200, {"paused": False, "mode": None})
    for body in ({"mode": "nap"}, {"mode": None}, {"mode": "wait", "seconds": 3}):
        answer = server.admin_client.post("/pause", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == ("seconds" if "seconds" in body else "mode")
    assert server.complete(max_tokens=2)["choices"]
