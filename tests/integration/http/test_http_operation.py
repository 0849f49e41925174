"""Running a server: load, disconnects, weights, pause, the OpenAPI schema, shutdown, and starts that must fail."""

import asyncio
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.http_load import load
from tests.http_server import ROOT, ServerProcess, environment, running_server

LOAD_SECONDS = 120.0
CLIENTS = 256


async def test_load_with_disconnects_leaks_nothing(server: ServerProcess) -> None:
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    await load(server.url, server.model, CLIENTS, 2.0)
    before = sum(member.memory_info().rss for member in family)
    outcomes = await load(server.url, server.model, CLIENTS, LOAD_SECONDS)
    assert set(outcomes) <= {"complete", "left", "429"}, outcomes
    assert outcomes["complete"] > CLIENTS
    assert outcomes["left"] > 0
    await settled(server)
    grown = sum(member.memory_info().rss for member in family) - before
    assert grown < 100 * 2**20, f"memory grew by {grown / 2**20:.0f} MiB"
    assert server.metric("e3rl_disconnects_total") > 0


async def settled(server: ServerProcess, seconds: float = 5.0) -> None:
    """No request is under way, in the endpoint or in vLLM, and all KV blocks are free."""
    deadline = time.monotonic() + seconds
    while server.metric("e3rl_requests_active") and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert server.metric("e3rl_requests_active") == 0
    assert server.metric("e3rl_responses_active") == 0
    assert server.metric("e3rl_requests_waiting") == 0
    assert server.blocks_in_use() == 0
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:num_requests_waiting") == 0


@pytest.mark.parametrize("streams", [True, False])
async def test_a_disconnect_frees_its_blocks_within_a_second(server: ServerProcess, streams: bool) -> None:
    body = {
        "model": server.model,
        "prompt": "a" * 200,
        "max_tokens": 800,
        "n": 8,
        "ignore_eos": True,
        "stream": streams,
        "erasure": {"threshold": 1e6, "segmentation": {"mode": "fixed", "length": 800}},
    }
    async with httpx.AsyncClient(base_url=server.url, timeout=120.0) as client:
        call = asyncio.create_task(client.post("/v1/completions", json=body))
        while server.metric("e3rl_responses_active") < 8:
            await asyncio.sleep(0.02)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await settled(server, 1.0)


def test_weights_are_synced_from_a_checkpoint_directory(
    server: ServerProcess, http_model: Path, tmp_path: Path
) -> None:
    request: dict[str, Any] = {
        "prompt": "Hello", "max_tokens": 20, "seed": 1, "ignore_eos": True, "return_token_ids": True,
        "erasure": {"threshold": 1e6},
    }  # fmt: skip
    before = server.complete(**request)["choices"][0]
    other = http_model.parent / "other"
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((other / "config.json").read_bytes())
    tensors = load_file(other / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:7]}, sharded / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[7:]}, sharded / "model-00002-of-00002.safetensors")
    version = server.admin_client.get("/weights").json()["replicas"][0]["policy_version"] + 5
    synced = server.admin_client.post("/weights/sync", json={"path": str(other), "policy_version": version})
    assert synced.status_code == 200, synced.text
    first = server.complete(**request)["choices"][0]
    again = server.admin_client.post("/weights/sync", json={"path": str(sharded)}).json()
    assert again["policy_version"] == version + 1
    assert again["checksum"] == synced.json()["checksum"]
    weights = server.admin_client.get("/weights").json()["replicas"]
    assert [(w["policy_version"], w["checksum"]) for w in weights] == [(version + 1, again["checksum"])]
    second = server.complete(**request)["choices"][0]
    assert first["token_ids"] == second["token_ids"] != before["token_ids"]
    assert [choice["erasure"]["policy_version"] for choice in (first, second)] == [version, version + 1]
    older = server.admin_client.post("/weights/sync", json={"path": str(http_model), "policy_version": version})
    assert (older.status_code, older.json()["error"]["code"]) == (409, "version_not_newer")
    assert server.admin_client.post("/weights/sync", json={"path": str(http_model)}).status_code == 200
    restored = server.complete(**request)["choices"][0]
    assert restored["token_ids"] == before["token_ids"]


