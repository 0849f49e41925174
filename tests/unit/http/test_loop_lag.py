"""No request, valid or not, holds the event loop for long."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from common.slices import Slices
from rollout_server.replicas.pool import EngineFacts
from tests.loop_lag import ask, watching
from tests.stub_replica import Script, StubReplica, StubServer, saying

MOST_SECONDS = 0.1
TRIES = 3
"""A request that holds the loop does so every time; a machine that is busy does not."""
COMPLETE, CHAT, ROLLOUTS = "/v1/completions", "/v1/chat/completions", "/v1/rollouts"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
ITEMS, NUMBERS = 49_000, 490_000
"""As many as a body may have."""


class LongReplica(StubReplica):
    """Of a model with a long context."""

    async def start(self) -> EngineFacts:
        return replace(await super().start(), max_length=2**17)

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> list[Any]:
        slices = Slices()
        scores: list[Any] = [None]
        for _ in prompt_token_ids[1:]:
            scores.append({token: (-1.0, 1) for token in range(97, 98 + top)})
            await slices.turn()
        return scores


@pytest.fixture(scope="module", autouse=True)
def settled() -> Iterator[None]:
    """As the server does when it has started: tests have far more in memory, which the collector would look at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


SAYING_A = saying("a")


async def hold(path: str, body: dict[str, Any], script: Script = SAYING_A) -> tuple[float, str, int]:
    """For how long a request holds the loop, what does, and its status: the least of several tries."""
    raw = json.dumps({"model": "stub", **body}, separators=(",", ":")).encode()
    tries = []
    async with StubServer(LongReplica(script)) as server:
        # What is done once in a process has been done.
        await ask(server.app, COMPLETE, b'{"model":"stub","prompt":"a"}')
        for _ in range(TRIES):
            with watching() as held:
                status, _, _ = await ask(server.app, path, raw)
            tries.append((max(held.loop, held.process), held.callback, status))
            if tries[-1][0] < MOST_SECONDS / 2:
                break
    return min(tries)


def names(count: int) -> dict[str, int]:
    return {f"k{number}": 0 for number in range(count)}


def chat(**message: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message}]}


HOSTILE: dict[str, tuple[str, Callable[[], dict[str, Any]], int]] = {
    "unknown keys": (COMPLETE, lambda: {"prompt": "a", **names(350_000)}, 400),
    "unknown keys, as many as may be": (COMPLETE, lambda: {"prompt": "a", **names(1000)}, 400),
    "unknown keys in every message": (CHAT, lambda: {"messages": [names(1000)] * 45}, 400),
    "a million token lists": (COMPLETE, lambda: {"prompt": [[]] * 1_000_000}, 400),
    "token lists, as many as may be": (COMPLETE, lambda: {"prompt": [[1]] * ITEMS}, 400),
    "parts": (CHAT, lambda: chat(content=[{}] * 1_300_000), 400),
    "parts, as many as may be": (CHAT, lambda: {"messages": chat(content=[{}] * 1000)["messages"] * 45}, 400),
    "messages": (CHAT, lambda: {"messages": [{"x": {}}] * 16_000}, 400),
    "groups": (ROLLOUTS, lambda: {"groups": [{}] * ITEMS, "max_tokens": 8}, 400),
    "nulls for token ids": (COMPLETE, lambda: {"prompt": [None] * NUMBERS}, 400),
    "stop strings": (COMPLETE, lambda: {"prompt": "a", "stop": [None] * NUMBERS}, 400),
    "what must be empty": (COMPLETE, lambda: {"prompt": "a", "prompt_embeds": [[]] * ITEMS}, 400),
    "a schema": (COMPLETE, lambda: {"prompt": "a", "response_format": schema([1] * NUMBERS)}, 400),
    "a template's variables": (CHAT, lambda: chat(content="a") | {"chat_template_kwargs": {"a": [1] * NUMBERS}}, 200),
    "a tool's parameters": (CHAT, lambda: chat(content="a") | {"tools": [tool({"a": [1] * NUMBERS})]}, 200),
    "a prompt that is too long": (COMPLETE, lambda: {"prompt": "ab c " * 400_000}, 400),
    "token ids that are too large": (COMPLETE, lambda: {"prompt": [10**6] * NUMBERS}, 400),
    "prompts of 4 KB": (COMPLETE, lambda: {"prompt": ["a" * 4000] * 1024, "max_tokens": 8}, 200),
    "prompts of 32 KB": (COMPLETE, lambda: {"prompt": ["a" * 32_000] * 128, "max_tokens": 8}, 200),
    "prompts without a character": (COMPLETE, lambda: {"prompt": [[128] * 2000] * 128, "max_tokens": 8}, 200),
    "groups of long prompts": (ROLLOUTS, lambda: {"groups": [group([1] * 400)] * 1024, "max_tokens": 8}, 200),
    "a text": (TOKENIZE, lambda: {"prompt": "ab c " * 400_000, "return_token_strs": True}, 200),
    "tokens": (DETOKENIZE, lambda: {"tokens": [240] * NUMBERS}, 200),
}


