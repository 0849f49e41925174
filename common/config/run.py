"""The configuration of a training run, and the checks that need more than one of its parts."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.config.base import StrictModel, Temperature
from common.config.data import (
    ChainData,
    ChainReward,
    Data,
    ErasureTreatment,
    GroupShare,
    ReasoningGymData,
    ReasoningGymReward,
    Reward,
    ShareAdaptive,
    Treatment,
)
from common.config.erasure import DelimiterSegmentation, ErasurePolicy
from common.config.off_policy import NO_IMPORTANCE_SAMPLING, ImportanceSampling, OldLogprobs

SENTINEL_STEPS = 1
"""Engine steps that a response costs beyond its tokens: the last segment is judged one step after its end."""


class ModelConfig(StrictModel):
    """The policy. `path`: a Hugging Face directory or hub name.

    `warm_start`: make the demo's model at `path` first, if it is not there. `sentinel_ids`: two token ids that
    responses never hold; null finds them (`common.sentinels`): embedding rows that no token has, else special tokens
    that nothing uses.
    """

    path: str
    revision: str | None = None
    warm_start: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_length: int = Field(ge=16, description="Prompt and response together, in tokens.")
    sentinel_ids: tuple[int, int] | None = None
    trust_remote_code: bool = False


class EngineConfig(StrictModel):
    """One vLLM replica, on `tensor_parallel_size` GPUs or on CPUs.

    `kv_cache_gib` is used on CPU, `gpu_memory_utilization` on GPUs.
    """

    replicas: int = Field(default=1, ge=1, le=1024)
    tensor_parallel_size: int = Field(default=1, ge=1, le=64, description="GPUs of a replica; processes on CPU.")
    max_concurrent_responses: int = Field(default=64, ge=1, le=8192)
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of a replica; null: OMP_NUM_THREADS, else the cores, shared."
    )
    kv_cache_gib: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    block_size: int = Field(default=32, ge=8, description="Tokens in a KV block; a multiple of 32 on CPU.")
    enforce_eager: bool = True
    num_gpu_blocks_override: int | None = Field(default=None, ge=2)
    start_seconds: float = Field(default=600.0, gt=0.0, description="Deadline for a replica to start.")
    max_restarts: int = Field(
        default=5, ge=0, le=1000, description="Starts in a row that may fail before a lost replica is given up."
    )
    stall_seconds: float = Field(
        default=180.0,
        gt=0.0,
        description="A replica whose engine makes no step for so long, though it has responses, is restarted.",
    )
    response_seconds: float = Field(
        default=600.0,
        gt=0.0,
        description="A replica that finishes none of its responses for so long is restarted; waiting for a place "
        "does not count.",
    )
    log_stats: bool = Field(default=False, description="Keep vLLM's own Prometheus metrics in the engine's process.")

    @property
    def gpus(self) -> int:
        """GPUs of all replicas, where there are any."""
        return self.replicas * self.tensor_parallel_size

    @property
    def silence_seconds(self) -> float:
        """How long no response may arrive from a pool that works: a stuck replica is noticed, and restarts may fail."""
        return self.response_seconds + max(self.max_restarts, 1) * self.start_seconds


StopString = Annotated[str, Field(min_length=1, max_length=1024)]


class RolloutConfig(StrictModel):
    """What is generated in a step, and how.

    `stop`: strings that end a response, in training and in evaluations. They are found in committed text; the response
    ends with the token that completes one, and its text before it.
    """

    groups_per_step: int = Field(default=8, ge=1)
    responses_per_group: int = Field(default=8, ge=2)
    max_prompt_tokens: int = Field(ge=1)
    max_response_tokens: int = Field(ge=1)
    temperature: Temperature = Field(default=1.0, gt=0.0)
    stop: tuple[StopString, ...] = Field(default=(), max_length=64)
    group_share: GroupShare = ShareAdaptive()
    treatment: Treatment = ErasureTreatment()
    erasure: ErasurePolicy = ErasurePolicy()
    engine: EngineConfig = EngineConfig()


class UniformCredit(StrictModel):
    """Every segment carries the response's advantage: GRPO's credit."""

    kind: Literal["uniform"] = "uniform"


class UncertaintyCredit(StrictModel):
    """Segments that were more uncertain carry more of the reward. Form: ours (`algorithm.md`, section 6).

    N*omega_n = clip((U_n + offset) / (U_mean + offset), low, high), rescaled to token mean 1 over the group.
    """

    kind: Literal["uncertainty"] = "uncertainty"
    offset: float = Field(default=0.1, gt=0.0, le=100.0)
    low: float = Field(default=0.25, gt=0.0, le=1.0)
    high: float = Field(default=4.0, ge=1.0, le=1000.0)


Credit = Annotated[UniformCredit | UncertaintyCredit, Field(discriminator="kind")]


class ClippedObjective(StrictModel):
    """PPO's clipped surrogate on the token's importance ratio, as in GRPO.

    `aggregation`: `token_mean` averages over all response tokens of a minibatch, `sequence_mean` over the tokens of
    each response and then over responses. `kl_coefficient` > 0 adds the k3 estimate of the KL to the start policy.
    """

    kind: Literal["clipped"] = "clipped"
    clip_low: float = Field(default=0.2, gt=0.0, lt=1.0)
    clip_high: float = Field(default=0.2, gt=0.0, le=10.0)
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    kl_coefficient: float = Field(default=0.0, ge=0.0, le=10.0)


class AdvantageConfig(StrictModel):
    """How rewards become advantages. `erased_weight` > 0 adds erased attempts as negatives on their own prefix."""

    credit: Credit = UncertaintyCredit()
    normalise: Literal["sequence", "segment"] = "sequence"
    epsilon: float = Field(default=1e-4, gt=0.0)
    erased_weight: float = Field(default=0.0, ge=0.0, le=10.0)


class NoOverlong(StrictModel):
    """Responses that reach the token limit are learnt from like others."""

    mode: Literal["none"] = "none"


class MaskOverlong(StrictModel):
    """Responses that were cut off at the limit count in their group's baseline and carry no loss. Source: DAPO."""

    mode: Literal["mask"] = "mask"


