"""Weights that correct for what sampled the tokens: other weights, or the same in an engine that rounds otherwise.

    token:     w_t = pi_old(y_t) / mu(y_t)
    sequence:  w_t = prod_s pi_old(y_s) / mu(y_s),    the same for all tokens of the response

`mu` is the behaviour policy as it was recorded, `pi_old` the learner's at the step's start. A weight multiplies the
surrogate of its token, not the KL, and has no gradient. Weights outside [floor, cap] are truncated to it (TIS: Yao et
al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; Ionides, "Truncated Importance
Sampling", 2008) or set to 0 (MIS: Liu et al., "When Speed Kills Stability", 2025). A masked token stays in the divisors
of the loss, as in TRL.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.off_policy import ImportanceSampling, NoImportanceSampling, SequenceImportanceSampling


@dataclass(slots=True)
class WeightStatistics:
    """Sums over weights as they were applied: one a token, or one a response with kind `sequence`."""

    count: int = 0
    outliers: int = 0
    sum: float = 0.0
    sum_of_squares: float = 0.0

    def add(self, other: "WeightStatistics") -> None:
        """Take in another part of the same minibatch."""
        self.count += other.count
        self.outliers += other.outliers
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares

    @property
    def mean(self) -> float:
        """NaN without weights, as the shares."""
        return self.sum / self.count if self.count else math.nan

    @property
    def outlier_share(self) -> float:
        return self.outliers / self.count if self.count else math.nan

    @property
    def effective_share(self) -> float:
        """Kish's effective sample size over the number of samples: 1 where all weights are equal, 0 where all are 0."""
        if not self.count:
            return math.nan
        return self.sum**2 / (self.count * self.sum_of_squares) if self.sum_of_squares else 0.0


def importance_weights(
    config: ImportanceSampling, old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor | None, WeightStatistics]:
    """The weight of every token, [responses, tokens] or [responses, 1], and statistics; None with kind `none`."""
    if isinstance(config, NoImportanceSampling):
        return None, WeightStatistics()
    with torch.no_grad():
        # Padding holds anything: it must not reach a response's sum.
        logs = torch.where(mask, old_logprobs - behaviour_logprobs, 0.0)
        counted = mask
        if isinstance(config, SequenceImportanceSampling):
            logs = logs.sum(-1, keepdim=True)
            counted = mask.any(-1, keepdim=True)
        raw = logs.exp()
        outside = raw > config.cap
        if config.floor is not None:
            outside |= raw < config.floor
        if config.outliers == "mask":
            weights = raw.masked_fill(outside, 0.0)
        else:
            weights = raw.clamp(min=config.floor, max=config.cap)
        applied = weights[counted].double()
        statistics = WeightStatistics(
            count=int(counted.sum()),
            outliers=int((outside & counted).sum()),
            sum=float(applied.sum()),
            sum_of_squares=float((applied**2).sum()),
        )
    return weights, statistics
