"""Learner ranks as plain processes, without Ray: what one of them does, for `multiprocessing`."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.run import RunConfig


@dataclass(frozen=True)
class Minibatch:
    """Of one rank. Bytes of tensors that it holds: when it was started, just before the optimizer's step, after it.

    `moments`: of AdamW's state alone; `buckets`: the size of each tensor that is larger than the model, left out above.
    """

    gradient_norm: float
    started: int
    before_step: int
    after_step: int
    moments: int
    buckets: list[int]


def held_tensors(known: dict[int, Any], largest: int) -> tuple[int, list[int]]:
    """Bytes of all tensors of this process but those in `known`, and those of `largest` bytes or more."""
    import torch

    gc.collect()
    found: dict[int, int] = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu":
            storage = value.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in found.values() if size < largest), [s for s in found.values() if s >= largest]


def known_tensors() -> dict[int, Any]:
    """Memory of this process's tensors, by address. It is kept: an address that was freed may be another's soon."""
    import torch

    gc.collect()
    tensors = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in storages}


def train_minibatches(rank: int, world_size: int, port: int, configs: list[RunConfig], groups: Any, log: str) -> Any:
    """One minibatch under each configuration, the ranks' processes being the same: a list of `Minibatch`."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed

    from learner.policy.batching import rank_batches, split_minibatches
    from learner.policy.rank import LearnerRank

    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    results = []
    for config in configs:
        known = known_tensors()
        learner = LearnerRank(config, rank, str(Path(log)))
        learner.start(environment)
        engine = learner._engine
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        # More than all of the model's state.
        largest = 32 * parameters
        started, _ = held_tensors(known, largest)
        (samples,) = split_minibatches(groups, config.learner.advantage, 1, config.seed, 0)
        batches = rank_batches(samples, world_size, config.learner.tokens_per_microbatch)
        step, before = engine.step, 0

        def counted(step: Any = step, known: dict[int, Any] = known, largest: int = largest) -> None:
            nonlocal before
            before, _ = held_tensors(known, largest)
            step()

        engine.step = counted
        (result,) = learner.train([batches[rank]])
        del engine.step
        after, buckets = held_tensors(known, largest)
        moments = sum(
            value.nbytes
            for state in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.numel() > 1
        )
        results.append(Minibatch(result.gradient_norm, started, before, after, moments, buckets))
    torch.distributed.destroy_process_group()
    return results