def test_weights_that_overflow_are_an_error_that_names_them_and_leave_nothing(
    server: ServerProcess, http_model: Path, tmp_path: Path
) -> None:
    prompts = [[7 * i % 256, 5, i] * 20 for i in range(30)]
    greedy: dict[str, Any] = {
        "prompt": prompts, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        "erasure": {"enabled": False},
    }  # fmt: skip
    before = [choice["token_ids"] for choice in server.complete(**greedy)["choices"]]
    tensors = load_file(http_model / "model.safetensors")
    overflowing = {name: t * 1e38 if "v_proj" in name else t for name, t in tensors.items()}
    shutil.copy(http_model / "config.json", tmp_path)
    save_file(overflowing, tmp_path / "model.safetensors")
    version = server.admin_client.post("/weights/sync", json={"path": str(tmp_path)}).json()["policy_version"]
    text = f"the weights of version {version} gave logits that are not finite"
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": "a" * 60, "erasure": erasure, "stream": stream, "logprobs": 2})
        for erasure in ({"enabled": False}, {"threshold": 0.0}, {})
        for stream in (False, True)
    ]
    bodies.append(("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 60}]}))
    group = {"prompt_id": "p", "prompt_token_ids": [1, 2, 3], "n": 4}
    bodies += [
        ("/v1/rollouts", {"groups": [group], "max_tokens": 30, "erasure": {"enabled": on}}) for on in (True, False)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda call: server.post(call[0], **call[1]), bodies * 3))
    for answer in answers:
        assert "NaN" not in answer.text
        assert answer.text.count(text) == 1
        assert answer.status_code == 500 or answer.headers["content-type"] != "application/json"
    assert server.admin_client.get("/weights").json()["replicas"][0]["non_finite_version"] == version
    assert server.metric("e3rl_non_finite_logits_total") >= len(answers)
    assert server.admin_client.post("/weights/sync", json={"path": str(http_model)}).status_code == 200
    assert [choice["token_ids"] for choice in server.complete(**greedy)["choices"]] == before
    server.settle()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors, last: {**tensors, "foo": tensors[last].clone()}, "too many, foo"),
        (lambda tensors, last: {name: t for name, t in tensors.items() if name != last}, "lacks the tensor"),
        (lambda tensors, last: {**tensors, last: tensors[last][:1].clone()}, "another shape"),
        (lambda tensors, last: {**tensors, last: tensors[last].to(torch.int32)}, "torch.int32"),
        (lambda tensors, last: {**tensors, last: tensors[last] * float("nan")}, "infinity or NaN"),
    ],
    ids=["too many", "too few", "shape", "integers", "nan"],
)
def test_tensors_that_are_not_the_models_are_refused_before_they_reach_an_engine(
    server: ServerProcess, http_model: Path, tmp_path: Path, change: Callable[..., dict[str, torch.Tensor]], text: str
) -> None:
    tensors = load_file(http_model / "model.safetensors")
    (tmp_path / "config.json").write_bytes((http_model / "config.json").read_bytes())
    save_file(change(tensors, max(tensors)), tmp_path / "model.safetensors")
    before = server.admin_client.get("/weights").json()
    answer = server.admin_client.post("/weights/sync", json={"path": str(tmp_path)})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "path")
    assert text in answer.json()["error"]["message"]
    assert server.complete(max_tokens=2)["choices"]
    assert server.admin_client.get("/weights").json() == before


@pytest.mark.parametrize("path", ["~nosuchuser/x", "a" * 4096, "a\0b", ""])
def test_a_path_that_can_be_none_is_a_400(server: ServerProcess, path: str) -> None:
    answer = server.admin_client.post("/weights/sync", json={"path": path})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "path")


@pytest.mark.parametrize("case", ["missing", "no weights", "other model", "damaged", "no object", "wrong type"])
def test_what_is_no_checkpoint_is_refused_and_serving_goes_on(
    server: ServerProcess, http_model: Path, tmp_path: Path, case: str
) -> None:
    directory = tmp_path / "checkpoint"
    if case != "missing":
        directory.mkdir()
        config = (http_model / "config.json").read_text()
        if case == "other model":
            config = config.replace('"hidden_size": 64', '"hidden_size": 32')
        if case == "no object":
            config = "5"
        if case == "wrong type":
            config = config.replace('"hidden_size": 64', '"hidden_size": "64"')
        (directory / "config.json").write_text(config)
    if case == "damaged":
        (directory / "model.safetensors").write_bytes(b"nothing")
    answer = server.admin_client.post("/weights/sync", json={"path": str(directory)})
    assert answer.status_code == 400
    assert str(tmp_path) not in answer.text
    assert server.complete(max_tokens=2)["choices"]


