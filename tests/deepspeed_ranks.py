"""Learner ranks as plain processes, without Ray: what one of them does, for `multiprocessing`."""

from pathlib import Path
from typing import Any

from common.config.run import RunConfig


def gradient_norms(rank: int, world_size: int, port: int, configs: list[RunConfig], groups: Any, log: str) -> Any:
    """The gradient's norm of one minibatch under each configuration, the ranks' processes being the same."""
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
    norms = []
    for config in configs:
        learner = LearnerRank(config, rank, str(Path(log)))
        learner.start(environment)
        (samples,) = split_minibatches(groups, config.learner.advantage, 1, config.seed, 0)
        batches = rank_batches(samples, world_size, config.learner.tokens_per_microbatch)
        (result,) = learner.train([batches[rank]])
        norms.append(result.gradient_norm)
    torch.distributed.destroy_process_group()
    return norms
