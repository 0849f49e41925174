"""How the monitor's state and its judgements are laid out in tensors, and what a slot must be told."""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch

from common.config.erasure import ErasurePolicy
from common.threshold import History

NO_SENTINEL = -1


class Int(IntEnum):
    """Columns of the integer state of a slot.

    `START`: of the segment under way. `BY_INDEX`: whether statistics are by its index, or of all segments.
    """

    START = 0
    SEGMENT = 1
    ATTEMPT = 2
    ERASED = 3
    WINDOW = 4
    LIMIT = 5
    STOPS = 6
    GROUP = 7
    PRIOR = 8
    MAX_ERASURES = 9
    ERASED_LIMIT = 10
    OBSERVE_ALL = 11
    USES_ENTROPY = 12
    BY_INDEX = 13


class Past(IntEnum):
    """Columns of a slot's history, of which the threshold is made: sums over its accepted segments."""

    UNCERTAINTY = 0
    MEAN = 1
    DEVIATION = 2


class Real(IntEnum):
    """Columns of a slot's policy, and of what was before: `BEST`, as `SlotSpec.best`."""

    BASE = 0
    EXTREME = 1
    GRADIENT = 2
    KAPPA = 3
    GAMMA = 4
    ETA = 5
    THRESHOLD = 6
    PRIOR_STRENGTH = 7
    TEMPERATURE = 8
    RETRY_TEMPERATURE = 9
    ENGINE_TEMPERATURE = 10
    MIN_UNCERTAINTY = 11
    BEST = 12


class Field(IntEnum):
    """Columns of a judgement, float64 `[judged, len(Field)]`.

    `ERASED`: also where no erasure was left, but an earlier attempt is to be kept in this one's place.
    """

    SEGMENT = 0
    ATTEMPT = 1
    START = 2
    END = 3
    UNCERTAINTY = 4
    BASE = 5
    EXTREME = 6
    GRADIENT = 7
    BASELINE = 8
    PENALTY = 9
    MODULATION = 10
    THRESHOLD = 11
    ERASED = 12
    COUNT = 13
    MEAN = 14
    VARIANCE = 15
    PRIOR_STRENGTH = 16
    PRIOR_MEAN = 17
    PRIOR_VARIANCE = 18
    HISTORY_UNCERTAINTY = 19
    HISTORY_MEAN = 20
    HISTORY_DEVIATION = 21
    ERASED_BEFORE = 22
    TEMPERATURE = 23
    FINAL = 24
    JUDGED = 25


@dataclass(frozen=True, slots=True)
class SlotSpec:
    """What a slot needs to know of the response that it follows, from wherever the response is resumed.

    `position`: committed tokens so far. `limit`: the response's token limit. `erasable` false: monitored only.
    `engine_temperature`: what the engine divides logits by after this processor; it differs from the temperature in
    force where segments are regenerated at their own. `stops`: a row of the token tables.
    `best`: the least uncertainty of earlier attempts at the segment, if one of them may be kept in place of the last.
    """

    policy: ErasurePolicy
    position: int
    segment: int
    attempt: int
    erased_tokens: int
    limit: int
    erased_limit: int
    temperature: float
    engine_temperature: float
    erasable: bool
    history: History
    stops: int
    group: int
    prior: int
    best: float = math.inf


@dataclass(frozen=True, slots=True)
class Judged:
    """What one step judged, still on the device.

    `slots` `[judged]`; `fields` float64 `[judged, len(Field)]`; `tokens` float32 `[judged, longest segment, 3]`:
    log-probability, behaviour log-probability and signal of each token of the segment.
    """

    slots: torch.Tensor
    fields: torch.Tensor
    tokens: torch.Tensor
