"""Uncertainty, threshold and verdict of many segments at once (`algorithm.md`, sections 3 to 5), in float64.

For devices that a step must not wait for: every row is computed, whether or not its segment ended.
`rollout_server.monitor.backends.host` does the same in the host's memory.
"""

import math
from dataclasses import dataclass

import torch

from rollout_server.monitor.layout import Int, Real


def columns(parts: list[torch.Tensor]) -> torch.Tensor:
    """Float64 `[rows, len(parts)]`."""
    return torch.stack([part.double() for part in parts], 1)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts of `rows` segments.

    `erased` bool `[rows]`; `history` `[rows, len(Past)]`: what an accepted segment adds to its trajectory's history;
    `fields` `[rows, Field.TEMPERATURE]`: the leading columns of a judgement.
    """

    erased: torch.Tensor
    history: torch.Tensor
    fields: torch.Tensor


def uncertainty_parts(
    signal: torch.Tensor, count: torch.Tensor, window: torch.Tensor, reals: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """U and its parts base, extreme and gradient, each float64 `[rows]`.

    `signal` float64 `[rows, longest]`: H of the tokens, of which the first `count` `[rows]` are the segment's.
    """
    place = torch.arange(signal.shape[1], device=signal.device)
    row = torch.arange(len(signal), device=signal.device)[:, None]
    count, window = count[:, None], window[:, None]
    inside = place < count
    kept = torch.where(inside, signal, 0.0)
    total = torch.cumsum(kept, 1)
    too_old = torch.where(place >= window, total[row, (place - window).clip(0)], 0.0)
    averages = (total - too_old) / torch.minimum(place + 1, window)
    base = (torch.where(inside, averages, 0.0) / count).sum(1)
    extreme = torch.amax(torch.where(inside, signal, -math.inf), 1) - (kept / count).sum(1)
    steps = torch.zeros_like(kept)
    steps[:, 1:] = abs(kept[:, 1:] - kept[:, :-1])
    gradient = torch.amax(torch.where(inside, steps, 0.0), 1)
    uncertainty = reals[:, Real.BASE] * base + reals[:, Real.EXTREME] * extreme + reals[:, Real.GRADIENT] * gradient
    return uncertainty, base, extreme, gradient


def judge(
    count: torch.Tensor,
    ints: torch.Tensor,
    past: torch.Tensor,
    reals: torch.Tensor,
    parts: tuple[torch.Tensor, ...],
    statistics: torch.Tensor,
    ended: torch.Tensor,
) -> Verdicts:
    """Judge the segments of the rows in `ended`; what other rows get means nothing.

    `count` `[rows]`: tokens of the segments. `ints`, `past`, `reals`: the slots' state, by the columns of `layout`.
    `parts`: from `uncertainty_parts`. `statistics` `[rows, 6]`: as `common.threshold.GroupStatistics`.
    """
    uncertainty, base, extreme, gradient = parts
    n, group_mean, group_variance, strength, prior_mean, prior_variance = statistics.T
    total = (n + strength).clip(1e-12)
    mean = (n * group_mean + strength * prior_mean) / total
    second = n * (group_variance + group_mean**2) + strength * (prior_variance + prior_mean**2)
    deviation = torch.sqrt((second / total - mean**2).clip(0.0))
    enough = n + strength >= 2.0
    baseline = torch.where(enough, mean + reals[:, Real.KAPPA] * deviation, math.inf)
    attempt = ints[:, Int.ATTEMPT]
    penalty = torch.exp(reals[:, Real.GAMMA] * attempt)
    past_uncertainty, past_mean, spread = past.T
    score = torch.where(spread > 1e-12, (past_uncertainty - past_mean) / spread.clip(1e-12), 0.0)
    modulation = 1.0 + reals[:, Real.ETA] * torch.tanh(score)
    fixed = reals[:, Real.THRESHOLD]
    threshold = torch.where(torch.isnan(fixed), baseline * penalty * modulation, fixed)
    exceeds = (uncertainty > threshold) & (uncertainty >= reals[:, Real.MIN_UNCERTAINTY])
    within_budget = ints[:, Int.ERASED] + count <= ints[:, Int.ERASED_LIMIT]
    allowed = (attempt < ints[:, Int.MAX_ERASURES]) & within_budget
    gives_way = (attempt > 0) & (reals[:, Real.BEST] < uncertainty)
    erased = ended & exceeds & (allowed | gives_way)
    fields = columns(
        [
            ints[:, Int.SEGMENT], attempt, ints[:, Int.START], ints[:, Int.START] + count,
            uncertainty, base, extreme, gradient, baseline, penalty, modulation, threshold, erased,
            n, group_mean, group_variance, strength, prior_mean, prior_variance,
            past_uncertainty, past_mean, spread, ints[:, Int.ERASED],
        ],
    )  # fmt: skip
    known = (enough & uncertainty.isfinite())[:, None]
    history = torch.where(known, columns([uncertainty, mean, deviation]), 0.0)
    return Verdicts(erased, history, fields)
