"""Long work in the event loop: in slices, between which everything else has its turn."""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

SLICE_SECONDS = 0.01
AT_ONCE = 16
"""Tasks that begin or end in one turn of the loop: it runs all that are ready before it looks at anything else."""


class Slices:
    """One piece of work. A slice ends at the first `turn` after `SLICE_SECONDS`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def turn(self) -> None:
        """Let everything else have its turn, if this slice was long enough."""
        if time.perf_counter() - self._began > SLICE_SECONDS:
            await asyncio.sleep(0)
            self._began = time.perf_counter()


async def joined(pieces: Iterable[bytes]) -> bytes:
    """The pieces as one, with turns for everything else between them: each is made in a moment."""
    slices = Slices()
    made = []
    for piece in pieces:
        made.append(piece)
        await slices.turn()
    return b"".join(made)


async def begun(calls: Iterable[tuple[Any, ...]], tasks: "list[asyncio.Task[None]]") -> None:
    """Begin tasks, a few in each turn of the loop, from functions and their arguments. Each is at once in `tasks`."""
    for number, (function, *arguments) in enumerate(calls, 1):
        tasks.append(asyncio.create_task(function(*arguments)))
        if number % AT_ONCE == 0:
            await asyncio.sleep(0)


async def ended(tasks: "Sequence[asyncio.Task[None]]") -> None:
    """Cancel tasks, a few in each turn of the loop, and wait for their ends. All are cancelled, whatever happens."""
    left = [task for task in tasks if not task.done()]
    try:
        while left:
            for task in left[:AT_ONCE]:
                task.cancel()
            del left[:AT_ONCE]
            await asyncio.sleep(0)
    finally:
        for task in left:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
