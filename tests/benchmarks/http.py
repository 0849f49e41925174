"""What HTTP costs: throughput and first-token latency of the endpoint against its own engine and `vllm serve`.

Each measurement runs in turn on the same machine, `ROUNDS` times; the medians are compared.
"""

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from tests.benchmarks.report import Finding
from tests.http_load import session
from tests.http_server import ROOT, START_SECONDS, environment, running_server
from tests.models import tiny_qwen3

CLIENTS = 64
TOKENS = 128
REQUESTS = 3 * CLIENTS
ROUNDS = 3
PLAIN = {"enabled": False}
ERASURE = {"segmentation": {"mode": "fixed", "length": 16}, "threshold": 0, "max_erasures": 1}


async def drive(url: str, model: str, extra: dict[str, Any], streams: bool, vocabulary: int) -> tuple[float, float]:
    """Generated tokens a second with `CLIENTS` clients, and the median time to a response's first chunk."""
    first: list[float] = []
    waiting = iter(range(REQUESTS))
    body = {"model": model, "max_tokens": TOKENS, "ignore_eos": True, "stream": streams, **extra}

    async def one(client: aiohttp.ClientSession) -> None:
        for number in waiting:
            prompt = [(number * 7 + place) % vocabulary for place in range(32)]
            started = time.perf_counter()
            async with client.post("/v1/completions", json={**body, "prompt": prompt, "seed": number}) as answer:
                assert answer.status == 200, await answer.text()
                seconds = None
                async for _ in answer.content.iter_any():
                    seconds = seconds or time.perf_counter() - started
                first.append(seconds or 0.0)

    async with session(url, CLIENTS) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(CLIENTS)))
        seconds = time.perf_counter() - started
    return REQUESTS * TOKENS / seconds, statistics.median(first)


ENGINE_SCRIPT = """
import asyncio, json, sys, time
from common.config import EngineConfig, ErasurePolicy, ModelConfig
from common.trajectory import ResponseRequest
from rollout_server.engine import ErasableEngine

path, clients, requests, tokens, rounds, erasure = sys.argv[1], *map(int, sys.argv[2:6]), json.loads(sys.argv[6])

async def main():
    config = EngineConfig(max_concurrent_responses=clients)
    engine = await ErasableEngine.start(ModelConfig(path=path, max_length=1024), config)
    policies = {"plain": None, "erasure": ErasurePolicy(**erasure)}
    for line in sys.stdin:
        common = {"group_size": 1, "sample": 0, "max_tokens": tokens, "ignore_eos": True}
        common |= {"policy": policies[line.strip()], "prompt_id": "p"}
        waiting = iter(range(requests))
        async def one():
            for number in waiting:
                prompt = [(number * 7 + place) % 256 for place in range(32)]
                group = f"{time.time()}-{number}"
                await engine.generate(
                    ResponseRequest(group_id=group, seed=number, prompt_token_ids=prompt, **common)
                )
        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        print("RATE", requests * tokens / (time.perf_counter() - started), flush=True)
    await engine.close()

asyncio.run(main())
"""


class Engine:
    """The engine by itself in a process of its own, which measures when it is told to."""

    def __init__(self, model: Path) -> None:
        arguments = [str(model), str(CLIENTS), str(REQUESTS), str(TOKENS), str(ROUNDS), json.dumps(ERASURE)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENGINE_SCRIPT, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def rate(self, kind: str) -> float:
        """Tokens a second with `kind` plain or erasure."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the engine's process has no pipes")
        self._process.stdin.write(f"{kind}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RATE"):
                return float(line.split()[1])
        raise RuntimeError("the engine's process ended")

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60.0)


@contextmanager
def vllm_serve(model: Path) -> Iterator[str]:
    """`vllm serve` on `model` under the name `bench`; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--enforce-eager"]
    command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", str(CLIENTS), "--block-size", "32"]
    command += ["--disable-uvicorn-access-log"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(), cwd=ROOT
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                    break
            except httpx.TransportError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure_http(directory: Path, rounds: int = ROUNDS) -> list[Finding]:
    """Throughput ratios, and a ratio of latencies, which must not exceed its target."""
    rates: dict[str, list[float]] = {}
    latencies: dict[str, list[float]] = {}

    def over_http(name: str, url: str, model: str, extra: dict[str, Any], streams: bool) -> None:
        rate, latency = asyncio.run(drive(url, model, extra, streams, 256))
        rates.setdefault(name, []).append(rate)
        latencies.setdefault(name, []).append(latency)

    model = tiny_qwen3(directory / "bench", hidden_size=128, layers=4)
    engine = Engine(model)
    with running_server(model, directory) as server, vllm_serve(model) as vllm:
        ways: list[tuple[str, str, dict[str, Any], bool]] = [
            ("ours, plain", server.url, {"erasure": PLAIN}, False),
            ("ours, plain, streamed", server.url, {"erasure": PLAIN}, True),
            ("vllm serve", vllm, {}, False),
            ("vllm serve, streamed", vllm, {}, True),
            ("ours, erasing", server.url, {"erasure": ERASURE}, False),
        ]
        for number in range(rounds + 1):
            for name, url, extra, streams in ways:
                over_http(name, url, "bench", extra, streams)
            for kind in ("plain", "erasure"):
                rates.setdefault(f"engine, {kind}", []).append(engine.rate(kind))
            if number == 0:  # The first round warms everything up.
                rates.clear()
                latencies.clear()
    engine.close()
    rate = {name: statistics.median(values) for name, values in rates.items()}
    latency = {name: statistics.median(values) for name, values in latencies.items()}
    return [
        _row("tokens/s of the engine, plain", rate, "ours, plain", "engine, plain", 0.9),
        _row("tokens/s of the engine, erasing", rate, "ours, erasing", "engine, erasure", 0.9),
        _row("tokens/s of vllm serve", rate, "ours, plain", "vllm serve", 0.95),
        _row("tokens/s of vllm serve, streamed", rate, "ours, plain, streamed", "vllm serve, streamed", 0.95),
        _row("first-token latency", latency, "ours, plain, streamed", "vllm serve, streamed", 1.15, most=True),
    ]


def _row(name: str, values: dict[str, float], ours: str, theirs: str, target: float, *, most: bool = False) -> Finding:
    detail = f"{ours}: {values[ours]:,.4g}; {theirs}: {values[theirs]:,.4g}; {CLIENTS} clients x {TOKENS} tokens"
    return Finding(f"HTTP: {name}", values[ours] / values[theirs], target, detail, at_least=not most)
