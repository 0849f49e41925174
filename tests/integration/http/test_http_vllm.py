"""With erasure off the endpoint answers token for token what `vllm serve` does, for the same model and seed."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.http_server import ROOT, START_SECONDS, ServerProcess, environment, events

PLAIN = {"enabled": False}


@pytest.fixture(scope="module")
def vllm(http_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """`vllm serve` on the same model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    flags = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64", "--block-size", "32"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(http_model), *flags]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(), cwd=ROOT)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120.0)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(client):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "vllm serve did not start"
            time.sleep(0.2)
        yield client
    finally:
        client.close()
        process.terminate()
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/health", timeout=2.0).status_code == 200
    except httpx.TransportError:
        return False


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": "Hello", "max_tokens": 40, "temperature": 0},
    "sampled": {"prompt": "Hello", "max_tokens": 40, "seed": 7},
    "several choices": {"prompt": "x = 1", "max_tokens": 30, "seed": 3, "n": 4, "temperature": 0.8},
    "several prompts": {"prompt": ["one", "two"], "max_tokens": 20, "seed": 1, "n": 2},
    "token ids": {"prompt": [72, 101, 108], "max_tokens": 20, "seed": 5},
    "truncated": {"prompt": "abc", "max_tokens": 30, "seed": 9, "top_p": 0.8, "top_k": 20, "min_p": 0.01},
    "ignoring the end": {"prompt": "abc", "max_tokens": 200, "seed": 11, "ignore_eos": True},
    "default length": {"prompt": "abc", "seed": 11},
    "stop": {"prompt": "abc", "max_tokens": 100, "seed": 12, "stop": ["f", "X"], "logprobs": 0},
    "log-probs": {"prompt": "abc", "max_tokens": 20, "seed": 13, "logprobs": 3},
    "penalties": {
        "prompt": "abcabc",
        "max_tokens": 40,
        "seed": 14,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.2,
    },
    "masks": {
        "prompt": "abc",
        "max_tokens": 40,
        "seed": 15,
        "logit_bias": {"65": 5, "70": -100},
        "allowed_token_ids": [*range(40, 100), 256],
        "bad_words": ["ab", "c"],
        "min_tokens": 10,
    },
    "stop tokens": {"prompt": "abc", "max_tokens": 99, "seed": 16, "stop_token_ids": [*range(90)], "min_tokens": 5},
    "stop tokens shown": {
        "prompt": "abc",
        "max_tokens": 99,
        "seed": 16,
        "stop_token_ids": [*range(90)],
        "include_stop_str_in_output": True,
    },
    "stop strings after some tokens": {
        "prompt": "abc",
        "max_tokens": 99,
        "seed": 12,
        "stop": ["f", "X"],
        "min_tokens": 30,
    },
    "stop strings shown": {
        "prompt": "abc",
        "max_tokens": 99,
        "seed": 12,
        "stop": ["f", "X"],
        "include_stop_str_in_output": True,
    },
    "special tokens": {
        "prompt": "abc",
        "max_tokens": 60,
        "seed": 17,
        "ignore_eos": True,
        "logit_bias": {"256": 6, "257": 6},
        "skip_special_tokens": False,
    },
    "special tokens without spaces": {
        "prompt": "abc",
        "max_tokens": 60,
        "seed": 17,
        "ignore_eos": True,
        "logit_bias": {"256": 6, "257": 6},
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    },
    "cut prompt": {"prompt": "abcdefgh", "max_tokens": 20, "seed": 18, "truncate_prompt_tokens": 3},
    "cut prompt on the right": {
        "prompt": "abcdefgh",
        "max_tokens": 20,
        "seed": 18,
        "truncate_prompt_tokens": 3,
        "truncation_side": "right",
    },
    "echo": {"prompt": "abc", "max_tokens": 10, "seed": 19, "echo": True, "logprobs": 1},
    "only the prompt": {"prompt": ["abc", "defg"], "max_tokens": 0, "echo": True, "logprobs": 2},
    "scored prompt": {"prompt": "abcd", "max_tokens": 5, "seed": 20, "prompt_logprobs": 2, "n": 2},
    "json": {
        "prompt": "abc",
        "max_tokens": 60,
        "seed": 21,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "n",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"enum": ["x", "y"]}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            },
        },
    },
    "nearly the whole context": {"prompt": "a" * 1000, "max_tokens": 24, "seed": 1, "ignore_eos": True},
}


