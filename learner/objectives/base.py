"""What objectives take and give.

Tensors are [responses, tokens], padded on the right; `mask` says which entries are real.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from learner.objectives.importance_sampling import WeightStatistics
from learner.objectives.logprob_gap import GapHistogram

Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True)
class MinibatchTotals:
    """Sizes of the whole minibatch, over all ranks and micro-batches: what its means are divided by."""

    responses: int
    response_tokens: int


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """A micro-batch as an objective sees it; `reference_logprobs` only where a KL is wanted.

    Log-probs are in nats, at the temperature that the token was sampled with. `old_logprobs`: of the policy at the
    step's start, without a gradient; null where the importance ratio is against the behaviour's.
    """

    logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    reference_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """The importance ratio of every token."""
        old = self.behaviour_logprobs if self.old_logprobs is None else self.old_logprobs
        return torch.exp(self.logprobs - old)


@dataclass(slots=True)
class ObjectiveStatistics:
    """Sums over tokens, and extremes, that micro-batches and ranks add up.

    `gaps` are of the policy at the step's start, as far as it is known: without `old_logprobs` they are the current
    policy's, which is the same in the first minibatch only.
    """

    tokens: int = 0
    clipped_tokens: int = 0
    kl_sum: float = 0.0
    ratio_min: float = float("inf")
    ratio_max: float = float("-inf")
    gaps: GapHistogram = field(default_factory=GapHistogram)
    weights: WeightStatistics = field(default_factory=WeightStatistics)

    def add(self, other: "ObjectiveStatistics") -> None:
        """Take in another part of the same minibatch."""
        self.tokens += other.tokens
        self.clipped_tokens += other.clipped_tokens
        self.kl_sum += other.kl_sum
        self.ratio_min = min(self.ratio_min, other.ratio_min)
        self.ratio_max = max(self.ratio_max, other.ratio_max)
        self.gaps.add(other.gaps)
        self.weights.add(other.weights)


def aggregate(losses: Tensor, mask: Tensor, totals: MinibatchTotals, aggregation: Aggregation) -> Tensor:
    """This micro-batch's share of the mean over tokens, or over responses of the mean over their tokens.

    The divisors are the whole minibatch's, so the sum over micro-batches and ranks is the same however it is split.
    """
    # Padding holds anything, infinities included: select, do not multiply by 0.
    losses = torch.where(mask, losses, 0.0)
    if aggregation == "token_mean":
        return losses.sum() / max(totals.response_tokens, 1)
    means = losses.sum(-1) / mask.sum(-1).clamp(min=1)
    return means.sum() / max(totals.responses, 1)
