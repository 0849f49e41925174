"""What HTTP costs: throughput and first-token latency of the endpoint against its own engine and `vllm serve`.

All run in turn, `ROUNDS` times; what is compared is measured in the same round, and the median of the ratios counts.
"""

import asyncio
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
from tests.benchmarks.workload import CONCURRENT, Workload, benchmark_model
from tests.http_load import session
from tests.http_server import ROOT, START_SECONDS, environment, running_server

WORK = Workload(requests=192, response=128, segment=16)
ROUNDS = 4
PLAIN = {"enabled": False}
ERASURE = {"segmentation": {"mode": "fixed", "length": WORK.segment}, "threshold": 0, "max_erasures": 1}


async def drive(url: str, model: str, extra: dict[str, Any], streams: bool) -> tuple[float, float]:
    """Generated tokens a second with `CONCURRENT` clients, and the median time to a response's first chunk."""
    first: list[float] = []
    waiting = iter(range(WORK.requests))
    body = {"model": model, "ignore_eos": True, "stream": streams, **extra}

    async def one(client: aiohttp.ClientSession) -> None:
        for number in waiting:
            own = {"prompt": WORK.prompt(number), "max_tokens": WORK.limit(number), "seed": number}
            started = time.perf_counter()
            async with client.post("/v1/completions", json={**body, **own}) as answer:
                assert answer.status == 200, await answer.text()
                seconds = None
                async for _ in answer.content.iter_any():
                    seconds = seconds or time.perf_counter() - started
                first.append(seconds or 0.0)

    async with session(url, CONCURRENT) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(CONCURRENT)))
        seconds = time.perf_counter() - started
    return WORK.tokens / seconds, statistics.median(first)


ENGINE_SCRIPT = """
import asyncio, sys, time
from common.config import EngineConfig, ErasurePolicy, ModelConfig
from common.trajectory import ResponseRequest
from rollout_server.engine.engine import ErasableEngine
from tests.benchmarks.http import ERASURE, WORK
from tests.benchmarks.workload import CONCURRENT

async def main():
    config = EngineConfig(max_concurrent_responses=CONCURRENT, log_stats=True)
    engine = await ErasableEngine.start(ModelConfig(path=sys.argv[1], max_length=1024), config)
    policies = {"plain": None, "erasing": ErasurePolicy(**ERASURE)}
    for line in sys.stdin:
        common = {"group_size": 1, "sample": 0, "ignore_eos": True}
        common |= {"policy": policies[line.strip()], "prompt_id": "p"}
        waiting = iter(range(WORK.requests))
        async def one():
            for number in waiting:
                own = {"prompt_token_ids": WORK.prompt(number), "max_tokens": WORK.limit(number), "seed": number}
                await engine.generate(ResponseRequest(group_id=f"{time.time()}-{number}", **common, **own))
        started = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(CONCURRENT)))
        print("RATE", WORK.tokens / (time.perf_counter() - started), flush=True)
    await engine.close()

asyncio.run(main())
"""


class Engine:
    """The engine by itself in a process of its own, set up as the server's; it measures when it is told to."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENGINE_SCRIPT, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
            cwd=ROOT,
        )

    def rate(self, kind: str) -> float:
        """Tokens a second with `kind` plain or erasing."""
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
    command += ["--max-model-len", "1024", "--max-num-seqs", str(CONCURRENT), "--block-size", "32"]
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
    model = benchmark_model(directory / "bench")
    engine = Engine(model)
    rates: list[dict[str, float]] = []
    latencies: list[dict[str, float]] = []
    with running_server(model, directory) as server, vllm_serve(model) as vllm:
        ways: dict[str, tuple[str, dict[str, Any], bool]] = {
            "ours, plain": (server.url, {"erasure": PLAIN}, False),
            "vllm serve": (vllm, {}, False),
            "ours, plain, streamed": (server.url, {"erasure": PLAIN}, True),
            "vllm serve, streamed": (vllm, {}, True),
            "ours, erasing": (server.url, {"erasure": ERASURE}, False),
        }
        for number in range(rounds + 1):
            # Each round goes the other way round, so that a drift of the machine's speed favours nobody.
            names = [*ways, "engine, erasing", "engine, plain"][:: 1 if number % 2 else -1]
            rate: dict[str, float] = {}
            latency: dict[str, float] = {}
            for name in names:
                if name in ways:
                    url, extra, streams = ways[name]
                    rate[name], latency[name] = asyncio.run(drive(url, "bench", extra, streams))
                else:
                    rate[name] = engine.rate(name.removeprefix("engine, "))
            if number > 0:  # The first round warms everything up.
                rates.append(rate)
                latencies.append(latency)
    engine.close()
    return [
        _row("tokens/s of the engine, plain", rates, "ours, plain", "engine, plain", 0.9),
        _row("tokens/s of the engine, erasing", rates, "ours, erasing", "engine, erasing", 0.9),
        _row("tokens/s of vllm serve", rates, "ours, plain", "vllm serve", 0.95),
        _row("tokens/s of vllm serve, streamed", rates, "ours, plain, streamed", "vllm serve, streamed", 0.95),
        _row("first-token latency", latencies, "ours, plain, streamed", "vllm serve, streamed", 1.15, most=True),
    ]


def _row(
    name: str, rounds: list[dict[str, float]], ours: str, theirs: str, target: float, *, most: bool = False
) -> Finding:
    ratios = [values[ours] / values[theirs] for values in rounds]
    medians = {side: statistics.median(values[side] for values in rounds) for side in (ours, theirs)}
    spread = f"rounds {min(ratios):.3f} to {max(ratios):.3f}"
    detail = f"{ours}: {medians[ours]:,.4g}; {theirs}: {medians[theirs]:,.4g}; {spread}; {WORK}"
    return Finding(f"HTTP: {name}", statistics.median(ratios), target, detail, at_least=not most)
