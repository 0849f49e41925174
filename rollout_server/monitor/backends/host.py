"""What the monitor does with sampled tokens where its state is in the host's memory: one compiled loop over the rows.

The same mathematics as `judge` (`algorithm.md`, sections 3 to 5), in float64. Few rows end a segment
in a step, and each of numpy's calls costs more than all that is computed for them here.
"""

import math
from typing import Any

import numpy as np

from rollout_server.monitor.backends.compiled import compiled, places
from rollout_server.monitor.layout import NO_SENTINEL, Field, Int, Past, Real

Array = Any

INT, PAST, REAL, FIELD = map(places, (Int, Past, Real, Field))


@compiled
def observe(
    slots: Array,
    tokens: Array,
    ends: Array,
    logprobs: Array,
    row: Array,
    normaliser: Array,
    entropy: Array,
    count: Array,
    token_logprobs: Array,
    token_behaviours: Array,
    token_signals: Array,
    token_tables: Array,
    ints: Array,
    past: Array,
    reals: Array,
    forced: Array,
    groups: Array,
    priors: Array,
    erase: int,
    finish: int,
) -> tuple[Array, Array, Array]:
    """Take `tokens` `[rows]`, sampled for `slots` `[rows]`, into the monitor's state; the arguments are its arrays.

    `ends` `[rows]`: which of them end their segments, by length or text (`boundaries`). Returns what `Judged` holds,
    of the segments that ended: slots, fields and tokens.
    """
    judged = np.empty(len(slots), np.int64)
    stopped = np.empty(len(slots), np.bool_)
    ended = 0
    longest = 0
    for i in range(len(slots)):
        slot, token = slots[i], tokens[i]
        if forced[slot] >= 0:
            continue  # An engine that runs ahead steps a row once more before it takes it out.
        place = count[slot]
        count[slot] = place + 1
        logprob = behaviour = logprobs[row[slot], token]
        temperature = _temperature(ints[slot], reals[slot])
        if temperature == 0.0:
            behaviour = 0.0
        elif temperature != 1.0:
            behaviour = logprob / max(temperature, 1e-5) - normaliser[slot]
        token_logprobs[slot, place] = logprob
        token_behaviours[slot, place] = behaviour
        token_signals[slot, place] = entropy[slot] if ints[slot, INT.USES_ENTROPY] else -logprob
        stops = token_tables[ints[slot, INT.STOPS], token]
        if stops or ends[i]:
            judged[ended], stopped[ended] = slot, stops
            ended += 1
            longest = max(longest, place + 1)
    judged = judged[:ended]
    fields = np.empty((ended, len(FIELD)), np.float64)
    per_token = np.empty((ended, longest, 3), np.float32)
    # Segments that end in the same step see each other: all are counted before one is judged.
    for i in range(ended):
        slot = judged[i]
        per_token[i, :, 0] = token_logprobs[slot, :longest]
        per_token[i, :, 1] = token_behaviours[slot, :longest]
        per_token[i, :, 2] = token_signals[slot, :longest]
        _uncertainty(per_token[i, : count[slot], 2], ints[slot, INT.WINDOW], reals[slot], fields[i])
        uncertainty = fields[i, FIELD.UNCERTAINTY]
        counts = ints[slot, INT.ATTEMPT] == 0 or ints[slot, INT.OBSERVE_ALL] > 0
        # Of weights that overflowed nothing is learnt: it would outlast them.
        if counts and math.isfinite(uncertainty):
            moments = groups[ints[slot, INT.GROUP], _place(ints[slot])]
            moments[0] += 1.0
            moments[1] += uncertainty
            moments[2] += uncertainty**2
    for i in range(ended):
        slot = judged[i]
        own = ints[slot]
        group = groups[own[INT.GROUP], _place(own)]
        prior = priors[own[INT.PRIOR], _place(own)]
        fields[i, FIELD.TEMPERATURE] = _temperature(own, reals[slot])
        erased = _judge(count[slot], own, past[slot], reals[slot], group, prior, fields[i])
        position = own[INT.START] + count[slot]
        final = stopped[i] or position >= own[INT.LIMIT]
        fields[i, FIELD.FINAL] = final
        fields[i, FIELD.JUDGED] = 1.0
        if erased:
            forced[slot] = max(forced[slot], erase)
        else:
            forced[slot] = max(forced[slot], finish if final else NO_SENTINEL)
            own[INT.START] = position
            own[INT.SEGMENT] += 1
            own[INT.ATTEMPT] = 0
        count[slot] = 0
    return judged, fields, per_token


@compiled
def _temperature(ints: Array, reals: Array) -> Any:
    """In force: the retry temperature while a segment is regenerated."""
    return reals[REAL.RETRY_TEMPERATURE] if ints[INT.ATTEMPT] > 0 else reals[REAL.TEMPERATURE]