def schema(values: list[int]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": {"enum": values}}}


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "x", "parameters": parameters}}


def group(prompt: list[int]) -> dict[str, Any]:
    return {"prompt_id": "p", "prompt_token_ids": prompt}


@pytest.mark.parametrize("name", HOSTILE)
async def test_no_body_holds_the_loop(name: str) -> None:
    path, body, expected = HOSTILE[name]
    seconds, callback, status = await hold(path, body())
    assert status == expected
    assert seconds < MOST_SECONDS, callback


def long_response(segments: int, tokens: int) -> Script:
    """Each segment is erased once."""
    script = [(verdict, "x" * tokens) for _ in range(segments) for verdict in ("erased", "accepted")]
    return lambda request: script


MANY = {"prompt": "a", "n": 64, "max_tokens": 100_000, "logprobs": 20, "return_token_ids": True}
TALK = {"messages": [{"role": "user", "content": "a"}], "n": 64, "max_tokens": 100_000, "top_logprobs": 20}
LONG = {"prompt": [97] * 100_000, "max_tokens": 8}
MANY_SEGMENTS, LONG_SEGMENTS = long_response(32, 8), long_response(1, 512)
ANSWERS: dict[str, tuple[str, dict[str, Any], Script]] = {
    "whole": (COMPLETE, MANY, MANY_SEGMENTS),
    "whole, of long segments": (COMPLETE, MANY, LONG_SEGMENTS),
    "streamed": (COMPLETE, {**MANY, "stream": True}, MANY_SEGMENTS),
    "live": (COMPLETE, {**MANY, "stream": True, "erasure": {"stream": "live"}}, MANY_SEGMENTS),
    "plain": (COMPLETE, {**MANY, "erasure": {"enabled": False}}, LONG_SEGMENTS),
    "with stop strings": (COMPLETE, {**MANY, "stop": [str(digit) * 1000 for digit in range(9)]}, LONG_SEGMENTS),
    "chat": (CHAT, {**TALK, "logprobs": True}, LONG_SEGMENTS),
    "one long response": (COMPLETE, {**MANY, "n": 1}, long_response(1, 20_000)),
    "rollouts": (ROLLOUTS, {"groups": [group([1]) | {"n": 32}], "max_tokens": 100_000}, long_response(2, 1000)),
    "a long prompt's log-probs": (COMPLETE, {**LONG, "prompt_logprobs": 3}, SAYING_A),
    "a long prompt again": (COMPLETE, {**LONG, "echo": True, "logprobs": 3, "return_token_ids": True}, SAYING_A),
    "a long prompt many times": (COMPLETE, {**LONG, "n": 64, "echo": True, "return_token_ids": True}, SAYING_A),
    "a long prompt in a stream": (COMPLETE, {**LONG, "echo": True, "logprobs": 3, "stream": True}, SAYING_A),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_no_answer_holds_the_loop(name: str) -> None:
    path, body, script = ANSWERS[name]
    seconds, callback, status = await hold(path, body, script)
    assert status == 200
    assert seconds < MOST_SECONDS, callback
