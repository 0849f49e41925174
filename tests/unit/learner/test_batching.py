"""Batching: nothing lost, budgets kept, ranks in step, little padding."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.run import AdvantageConfig, UncertaintyCredit, UniformCredit
from common.packed import Group, TokenArrays, pack
from learner.credit.advantages import group_advantages
from learner.policy.batching import (
    MicroBatch,
    collate,
    plan_microbatches,
    rank_batches,
    split_minibatches,
    token_counts,
    with_tokens,
)
from learner.policy.samples import TrainingSample, response_samples
from tests.trajectories import PROMPT_TOKENS, attempt, attempt_of, random_groups, trajectory, unpacked

UNIFORM = AdvantageConfig(credit=UniformCredit())
WITH_ERASED = AdvantageConfig(credit=UniformCredit(), erased_weight=0.5)


def sample(length: int, context: int = 1) -> TrainingSample:
    response = pack(trajectory([attempt_of(range(length - context), segment=0, start=0)], reward=None))
    (planned,) = response_samples([replace(response, reward=0.0, prompt_tokens=context)], UNIFORM)[0]
    return planned


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
    owner = {tuple(t.prompt_token_ids + t.token_ids): g for g, group in enumerate(groups) for t in unpacked(group)}

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
        pack(trajectory([first, erased, second, third], reward=1.0)),
        pack(trajectory([attempt(rng, 0, 0, 5)], reward=0.0, sample=1)),
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


def collated_from_lists(groups: list[Group], config: AdvantageConfig, order: list[int]) -> MicroBatch:
    """The same batch from lists, a token at a time, in float64 until the end."""
    sequences: list[tuple[list[int], int, list[tuple[float, float, float]]]] = []
    for group in groups:
        advantages = group_advantages(group.trajectories, config)
        for t, segments in zip(unpacked(group), advantages.segments, strict=True):
            values: list[tuple[float, float, float]] = []
            for a, advantage in zip(t.accepted, segments.tolist(), strict=True):
                values += [(b, a.temperature, advantage) for b in a.behaviour_logprobs]
            sequences.append((t.prompt_token_ids + t.token_ids, len(t.prompt_token_ids), values))
            for a in t.attempts if advantages.erased else ():
                if a.verdict == "erased":
                    kept = [x for other in t.accepted if other.segment < a.segment for x in other.token_ids]
                    context = t.prompt_token_ids + kept
                    values = [(b, a.temperature, advantages.erased) for b in a.behaviour_logprobs]
                    sequences.append((context + a.token_ids, len(context), values))
    chosen = [sequences[i] for i in order]
    width, first = max(len(s[0]) for s in chosen), min(s[1] for s in chosen) - 1
    tokens = torch.zeros((len(chosen), width), dtype=torch.int64)
    mask = torch.zeros((len(chosen), width), dtype=torch.bool)
    columns = torch.zeros((3, len(chosen), width), dtype=torch.float64)
    columns[1] = 1.0
    for row, (ids, context, values) in enumerate(chosen):
        for place, token in enumerate(ids):
            tokens[row, place] = token
        for place, value in enumerate(values):
            mask[row, context + place] = True
            columns[:, row, context + place] = torch.tensor(value, dtype=torch.float64)
    behaviour, temperatures, advantages_ = columns[:, :, first + 1 :].float()
    return MicroBatch(tokens, first, tokens[:, first + 1 :], mask[:, first + 1 :], behaviour, temperatures, advantages_)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), erased_weight=st.sampled_from([0.0, 0.5]), as_references=st.booleans())
def test_batches_are_those_of_lists_bit_for_bit(seed: int, erased_weight: float, as_references: bool) -> None:
    config = AdvantageConfig(credit=UncertaintyCredit(), normalise="segment", erased_weight=erased_weight)
    groups = random_groups(seed, 2, 3)
    if as_references:
        elsewhere = [replace(t, tokens=None, reference=t.arrays) for g in groups for t in g.trajectories]
        given_groups = [Group(g.prompt, elsewhere[3 * i : 3 * i + 3]) for i, g in enumerate(groups)]
    else:
        given_groups = groups
    samples = [s for g in given_groups for own in response_samples(g.trajectories, config) for s in own]
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    ours, expected = collate([samples[i] for i in order]), collated_from_lists(groups, config, order)
    assert ours.first == expected.first
    for field in ("token_ids", "targets", "mask", "behaviour_logprobs", "temperatures", "advantages"):
        assert torch.equal(getattr(ours, field), getattr(expected, field)), field


def test_each_response_s_arrays_are_fetched_once_for_all_its_samples() -> None:
    groups = random_groups(2, 2, 4)
    store = {f"ref {g} {t.sample}": t.arrays for g, group in enumerate(groups) for t in group.trajectories}
    for g, group in enumerate(groups):
        for t in group.trajectories:
            t.tokens, t.reference = None, f"ref {g} {t.sample}"
    (part,) = split_minibatches(groups, WITH_ERASED, 1, 0, 0)
    assert len(part) > 8
    calls: list[list[str]] = []

    def fetch(references: list[str]) -> list[TokenArrays]:
        calls.append(references)
        return [store[reference] for reference in references]

    # Planning needs lengths alone; each rank fetches what is its own.
    batches = rank_batches(part, 2, 64)
    for batch in batches:
        (filled,) = with_tokens([batch], fetch)
        for before, after in zip(batch.microbatches, filled.microbatches, strict=True):
            assert [len(s.token_ids) for s in after] == [len(s) for s in before]
    assert all(len(set(references)) == len(references) for references in calls)
    assert {r for references in calls for r in references} == store.keys()


def test_a_response_without_a_monitor_cannot_be_trained_on() -> None:
    plain = attempt_of([1, 2], segment=0, start=0).model_copy(update={"behaviour_logprobs": []})
    members = [pack(trajectory([plain], reward=float(n), sample=n)) for n in range(2)]
    with pytest.raises(ValueError, match="response 0 to prompt 'p0' has no behaviour log-probs"):
        response_samples(members, UNIFORM)


def test_an_empty_microbatch_predicts_nothing() -> None:
    batch = collate([])
    assert not batch.mask.any()
    assert batch.token_ids.shape == (1, 2)
