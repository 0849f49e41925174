"""Memory by part: of a learner rank and of a replica. Every figure is in bytes.

Training state is what DeepSpeed 0.19.8 holds, counted in its engine (`tests/integration`); its buffers have the sizes
of its defaults, which the learner does not change.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from common.config.run import SENTINEL_STEPS, RunConfig
from learner.planning.shape import ModelShape

GIB = 1024**3
BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
Offload = Literal["none", "optimizer"]

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's `reduce_bucket_size`."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: what a rank of stage 3 holds whole at a time."""
LOGIT_BYTES = 12
"""Of a logit in float32 with its softmax and its gradient."""
CHECKPOINT_COPIES: Mapping[str, int] = {"float32": 4, "bfloat16": 7}
"""A checkpoint in copies of the weights: themselves, and in float32 their master copy and AdamW's two moments."""

ENGINE_GIB = 1.5
"""Assumed: what CUDA, NCCL and CUDA graphs take of a GPU, in an engine and in a learner rank."""
PREFILL_TOKENS = 8192
"""vLLM's default for the tokens of one engine step."""
LOGIT_COPIES = 4
"""Float32 arrays over the vocabulary that an engine step holds at a time, for each response: the logits, the monitor's
log-probs of this step and the last, and what is sampled from."""


@dataclass(frozen=True, slots=True)
class LearnerMemory:
    """Of one rank. `host`: what is kept in the host's memory instead.

    `activations`, `logits` are needed in the backward pass, `step` in the optimizer's step: never both.
    """

    weights: float
    master_weights: float
    gradients: float
    moments: float
    buffers: float
    activations: float
    logits: float
    step: float
    reference: float
    host: float

    @property
    def state(self) -> float:
        """What is there all the time."""
        return self.weights + self.master_weights + self.gradients + self.moments + self.buffers + self.reference

    @property
    def total(self) -> float:
        return self.state + max(self.activations + self.logits, self.step)

    def parts(self) -> dict[str, float]:
        """By name, those that are not 0."""
        named = {
            "weights": self.weights,
            "master weights": self.master_weights,
            "gradients": self.gradients,
            "AdamW moments": self.moments,
            "communication buffers": self.buffers,
            "reference policy": self.reference,
            "activations of a micro-batch": self.activations,
            "logits of a micro-batch": self.logits,
            "optimizer step": self.step,
        }
        return {name: size for name, size in named.items() if size}


def learner_memory(
    config: RunConfig, shape: ModelShape, *, on_gpu: bool = True, offload: Offload = "none"
) -> LearnerMemory:
    """What a rank holds at its peak, at most. On a CPU a buffer takes only as much as is ever written to it."""
    learner, size, parameters = config.learner, BYTES[config.model.dtype], shape.parameters
    stage, share = learner.zero_stage, parameters / learner.ranks
    owned = share if stage else parameters
    master = 4 * owned if stage else 0.0
    moments = 8 * owned
    gradients = _gradients(config, shape)
    # AdamW's square root and quotient, and the gradients in one piece.
    step = (8 + (4 if stage in (1, 2) else 0)) * owned
    host = 0.0
    if offload == "optimizer":
        host = master + moments + 4 * owned
        master = moments = step = 0.0
    tokens = learner.tokens_per_microbatch
    return LearnerMemory(
        weights=size * (share if stage == 3 else parameters),
        master_weights=master,
        gradients=gradients,
        moments=moments,
        buffers=_buffers(config, parameters, on_gpu),
        activations=tokens * activation_bytes(shape, size, learner.gradient_checkpointing),
        logits=float(tokens * shape.vocabulary * LOGIT_BYTES),
        step=step,
        reference=float(size * parameters) if learner.objective.kl_coefficient > 0.0 else 0.0,
        host=host,
    )


def _gradients(config: RunConfig, shape: ModelShape) -> float:
    """In stages 0 and 1 of all parameters. Stage 1 with a float32 sum keeps the bfloat16 ones until the step, too."""
    learner, size = config.learner, BYTES[config.model.dtype]
    summed = 4 if config.model.dtype == "float32" else BYTES[learner.grad_accum_dtype]
    if learner.zero_stage >= 2:
        return summed * shape.parameters / learner.ranks
    own = size if learner.zero_stage == 1 and summed > size else 0
    return float((summed + own) * shape.parameters)


