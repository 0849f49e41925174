"""What one step's responses were like, as metrics (`common/metrics.py`)."""

from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np

from common import metrics as names
from common.trajectory import Attempt, Group, Trajectory
from learner.environments.step_checks import StepCounts

REPEATED_TOKENS = 8
"""Length of the sequences that are looked for again: longer than what right reasoning repeats by itself."""


def rollout_metrics(groups: Sequence[Group], first_treated: int, counts: StepCounts | None) -> dict[str, float | None]:
    """Rewards, tokens, erasures and thresholds of a step; a mean over nothing is None.

    Responses of each group from sample `first_treated` on were treated. `counts`: null where steps can't be checked.
    """
    responses = [trajectory for group in groups for trajectory in group.trajectories]
    judged = [judgement for a in _attempts(responses) if (judgement := a.judgement)]
    return {
        names.GENERATED_TOKENS: sum(t.generated_tokens for t in responses),
        names.ERASED_TOKENS: sum(t.erased_tokens for t in responses),
        names.REUSED_PREFIX_TOKENS: sum(t.reused_prefix_tokens for t in responses),
        names.ERASURES: sum(t.erasures for t in responses),
        names.ERASE_RATE: erase_rate(responses),
        names.SIGNAL_SHARE: fmean(len({t.reward for t in group.trajectories}) > 1 for group in groups),
        names.REWARD_SPREAD: fmean(pstdev(_rewards(group.trajectories)) for group in groups),
        names.TRUNCATED_SHARE: fmean(t.finish_reason == "length" for t in responses),
        names.REPEATED_SHARE: fmean(repeated_share(t.token_ids) for t in responses),
        names.ENTROPY: _mean([-value for a in _attempts(responses) for value in a.behaviour_logprobs]),
        names.TREATED_SHARE: fmean(t.sample >= first_treated for t in responses),
        names.REWARD_MEAN: _mean(_rewards(responses)),
        names.REWARD_PLAIN: _mean(_rewards([t for t in responses if t.sample < first_treated])),
        names.REWARD_TREATED: _mean(_rewards([t for t in responses if t.sample >= first_treated])),
        names.RESPONSE_TOKENS: fmean(len(t.token_ids) for t in responses),
        names.UNCERTAINTY_MEAN: _mean([j.uncertainty for j in judged]),
        names.THRESHOLD_MEAN: _mean([j.threshold for j in judged if j.threshold is not None]),
        names.CASCADE_RATE: counts.cascade_rate if counts else None,
        names.RECOVERED_RATE: counts.recovered_rate if counts else None,
    }


def repeated_share(token_ids: Sequence[int], length: int = REPEATED_TOKENS) -> float:
    """The share of a response's sequences of `length` tokens that stand in it a second time or more."""
    count = len(token_ids) - length + 1
    if count < 1:
        return 0.0
    # A number for each sequence: its tokens times fixed odd factors, modulo 2**64. Equal ones get equal numbers.
    factors = np.random.default_rng(0).integers(0, 2**63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    tokens = np.asarray(token_ids, dtype=np.uint64)
    numbers = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        numbers += tokens[place : place + count] * factors[place]
    return 1.0 - len(np.unique(numbers)) / count


def erase_rate(responses: Sequence[Trajectory]) -> float:
    """Erased attempts over all attempts of erasable responses; 0 without any."""
    attempts = _attempts([t for t in responses if t.erasable])
    return fmean(a.verdict == "erased" for a in attempts) if attempts else 0.0


def _attempts(responses: Sequence[Trajectory]) -> list[Attempt]:
    return [attempt for trajectory in responses for attempt in trajectory.attempts]


def _rewards(responses: Sequence[Trajectory]) -> list[float]:
    return [trajectory.reward or 0.0 for trajectory in responses]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