def test_pause_keep_freezes_and_resume_goes_on(server: ServerProcess) -> None:
    result: list[dict[str, Any]] = []
    assert server.admin_client.post("/pause", json={"mode": "keep"}).json()["paused"] is True
    thread = threading.Thread(target=lambda: result.append(server.complete(max_tokens=4)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    assert server.client.get("/ready").status_code == 200
    assert server.admin_client.post("/resume").json() == {"paused": False, "mode": None}
    thread.join(60.0)
    assert result[0]["choices"]


def test_keys_limits_and_sigterm(http_model: Path, tmp_path: Path) -> None:
    key = "a-key-for-the-test"
    flags = ("--host", "0.0.0.0", "--max-body-bytes", "2048", "--shutdown-seconds", "1", "--no-erasure-enabled")
    with running_server(http_model, tmp_path, *flags, E3RL_API_KEY=key) as server:
        headers = {"Authorization": f"Bearer {key}"}
        port = server.url.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/health").status_code == 200
        for base, route in ((url, "/metrics"), (url, "/nothing"), (server.admin, "/weights")):
            assert httpx.get(base + route).status_code == 401
            answer = httpx.get(base + route, headers=headers)
            assert answer.status_code == (404 if route == "/nothing" else 200)
            assert str(http_model) not in answer.text
        with socket.create_connection(("127.0.0.1", int(port))) as raw:
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
            raw.sendall(b"Transfer-Encoding: chunked\r\n")
            raw.sendall(f"Authorization: Bearer {key}\r\n\r\n".encode() + b"1000\r\n" + b"x" * 4096 + b"\r\n")
            assert b" 413 " in raw.recv(200)
        with socket.create_connection(("127.0.0.1", int(port))) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nX-Long: ")
            raw.settimeout(10.0)
            assert _is_dropped(raw)
        body = {"model": server.model, "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True, "n": 16}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60.0) as answer:
            parts = answer.iter_text()
            next(parts)
            terminated = time.monotonic()
            server.process.terminate()
            text = "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert "shutting down" in text
        assert server.process.wait(30.0) == 0
        assert time.monotonic() - terminated < 10.0, "though the request was far from its end"
        assert server.printed["starting"].endswith("threads each"), "what a start does is printed"
        assert key not in server.log.read_text()


def test_a_killed_server_leaves_no_engine_behind(http_model: Path, tmp_path: Path) -> None:
    with running_server(http_model, tmp_path) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any("EngineCore" in process.name() for process in family)
        server.process.kill()
        gone, alive = psutil.wait_procs(family, timeout=15.0)
        assert alive == []
        assert len(gone) == len(family)


def _is_dropped(raw: socket.socket) -> bool:
    """Whether the server ends a connection whose header never ends."""
    for _ in range(1000):
        try:
            raw.sendall(b"x" * 65536)
        except OSError:
            return True
    return False


STARTS: dict[str, tuple[list[str], str]] = {
    "no such directory": (["--model", "./nowhere"], "no such directory"),
    "no model directory": (["--model", "/"], "config.json"),
    "no key": (["--host", "0.0.0.0"], "set an API key"),
    "port in use": ([], "the port is in use"),
    "unknown setting in the file": (["--config", "CONFIG"], "unknown setting 'prot'"),
    "bad value": (["--replicas", "0"], "--replicas"),
    "too long": (["--max-length", "4096"], "exceeds the 1024 tokens"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_start_that_cannot_work_ends_with_one_line(
    server: ServerProcess, http_model: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "config.yaml").write_text("prot: 1\n")
    flags, text = STARTS[case]
    flags = [flag.replace("CONFIG", str(tmp_path / "config.yaml")) for flag in flags]
    port = server.url.rpartition(":")[2] if case == "port in use" else "0"
    given = {"--model": str(http_model), "--port": port, "--admin-port": "0"}
    rest = [part for flag, value in given.items() if flag not in flags for part in (flag, value)]
    command = [sys.executable, "-m", "rollout_server", *flags, *rest]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT)
    assert ended.returncode == 2
    assert all(line.startswith("starting ") for line in ended.stdout.splitlines())
    lines = [line for line in ended.stderr.splitlines() if "Triton" not in line]
    assert len(lines) == 1, ended.stderr
    assert text in lines[0]
