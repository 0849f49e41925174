"""Two thousand clients in bursts, who ask for all kinds of things and leave at every stage: nothing of them stays."""

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.http_server import ServerProcess

CLIENTS = 2000
BURST = 100
PATIENCE_SECONDS = 40.0
LEAVE_AT = {
    "connected": 3, "in the header": 3, "in the body": 3, "asked": 4, "later": 4, "first bytes": 1, "half way": 1,
    "never": 1,
}  # fmt: skip
"""Stages at which clients leave and how often. `asked`: at once; `later`: whatever has happened by then."""
ERASURES: tuple[dict[str, Any], ...] = (
    {"enabled": False},
    {"threshold": 0, "max_erasures": 1, "segmentation": {"mode": "fixed", "length": 3}, "regeneration_budget": 9},
    {"kappa": 0, "min_uncertainty": 0, "segmentation": {"mode": "fixed", "length": 2}, "on_exhaustion": "best"},
    {"segmentation": {"mode": "delimiter", "delimiter": "e"}},
)


async def test_a_storm_of_clients_who_leave_at_every_stage_leaves_nothing(server: ServerProcess) -> None:
    process = psutil.Process(server.process.pid)
    slowest_before = slowest_of(server, 5)
    files = process.num_fds()
    outcomes: Counter[str] = Counter()
    draw = random.Random(7)
    clients: list[asyncio.Task[None]] = []
    for first in range(0, CLIENTS, BURST):
        clients += [asyncio.create_task(client(server, number, outcomes)) for number in range(first, first + BURST)]
        await asyncio.sleep(draw.random())
    _, waiting = await asyncio.wait(clients, timeout=PATIENCE_SECONDS)
    assert not waiting, f"{len(waiting)} clients still wait: {outcomes}"
    await asyncio.gather(*clients)
    assert sum(outcomes.values()) == CLIENTS
    assert set(outcomes) <= {f"left {stage}" for stage in LEAVE_AT} | {"complete", "429"}, outcomes
    assert all(outcomes[f"left {stage}"] for stage in LEAVE_AT if stage != "never"), outcomes
    assert outcomes["complete"] > CLIENTS / 40, outcomes
    for name in ("requests_active", "requests_waiting", "places_in_use", "monitor_slots_in_use", "kv_blocks_in_use"):
        server.wait_for(f"e3rl_{name}", 0)
    assert server.client.get("/ready").status_code == 200
    assert slowest_of(server, 5) < max(2.0, 4 * slowest_before)
    full = server.complete(max_tokens=2, n=64, ignore_eos=True)
    assert len(full["choices"]) == server.metric("e3rl_places") == 64
    deadline = time.monotonic() + 10.0
    while process.num_fds() > files + 5 and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert process.num_fds() <= files + 5, "connections are left"


def slowest_of(server: ServerProcess, requests: int) -> float:
    """Seconds that the slowest of some short requests takes."""
    seconds = []
    for number in range(requests):
        started = time.monotonic()
        server.complete(f"afterwards {number}", max_tokens=8, ignore_eos=True)
        seconds.append(time.monotonic() - started)
    return max(seconds)


async def client(server: ServerProcess, number: int, outcomes: Counter[str]) -> None:
    """One client; what became of it is counted."""
    draw = random.Random(number)
    (leaves,) = draw.choices(list(LEAVE_AT), list(LEAVE_AT.values()))
    # Those who listen ask for little, or all would wait for them.
    path, body = something(draw, server.model, 4 if leaves in ("first bytes", "half way", "never") else 128)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += f"Content-Length: {len(raw)}\r\n\r\n"
    parts = {"connected": b"", "in the header": head[:40].encode(), "in the body": head.encode() + raw[: len(raw) // 2]}
    reader, writer = await asyncio.open_connection(urlsplit(server.url).hostname, urlsplit(server.url).port)
    try:
        writer.write(parts.get(leaves, head.encode() + raw))
        with suppress(ConnectionError):
            await writer.drain()
        if leaves in (*parts, "later"):
            with suppress(TimeoutError):
                async with asyncio.timeout(draw.random() * (2.0 if leaves == "later" else 0.5)):
                    await reader.read()
            outcomes[f"left {leaves}"] += 1
        elif leaves == "asked":
            outcomes["left asked"] += 1
        else:
            outcomes[await listened(reader, leaves, draw)] += 1
    finally:
        await left(writer, rudely=draw.random() < 0.5)


async def listened(reader: asyncio.StreamReader, leaves: str, draw: random.Random) -> str:
    """Reads an answer, or its beginning; the outcome."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    if leaves == "first bytes":
        return "left first bytes"
    if leaves == "half way":
        await reader.read(draw.randint(1, 3000))
        return "left half way"
    body = await reader.read()
    if status != 200:
        return str(status)
    streams = b"text/event-stream" in head
    is_whole = body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") if streams else body.rstrip().endswith((b"}", b"0"))
    return "complete" if is_whole and b'"error"' not in body else "broken"


async def left(writer: asyncio.StreamWriter, rudely: bool) -> None:
    """Leave, with a reset of the connection or with its end."""
    if rudely:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def something(draw: random.Random, model: str, most: int) -> tuple[str, dict[str, Any]]:
    """A route and a request that it takes, for at most so many responses to a prompt."""
    erasure = dict(draw.choice(ERASURES))
    n = min(draw.choice((1, 1, 1, 2, 3, 4, 16, 64, 128)), most)
    body: dict[str, Any] = {"model": model, "max_tokens": draw.randint(1, 8)}
    if draw.random() < 0.2:
        group = {"prompt_id": "p", "prompt_token_ids": [draw.randrange(256) for _ in range(9)], "n": min(n, 16)}
        return "/v1/rollouts", {**body, "groups": [group] * draw.randint(1, 3), "erasure": erasure}
    stream = draw.random() < 0.6
    if stream and draw.random() < 0.5:
        erasure["stream"] = "live"
    body |= {"n": n, "ignore_eos": draw.random() < 0.5, "stream": stream, "erasure": erasure}
    text = "ab " * draw.randint(1, 60)
    if draw.random() < 0.3:
        messages = [{"role": "user", "content": text}]
        return "/v1/chat/completions", {**body, "messages": messages, "logprobs": draw.random() < 0.3}
    if not stream and draw.random() < 0.3:
        body |= {"echo": True, "logprobs": 1}
    prompt = text if draw.random() < 0.7 else [text, "another"][: 1 + (n < 64)]
    return "/v1/completions", {**body, "prompt": prompt}
