"""Reference mathematics of the adaptive threshold and the verdict (`algorithm.md`, sections 4 and 5).

Pure functions on Python floats (float64). The segment monitor on the device is tested against them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.config.erasure import ErasurePolicy


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """What is known of U when a segment is judged, the judged one included if it is observed.

    Of its index, or of all segments, as `ErasurePolicy.statistics` says. `count`, `mean`, `variance` (population):
    over this group's observations so far. `prior_mean` and `prior_variance`: over earlier groups, worth
    `prior_strength` observations (0 when there were none).
    """

    count: float
    mean: float
    variance: float
    prior_strength: float
    prior_mean: float
    prior_variance: float


@dataclass(frozen=True, slots=True)
class History:
    """Sums over a trajectory's accepted segments: their U, and the group's mean and deviation at their indices."""

    uncertainty: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0


@dataclass(frozen=True, slots=True)
class Threshold:
    """Theta and its factors: `threshold = baseline * penalty * modulation`; infinite when nothing can be erased."""

    baseline: float
    penalty: float
    modulation: float
    threshold: float


def shrunk_moments(statistics: GroupStatistics) -> tuple[float, float] | None:
    """Mean and standard deviation of U at this index, shrunk to the prior; None with fewer than two observations.

    The prior counts as `prior_strength` observations with its own mean and variance. Source: ours.
    """
    n, k = statistics.count, statistics.prior_strength
    total = n + k
    if total < 2.0:
        return None
    mean = (n * statistics.mean + k * statistics.prior_mean) / total
    second = n * (statistics.variance + statistics.mean**2) + k * (statistics.prior_variance + statistics.prior_mean**2)
    return mean, math.sqrt(max(second / total - mean**2, 0.0))


def history_modulation(history: History, eta: float) -> float:
    """phi = 1 + eta * tanh(z); z is the trajectory's accepted U so far, standardised by the group's. Form: ours."""
    if history.deviation <= 1e-12:
        return 1.0
    return 1.0 + eta * math.tanh((history.uncertainty - history.mean) / history.deviation)


def extended_history(history: History, uncertainty: float, statistics: GroupStatistics) -> History:
    """A trajectory's history after it accepted a segment that was judged by `statistics`.

    An `uncertainty` that is no number, which weights that overflowed give, is left out, as it is of the statistics.
    """
    moments = shrunk_moments(statistics)
    if moments is None or not math.isfinite(uncertainty):
        return history
    return History(history.uncertainty + uncertainty, history.mean + moments[0], history.deviation + moments[1])


def adaptive_threshold(
    policy: ErasurePolicy, statistics: GroupStatistics, history: History, erasures: int
) -> Threshold:
    """Theta for a segment that has been erased `erasures` times. Source: paper (product of three factors)."""
    penalty = math.exp(policy.gamma * erasures)
    modulation = history_modulation(history, policy.eta)
    moments = shrunk_moments(statistics)
    baseline = math.inf if moments is None else moments[0] + policy.kappa * moments[1]
    if policy.threshold is not None:
        return Threshold(baseline, penalty, modulation, policy.threshold)
    return Threshold(baseline, penalty, modulation, baseline * penalty * modulation)


def is_erased(
    policy: ErasurePolicy,
    uncertainty: float,
    threshold: float,
    erasures: int,
    erased_tokens: int,
    segment_tokens: int,
    erased_token_limit: int,
) -> bool:
    """The verdict: whether this attempt is erased (section 5). Nothing below `policy.min_uncertainty` is (ours).

    `erased_tokens`: erased from this response before; with this segment's they may not exceed `erased_token_limit`.
    """
    exceeds = uncertainty > threshold and uncertainty >= policy.min_uncertainty
    return exceeds and may_erase(policy, erasures, erased_tokens, segment_tokens, erased_token_limit)


def may_erase(
    policy: ErasurePolicy, erasures: int, erased_tokens: int, segment_tokens: int, erased_token_limit: int
) -> bool:
    """Whether an attempt may be erased, however uncertain it is; the arguments are `is_erased`'s."""
    return erasures < policy.max_erasures and erased_tokens + segment_tokens <= erased_token_limit


def kept_attempt(
    uncertainties: Sequence[float], lengths: Sequence[int], erased_tokens: int, erased_token_limit: int
) -> int:
    """Which attempt at a segment stays with `on_exhaustion: best` when the last exceeds its threshold. Source: ours.

    The least uncertain one; of equals the latest. The others count as erased, together with the `erased_tokens` of
    earlier segments, so one that is too short to stay within the limit in place of a longer last one is left out.
    """
    spent = erased_tokens + sum(lengths)
    last = len(lengths) - 1
    affordable = [n for n, length in enumerate(lengths) if n == last or spent - length <= erased_token_limit]
    return min(affordable, key=lambda n: (uncertainties[n], -n))


def updated_prior(prior: tuple[float, float] | None, group: tuple[float, float], decay: float) -> tuple[float, float]:
    """Prior (mean, variance) at one index after a group with (mean, variance) has finished. Source: ours.

    First and second moments decay, so the spread between groups is part of the prior's variance and groups of a
    single response make a prior too.
    """
    if prior is None:
        return group
    mean = decay * prior[0] + (1.0 - decay) * group[0]
    second = decay * (prior[1] + prior[0] ** 2) + (1.0 - decay) * (group[1] + group[0] ** 2)
    return mean, max(second - mean**2, 0.0)
