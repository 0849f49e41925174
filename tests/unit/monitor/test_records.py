"""Records between the monitor's process and the engine's, over a real socket."""

import asyncio
import math
from typing import Any

import torch

from rollout_server.monitor import Field, Judged
from rollout_server.monitor.records import Inbox, JudgementRecord, NonFiniteRecord, Outbox, Record


def judged(rows: list[dict[Field, float]], longest: int) -> Judged:
    """Judgements with the given fields, the others 0, and per-token values that name row and place."""
    fields = torch.zeros(len(rows), len(Field), dtype=torch.float64)
    for row, values in enumerate(rows):
        for field, value in values.items():
            fields[row, field] = value
    tokens = torch.arange(len(rows) * longest * 3, dtype=torch.float32).view(len(rows), longest, 3)
    return Judged(torch.arange(len(rows)), fields, tokens)


async def test_what_is_judged_arrives_in_order_and_whole() -> None:
    inbox = Inbox()
    outbox = Outbox(inbox.address, threaded=False)
    arrived: list[Any] = []
    complete = asyncio.Event()

    def take(record: Record) -> None:
        arrived.append(record)
        if len(arrived) == 3:
            complete.set()

    receiver = asyncio.create_task(inbox.receive(take))
    first = judged(
        [
            {Field.JUDGED: 1, Field.START: 4, Field.END: 6, Field.ERASED: 1, Field.THRESHOLD: math.inf},
            {Field.JUDGED: 0, Field.END: 9},
            {Field.JUDGED: 1, Field.END: 3, Field.FINAL: 1},
        ],
        longest=3,
    )
    outbox.put([(7, 1, False, [(0, 1)]), (8, 1, False, [(0, 1)]), (9, 2, False, [(0, 1), (5, 2)])], 5, first)
    outbox.put([(10, 3, True, [(0, 1)])], 6, judged([{Field.JUDGED: 1, Field.END: 1}], longest=1))
    async with asyncio.timeout(10.0):
        await complete.wait()
    receiver.cancel()
    outbox.close()
    inbox.close()
    assert [(r.uid, r.opened, r.step) for r in arrived] == [(7, 1, 5), (9, 2, 5), (10, 3, 6)]
    assert [(r.erased, r.final) for r in arrived] == [(True, False), (False, True), (False, False)]
    assert [list(map(tuple, r.versions)) for r in arrived] == [[(0, 1)], [(0, 1), (5, 2)], [(0, 1)]]
    assert arrived[0].field(Field.THRESHOLD) == math.inf
    assert arrived[0].per_token.tolist() == first.tokens[0, :2].tolist()
    assert arrived[1].per_token.tolist() == first.tokens[2].tolist()
    # Erased and final ones end their requests, the last judgement does not.
    assert list(outbox.ended) == [(7, False), (9, True)]


async def test_what_nobody_watches_waits_for_the_next_end() -> None:
    inbox = Inbox()
    outbox = Outbox(inbox.address, threaded=False)
    arrived: asyncio.Queue[Record] = asyncio.Queue()
    receiver = asyncio.create_task(inbox.receive(arrived.put_nowait))
    accepted = judged([{Field.JUDGED: 1, Field.END: 1}], longest=1)
    outbox.put([(1, 1, False, [(0, 1)])], 5, accepted)
    outbox.put([(2, 1, False, [(0, 1)])], 6, accepted)
    await asyncio.sleep(0.2)
    assert arrived.empty()
    outbox.put([(3, 1, False, [(0, 1)])], 7, judged([{Field.JUDGED: 1, Field.END: 1, Field.FINAL: 1}], longest=1))
    async with asyncio.timeout(10.0):
        assert [(await arrived.get()).uid for _ in range(3)] == [1, 2, 3]
    receiver.cancel()
    outbox.close()
    inbox.close()


async def test_what_is_not_finite_is_told_behind_what_was_judged_before() -> None:
    inbox = Inbox()
    outbox = Outbox(inbox.address, threaded=False)
    arrived: asyncio.Queue[Record] = asyncio.Queue()
    receiver = asyncio.create_task(inbox.receive(arrived.put_nowait))
    outbox.put([(1, 1, False, [(0, 1)])], 5, judged([{Field.JUDGED: 1, Field.END: 1}], longest=1))
    for _ in range(2):
        outbox.put_non_finite([1, 2, 3], torch.tensor([True, False, True]), version=7)
    async with asyncio.timeout(10.0):
        records = [await arrived.get() for _ in range(3)]
    assert isinstance(records[0], JudgementRecord)
    assert records[0].uid == 1
    assert records[1:] == [NonFiniteRecord(1, 7), NonFiniteRecord(3, 7)]
    assert arrived.empty(), "each is told once"
    assert list(outbox.ended) == [(1, True), (3, True)]
    receiver.cancel()
    outbox.close()
    inbox.close()


def test_without_an_address_nothing_is_sent_and_ends_are_known_all_the_same() -> None:
    outbox = Outbox(None, threaded=False)
    outbox.put([(1, 1, True, [(0, 1)])], 5, judged([{Field.JUDGED: 1, Field.END: 1, Field.FINAL: 1}], longest=1))
    outbox.put_non_finite([2], torch.tensor([True]), 3)
    outbox.close()
    assert list(outbox.ended) == [(1, True), (2, True)]
    assert outbox.non_finite == {2: 3}
