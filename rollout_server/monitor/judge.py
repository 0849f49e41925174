"""Uncertainty, threshold and verdict of many segments at once (`algorithm.md`, sections 3 to 5), in float64."""

import math
from dataclasses import dataclass

import torch

from rollout_server.monitor.layout import Int, Real, Sum


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts of `rows` segments.

    `erased` bool `[rows]`; `history` `[rows, 3]`: what an accepted segment adds to its trajectory's history;
    `fields` `[rows, Field.TEMPERATURE]`: the leading columns of a judgement.
    """

    erased: torch.Tensor
    history: torch.Tensor
    fields: torch.Tensor


def uncertainty_parts(
    ints: torch.Tensor, sums: torch.Tensor, reals: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """U and its parts base, extreme and gradient, each float64 `[rows]`."""
    count = ints[:, Int.COUNT].double()
    base = sums[:, Sum.AVERAGES] / count
    extreme = sums[:, Sum.MAXIMUM] - sums[:, Sum.SIGNAL] / count
    gradient = sums[:, Sum.GRADIENT]
    uncertainty = reals[:, Real.BASE] * base + reals[:, Real.EXTREME] * extreme + reals[:, Real.GRADIENT] * gradient
    return uncertainty, base, extreme, gradient


def judge(
    ints: torch.Tensor,
    sums: torch.Tensor,
    reals: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    statistics: torch.Tensor,
    ended: torch.Tensor,
) -> Verdicts:
    """Judge the segments of the rows in `ended`; what other rows get means nothing.

    `ints`, `sums`, `reals`: the slots' state, by the columns of `layout`. `parts`: from `uncertainty_parts`.
    `statistics` `[rows, 6]`: as `common.threshold.GroupStatistics`.
    """
    uncertainty, base, extreme, gradient = parts
    n, group_mean, group_variance, strength, prior_mean, prior_variance = statistics.unbind(-1)
    total = (n + strength).clamp(min=1e-12)
    mean = (n * group_mean + strength * prior_mean) / total
    second = n * (group_variance + group_mean**2) + strength * (prior_variance + prior_mean**2)
    deviation = (second / total - mean**2).clamp(min=0.0).sqrt()
    enough = n + strength >= 2.0
    baseline = torch.where(enough, mean + reals[:, Real.KAPPA] * deviation, math.inf)
    attempt = ints[:, Int.ATTEMPT]
    penalty = torch.exp(reals[:, Real.GAMMA] * attempt)
    past, past_mean, spread = sums[:, Sum.HISTORY_UNCERTAINTY :].unbind(-1)
    score = torch.where(spread > 1e-12, (past - past_mean) / spread.clamp(min=1e-12), 0.0)
    modulation = 1.0 + reals[:, Real.ETA] * torch.tanh(score)
    fixed = reals[:, Real.THRESHOLD]
    threshold = torch.where(fixed.isnan(), baseline * penalty * modulation, fixed)
    erased = (
        ended
        & (uncertainty > threshold)
        & (attempt < ints[:, Int.MAX_ERASURES])
        & (ints[:, Int.ERASED] + ints[:, Int.COUNT] <= ints[:, Int.ERASED_LIMIT])
    )
    fields = torch.stack(
        [
            ints[:, Int.SEGMENT], attempt, ints[:, Int.POSITION] - ints[:, Int.COUNT], ints[:, Int.POSITION],
            uncertainty, base, extreme, gradient, baseline, penalty, modulation, threshold, erased,
            n, group_mean, group_variance, strength, prior_mean, prior_variance,
            past, past_mean, spread, ints[:, Int.ERASED],
        ],
        dim=1,
    )  # fmt: skip
    history = torch.stack([uncertainty, mean, deviation], dim=1) * enough.unsqueeze(1)
    return Verdicts(erased, history, fields)
