"""What a run will need of memory, in lines for the dry run, and what this machine has."""

from collections.abc import Iterator
from pathlib import Path

import psutil

from common.config.run import RunConfig
from learner.planning.memory import (
    BYTES,
    CHECKPOINT_COPIES,
    GIB,
    LearnerMemory,
    ReplicaMemory,
    engine_workspace,
    gib,
    learner_memory,
    replica_memory,
)
from learner.planning.shape import ModelShape

DRIVER_GIB = 1.0
"""Measured on CPUs: the driver, with Ray's processes beside it."""
REPLICA_GIB, RANK_GIB = 0.7, 0.6
"""Measured on CPUs: what a replica and a rank take beyond weights, KV cache and training state."""
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_lines(config: RunConfig, shape: ModelShape, gpus: list[int]) -> Iterator[tuple[str, str]]:
    """Lines of name and value. `gpus`: the memory of each GPU of this machine, in bytes."""
    yield "parameters", f"{shape.parameters:,}"
    rank = learner_memory(config, shape, on_gpu=bool(gpus))
    yield "memory of a learner rank", _rank_text(rank)
    workspace = engine_workspace(config, shape) if gpus else 0.0
    replica = replica_memory(config, shape, min(gpus) if gpus else None, workspace=workspace)
    yield "memory of a replica", " + ".join(f"{gib(size)} {name}" for name, size in replica.parts().items())
    yield "KV cache of a replica", _cache_text(config, replica)
    copies = CHECKPOINT_COPIES[config.model.dtype]
    yield (
        "disk for checkpoints",
        f"{gib(copies * shape.parameters * BYTES[config.model.dtype])} each, up to {config.checkpoint.keep + 2} at a "
        "time",
    )
    if gpus:
        yield "this machine", _gpu_verdict(config, rank.total, replica.weights, gpus)
    else:
        yield "this machine", _ram_verdict(config, rank.total, replica.weights)


def _rank_text(rank: LearnerMemory) -> str:
    batch = rank.activations + rank.logits
    parts = [f"{gib(size)} {name}" for name, size in rank.parts().items() if not name.endswith(("micro-batch", "step"))]
    peak = f"at most about {gib(batch)} for a micro-batch" if batch >= rank.step else f"{gib(rank.step)} optimizer step"
    return f"{gib(rank.total)} = {' + '.join([*parts, peak])}"


def _cache_text(config: RunConfig, replica: ReplicaMemory) -> str:
    responses, wanted = replica.responses, config.rollout.engine.max_concurrent_responses
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
        f"no GPU; about {gib(need)} needed = {engine.replicas} replica(s) x {gib(replica)} + {learner.ranks} "
        f"rank(s) x {gib(rank + RANK_GIB * GIB)} + {gib(DRIVER_GIB * GIB)} driver and Ray; {gib(total)} there, "
        f"{gib(free)} of it free"
    )
    return _with_warning(text, need > total, need > free)


def _gpu_verdict(config: RunConfig, rank: float, weights: float, gpus: list[int]) -> str:
    replicas, ranks, smallest = config.rollout.engine.replicas, config.learner.ranks, min(gpus)
    parallel = config.rollout.engine.tensor_parallel_size
    each = "one each" if parallel == 1 else f"{parallel} and one each"
    text = (
        f"{len(gpus)} GPU(s) of {gib(smallest)} and more; {replicas} replica(s) + {ranks} rank(s) take {each}, "
        f"a rank about {gib(rank)} of it"
    )
    return _with_warning(text, replicas * parallel + ranks > len(gpus) or max(rank, weights) > smallest, False)


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
