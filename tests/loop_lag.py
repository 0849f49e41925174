"""How long requests hold the event loop, in CPU time, so that it does not matter what else the machine does."""

import asyncio
import time
from asyncio.events import Handle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

PROBE_SECONDS = 0.001


class Held:
    """`loop`: the longest that one callback ran, and what it was. `process`: the most that this process computed
    while the loop had no turn, in one callback after the other or in a thread that kept Python's lock."""

    def __init__(self) -> None:
        self.loop = 0.0
        self.callback = ""
        self.process = 0.0


@contextmanager
def watching() -> Iterator[Held]:
    """Watch the running loop."""
    held = Held()
    run = Handle._run
    last = time.process_time()

    def timed(handle: Handle) -> None:
        started = time.thread_time()
        run(handle)
        seconds = time.thread_time() - started
        if seconds > held.loop:
            held.loop, held.callback = seconds, repr(handle)

    async def probe() -> None:
        nonlocal last
        while True:
            now = time.process_time()
            held.process, last = max(held.process, now - last), now
            await asyncio.sleep(PROBE_SECONDS)

    with patch.object(Handle, "_run", timed):
        probing = asyncio.get_running_loop().create_task(probe())
        try:
            yield held
        finally:
            held.process = max(held.process, time.process_time() - last)
            probing.cancel()


async def ask(app: Any, path: str, body: bytes) -> tuple[int, int, bytes]:
    """Status, length and beginning of an answer. Calls the app itself: a client would hold the loop too."""
    sent = False
    status, length, beginning = 0, 0, b""

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status, length, beginning
        status = message.get("status", status)
        part = message.get("body", b"")
        length += len(part)
        if len(beginning) < 4096:
            beginning += part[:4096]

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    await app(scope, receive, send)
    return status, length, beginning
