"""Reference mathematics of a segment's uncertainty (`algorithm.md`, sections 2 and 3).

Pure functions in float64, written for reading: the segment monitor on the device is tested against them, and a
recorded attempt can be replayed with them. Units: nats.
"""

from dataclasses import dataclass

import torch

from common.config.erasure import SignalWeights


@dataclass(frozen=True, slots=True)
class SegmentUncertainty:
    """U of one segment and its three parts, in nats."""

    uncertainty: float
    base: float
    extreme: float
    gradient: float


def token_signal(logits_TV: torch.Tensor, token_ids_T: torch.Tensor, signal: str) -> torch.Tensor:
    """H_t of each token, float64 `[T]`, from the model's own logits `[T, vocabulary]`.

    `entropy`: of the next-token distribution. `cross_entropy`: minus the log-probability of the sampled token.
    The distribution is the one before temperature, top-k and top-p. Source: paper (H_t), the two readings ours.
    """
    log_probs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
    if signal == "entropy":
        return -(log_probs_TV.exp() * log_probs_TV).nan_to_num(0.0).sum(dim=-1)
    if signal == "cross_entropy":
        return -log_probs_TV.gather(-1, token_ids_T.unsqueeze(-1)).squeeze(-1)
    raise ValueError(f"signal must be 'entropy' or 'cross_entropy', not {signal!r}")


def segment_uncertainty(signal_T: torch.Tensor, window: int, weights: SignalWeights) -> SegmentUncertainty:
    """U of a segment from the H of its tokens, `[T]` with T >= 1.

    base: mean of the trailing moving average over `window` tokens, clipped at the segment's start.
    extreme: the maximum minus the mean. gradient: the largest step between neighbours (0 for a single token).
    Source: paper (three parts, weighted sum); exact forms ours.
    """
    values = signal_T.double()
    if values.numel() == 0:
        raise ValueError("a segment has at least one token")
    averages = [values[max(0, t + 1 - window) : t + 1].mean() for t in range(len(values))]
    base = float(torch.stack(averages).mean())
    extreme = float(values.max() - values.mean())
    gradient = float(values.diff().abs().max()) if len(values) > 1 else 0.0
    total = weights.base * base + weights.extreme * extreme + weights.gradient * gradient
    return SegmentUncertainty(total, base, extreme, gradient)