@compiled
def _place(ints: Array) -> Any:
    """Where the statistics of the segment under way are: at its index, or at the one place for all."""
    return ints[INT.SEGMENT] if ints[INT.BY_INDEX] else 0


@compiled
def _uncertainty(signal: Array, window: int, reals: Array, fields: Array) -> None:
    """U of a segment from the H of its tokens, float32 `[tokens]`, and its parts, into `fields`."""
    length = len(signal)
    total, trailing, averages = 0.0, 0.0, 0.0
    largest, gradient = -math.inf, 0.0
    for t in range(length):
        value = np.float64(signal[t])
        total += value
        trailing += value
        if t >= window:
            trailing -= np.float64(signal[t - window])
        averages += trailing / min(t + 1, window)
        largest = max(largest, value)
        if t > 0:
            gradient = max(gradient, abs(value - np.float64(signal[t - 1])))
    base = averages / length
    extreme = largest - total / length
    fields[FIELD.BASE], fields[FIELD.EXTREME], fields[FIELD.GRADIENT] = base, extreme, gradient
    fields[FIELD.UNCERTAINTY] = (
        reals[REAL.BASE] * base + reals[REAL.EXTREME] * extreme + reals[REAL.GRADIENT] * gradient
    )


@compiled
def _judge(count: int, ints: Array, past: Array, reals: Array, group: Array, prior: Array, fields: Array) -> Any:
    """Threshold and verdict of a segment of `count` tokens, into `fields`; an accepted one becomes `past`.

    `group`: observations, sum and sum of squares of U. `prior`: whether known, mean, second moment.
    """
    observed = max(group[0], 1.0)
    n, mean = group[0], group[1] / observed
    variance = max(group[2] / observed - mean**2, 0.0)
    strength = prior[0] * reals[REAL.PRIOR_STRENGTH]
    prior_variance = max(prior[2] - prior[1] ** 2, 0.0)
    weight = max(n + strength, 1e-12)
    shrunk = (n * mean + strength * prior[1]) / weight
    second = n * (variance + mean**2) + strength * (prior_variance + prior[1] ** 2)
    deviation = math.sqrt(max(second / weight - shrunk**2, 0.0))
    enough = n + strength >= 2.0
    baseline = shrunk + reals[REAL.KAPPA] * deviation if enough else math.inf
    attempt = ints[INT.ATTEMPT]
    penalty = math.exp(reals[REAL.GAMMA] * attempt)
    spread = past[PAST.DEVIATION]
    score = (past[PAST.UNCERTAINTY] - past[PAST.MEAN]) / spread if spread > 1e-12 else 0.0
    modulation = 1.0 + reals[REAL.ETA] * math.tanh(score)
    threshold = reals[REAL.THRESHOLD]
    if math.isnan(threshold):
        threshold = baseline * penalty * modulation
    uncertainty = fields[FIELD.UNCERTAINTY]
    exceeds = uncertainty > threshold and uncertainty >= reals[REAL.MIN_UNCERTAINTY]
    allowed = attempt < ints[INT.MAX_ERASURES] and ints[INT.ERASED] + count <= ints[INT.ERASED_LIMIT]
    gives_way = attempt > 0 and reals[REAL.BEST] < uncertainty
    erased = exceeds and (allowed or gives_way)
    fields[FIELD.SEGMENT], fields[FIELD.ATTEMPT] = ints[INT.SEGMENT], attempt
    fields[FIELD.START], fields[FIELD.END] = ints[INT.START], ints[INT.START] + count
    fields[FIELD.BASELINE], fields[FIELD.PENALTY], fields[FIELD.MODULATION] = baseline, penalty, modulation
    fields[FIELD.THRESHOLD], fields[FIELD.ERASED] = threshold, erased
    fields[FIELD.COUNT], fields[FIELD.MEAN], fields[FIELD.VARIANCE] = n, mean, variance
    fields[FIELD.PRIOR_STRENGTH], fields[FIELD.PRIOR_MEAN] = strength, prior[1]
    fields[FIELD.PRIOR_VARIANCE] = prior_variance
    fields[FIELD.HISTORY_UNCERTAINTY], fields[FIELD.HISTORY_MEAN] = past[PAST.UNCERTAINTY], past[PAST.MEAN]
    fields[FIELD.HISTORY_DEVIATION], fields[FIELD.ERASED_BEFORE] = spread, ints[INT.ERASED]
    if enough and not erased and math.isfinite(uncertainty):
        past[PAST.UNCERTAINTY] += uncertainty
        past[PAST.MEAN] += shrunk
        past[PAST.DEVIATION] += deviation
    return erased
