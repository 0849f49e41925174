"""What a run will need of memory, by part, and what this machine has: estimates, to be read before a run starts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from common.config.run import SENTINEL_STEPS, RunConfig
from learner.policy.model_directory import read_header

GIB = 1024**3
DRIVER_GIB = 1.0
"""Measured on CPUs: the driver, with Ray's processes beside it."""
REPLICA_GIB, RANK_GIB = 0.7, 0.6
"""Measured on CPUs: what a replica and a rank take beyond weights, KV cache and training state."""
ACTIVATIONS_PER_LAYER = 17
"""Numbers kept for the backward pass, per token, layer and hidden unit, with fused attention.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 2, without
its attention scores.
"""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model decides over memory."""

    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    kv_heads: int
    head_dim: int


def model_shape(directory: Path, text_config: Any) -> ModelShape | None:
    """The shape of the model in a directory, by its configuration and its weight files' headers; None without them."""
    parameters = 0
    for file in directory.glob("*.safetensors"):
        tensors = (entry for name, entry in read_header(file).items() if name != "__metadata__")
        parameters += sum(math.prod(tensor["shape"]) for tensor in tensors)
    heads = getattr(text_config, "num_attention_heads", None)
    if not parameters or heads is None:
        return None
    hidden = text_config.hidden_size
    return ModelShape(
        parameters=parameters,
        layers=text_config.num_hidden_layers,
        hidden=hidden,
        vocabulary=text_config.vocab_size,
        kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(text_config, "head_dim", None) or hidden // heads,
    )


def memory_lines(config: RunConfig, shape: ModelShape, gpus: list[int]) -> Iterator[tuple[str, str]]:
    """Lines of name and value. `gpus`: the memory of each GPU of this machine, in bytes."""
    yield "parameters", f"{shape.parameters:,}"
    rank, rank_text = _rank_memory(config, shape)
    yield "memory of a learner rank", rank_text
    weights = shape.parameters * _BYTES[config.model.dtype]
    engine = config.rollout.engine
    cache = gpus[0] * engine.gpu_memory_utilization - weights if gpus else float(engine.kv_cache_gib * GIB)
    yield "memory of a replica", f"{_gib(weights)} weights + {_gib(max(cache, 0.0))} KV cache"
    yield "KV cache of a replica", _cache_text(config, shape, cache)
    copies = {"float32": 4, "bfloat16": 7}[config.model.dtype]
    yield (
        "disk for checkpoints",
        f"{_gib(copies * weights)} each, up to {config.checkpoint.keep + 2} at a time",
    )
    if gpus:
        yield "this machine", _gpu_verdict(config, rank, weights, gpus)
    else:
        yield "this machine", _ram_verdict(config, rank, weights)


def _rank_memory(config: RunConfig, shape: ModelShape) -> tuple[float, str]:
    """A rank's memory in bytes, and its parts in words."""
    learner, size = config.learner, _BYTES[config.model.dtype]
    ranks, stage = learner.ranks, learner.zero_stage
    weights = shape.parameters * size / (ranks if stage == 3 else 1)
    gradient_size = 4 if config.model.dtype == "float32" else _BYTES[learner.grad_accum_dtype]
    gradients = shape.parameters * gradient_size / (ranks if stage >= 2 else 1)
    master = 0 if config.model.dtype == "float32" else 4
    optimizer = shape.parameters * (8 + master) / (ranks if stage >= 1 else 1)
    tokens = learner.tokens_per_microbatch
    kept = 1 if learner.gradient_checkpointing else ACTIVATIONS_PER_LAYER
    activations = tokens * shape.hidden * size * (shape.layers * kept + ACTIVATIONS_PER_LAYER)
    # The logits of a response's positions, in float32, with their softmax and gradient.
    logits = tokens * shape.vocabulary * 12
    reference = shape.parameters * size if learner.objective.kl_coefficient > 0.0 else 0
    parts = [
        f"{_gib(weights)} weights",
        f"{_gib(gradients)} gradients",
        f"{_gib(optimizer)} optimizer",
        f"at most about {_gib(activations + logits)} for a micro-batch",
    ]
    if reference:
        parts.append(f"{_gib(reference)} reference policy")
    total = weights + gradients + optimizer + activations + logits + reference
    return total, f"{_gib(total)} = {' + '.join(parts)}"


def _cache_text(config: RunConfig, shape: ModelShape, cache: float) -> str:
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * _BYTES[config.model.dtype]
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens + SENTINEL_STEPS
    responses = int(max(cache, 0.0) // (token * longest))
    wanted = config.rollout.engine.max_concurrent_responses
    text = f"room for {responses:,} responses of the full length at a time, max_concurrent_responses is {wanted:,}"
    if responses >= wanted:
        return text
    return f"{text}: LESS THAN ONE" if not responses else f"{text}: long ones will be preempted and computed again"


def _ram_verdict(config: RunConfig, rank: float, weights: float) -> str:
    engine, learner = config.rollout.engine, config.learner
    replica = weights + (engine.kv_cache_gib + REPLICA_GIB) * GIB
    need = engine.replicas * replica + learner.ranks * (rank + RANK_GIB * GIB) + DRIVER_GIB * GIB
    total, free = machine_memory()
    text = (
        f"no GPU; about {_gib(need)} needed = {engine.replicas} replica(s) x {_gib(replica)} + {learner.ranks} "
        f"rank(s) x {_gib(rank + RANK_GIB * GIB)} + {_gib(DRIVER_GIB * GIB)} driver and Ray; {_gib(total)} there, "
        f"{_gib(free)} of it free"
    )
    return _with_warning(text, need > total, need > free)


def _gpu_verdict(config: RunConfig, rank: float, weights: float, gpus: list[int]) -> str:
    replicas, ranks, smallest = config.rollout.engine.replicas, config.learner.ranks, min(gpus)
    text = (
        f"{len(gpus)} GPU(s) of {_gib(smallest)} and more; {replicas} replica(s) + {ranks} rank(s) take one each, "
        f"a rank about {_gib(rank)} of it"
    )
    return _with_warning(text, replicas + ranks > len(gpus) or max(rank, weights) > smallest, False)


def _with_warning(text: str, too_small: bool, too_full: bool) -> str:
    if too_small:
        return f"{text}: THIS MACHINE IS TOO SMALL"
    return f"{text}: what runs here beside it may have to end first" if too_full else text


def machine_memory() -> tuple[float, float]:
    """This machine's memory and what is free of it, in bytes; within a container, what its limit leaves."""
    memory = psutil.virtual_memory()
    total, free = float(memory.total), float(memory.available)
    for path in _CGROUP_LIMITS:
        try:
            limit = float(path.read_text())
        except (OSError, ValueError):
            # No container, or one without a limit ("max").
            continue
        total, free = min(total, limit), min(free, limit)
    return total, free


def gpu_memory() -> list[int]:
    """The memory of each CUDA device of this machine, in bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:,.0f} GiB"
