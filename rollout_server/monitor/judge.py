"""Uncertainty, threshold and verdict of many segments at once (`algorithm.md`, sections 3 to 5), in float64."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rollout_server.monitor.layout import Int, Real

Array = Any
"""An array of numpy's or a tensor of torch's: what is done to it here is spelt alike in both."""


def columns(xp: Any, parts: list[Array]) -> Array:
    """Float64 `[rows, len(parts)]`: `stack`, which numpy does in Python, array by array."""
    return np.array(parts, dtype=np.float64).T if xp is np else xp.stack(parts, 1)


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts of `rows` segments.

    `erased` bool `[rows]`; `history` `[rows, len(Past)]`: what an accepted segment adds to its trajectory's history;
    `fields` `[rows, Field.TEMPERATURE]`: the leading columns of a judgement.
    """

    erased: Array
    history: Array
    fields: Array


def uncertainty_parts(
    xp: Any, signal: Array, count: Array, window: Array, reals: Array
) -> tuple[Array, Array, Array, Array]:
    """U and its parts base, extreme and gradient, each float64 `[rows]`.

    `signal` float64 `[rows, longest]`: H of the tokens, of which the first `count` `[rows]` are the segment's.
    """
    place = xp.arange(signal.shape[1], device=signal.device)
    row = xp.arange(len(signal), device=signal.device)[:, None]
    count, window = count[:, None], window[:, None]
    inside = place < count
    kept = xp.where(inside, signal, 0.0)
    total = xp.cumsum(kept, 1)
    too_old = xp.where(place >= window, total[row, (place - window).clip(0)], 0.0)
    averages = (total - too_old) / xp.minimum(place + 1, window)
    base = (xp.where(inside, averages, 0.0) / count).sum(1)
    extreme = xp.amax(xp.where(inside, signal, -math.inf), 1) - (kept / count).sum(1)
    steps = xp.zeros_like(kept)
    steps[:, 1:] = abs(kept[:, 1:] - kept[:, :-1])
    gradient = xp.amax(xp.where(inside, steps, 0.0), 1)
    uncertainty = reals[:, Real.BASE] * base + reals[:, Real.EXTREME] * extreme + reals[:, Real.GRADIENT] * gradient
    return uncertainty, base, extreme, gradient


def judge(
    xp: Any,
    count: Array,
    ints: Array,
    past: Array,
    reals: Array,
    parts: tuple[Array, ...],
    statistics: Array,
    ended: Array,
) -> Verdicts:
    """Judge the segments of the rows in `ended`; what other rows get means nothing.

    `xp`: numpy or torch, whichever the arrays are of. `count` `[rows]`: tokens of the segments. `ints`, `past`,
    `reals`: the slots' state, by the columns of `layout`. `parts`: from `uncertainty_parts`. `statistics`
    `[rows, 6]`: as `common.threshold.GroupStatistics`.
    """
    uncertainty, base, extreme, gradient = parts
    n, group_mean, group_variance, strength, prior_mean, prior_variance = statistics.T
    total = (n + strength).clip(1e-12)
    mean = (n * group_mean + strength * prior_mean) / total
    second = n * (group_variance + group_mean**2) + strength * (prior_variance + prior_mean**2)
    deviation = xp.sqrt((second / total - mean**2).clip(0.0))
    enough = n + strength >= 2.0
    baseline = xp.where(enough, mean + reals[:, Real.KAPPA] * deviation, math.inf)
    attempt = ints[:, Int.ATTEMPT]
    penalty = xp.exp(reals[:, Real.GAMMA] * attempt)
    past_uncertainty, past_mean, spread = past.T
    score = xp.where(spread > 1e-12, (past_uncertainty - past_mean) / spread.clip(1e-12), 0.0)
    modulation = 1.0 + reals[:, Real.ETA] * xp.tanh(score)
    fixed = reals[:, Real.THRESHOLD]
    threshold = xp.where(xp.isnan(fixed), baseline * penalty * modulation, fixed)
    erased = (
        ended
        & (uncertainty > threshold)
        & (attempt < ints[:, Int.MAX_ERASURES])
        & (ints[:, Int.ERASED] + count <= ints[:, Int.ERASED_LIMIT])
    )
    fields = columns(
        xp,
        [
            ints[:, Int.SEGMENT], attempt, ints[:, Int.START], ints[:, Int.START] + count,
            uncertainty, base, extreme, gradient, baseline, penalty, modulation, threshold, erased,
            n, group_mean, group_variance, strength, prior_mean, prior_variance,
            past_uncertainty, past_mean, spread, ints[:, Int.ERASED],
        ],
    )  # fmt: skip
    history = columns(xp, [uncertainty, mean, deviation]) * enough[:, None]
    return Verdicts(erased, history, fields)
