"""The KL of the policy to a reference, a token at a time, from sampled tokens alone.

    k3 = exp(d) - d - 1,    d = log q(y_t) - log p(y_t),    y_t from p

It is unbiased for KL(p || q) and never below 0. Source: Schulman, "Approximating KL Divergence"; GRPO (arXiv
2402.03300, eq. 4).
"""

import torch
from torch import Tensor


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """KL(p || q) of each token; `logprobs` are log p, `reference_logprobs` log q."""
    difference = reference_logprobs - logprobs
    return torch.exp(difference) - difference - 1.0
