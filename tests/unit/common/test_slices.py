"""Long work leaves turns to everything else."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from common.slices import AT_ONCE, SLICE_SECONDS, Slices, begun, ended, joined


async def turns(done: asyncio.Event) -> int:
    """How often the loop came round until `done`."""
    count = 0
    while not done.is_set():
        await asyncio.sleep(0)
        count += 1
    return count


async def test_pieces_are_joined_in_order_with_turns_between_them() -> None:
    done = asyncio.Event()
    others = asyncio.create_task(turns(done))

    def pieces() -> Iterator[bytes]:
        for number in range(10):
            until = time.perf_counter() + SLICE_SECONDS * 1.1
            while time.perf_counter() < until:
                pass
            yield b"%d" % number

    await asyncio.sleep(0)
    assert await joined(pieces()) == b"0123456789"
    done.set()
    assert await others >= 10


async def test_short_work_is_not_interrupted() -> None:
    slices = Slices()
    other = asyncio.create_task(asyncio.sleep(0))
    await slices.turn()
    assert not other.done()
    await other


async def test_many_tasks_begin_and_end_a_few_at_a_time() -> None:
    per_turn: list[int] = []
    count = 0

    async def work(number: int) -> None:
        nonlocal count
        count += 1
        try:
            await asyncio.Event().wait()
        finally:
            count -= 1

    async def look() -> None:
        seen = 0
        while True:
            per_turn.append(abs(count - seen))
            seen = count
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    tasks: list[asyncio.Task[None]] = []
    await begun(((work, number) for number in range(10 * AT_ONCE)), tasks)
    await asyncio.sleep(0)
    assert count == len(tasks) == 10 * AT_ONCE
    await ended(tasks)
    assert count == 0
    looking.cancel()
    assert max(per_turn) <= AT_ONCE


async def test_all_tasks_are_cancelled_even_if_whoever_ends_them_is() -> None:
    tasks: list[asyncio.Task[None]] = []

    async def work() -> None:
        await asyncio.Event().wait()

    await begun(((work,) for _ in range(10 * AT_ONCE)), tasks)
    ending = asyncio.create_task(ended(tasks))
    await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    await asyncio.wait(tasks, timeout=5.0)
    assert all(task.cancelled() for task in tasks)
