"""The monitor's two implementations, the compiled one and torch's, on random responses: they must judge alike.

They must also end segments where the reference does. `test_monitor.py` compares their judgements with the reference,
in fewer situations.
"""

import math
import random
from typing import Any

import pytest
import torch

from common.config.erasure import DelimiterSegmentation, ErasurePolicy, FixedSegmentation, Segmentation, SignalWeights
from common.segmentation import segment_length
from common.threshold import History
from rollout_server.monitor import Field, SegmentMonitor
from tests.unit.monitor.test_monitor import CPU, SENTINELS, TOKEN_BYTES, VOCABULARY, rows_of, spec

SLOTS, GROUPS, PRIORS, STEPS = 5, 3, 2, 120


def random_policy(rng: random.Random) -> ErasurePolicy:
    segmentation: Segmentation = FixedSegmentation(length=rng.randint(1, 6))
    if rng.random() < 0.5:
        shortest = rng.randint(1, 3)
        segmentation = DelimiterSegmentation(
            delimiter=rng.choice(["x", "1,", "x1", "2,3", ("x", ",1", "9,4")]),
            min_length=shortest,
            max_length=shortest + rng.randint(0, 4),
        )
    return ErasurePolicy(
        segmentation=segmentation,
        signal=rng.choice(["entropy", "cross_entropy"]),
        window=rng.randint(1, 9),
        weights=SignalWeights(base=rng.random() + 0.1, extreme=rng.random(), gradient=rng.random()),
        min_uncertainty=rng.choice([0.0, 0.02, 2.0, 5.0]),
        statistics=rng.choice(["index", "group"]),
        kappa=rng.uniform(-1.0, 1.0),
        gamma=rng.random(),
        eta=rng.uniform(0.0, 0.9),
        max_erasures=rng.randint(0, 4),
        retry_temperature=rng.choice([None, 0.8, 1.3]),
        threshold=rng.choice([None, None, None, 1.0, 0.0, math.inf]),
        prior_strength=rng.uniform(0.0, 10.0),
        observe=rng.choice(["first", "all"]),
    )


def random_response(rng: random.Random, policy: ErasurePolicy) -> dict[str, Any]:
    """Where a response stands when a submission opens a slot."""
    attempt, temperature = rng.randint(0, 3), rng.choice([1.0, 1.0, 0.7, 0.0])
    retries_greedily = temperature == 0.0 and attempt > 0 and policy.retry_temperature is not None
    return {
        "limit": rng.randint(3, 25),
        "erased_limit": rng.randint(0, 30),
        "attempt": attempt,
        "erased_tokens": rng.randint(0, 10),
        "temperature": temperature,
        "engine_temperature": policy.retry_temperature if retries_greedily else temperature,
        "erasable": rng.random() < 0.8,
        "history": History(rng.random(), rng.random(), rng.random()),
        "group": rng.randrange(GROUPS),
        "prior": rng.randrange(PRIORS),
        "best": rng.choice([math.inf, rng.uniform(0.0, 4.0)]),
    }


@pytest.mark.parametrize("seed", range(6))
def test_both_paths_judge_alike(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    monitors = [
        SegmentMonitor(VOCABULARY, CPU, SENTINELS, TOKEN_BYTES, slots=2, on_host=on_host) for on_host in (True, False)
    ]
    stops = []
    for monitor in monitors:
        for row in range(PRIORS):
            monitor.clear_prior(row)
        for row in range(GROUPS):
            monitor.open_group(row)
        stops.append(monitor.add_token_table(torch.tensor([9])))

    segments: dict[int, tuple[Segmentation, int, list[int]]] = {}
    """Of the response in each slot: how it is cut, what tokens it has left at the segment's start, the segment's."""

    def open_slot(slot: int) -> None:
        policy = random_policy(rng)
        values = random_response(rng, policy)
        for monitor, own in zip(monitors, stops, strict=True):
            monitor.open(slot, spec(policy, **values, stops=own))
        segments[slot] = policy.segmentation, values["limit"], []

    for slot in range(SLOTS):
        open_slot(slot)
    slots = torch.arange(SLOTS)
    erased = accepted = 0
    for _ in range(STEPS):
        logits = 2.0 * torch.randn(SLOTS, VOCABULARY, generator=generator)
        shaped = [logits.clone() for _ in monitors]
        for monitor, own in zip(monitors, shaped, strict=True):
            monitor.prepare(slots, own, None)
        torch.testing.assert_close(shaped[0], shaped[1], atol=1e-5, rtol=0)
        tokens = torch.multinomial(shaped[0].softmax(-1), 1, generator=generator).view(-1)
        compiled, torchs = (dict(rows_of(monitor.observe(slots, tokens))) for monitor in monitors)
        assert compiled.keys() == torchs.keys()
        for slot, fields in compiled.items():
            torch.testing.assert_close(
                torch.tensor(fields), torch.tensor(torchs[slot]), atol=1e-5, rtol=1e-5, equal_nan=True
            )
        for slot, token in enumerate(tokens.tolist()):
            if slot in segments:
                segmentation, left, own_tokens = segments[slot]
                own_tokens.append(token)
                texts = [TOKEN_BYTES[t] if t < len(TOKEN_BYTES) else b"" for t in own_tokens]
                length = segment_length(texts, segmentation, left)
                assert (slot in compiled) == (length is not None or token == 9)
                if slot in compiled:
                    segments[slot] = segmentation, left - len(own_tokens), []
                    if compiled[slot][Field.ERASED] or compiled[slot][Field.FINAL]:
                        del segments[slot]
            erased += token == SENTINELS[0]
            accepted += slot in compiled
            # An engine that runs ahead steps a row on after its sentinel.
            if token in SENTINELS and rng.random() < 0.7:
                open_slot(slot)
        if rng.random() < 0.05:
            group, prior = rng.randrange(GROUPS), rng.randrange(PRIORS)
            for monitor in monitors:
                monitor.close_group(group, prior, 0.8)
                monitor.open_group(group)
        for row in range(PRIORS):
            torch.testing.assert_close(torch.tensor(monitors[0].prior(row)), torch.tensor(monitors[1].prior(row)))
    assert erased > 5
    assert accepted > 50
