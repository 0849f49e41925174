"""The segment monitor on a CUDA device against itself on the CPU, and its records on their way from the device."""

import asyncio

import pytest
import torch

from common.config import ErasurePolicy, FixedSegmentation
from common.threshold import History
from rollout_server.monitor import Field, Judged, SegmentMonitor, SlotSpec
from rollout_server.monitor.records import Inbox, JudgementRecord, Outbox

pytestmark = pytest.mark.gpu

VOCABULARY = 50
STEPS = 24
SLOTS = 6


def judgements(device: str) -> list[Judged]:
    """All judgements of `STEPS` steps of `SLOTS` responses in one group, on `device`."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(STEPS, SLOTS, VOCABULARY, generator=generator)
    tokens = torch.multinomial(logits.softmax(-1).view(-1, VOCABULARY), 1, generator=generator).view(STEPS, SLOTS)
    policy = ErasurePolicy(segmentation=FixedSegmentation(length=6), signal="entropy", window=3, eta=0.4)
    monitor = SegmentMonitor(VOCABULARY, torch.device(device), (48, 49), [], slots=SLOTS)
    monitor.clear_prior(0)
    monitor.open_group(0)
    for slot in range(SLOTS):
        monitor.open(slot, SlotSpec(policy, 0, 0, 0, 0, STEPS, STEPS, 1.0, 1.0, False, History(), 0, 0, 0))
    slots = torch.arange(SLOTS)
    found = []
    for step in range(STEPS):
        monitor.prepare(slots.to(device), logits[step].to(device), None)
        judged = monitor.observe(slots, tokens[step])
        if judged is not None:
            found.append(judged)
    return found


def judged_rows(judged: list[Judged]) -> torch.Tensor:
    fields = torch.cat([j.fields.cpu() for j in judged])
    return fields[fields[:, Field.JUDGED] > 0]


def test_judgements_on_cuda_equal_those_on_the_cpu() -> None:
    torch.testing.assert_close(judged_rows(judgements("cuda")), judged_rows(judgements("cpu")), atol=1e-5, rtol=0)


async def test_records_leave_the_device_without_the_step_waiting() -> None:
    inbox = Inbox()
    outbox = Outbox(inbox.address, threaded=True)
    arrived: list[JudgementRecord] = []
    receiver = asyncio.create_task(inbox.receive(arrived.append))
    judged = judgements("cuda")
    for step, one in enumerate(judged):
        outbox.put([(slot, 1, True) for slot in range(SLOTS)], step, one)
    async with asyncio.timeout(10.0):
        while len(arrived) < len(judged_rows(judged)):
            await asyncio.sleep(0.01)
    receiver.cancel()
    outbox.close()
    inbox.close()
    assert {record.uid for record in arrived} == set(range(SLOTS))
