"""Streaming clients that ask again and again, some of which leave half-way.

On aiohttp: httpx now and then loses a request when others of its pool are cancelled, whatever the server.
"""

import asyncio
import random
import time
from typing import Any

import aiohttp

ERASURE = {"segmentation": {"mode": "fixed", "length": 8}, "threshold": 0, "max_erasures": 1}


async def load(url: str, model: str, clients: int, seconds: float, leaving: float = 0.1) -> dict[str, int]:
    """Load a server for `seconds`; a share of `leaving` of the requests is left half-way. Counts of outcomes.

    An outcome is `complete`, `left`, an HTTP status, or `broken`: an answer without its end, or with an error.
    """
    outcomes: dict[str, int] = {}
    deadline = time.monotonic() + seconds

    async def one(session: aiohttp.ClientSession, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < deadline:
            body = {
                "model": model,
                "prompt": f"client {number}",
                "max_tokens": draw.randint(1, 24),
                "ignore_eos": True,
                "stream": True,
                "erasure": {**ERASURE, "stream": draw.choice(("commit", "live"))},
            }
            leaves = draw.random() < leaving
            outcome = await _ask(session, body, draw.random() * 0.5 if leaves else None)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    async with session(url, clients) as opened:
        await asyncio.gather(*(one(opened, number) for number in range(clients)))
    return outcomes


def session(url: str, clients: int) -> aiohttp.ClientSession:
    """A client of the server at `url` with as many connections as there are `clients`."""
    connector = aiohttp.TCPConnector(limit=clients)
    return aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=300.0))


async def _ask(session: aiohttp.ClientSession, body: dict[str, Any], leave_after: float | None) -> str:
    try:
        async with asyncio.timeout(leave_after), session.post("/v1/completions", json=body) as answer:
            text = await answer.text()
    except TimeoutError:
        if leave_after is None:
            raise
        return "left"
    if answer.status != 200:
        return str(answer.status)
    return "complete" if text.endswith("data: [DONE]\n\n") and '"error"' not in text else "broken"
