"""What is learnt from: sequences as places in the per-token arrays of responses, wherever these are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config.run import AdvantageConfig, NoOverlong, Overlong
from common.packed import HAS_COLUMN, PackedResponse, TokenArrays, gathered
from learner.credit.advantages import group_advantages
from learner.environments.overlong import is_masked

NO_OVERLONG = NoOverlong()

Array = NDArray[np.float64]
Ranges = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSample:
    """One sequence to learn from: tokens that are given, the prompt's first, then those that carry loss.

    `tokens`: the response's arrays, or a reference to them. `context`, `response`: `[parts, 2]` start and end of the
    parts in these arrays that the sequence is made of. `part_temperatures`, `part_advantages`: of each part of
    `response`, none of which is empty. `context_length` counts the prompt.
    """

    tokens: TokenArrays | Any
    context_length: int
    response_length: int
    context: Ranges
    response: Ranges
    part_temperatures: Array
    part_advantages: Array

    def __len__(self) -> int:
        return self.context_length + self.response_length

    @property
    def has_signal(self) -> bool:
        """Whether any of its advantages is not exactly 0."""
        return bool(self.part_advantages.any())

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """[context + response]. Like the other arrays only where the response's arrays are."""
        given = gathered(self.tokens.token_ids, self.context)
        return np.concatenate([self.tokens.prompt_token_ids, given, gathered(self.tokens.token_ids, self.response)])

    @property
    def behaviour_logprobs(self) -> NDArray[Any]:
        """[response], as all that follow."""
        return gathered(self.tokens.behaviour_logprobs, self.response)

    @property
    def temperatures(self) -> Array:
        return np.repeat(self.part_temperatures, self._part_lengths)

    @property
    def advantages(self) -> Array:
        return np.repeat(self.part_advantages, self._part_lengths)

    @property
    def _part_lengths(self) -> NDArray[np.int64]:
        return self.response[:, 1] - self.response[:, 0]


def response_samples(
    responses: Sequence[PackedResponse], config: AdvantageConfig, overlong: Overlong = NO_OVERLONG
) -> list[list[TrainingSample]]:
    """Samples of one group, for each response those to learn from: itself, and its erased attempts if they count.

    A response's context is its prompt; an erased attempt's is the prompt and the committed tokens before it. A response
    without tokens, or one that `overlong` masks, takes part in the group's baseline and gives no sample.

    Raises ValueError for a response without a reward, or one that `credit` can't weigh or that has no behaviour
    log-probs.
    """
    advantages = group_advantages(responses, config)
    samples: list[list[TrainingSample]] = []
    for response, segments in zip(responses, advantages.segments, strict=True):
        own: list[TrainingSample] = []
        samples.append(own)
        if is_masked(response, overlong):
            continue
        accepted = response.attempts.accepted
        if response.response_tokens:
            own.append(_sample(response, accepted[:0], accepted, segments))
        if advantages.erased != 0.0:
            for index in np.flatnonzero(response.attempts.erased):
                # A rollback goes to the segment's start, so that earlier segments stand.
                before = response.attempts.segments[accepted] < response.attempts.segments[index]
                own.append(_sample(response, accepted[before], np.array([index]), np.array([advantages.erased])))
    return samples


def _sample(
    response: PackedResponse, given: NDArray[np.intp], attempts: NDArray[np.intp], advantages: Array
) -> TrainingSample:
    """The tokens of `attempts` behind those that are `given`. `advantages`: of each of `attempts`."""
    table = response.attempts
    if not table.having(HAS_COLUMN["behaviour_logprobs"])[attempts].all():
        raise ValueError(
            f"response {response.sample} to prompt {response.prompt_id!r} has no behaviour log-probs: it was generated "
            "without a monitor (give its request a policy; `erasable: false` for plain members)"
        )
    offsets = table.offsets
    context = np.stack([offsets[given], offsets[given + 1]], axis=1)
    ranges = np.stack([offsets[attempts], offsets[attempts + 1]], axis=1)
    kept = ranges[:, 1] > ranges[:, 0]
    return TrainingSample(
        tokens=response.reference if response.tokens is None else response.tokens,
        context_length=response.prompt_tokens + int((context[:, 1] - context[:, 0]).sum()),
        response_length=int((ranges[:, 1] - ranges[:, 0]).sum()),
        context=context,
        response=ranges[kept],
        part_temperatures=table.column("temperature")[attempts[kept]],
        part_advantages=advantages[kept],
    )
