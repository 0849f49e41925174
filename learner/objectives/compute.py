"""The loss that the configuration asks for, from its parts."""

import torch
from torch import Tensor

from common.config.off_policy import NO_IMPORTANCE_SAMPLING, ImportanceSampling
from common.config.run import ClippedObjective
from learner.objectives.base import MinibatchTotals, ObjectiveInputs, ObjectiveStatistics, aggregate
from learner.objectives.clipped import clipped_surrogate, is_clipped
from learner.objectives.importance_sampling import WeightStatistics, importance_weights
from learner.objectives.kl import k3_divergence
from learner.objectives.logprob_gap import GapHistogram


def compute_objective(
    config: ClippedObjective,
    inputs: ObjectiveInputs,
    totals: MinibatchTotals,
    sampling: ImportanceSampling = NO_IMPORTANCE_SAMPLING,
) -> tuple[Tensor, ObjectiveStatistics]:
    """This micro-batch's share of the minibatch's loss, and statistics; shares of all micro-batches add up to it.

    Further objectives (GSPO, SAPO) turn `config` into a union and the surrogate's line into its dispatch. Raises
    ValueError for importance sampling without `old_logprobs`: all weights would be 1.
    """
    ratio = inputs.ratio
    losses = clipped_surrogate(config, ratio, inputs.advantages)
    statistics = WeightStatistics()
    if sampling.kind != "none":
        if inputs.old_logprobs is None:
            raise ValueError("importance sampling needs the old log-probs")
        weights, statistics = importance_weights(sampling, inputs.old_logprobs, inputs.behaviour_logprobs, inputs.mask)
        losses = losses if weights is None else losses * weights
    kl = None
    if inputs.reference_logprobs is not None:
        kl = k3_divergence(inputs.logprobs, inputs.reference_logprobs)
        losses = losses + config.kl_coefficient * kl
    loss = aggregate(losses, inputs.mask, totals, config.aggregation)
    with torch.no_grad():
        outside = is_clipped(config, ratio, inputs.advantages)
        return loss, _statistics(inputs, ratio, outside, kl, statistics)


def _statistics(
    inputs: ObjectiveInputs, ratio: Tensor, outside: Tensor, kl: Tensor | None, weights: WeightStatistics
) -> ObjectiveStatistics:
    mask = inputs.mask
    if not bool(mask.any()):
        return ObjectiveStatistics()
    start = inputs.logprobs if inputs.old_logprobs is None else inputs.old_logprobs
    return ObjectiveStatistics(
        tokens=int(mask.sum()),
        clipped_tokens=int((outside & mask).sum()),
        kl_sum=0.0 if kl is None else float(kl[mask].sum()),
        ratio_min=float(ratio[mask].min()),
        ratio_max=float(ratio[mask].max()),
        gaps=GapHistogram.of(start[mask], inputs.behaviour_logprobs[mask]),
        weights=weights,
    )
