"""Policy objectives: from log-probs and advantages to a loss that does not depend on how a minibatch is split.

Tensors are [responses, tokens], padded on the right; `mask` says which entries are real.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config.run import ClippedObjective

Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True)
class MinibatchTotals:
    """Sizes of the whole minibatch, over all ranks and micro-batches: what its means are divided by."""

    responses: int
    response_tokens: int


@dataclass(frozen=True, slots=True)
class ObjectiveInputs:
    """A micro-batch as an objective sees it; `reference_logprobs` only where a KL is wanted.

    Log-probs are in nats, at the temperature that the token was sampled with.
    """

    logprobs: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    reference_logprobs: Tensor | None = None


@dataclass(slots=True)
class ObjectiveStatistics:
    """Sums over tokens, and extremes, that micro-batches and ranks add up."""

    tokens: int = 0
    clipped_tokens: int = 0
    kl_sum: float = 0.0
    gap_sum: float = 0.0
    gap_max: float = 0.0
    ratio_min: float = float("inf")
    ratio_max: float = float("-inf")

    def add(self, other: "ObjectiveStatistics") -> None:
        """Take in another part of the same minibatch."""
        self.tokens += other.tokens
        self.clipped_tokens += other.clipped_tokens
        self.kl_sum += other.kl_sum
        self.gap_sum += other.gap_sum
        self.gap_max = max(self.gap_max, other.gap_max)
        self.ratio_min = min(self.ratio_min, other.ratio_min)
        self.ratio_max = max(self.ratio_max, other.ratio_max)


def compute_objective(
    config: ClippedObjective, inputs: ObjectiveInputs, totals: MinibatchTotals
) -> tuple[Tensor, ObjectiveStatistics]:
    """This micro-batch's share of the minibatch's loss, and statistics; shares of all micro-batches add up to it.

    Further objectives (DAPO, GSPO, SAPO, Dr. GRPO) turn `config` into a union and this function into its dispatch.
    """
    return clipped_surrogate(config, inputs, totals)


def clipped_surrogate(
    config: ClippedObjective, inputs: ObjectiveInputs, totals: MinibatchTotals
) -> tuple[Tensor, ObjectiveStatistics]:
    """PPO's clipped surrogate on token importance ratios, plus `kl_coefficient` times the k3 estimate of the KL.

    Source: GRPO (arXiv 2402.03300, eq. 3 and 4); k3: Schulman, "Approximating KL Divergence".
    """
    ratio = torch.exp(inputs.logprobs - inputs.behaviour_logprobs)
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    losses = -torch.minimum(ratio * inputs.advantages, clipped * inputs.advantages)
    kl = k3_divergence(inputs.logprobs, inputs.reference_logprobs)
    if kl is not None:
        losses = losses + config.kl_coefficient * kl
    loss = aggregate(losses, inputs.mask, totals, config.aggregation)
    with torch.no_grad():
        outside = ((ratio < 1.0 - config.clip_low) & (inputs.advantages < 0.0)) | (
            (ratio > 1.0 + config.clip_high) & (inputs.advantages > 0.0)
        )
        return loss, _statistics(inputs, ratio, outside, kl)


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor | None) -> Tensor | None:
    """KL(policy || reference) of each token, `exp(d) - d - 1` with `d = reference - policy`: unbiased, never < 0."""
    if reference_logprobs is None:
        return None
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1.0


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


def _statistics(inputs: ObjectiveInputs, ratio: Tensor, outside: Tensor, kl: Tensor | None) -> ObjectiveStatistics:
    mask = inputs.mask
    if not bool(mask.any()):
        return ObjectiveStatistics()
    gaps = (inputs.logprobs - inputs.behaviour_logprobs)[mask].abs()
    return ObjectiveStatistics(
        tokens=int(mask.sum()),
        clipped_tokens=int((outside & mask).sum()),
        kl_sum=0.0 if kl is None else float(kl[mask].sum()),
        gap_sum=float(gaps.sum()),
        gap_max=float(gaps.max()),
        ratio_min=float(ratio[mask].min()),
        ratio_max=float(ratio[mask].max()),
    )
