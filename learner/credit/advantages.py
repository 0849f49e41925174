"""From the rewards of a group to an advantage for every token (`algorithm.md`, section 6).

Pure functions in float64. Arrays named `segments` have one entry for each accepted segment of a response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from common.config.run import AdvantageConfig, Credit, UncertaintyCredit, UniformCredit
from common.packed import PackedResponse

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GroupAdvantages:
    """`segments`: for each response the advantage of its accepted segments. `erased`: of every erased attempt."""

    segments: list[Array]
    erased: float


def group_advantages(responses: Sequence[PackedResponse], config: AdvantageConfig) -> GroupAdvantages:
    """The advantages of one group of rewarded responses, which share one baseline.

    A group in which all rewards are equal says nothing about its responses: all its advantages are 0, with
    `normalise: segment` too, where unequal weights alone would make segment rewards differ (ours).

    Erased attempts carry `-erased_weight` times the group's mean absolute normalised reward, so that they weigh as
    much as the group's committed tokens do, and nothing where the group has no signal (ours).

    Raises ValueError for a response without a reward, or one that `credit` can't weigh.
    """
    rewards = _rewards(responses)
    lengths = [segment_lengths(response) for response in responses]
    if np.ptp(rewards) == 0.0:
        return GroupAdvantages([np.zeros(len(n)) for n in lengths], 0.0)
    weights = segment_weights(config.credit, responses)
    normalised = normalise(rewards, config.epsilon)
    if config.normalise == "sequence":
        segments = [w * value for w, value in zip(weights, normalised, strict=True)]
    else:
        segments = normalise_by_segment(weights, rewards, config.epsilon)
    return GroupAdvantages(segments, -config.erased_weight * float(np.abs(normalised).mean()))


def normalise(values: Array, epsilon: float) -> Array:
    """`(values - mean) / (std + epsilon)` over the group, [responses].

    The deviation is the sample's (divided by n - 1), as `torch.std` and so TRL's GRPO have it. Equal values, and a
    single one, give 0.
    """
    if len(values) < 2 or np.ptp(values) == 0.0:
        return np.zeros_like(values)
    normalised: Array = (values - values.mean()) / (values.std(ddof=1) + epsilon)
    return normalised


def normalise_by_segment(weights: Sequence[Array], rewards: Array, epsilon: float) -> list[Array]:
    """Segment rewards `weight * reward`, normalised over the responses that have a segment at that index."""
    segments = [np.zeros_like(w) for w in weights]
    for index in range(max(len(w) for w in weights)):
        having = [i for i, w in enumerate(weights) if index < len(w)]
        values = normalise(np.array([weights[i][index] * rewards[i] for i in having]), epsilon)
        for i, value in zip(having, values, strict=True):
            segments[i][index] = value
    return segments


def segment_weights(credit: Credit, responses: Sequence[PackedResponse]) -> list[Array]:
    """`N * omega` of every accepted segment: how much of the response's reward it carries, 1 on average.

    Further forms of credit (attention) are a member of `common.config.run.Credit` and a case here.
    """
    match credit:
        case UniformCredit():
            return [np.ones(len(response.attempts.accepted)) for response in responses]
        case UncertaintyCredit():
            return uncertainty_weights(
                [_uncertainties(response) for response in responses],
                [segment_lengths(response) for response in responses],
                credit,
            )
        case _:
            assert_never(credit)


def uncertainty_weights(
    uncertainties: Sequence[Array], lengths: Sequence[Array], credit: UncertaintyCredit
) -> list[Array]:
    """`clip((U + offset) / (U_mean + offset), low, high)`, rescaled to a token mean of 1 over the group.

    `U_mean` is the mean over the group's accepted segments. The weights do not depend on rewards, so they are the
    same for both signs of the advantage. Source: ours.
    """
    mean = np.concatenate(list(uncertainties)).mean()
    raw = [np.clip((u + credit.offset) / (mean + credit.offset), credit.low, credit.high) for u in uncertainties]
    token_sum = sum(float(w @ n) for w, n in zip(raw, lengths, strict=True))
    scale = sum(float(n.sum()) for n in lengths) / token_sum
    return [w * scale for w in raw]


def segment_lengths(response: PackedResponse) -> Array:
    """Tokens of each accepted segment."""
    return response.attempts.lengths[response.attempts.accepted].astype(np.float64)


def _rewards(responses: Sequence[PackedResponse]) -> Array:
    values = []
    for response in responses:
        if response.reward is None:
            raise ValueError(f"response {response.sample} to prompt {response.prompt_id!r} has no reward")
        values.append(response.reward)
    return np.array(values, dtype=np.float64)


def _uncertainties(response: PackedResponse) -> Array:
    table = response.attempts
    accepted = table.accepted
    unjudged = accepted[~table.judged[accepted]]
    if len(unjudged):
        raise ValueError(
            f"credit 'uncertainty' needs judged segments: segment {table.segments[unjudged[0]]} of response "
            f"{response.sample} to prompt {response.prompt_id!r} was generated without a monitor "
            "(give its request a policy; `erasable: false` for plain members)"
        )
    return table.column("uncertainty")[accepted]
