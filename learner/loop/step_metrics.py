"""What one step's responses were like, as metrics (`common/metrics.py`)."""

from collections.abc import Sequence
from statistics import fmean, pstdev

import numpy as np
from numpy.typing import NDArray

from common import metrics as names
from common.packed import HAS_THRESHOLD, JUDGED, Group, PackedResponse
from learner.environments.step_checks import StepCounts


def rollout_metrics(
    groups: Sequence[Group], first_treated: Sequence[int], counts: StepCounts | None
) -> dict[str, float | None]:
    """Rewards, tokens, erasures and thresholds of a step; a mean over nothing is None.

    Responses of a group from its sample `first_treated` on were treated. `counts`: null where steps can't be checked.
    """
    responses = [trajectory for group in groups for trajectory in group.trajectories]
    pairs = list(zip(groups, first_treated, strict=True))
    plain = [response for group, first in pairs for response in group.trajectories if response.sample < first]
    treated = [response for group, first in pairs for response in group.trajectories if response.sample >= first]
    measured = sum(t.behaviour_tokens for t in responses)
    return {
        names.GENERATED_TOKENS: sum(t.generated_tokens for t in responses),
        names.ERASED_TOKENS: sum(t.erased_tokens for t in responses),
        names.REUSED_PREFIX_TOKENS: sum(t.reused_prefix_tokens for t in responses),
        names.ERASURES: sum(t.erasures for t in responses),
        names.ERASE_RATE: erase_rate(responses),
        names.SIGNAL_SHARE: fmean(len({t.reward for t in group.trajectories}) > 1 for group in groups),
        names.REWARD_SPREAD: fmean(pstdev(_rewards(group.trajectories)) for group in groups),
        names.TRUNCATED_SHARE: fmean(t.finish_reason == "length" for t in responses),
        names.REPEATED_SHARE: fmean(t.repeated_share for t in responses),
        names.ENTROPY: -sum(t.behaviour_logprob_sum for t in responses) / measured if measured else None,
        names.TREATED_SHARE: len(treated) / len(responses),
        names.REWARD_MEAN: _mean(_rewards(responses)),
        names.REWARD_PLAIN: _mean(_rewards(plain)),
        names.REWARD_TREATED: _mean(_rewards(treated)),
        names.RESPONSE_TOKENS: fmean(t.response_tokens for t in responses),
        names.UNCERTAINTY_MEAN: _mean(_column(responses, "uncertainty", JUDGED)),
        names.THRESHOLD_MEAN: _mean(_column(responses, "threshold", HAS_THRESHOLD)),
        names.CASCADE_RATE: counts.cascade_rate if counts else None,
        names.RECOVERED_RATE: counts.recovered_rate if counts else None,
    }


def erase_rate(responses: Sequence[PackedResponse]) -> float:
    """Erased attempts over all attempts of erasable responses; 0 without any."""
    erasable = [t for t in responses if t.erasable]
    attempts = sum(len(t.attempts) for t in erasable)
    return sum(t.erasures for t in erasable) / attempts if attempts else 0.0


def _column(responses: Sequence[PackedResponse], name: str, flag: int) -> NDArray[np.float64]:
    """A value of all attempts that have `flag`."""
    return np.concatenate([t.attempts.column(name)[t.attempts.having(flag)] for t in responses])


def _rewards(responses: Sequence[PackedResponse]) -> list[float]:
    return [response.reward or 0.0 for response in responses]


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    return fmean(values) if len(values) else None
