"""Seconds of training: operations, traffic between ranks, the optimizer's step."""

from dataclasses import dataclass

from learner.planning.assumptions import Assumptions
from learner.planning.memory import BYTES
from learner.planning.setup import Setup
from learner.planning.work import Work, microbatches, training_operations

OPTIMIZER_BYTES = 36
"""Of a parameter, read and written: its gradient twice, master weight and moments each read and written, the weight."""


@dataclass(frozen=True, slots=True)
class Training:
    """Of a step. Stage 3 sends while it computes, the others afterwards (DeepSpeed's defaults)."""

    operations: float
    overhead: float
    links: float
    optimizer: float
    microbatches: int
    overlaps: bool

    @property
    def seconds(self) -> float:
        compute = self.operations + self.overhead
        both = max(compute, self.links) if self.overlaps else compute + self.links
        return both + self.optimizer


def training(setup: Setup, assumptions: Assumptions, work: Work) -> Training:
    config, hardware, shape = setup.config, setup.hardware, setup.shape
    learner, ranks = config.learner, setup.ranks
    count = microbatches(config, work)
    peak = hardware.tflops(config.model.dtype) * 1e12 * assumptions.train_flops_share * setup.rank_share
    owned = shape.parameters / (ranks if learner.zero_stage else 1)
    bandwidth = hardware.memory_gb_per_second * 1e9 * assumptions.optimizer_bandwidth_share * setup.rank_share
    optimizer = owned * OPTIMIZER_BYTES / bandwidth
    if setup.offload == "optimizer":
        # Gradients go to the host, weights come back; the host's copies are all of its ranks' together.
        moved = owned * (4 + BYTES[config.model.dtype]) / (hardware.pcie_gb_per_second * 1e9 * assumptions.copy_share)
        sharing = min(ranks, hardware.gpus_per_node)
        updated = sharing * owned * OPTIMIZER_BYTES / (hardware.host_copy_gb_per_second * 1e9 * assumptions.copy_share)
        optimizer = moved + updated
    return Training(
        operations=training_operations(config, shape, work) / (ranks * peak),
        overhead=count * hardware.microbatch_seconds,
        links=_links(setup, assumptions, count),
        optimizer=learner.minibatches_per_step * optimizer,
        microbatches=count,
        overlaps=learner.zero_stage == 3,
    )


def link_rate(setup: Setup, assumptions: Assumptions, members: int) -> float:
    """Bytes a second that one of `members` devices sends in a collective."""
    hardware = setup.hardware
    if not setup.on_gpu:
        return hardware.host_copy_gb_per_second * 1e9 * assumptions.copy_share
    inside = members <= hardware.gpus_per_node
    return (
        (hardware.nvlink_gb_per_second if inside else hardware.network_gb_per_second)
        * 1e9
        * assumptions.collective_share
    )


def _links(setup: Setup, assumptions: Assumptions, count: int) -> float:
    """What a rank sends of gradients and weights: `(n - 1) / n` of them in each gathering or reduction."""
    config, ranks = setup.config, setup.ranks
    if ranks == 1:
        return 0.0
    learner, size = config.learner, BYTES[config.model.dtype]
    summed = max(size, BYTES[learner.grad_accum_dtype])
    updates = learner.minibatches_per_step
    sent = {
        # An all-reduce reduces and gathers.
        0: updates * 2 * summed,
        1: updates * (2 * summed + size),
        2: count * summed + updates * size,
        3: count * (2 * size + summed),
    }[learner.zero_stage]
    return setup.shape.parameters * sent * (ranks - 1) / ranks / link_rate(setup, assumptions, ranks)
