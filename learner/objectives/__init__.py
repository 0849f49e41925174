"""Policy objectives: from log-probs and advantages to a loss that does not depend on how a minibatch is split.

One file each: `clipped` (the surrogate), `kl`, `importance_sampling`, each with its equation and source; `logprob_gap`
measures, `base` holds what all of them take and give, `compute` puts them together. Imports torch and `common` only.
"""

from learner.objectives.base import MinibatchTotals, ObjectiveInputs, ObjectiveStatistics
from learner.objectives.compute import compute_objective
from learner.objectives.importance_sampling import WeightStatistics, importance_weights
from learner.objectives.logprob_gap import GapHistogram

__all__ = [
    "GapHistogram",
    "MinibatchTotals",
    "ObjectiveInputs",
    "ObjectiveStatistics",
    "WeightStatistics",
    "compute_objective",
    "importance_weights",
]
