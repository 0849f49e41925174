"""What neither the configuration nor the hardware says: shares of the peaks that are reached, lengths, the driver."""

from collections.abc import Sequence

from pydantic import ConfigDict, Field

from common.config.base import StrictModel
from learner.planning.hardware import validated
from learner.planning.memory import ENGINE_GIB


class Assumptions(StrictModel):
    """Each can be given as `--assume name=value`. Lengths that are null are the configuration's limits."""

    model_config = ConfigDict(allow_inf_nan=False)

    mean_prompt_tokens: float | None = Field(default=None, gt=0.0)
    mean_response_tokens: float | None = Field(default=None, gt=0.0)
    erased_share: float = Field(
        default=0.2, ge=0.0, lt=1.0, description="Of the tokens that erasable responses generate; metrics tell it."
    )
    signal_share: float = Field(
        default=1.0, gt=0.0, le=1.0, description="Responses that the learner runs: 1 - learner/skipped_share."
    )
    padding_share: float = Field(default=0.08, ge=0.0, lt=1.0, description="learner/padding_share, at most.")

    decode_bandwidth_share: float = Field(
        default=0.7, gt=0.0, le=1.0, description="Of the memory's bandwidth, while responses are generated."
    )
    decode_flops_share: float = Field(default=0.6, gt=0.0, le=1.0, description="Of the peak, in an engine.")
    train_flops_share: float = Field(
        default=0.3,
        gt=0.0,
        le=1.0,
        description="Of the peak, forward and backward; prime-rl reports 0.15 to 0.36 for a 4B model on 8 H200.",
    )
    collective_share: float = Field(
        default=0.7, gt=0.0, le=1.0, description="Of a link, in collectives; point to point 0.84 of NVLink is reached."
    )
    gloo_share: float = Field(default=0.25, gt=0.0, le=1.0, description="Of the network, by TCP from one process.")
    copy_share: float = Field(default=0.8, gt=0.0, le=1.0, description="Of PCIe and of copies in the host's memory.")
    optimizer_bandwidth_share: float = Field(default=0.7, gt=0.0, le=1.0, description="Of the memory's bandwidth.")

    sync_latency_seconds: float = Field(
        default=0.2, ge=0.0, description="Of a weight sync beyond its bytes: 0.1 to 0.3 s measured for 3 MB."
    )
    sync_pause_share: float = Field(
        default=1.0, ge=0.0, le=1.0, description="Of a sync, for which replicas generate nothing."
    )
    collective_latency_seconds: float = Field(default=20e-6, ge=0.0)
    reward_seconds: float | None = Field(
        default=None, ge=0.0, description="Of one core, for a response; null: 0.02, and 0.0002 for the demo's task."
    )
    driver_seconds_per_million_tokens: float = Field(
        default=5.4, ge=0.0, description="Of the driver's one thread: 5.4 s were measured with lists."
    )
    gpu_overhead_gib: float = Field(
        default=ENGINE_GIB, ge=0.0, description="CUDA, NCCL and graphs on a GPU, for an engine and for a rank."
    )
    gpu_memory_share: float = Field(
        default=0.95, gt=0.0, le=1.0, description="Of a learner's GPU that its tensors can fill before fragments do."
    )


def read_assumptions(changes: Sequence[str]) -> Assumptions:
    """`name=value` each. Raises ConfigError."""
    result: Assumptions = validated(Assumptions, {}, changes, "--assume")
    return result
