"""What learner and replicas say to each other about a set of weights: updates, their files and their checksums.

`updates` has a kind of update for each transport, `weight_file` the file in which weights lie, `checksum` what proves
that they arrived. Both sides import this package; it imports neither of them.
"""

from common.weights.checksum import held_by_ranks, held_sum, weights_checksum
from common.weights.updates import (
    DiskUpdate,
    GlooUpdate,
    HostUpdate,
    IpcUpdate,
    NcclUpdate,
    NonFiniteLogits,
    ReplicaSync,
    SyncReport,
    WeightUpdate,
)

__all__ = [
    "DiskUpdate",
    "GlooUpdate",
    "HostUpdate",
    "IpcUpdate",
    "NcclUpdate",
    "NonFiniteLogits",
    "ReplicaSync",
    "SyncReport",
    "WeightUpdate",
    "held_by_ranks",
    "held_sum",
    "weights_checksum",
]
