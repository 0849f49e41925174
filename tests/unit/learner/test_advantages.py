"""Advantages against independent recomputations of `algorithm.md`, section 6."""

import statistics
from typing import Any

import numpy as np
import pytest
import torch

from common.config.run import AdvantageConfig, UncertaintyCredit, UniformCredit
from common.packed import PackedResponse, pack, unpack
from learner.credit.advantages import group_advantages, segment_weights
from tests.trajectories import attempt, random_trajectory, trajectory

GRPO = AdvantageConfig(credit=UniformCredit(), normalise="sequence")


def group(rewards: list[float], *, segments: int = 3, seed: int = 0) -> list[PackedResponse]:
    rng = np.random.default_rng(seed)
    members = [random_trajectory(rng, sample=i, reward=reward, segments=segments) for i, reward in enumerate(rewards)]
    return [pack(member) for member in members]


def token_advantages(response: PackedResponse, segments: Any) -> Any:
    return np.repeat(segments, [len(a.token_ids) for a in unpack(response).accepted])


def test_uniform_sequence_credit_is_grpo_s_advantage() -> None:
    rewards = [1.0, 0.0, 0.25, 0.0, 1.0]
    members = group(rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = (values - values.mean()) / (values.std() + 1e-4)
    for member, segments, value in zip(members, group_advantages(members, GRPO).segments, expected, strict=True):
        tokens = token_advantages(member, segments)
        assert len(tokens) == len(member.token_ids)
        np.testing.assert_allclose(tokens, float(value), rtol=0, atol=1e-12)


def test_uncertainty_weights_follow_the_formula_and_average_to_one_over_tokens() -> None:
    credit = UncertaintyCredit(offset=0.2, low=0.5, high=1.5)
    members = group([1.0, 0.0, 1.0, 0.0], seed=3)
    uncertainties = [[a.judgement.uncertainty for a in unpack(m).accepted if a.judgement] for m in members]
    mean = statistics.fmean(u for row in uncertainties for u in row)
    raw = [[min(max((u + 0.2) / (mean + 0.2), 0.5), 1.5) for u in row] for row in uncertainties]
    assert any(w in (0.5, 1.5) for row in raw for w in row)
    lengths = [[len(a.token_ids) for a in unpack(m).accepted] for m in members]
    pairs = [(w, n) for ws, ns in zip(raw, lengths, strict=True) for w, n in zip(ws, ns, strict=True)]
    scale = sum(n for _, n in pairs) / sum(w * n for w, n in pairs)
    weights = segment_weights(credit, members)
    for ours, theirs in zip(weights, raw, strict=True):
        np.testing.assert_allclose(ours, [w * scale for w in theirs], rtol=1e-12)
    tokens = np.concatenate([token_advantages(m, w) for m, w in zip(members, weights, strict=True)])
    assert tokens.mean() == pytest.approx(1.0, abs=1e-12)


def test_the_same_weights_apply_to_both_signs() -> None:
    config = AdvantageConfig(credit=UncertaintyCredit())
    rewarded, opposite = group([1.0, 0.0, 0.0]), group([0.0, 1.0, 1.0])
    for one, other in zip(
        group_advantages(rewarded, config).segments, group_advantages(opposite, config).segments, strict=True
    ):
        np.testing.assert_allclose(one, -other, rtol=1e-12)


def test_segment_normalisation_compares_the_responses_that_have_the_segment() -> None:
    rng = np.random.default_rng(5)
    rewards, counts = [1.0, 0.0, 0.5], [3, 2, 1]
    members = [
        pack(random_trajectory(rng, sample=i, reward=r, segments=n))
        for i, (r, n) in enumerate(zip(rewards, counts, strict=True))
    ]
    config = AdvantageConfig(credit=UncertaintyCredit(), normalise="segment", epsilon=1e-3)
    weights = segment_weights(config.credit, members)
    got = group_advantages(members, config).segments
    for index in range(3):
        having = [i for i, n in enumerate(counts) if index < n]
        values = [float(weights[i][index]) * rewards[i] for i in having]
        if len(values) == 1:
            assert got[having[0]][index] == 0.0
            continue
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        for i, value in zip(having, values, strict=True):
            assert got[i][index] == pytest.approx((value - mean) / (deviation + 1e-3), abs=1e-12)


@pytest.mark.parametrize("normalise", ["sequence", "segment"])
@pytest.mark.parametrize("credit", [UniformCredit(), UncertaintyCredit()])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_has_no_advantage(
    normalise: str, credit: UniformCredit | UncertaintyCredit, reward: float
) -> None:
    config = AdvantageConfig.model_validate({"credit": credit, "normalise": normalise, "erased_weight": 1.0})
    advantages = group_advantages(group([reward] * 3), config)
    assert all((segments == 0.0).all() for segments in advantages.segments)
    assert advantages.erased == 0.0


def test_erased_attempts_weigh_as_much_as_the_group_s_mean_advantage() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0]
    config = AdvantageConfig(credit=UniformCredit(), erased_weight=0.5)
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    size = statistics.fmean(abs(r - mean) / (deviation + 1e-4) for r in rewards)
    assert group_advantages(group(rewards), config).erased == pytest.approx(-0.5 * size, abs=1e-12)
    assert group_advantages(group(rewards), GRPO).erased == 0.0


def test_a_response_without_reward_or_judgement_is_refused_by_name() -> None:
    rng = np.random.default_rng(0)
    plain = [attempt(rng, 0, 0, 3)]
    with pytest.raises(ValueError, match="response 1 to prompt 'p0' has no reward"):
        group_advantages([pack(trajectory(plain, reward=1.0)), pack(trajectory(plain, reward=None, sample=1))], GRPO)
    members = [pack(trajectory(plain, reward=1.0)), pack(trajectory(plain, reward=0.0, sample=1))]
    with pytest.raises(ValueError, match="segment 0 of response 0 to prompt 'p0' was generated without a monitor"):
        group_advantages(members, AdvantageConfig(credit=UncertaintyCredit()))
