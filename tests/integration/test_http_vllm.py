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

from tests.http_server import ROOT, START_SECONDS, ServerProcess, environment

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
    "nearly the whole context": {"prompt": "a" * 1000, "max_tokens": 24, "seed": 1, "ignore_eos": True},
}


def same_tokens(ours: list[str], theirs: list[str]) -> bool:
    """Texts of single tokens. A token that is a part of a character is U+FFFD here; vLLM looks at its neighbours."""
    return all(a == b or a == "\ufffd" for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", REQUESTS)
def test_completions_equal_vllm_serve(server: ServerProcess, vllm: httpx.Client, name: str) -> None:
    request = {"model": "tiny", "return_token_ids": True, **REQUESTS[name]}
    theirs = vllm.post("/v1/completions", json=request)
    assert theirs.status_code == 200, theirs.text
    ours = server.complete(**{**request, "model": server.model}, erasure=PLAIN)
    expected = theirs.json()
    for mine, other in zip(ours["choices"], expected["choices"], strict=True):
        assert mine["token_ids"] == other["token_ids"]
        assert mine["text"] == other["text"]
        assert mine["finish_reason"] == other["finish_reason"]
        if "logprobs" in request:
            assert same_tokens(mine["logprobs"]["tokens"], other["logprobs"]["tokens"])
            assert mine["logprobs"]["token_logprobs"] == pytest.approx(other["logprobs"]["token_logprobs"], abs=1e-4)
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert ours["usage"][field] == expected["usage"][field]


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
