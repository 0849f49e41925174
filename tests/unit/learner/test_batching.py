"""Batching: nothing lost, budgets kept, ranks in step, little padding."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.run import AdvantageConfig, UniformCredit
from learner.policy.batching import (
    TrainingSample,
    collate,
    plan_microbatches,
    rank_batches,
    response_samples,
    split_minibatches,
    token_counts,
)
from tests.trajectories import PROMPT_TOKENS, attempt, random_groups, trajectory

UNIFORM = AdvantageConfig(credit=UniformCredit())
WITH_ERASED = AdvantageConfig(credit=UniformCredit(), erased_weight=0.5)


def sample(length: int, context: int = 1) -> TrainingSample:
    rest = np.zeros(length - context)
    return TrainingSample(np.arange(length), context, rest, rest + 1.0, rest)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 200), min_size=1, max_size=60),
    ranks=st.integers(1, 5),
    slack=st.integers(0, 800),
)
def test_every_sequence_is_planned_once_within_the_budget_and_in_step(
    lengths: list[int], ranks: int, slack: int
) -> None:
    budget = max(lengths) + slack
    plan = plan_microbatches(lengths, ranks, budget)
    assert len(plan) == ranks
    assert len({len(rank) for rank in plan}) == 1
    assert sorted(i for rank in plan for batch in rank for i in batch) == list(range(len(lengths)))
    for batch in itertools.chain.from_iterable(plan):
        assert len(batch) * max((lengths[i] for i in batch), default=0) <= budget


def test_a_sequence_beyond_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"a sequence of 33 tokens does not fit .*\(32\)"):
        plan_microbatches([5, 33], 1, 32)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("deviation", [0.3, 0.8])
def test_padding_of_log_normal_lengths_stays_below_a_tenth(ranks: int, deviation: float) -> None:
    rng = np.random.default_rng(1)
    for count in (32, 128, 512):
        lengths = np.clip(rng.lognormal(6.0, deviation, count), 16, 4096).astype(int) + 64
        batches = rank_batches([sample(int(n), 64) for n in lengths], ranks, 8192)
        real, padded = token_counts(batches)
        assert real == lengths.sum()
        assert 1.0 - real / padded < 0.10


def test_ranks_get_about_as_many_tokens() -> None:
    rng = np.random.default_rng(2)
    lengths = np.clip(rng.lognormal(6.0, 0.6, 256), 16, 4096).astype(int)
    batches = rank_batches([sample(int(n)) for n in lengths], 4, 8192)
    tokens = [token_counts([batch])[1] for batch in batches]
    assert max(tokens) < 1.15 * np.mean(tokens)


def test_a_minibatch_s_totals_are_the_same_on_every_rank() -> None:
    batches = rank_batches([sample(n, 2) for n in (4, 9, 30)], 2, 32)
    assert {(b.totals.responses, b.totals.response_tokens) for b in batches} == {(3, 2 + 7 + 28)}


def test_minibatches_keep_groups_whole_and_follow_from_seed_and_step() -> None:
    groups = random_groups(0, 5, 3)
    owner = {tuple(t.prompt_token_ids + t.token_ids): g for g, group in enumerate(groups) for t in group.trajectories}

    def owners(seed: int, step: int) -> list[list[int]]:
        parts = split_minibatches(groups, UNIFORM, 2, seed, step)
        return [[owner[tuple(s.token_ids.tolist())] for s in part] for part in parts]

    parts = owners(0, 0)
    assert sorted(itertools.chain.from_iterable(parts)) == sorted([*range(5)] * 3)
    assert not set(parts[0]) & set(parts[1])
    assert owners(0, 0) == parts
    assert len({str(owners(0, step)) for step in range(8)}) > 1
    assert len({str(owners(seed, 0)) for seed in range(8)}) > 1


def test_fewer_groups_than_minibatches_deal_out_responses() -> None:
    parts = split_minibatches(random_groups(0, 1, 8), UNIFORM, 4, 0, 0)
    assert [len(part) for part in parts] == [2, 2, 2, 2]


def test_erased_attempts_follow_their_own_prefix_and_carry_only_their_own_loss() -> None:
    rng = np.random.default_rng(0)
    first = attempt(rng, 0, 0, 3)
    erased = attempt(rng, 1, 3, 4, verdict="erased", temperature=0.9)
    second = attempt(rng, 1, 3, 2, number=1)
    third = attempt(rng, 2, 5, 2)
    members = [
        trajectory([first, erased, second, third], reward=1.0),
        trajectory([attempt(rng, 0, 0, 5)], reward=0.0, sample=1),
    ]
    committed, negative = response_samples(members, WITH_ERASED)[0]
    assert committed.token_ids.tolist() == [
        *PROMPT_TOKENS,
        *first.token_ids,
        *second.token_ids,
        *third.token_ids,
    ]
    assert negative.token_ids.tolist() == [*PROMPT_TOKENS, *first.token_ids, *erased.token_ids]
    assert negative.context_length == len(PROMPT_TOKENS) + erased.start
    assert negative.behaviour_logprobs.tolist() == erased.behaviour_logprobs
    assert negative.temperatures.tolist() == [0.9] * 4
    assert (negative.advantages < 0.0).all()
    assert [len(own) for own in response_samples(members, UNIFORM)] == [1, 1]


def test_collating_aligns_every_value_with_the_token_it_belongs_to() -> None:
    groups = random_groups(4, 1, 4)
    samples = [s for own in response_samples(groups[0].trajectories, WITH_ERASED) for s in own]
    batch = collate(samples)
    for row, one in enumerate(samples):
        mask = batch.mask[row]
        assert batch.targets[row][mask].tolist() == one.token_ids[one.context_length :].tolist()
        for values, expected in (
            (batch.behaviour_logprobs, one.behaviour_logprobs),
            (batch.temperatures, one.temperatures),
            (batch.advantages, one.advantages),
        ):
            np.testing.assert_allclose(values[row][mask].numpy(), expected, rtol=1e-6)
        start = int(mask.nonzero()[0, 0]) + batch.first + 1
        assert start == one.context_length


def test_an_empty_microbatch_predicts_nothing() -> None:
    batch = collate([])
    assert not batch.mask.any()
    assert batch.token_ids.shape == (1, 2)
