"""PPO's clipped surrogate.

    loss_t = -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),    r_t = pi(y_t) / pi_old(y_t)

Source: PPO (arXiv 1707.06347, eq. 7), for tokens as in GRPO (arXiv 2402.03300, eq. 3).
"""

import torch
from torch import Tensor

from common.config.run import ClippedObjective


def clipped_surrogate(config: ClippedObjective, ratio: Tensor, advantages: Tensor) -> Tensor:
    """The loss of every token."""
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def is_clipped(config: ClippedObjective, ratio: Tensor, advantages: Tensor) -> Tensor:
    """Whether a token is clipped, and so has no gradient."""
    return ((ratio < 1.0 - config.clip_low) & (advantages < 0.0)) | (
        (ratio > 1.0 + config.clip_high) & (advantages > 0.0)
    )