def same_tokens(ours: list[str], theirs: list[str]) -> bool:
    """Texts of single tokens. A token that is a part of a character is U+FFFD here; vLLM looks at its neighbours."""
    return all(a == b or a == "\ufffd" for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", REQUESTS)
def test_completions_equal_vllm_serve(server: ServerProcess, vllm: httpx.Client, name: str) -> None:
    # With token ids vLLM leaves out what `echo` asks for.
    shows_tokens = "echo" not in REQUESTS[name]
    request = {"model": "tiny", "return_token_ids": shows_tokens, **REQUESTS[name]}
    theirs = vllm.post("/v1/completions", json=request)
    assert theirs.status_code == 200, theirs.text
    ours = server.complete(**{**request, "model": server.model}, erasure=PLAIN)
    expected = theirs.json()
    for mine, other in zip(ours["choices"], expected["choices"], strict=True):
        if shows_tokens:
            assert mine["token_ids"] == other["token_ids"]
            assert mine["prompt_token_ids"] == other["prompt_token_ids"]
        assert mine["text"] == other["text"]
        for field in ("finish_reason", "stop_reason"):
            assert mine[field] == other[field], field
        if "logprobs" in request:
            same_logprobs(mine["logprobs"], other["logprobs"])
        if "prompt_logprobs" in request:
            same_scores(mine["prompt_logprobs"], other["prompt_logprobs"])
    assert ours["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    if request.get("max_tokens") != 0:  # vLLM counts a token that it had to sample.
        assert ours["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]


def same_logprobs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert same_tokens(ours["tokens"], theirs["tokens"])
    for mine, other in zip(ours["token_logprobs"], theirs["token_logprobs"], strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or mine == pytest.approx(other, abs=1e-4)


def same_scores(ours: list[Any], theirs: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine or {}).keys() == (other or {}).keys()
        for token, entry in (mine or {}).items():
            assert entry["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-4)
            assert entry["rank"] == other[token]["rank"]


def test_streams_tell_what_vllms_do(server: ServerProcess, vllm: httpx.Client) -> None:
    request: dict[str, Any] = {"prompt": "abc", "max_tokens": 12, "seed": 5, "return_token_ids": True}
    request |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    told = []
    for answer in (
        vllm.post("/v1/completions", json={"model": "tiny", **request}),
        server.post("/v1/completions", **request, erasure=PLAIN),
    ):
        assert answer.status_code == 200, answer.text
        chunks = list(events(iter(answer.text.split("\n"))))
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        told.append(
            {
                "text": "".join(choice["text"] for choice in choices),
                "tokens": [token for choice in choices for token in choice["token_ids"] or []],
                "prompts": [c["prompt_token_ids"] for c in choices if c.get("prompt_token_ids")],
                "usage": [chunks[-1]["usage"]["completion_tokens"], chunks[-2]["usage"]["completion_tokens"]],
                "ends": [(c["finish_reason"], c["stop_reason"]) for c in choices if c["finish_reason"]],
            }
        )
    assert told[0] == told[1]


def test_messages_become_the_prompts_that_vllm_makes(server: ServerProcess, vllm: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "q", "name": "Eve"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "so far"},
    ]
    for options in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
        request = {"messages": messages, "max_tokens": 1, "return_token_ids": True, "prompt_logprobs": 1, **options}
        theirs = vllm.post("/v1/chat/completions", json={"model": "tiny", **request}).json()
        ours = server.post("/v1/chat/completions", **request, erasure=PLAIN).json()
        assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]
        same_scores(ours["prompt_logprobs"], theirs["prompt_logprobs"])
        tokens = {"messages": messages, **options}
        assert (
            server.post("/tokenize", **tokens).json()["tokens"]
            == vllm.post("/tokenize", json=tokens).json()["tokens"]
            == ours["prompt_token_ids"]
        )
    for route, body in (("/tokenize", {"prompt": "hé", "return_token_strs": True}), ("/detokenize", {"tokens": [72]})):
        assert server.post(route, **body).json() == vllm.post(route, json=body).json()


def test_chat_equals_vllm_serve(server: ServerProcess, vllm: httpx.Client) -> None:
    request: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Hello é"}],
        "max_tokens": 30,
        "seed": 4,
        "n": 2,
        "return_token_ids": True,
        "logprobs": True,
        "top_logprobs": 2,
    }
    theirs = vllm.post("/v1/chat/completions", json={"model": "tiny", **request}).json()
    ours = server.post("/v1/chat/completions", **request, erasure=PLAIN).json()
    for mine, other in zip(ours["choices"], theirs["choices"], strict=True):
        assert mine["token_ids"] == other["token_ids"]
        assert mine["message"]["content"] == other["message"]["content"]
        for entry, reference in zip(mine["logprobs"]["content"], other["logprobs"]["content"], strict=True):
            assert same_tokens([entry["token"]], [reference["token"]])
            assert entry["logprob"] == pytest.approx(reference["logprob"], abs=1e-4)
            # OpenAI's list is of the likeliest tokens; vLLM puts the sampled one first, in place of the last of them.
            top = [t["logprob"] for t in entry["top_logprobs"]]
            assert top == sorted(top, reverse=True)
            theirs_top = [t["logprob"] for t in reference["top_logprobs"]]
            likeliest = theirs_top if theirs_top == sorted(theirs_top, reverse=True) else theirs_top[1:]
            assert top[: len(likeliest)] == pytest.approx(likeliest, abs=1e-4)
    assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]


def test_an_infinite_threshold_equals_no_erasure(server: ServerProcess) -> None:
    request: dict[str, Any] = {"prompt": "Hello", "max_tokens": 40, "seed": 7, "return_token_ids": True}
    plain = server.complete(**request, erasure=PLAIN)["choices"][0]
    high = server.complete(**request, erasure={"threshold": 1e6, "segmentation": {"mode": "fixed", "length": 8}})
    assert high["choices"][0]["token_ids"] == plain["token_ids"]
    assert high["choices"][0]["text"] == plain["text"]
