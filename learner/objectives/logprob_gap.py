"""How far the policy's log-probs are from the behaviour's: a distribution that parts of a minibatch add up exactly.

A mean hides what matters: a few tokens whose probability differs by a factor, among many that agree (ours).
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.objectives.kl import k3_divergence

_BITS = 4
"""Bits of a gap's mantissa that tell bins apart: 16 bins an octave, each a sixteenth of its octave's beginning wide."""
_SHIFT = 23 - _BITS
_LOWEST, _HIGHEST = -40, 7
"""Powers of two: gaps below the lowest are in bin 0 and count as 0, those from the highest on are in the last bin."""
_FIRST = (127 + _LOWEST) << _BITS
_BINS = ((_HIGHEST - _LOWEST) << _BITS) + 2


def _no_counts() -> NDArray[np.int64]:
    return np.zeros(_BINS, dtype=np.int64)


@dataclass(slots=True)
class GapHistogram:
    """|policy's - behaviour's log-prob| of tokens, in nats: counts in fixed bins, and the mean and maximum.

    A bin is found from the bits of a float32, without rounding, so that it is the same on every device.
    `kl_sum`: of the estimate `k3` of KL(behaviour || policy).
    """

    counts: NDArray[np.int64] = field(default_factory=_no_counts)
    sum: float = 0.0
    max: float = 0.0
    kl_sum: float = 0.0

    @classmethod
    def of(cls, logprobs: Tensor, behaviour_logprobs: Tensor) -> "GapHistogram":
        """Of these tokens, [tokens]."""
        gaps = (logprobs - behaviour_logprobs).detach().abs().float()
        if not len(gaps):
            return cls()
        # The bits of a float that is not negative, read as an integer, are in the order of the floats. NaN is last.
        bins = ((gaps.view(torch.int32) >> _SHIFT) - _FIRST + 1).clamp(0, _BINS - 1)
        counts = torch.bincount(bins, minlength=_BINS)
        kl = k3_divergence(behaviour_logprobs.double(), logprobs.detach().double())
        return cls(counts.cpu().numpy(), float(gaps.double().sum()), float(gaps.max()), float(kl.sum()))

    def add(self, other: "GapHistogram") -> None:
        """Take in the gaps of other tokens."""
        self.counts = self.counts + other.counts
        self.sum += other.sum
        self.max = max(self.max, other.max)
        self.kl_sum += other.kl_sum

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """NaN without tokens, as all that is asked of nothing."""
        return self.sum / self.tokens if self.tokens else float("nan")

    @property
    def kl(self) -> float:
        """KL(behaviour || policy) of a token."""
        return self.kl_sum / self.tokens if self.tokens else float("nan")

    def quantile(self, share: float) -> float:
        """The gap that at least `share` of the tokens do not exceed: its bin's upper end, and at most the maximum."""
        if not self.tokens:
            return float("nan")
        needed = max(int(np.ceil(share * self.tokens)), 1)
        index = int(np.searchsorted(np.cumsum(self.counts), needed))
        if index == 0:
            return 0.0
        if index == _BINS - 1:
            return self.max
        end = np.array((index + _FIRST) << _SHIFT, dtype=np.int32).view(np.float32)
        return min(float(end), self.max)