def _buffers(config: RunConfig, parameters: int, on_gpu: bool) -> float:
    """What gradients are gathered in on their way, and in stage 3 the parameters that are whole for the moment."""
    learner, size = config.learner, BYTES[config.model.dtype]
    summed = max(size, BYTES[learner.grad_accum_dtype])
    whole = learner.zero_stage == 0 or (learner.zero_stage == 1 and summed > size)
    if whole:
        # A copy of what is reduced at a time, where there is somebody to reduce with.
        return float(min(parameters, BUCKET_ELEMENTS) * summed) if learner.ranks > 1 else 0.0
    elements = BUCKET_ELEMENTS if on_gpu else min(parameters, BUCKET_ELEMENTS)
    if learner.zero_stage < 3:
        return float(elements * size)
    return float(elements * summed + min(parameters, LIVE_PARAMETERS) * size)


def activation_bytes(shape: ModelShape, size: int, checkpointing: bool) -> float:
    """Of one token: what all layers keep for the backward pass, and one layer's again while it is passed."""
    layer = layer_activation_bytes(shape, size)
    kept = size * shape.hidden if checkpointing else layer
    return shape.layers * kept + layer


def layer_activation_bytes(shape: ModelShape, size: int) -> float:
    """What one layer keeps of one token for the backward pass, with fused attention, in transformers' own layers.

    Both norms keep their input in float32, what they multiply and their output; attention its queries, keys, values
    and output; the gated MLP four times its width. `tests/unit` counts what autograd saves.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (4 + 2 * size) * shape.hidden
    head_norms = (4 + size) * (queries + keys) if shape.norms_heads else 0
    attention = size * 2 * (queries + keys)
    return norms + head_norms + attention + 4 * size * shape.intermediate


@dataclass(frozen=True, slots=True)
class ReplicaMemory:
    """Of one GPU of a replica, or of a replica on CPUs. `cache`: what is left for keys and values.

    `blocks`: that the whole replica's cache has, of `block_size` tokens; `responses`: of the longest prompt and
    response, that fit at a time.
    """

    weights: float
    workspace: float
    cache: float
    blocks: int
    block_size: int
    responses: int

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    def holds(self, tokens: float) -> int:
        """How many responses of `tokens` tokens, prompts included."""
        return self.blocks // math.ceil(tokens / self.block_size)

    def parts(self) -> dict[str, float]:
        named = {"weights": self.weights, "workspace": self.workspace, "KV cache": self.cache}
        return {name: size for name, size in named.items() if size or name == "KV cache"}


def replica_memory(
    config: RunConfig, shape: ModelShape, memory: float | None, *, tensor_parallel: int = 1, workspace: float = 0.0
) -> ReplicaMemory:
    """`memory`: of one GPU, None on CPUs. `workspace`: what an engine needs beside weights and cache, on one GPU."""
    engine, size = config.rollout.engine, BYTES[config.model.dtype]
    weights = shape.parameters * size / tensor_parallel
    if memory is None:
        cache = float(engine.kv_cache_gib * GIB)
    else:
        cache = max(memory * engine.gpu_memory_utilization - weights - workspace, 0.0)
    # More GPUs than heads of keys and values: each head is on several of them.
    sharing = min(tensor_parallel, shape.kv_heads)
    block = shape.kv_bytes_per_token(size) / sharing * engine.block_size
    blocks = int(cache // block) if engine.num_gpu_blocks_override is None else engine.num_gpu_blocks_override
    longest = math.ceil(longest_response(config) / engine.block_size)
    return ReplicaMemory(weights, workspace, cache, blocks, engine.block_size, blocks // longest)


def engine_workspace(
    config: RunConfig, shape: ModelShape, *, tensor_parallel: int = 1, base: float = ENGINE_GIB
) -> float:
    """What an engine takes of a GPU beside weights and cache: a prefill's MLP and the arrays over the vocabulary."""
    layer = 3 * shape.intermediate / tensor_parallel + 4 * shape.hidden
    prefill = PREFILL_TOKENS * layer * BYTES[config.model.dtype]
    logits = config.rollout.engine.max_concurrent_responses * shape.vocabulary * 4 * LOGIT_COPIES
    return base * GIB + prefill + logits


def longest_response(config: RunConfig) -> int:
    """Tokens of the longest prompt and response, with the sentinel's step."""
    return config.rollout.max_prompt_tokens + config.rollout.max_response_tokens + SENTINEL_STEPS


def gib(size: float) -> str:
    """For people: 0.12 GiB, 5.10 GiB, 24 GiB."""
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:,.0f} GiB"