class ShapeOverlong(StrictModel):
    """Rewards fall linearly over the last `buffer_tokens` before the limit, by `penalty` at the limit. Source: DAPO."""

    mode: Literal["shape"] = "shape"
    buffer_tokens: int = Field(ge=1)
    penalty: float = Field(default=1.0, gt=0.0, le=1e6)


Overlong = Annotated[NoOverlong | MaskOverlong | ShapeOverlong, Field(discriminator="mode")]


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(StrictModel):
    """AdamW with linear warm-up, then a schedule over the run's optimizer steps."""

    learning_rate: float = Field(default=1e-6, ge=0.0, le=1.0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    warmup_steps: int = Field(default=5, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_gradient_norm: float = Field(default=1.0, gt=0.0)


class LearnerConfig(StrictModel):
    """The DeepSpeed learner. `minibatches_per_step`: optimizer steps a rollout is split into.

    `grad_accum_dtype`: what the gradients of micro-batches are summed in; in bfloat16 small ones are lost in the sum.
    `old_logprobs`: what the importance ratio is taken against, by default `recomputed` with `importance_sampling` and
    `behaviour` without.
    """

    ranks: int = Field(default=1, ge=1, le=4096)
    zero_stage: Literal[0, 1, 2, 3] = 2
    threads_per_rank: int = Field(default=1, ge=1)
    minibatches_per_step: int = Field(default=2, ge=1)
    tokens_per_microbatch: int = Field(default=8192, ge=1, description="Padded tokens of one forward pass, one rank.")
    gradient_checkpointing: bool = False
    grad_accum_dtype: Literal["float32", "bfloat16"] = "float32"
    optimizer: OptimizerConfig = OptimizerConfig()
    objective: ClippedObjective = ClippedObjective()
    old_logprobs: OldLogprobs = "behaviour"
    importance_sampling: ImportanceSampling = NO_IMPORTANCE_SAMPLING
    advantage: AdvantageConfig = AdvantageConfig()
    overlong: Overlong = NoOverlong()
    step_seconds: float = Field(default=3600.0, gt=0.0, description="Deadline for one training step.")
    max_restarts_in_a_row: int = Field(
        default=3, ge=0, description="Restarts of all ranks after one was lost, until a step is finished again."
    )

    @model_validator(mode="before")
    @classmethod
    def _weights_have_a_default(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "old_logprobs" in given:
            return given
        sampling = given.get("importance_sampling")
        kind = sampling.get("kind") if isinstance(sampling, dict) else getattr(sampling, "kind", None)
        return given | {"old_logprobs": "recomputed"} if kind in ("token", "sequence") else given

    @model_validator(mode="after")
    def _weights_differ_from_one(self) -> "LearnerConfig":
        if self.importance_sampling.kind != "none" and self.old_logprobs == "behaviour":
            raise ValueError(
                f"importance_sampling {self.importance_sampling.kind!r} needs old_logprobs: recomputed: a weight is "
                "old over behaviour, so with old_logprobs: behaviour all of them are 1 (the ratio itself corrects then)"
            )
        return self


InFlight = Literal["keep", "recompute", "wait", "abort"]
DEFAULT_BUCKET_BYTES = 64 * 2**20


class SyncConfig(StrictModel):
    """How replicas get new weights.

    `transport`: `host` is a file in shared memory, for replicas on the learner's machine; `disk` a file in `directory`,
    which every machine must see under this path; `gloo` a broadcast over the network in buckets of `bucket_bytes`,
    64 MiB by default; `nccl` one from GPU to GPU, `ipc` memory of one GPU (neither has run on a GPU).
    `network_interface`: of learner rank 0's machine, over which it sends; by default the one of the address by which
    Ray knows the machine. `deadline_seconds`: for gathering and for loading, each.
    `in_flight`: what becomes of responses that are under way. `recompute` goes on with them, and computes their KV
    cache anew under the new weights; `keep` goes on with the old KV cache; `wait` lets them finish first, within the
    deadline, and admits no others; `abort` ends them, and makes each again from its beginning. Every token carries the
    version that sampled it.
    """

    transport: Literal["host", "disk", "gloo", "nccl", "ipc"] = "host"
    directory: str | None = Field(default=None, min_length=1, description="For transport `disk`: a shared directory.")
    bucket_bytes: int | None = Field(default=None, ge=2**16, le=2**32, description="For transports that send.")
    network_interface: str | None = Field(default=None, min_length=1, description="For transports that send.")
    deadline_seconds: float = Field(default=120.0, gt=0.0)
    in_flight: InFlight = "recompute"

    @property
    def packed_bytes(self) -> int:
        """The size of a bucket."""
        return self.bucket_bytes or DEFAULT_BUCKET_BYTES

    @model_validator(mode="after")
    def _settings_fit(self) -> "SyncConfig":
        if self.transport == "disk" and self.directory is None:
            raise ValueError("transport 'disk' needs directory: one that the learner's and every replica's machine see")
        for name, transports in (
            ("directory", ("disk",)),
            ("bucket_bytes", ("gloo", "nccl", "ipc")),
            ("network_interface", ("gloo", "nccl")),
        ):
            if getattr(self, name) is not None and self.transport not in transports:
                raise ValueError(f"{name} is for transport {', '.join(transports)}, not for {self.transport!r}")
        return self


class EvaluationConfig(StrictModel):
    """Avg@k and Pass@k on held-out problems, before and after training, and every `every_steps` steps (0: never).

    `success_threshold`: a response succeeds if its reward is at least this, in evaluations and for
    `rollout.group_share` alike.
    """

    problems: int = Field(default=64, ge=1)
    responses_per_problem: int = Field(default=4, ge=1)
    every_steps: int = Field(default=0, ge=0)
    success_threshold: float = 0.5
    seed: int = 1


class WarningsConfig(StrictModel):
    """Thresholds of a step's metrics, past which the run says so and goes on. Null: never.

    Above `truncated_share` (of responses that were cut off) and `repeated_share` (of their text); below `entropy` (of
    the policy, in nats) and `reward_spread` (standard deviation of a group's rewards). Above `drop_bias`: by how much
    more of the responses that took something back are dropped as too old than of the others.
    """

    truncated_share: float | None = Field(default=0.5, ge=0.0, le=1.0)
    repeated_share: float | None = Field(default=0.5, ge=0.0, le=1.0)
    entropy: float | None = Field(default=0.01, ge=0.0)
    reward_spread: float | None = Field(default=0.001, ge=0.0)
    drop_bias: float | None = Field(default=0.1, ge=0.0, le=1.0)


class CheckpointConfig(StrictModel):
    """`every_steps`: 0 writes only at the end and on interruption. `keep`: newest of these that are kept.

    `latest`: the last finished step is always on disk, too. It is written while the next one generates, and replaces
    the one before, so that a run that is killed at any moment loses the step that was under way and no other.
    """

    every_steps: int = Field(default=10, ge=0)
    keep: int = Field(default=2, ge=1)
    latest: bool = True


class RunConfig(StrictModel):
    """A whole training run. `preset` changes defaults only; what the file or `--set` says wins over it.

    `max_staleness`: how many versions of the policy a response may be older than the one that it changes. 0: generation
    and training take turns. From 1 on responses are generated while others are trained on.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)
    preset: Literal["e3rl", "paper", "pretrained", "grpo", "temperature_control"] = "e3rl"
    runs_directory: str = "runs"
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(ge=1)
    token_budget: int | None = Field(
        default=None, ge=1, description="Stop once this many tokens have been generated for training."
    )
    max_staleness: int = Field(default=0, ge=0, le=64)
    model: ModelConfig
    data: Data = ChainData()
    reward: Reward = ChainReward()
    rollout: RolloutConfig
    learner: LearnerConfig = LearnerConfig()
    sync: SyncConfig = SyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    warnings: WarningsConfig = WarningsConfig()

    @property
    def responses_per_step(self) -> int:
        return self.rollout.groups_per_step * self.rollout.responses_per_group

    @property
    def treated_per_group(self) -> int:
        """Responses of a group that are treated while the share applies."""
        return round(self.rollout.group_share.share * self.rollout.responses_per_group)

    @model_validator(mode="before")
    @classmethod
    def _data_brings_its_reward(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "reward" in given:
            return given
        data = given.get("data")
        source = data.get("source", data.get("kind")) if isinstance(data, dict) else getattr(data, "source", None)
        return given | {"reward": {"kind": "reasoning_gym"}} if source == "reasoning_gym" else given

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        for check in (
            _reward_fits,
            _length_fits,
            _segments_fit,
            _share_is_whole,
            _batches_fit,
            _negatives_exist,
            _precision_fits,
            _buffer_fits,
            _sender_fits,
        ):
            check(self)
        return self


def _reward_fits(config: RunConfig) -> None:
    procedural = isinstance(config.data, ReasoningGymData)
    if isinstance(config.reward, ReasoningGymReward) and not procedural:
        raise ValueError(
            f"reward.kind 'reasoning_gym' scores problems of data.kind 'reasoning_gym' only, not of "
            f"{config.data.source!r}"
        )
    if isinstance(config.reward, ChainReward) and procedural:
        raise ValueError("reward.kind 'chain' can't score problems of data.kind 'reasoning_gym': leave reward out")


def _length_fits(config: RunConfig) -> None:
    prompt, response = config.rollout.max_prompt_tokens, config.rollout.max_response_tokens
    need = prompt + response + SENTINEL_STEPS
    if need > config.model.max_length:
        raise ValueError(
            f"model.max_length ({config.model.max_length}) is less than max_prompt_tokens + max_response_tokens + "
            f"{SENTINEL_STEPS} sentinel step ({need} = {prompt} + {response} + {SENTINEL_STEPS})"
        )


def _segments_fit(config: RunConfig) -> None:
    segmentation, limit = config.rollout.erasure.segmentation, config.rollout.max_response_tokens
    length = segmentation.min_length if isinstance(segmentation, DelimiterSegmentation) else segmentation.length
    if length > limit:
        raise ValueError(f"a segment of at least {length} tokens never ends within max_response_tokens ({limit})")


def _share_is_whole(config: RunConfig) -> None:
    share, size = config.rollout.group_share.share, config.rollout.responses_per_group
    if abs(share * size - round(share * size)) > 1e-9:
        raise ValueError(
            f"group_share {share} x responses_per_group {size} = {share * size:g}, which is not a whole number"
        )


def _batches_fit(config: RunConfig) -> None:
    learner, responses = config.learner, config.responses_per_step
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if learner.tokens_per_microbatch < longest:
        raise ValueError(
            f"learner.tokens_per_microbatch ({learner.tokens_per_microbatch}) is less than the longest sequence "
            f"({longest} = {config.rollout.max_prompt_tokens} + {config.rollout.max_response_tokens})"
        )
    parts = learner.minibatches_per_step * learner.ranks
    if responses % parts:
        raise ValueError(
            f"responses per step ({responses} = {config.rollout.groups_per_step} groups x "
            f"{config.rollout.responses_per_group}) do not divide into minibatches_per_step x ranks "
            f"({parts} = {learner.minibatches_per_step} x {learner.ranks})"
        )


def _negatives_exist(config: RunConfig) -> None:
    erases = config.rollout.treatment.kind == "erasure" and config.treated_per_group > 0
    if config.learner.advantage.erased_weight > 0.0 and not erases:
        raise ValueError(
            "learner.advantage.erased_weight needs rollout.treatment 'erasure' and a group_share above 0: "
            "nothing is erased else"
        )


def _precision_fits(config: RunConfig) -> None:
    if config.model.dtype == "bfloat16" and config.learner.zero_stage == 0:
        raise ValueError("learner.zero_stage 0 trains in float32 only; model.dtype 'bfloat16' needs stage 1, 2 or 3")
    if config.model.dtype == "float32" and config.learner.grad_accum_dtype == "bfloat16":
        raise ValueError("learner.grad_accum_dtype 'bfloat16' needs model.dtype 'bfloat16': gradients are float32 else")


def _buffer_fits(config: RunConfig) -> None:
    overlong, limit = config.learner.overlong, config.rollout.max_response_tokens
    if isinstance(overlong, ShapeOverlong) and overlong.buffer_tokens > limit:
        raise ValueError(
            f"learner.overlong.buffer_tokens ({overlong.buffer_tokens}) exceeds max_response_tokens ({limit})"
        )


def _sender_fits(config: RunConfig) -> None:
    if config.sync.transport == "ipc" and config.learner.ranks > 1:
        raise ValueError(
            f"sync.transport 'ipc' sends from one rank, and learner.ranks is {config.learner.ranks}: vLLM's sender "
            "gathers handles from all of them"
        )
