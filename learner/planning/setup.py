"""Where a run's parts are: devices, nodes and the choices that time and memory depend on."""

import math
from dataclasses import dataclass
from typing import Literal

from common.config import RunConfig
from common.config.run import InFlight
from learner.planning.hardware import Hardware
from learner.planning.memory import Offload
from learner.planning.shape import ModelShape
from learner.run.errors import InputError

Transport = Literal["host", "disk", "gloo", "nccl", "ipc"]


@dataclass(frozen=True, slots=True)
class Setup:
    """A run on a kind of machine. `max_staleness`: 0 is the synchronous loop."""

    config: RunConfig
    shape: ModelShape
    hardware: Hardware
    tensor_parallel: int = 1
    transport: Transport = "host"
    max_staleness: int = 0
    in_flight: InFlight = "recompute"
    offload: Offload = "none"

    @property
    def replicas(self) -> int:
        return self.config.rollout.engine.replicas

    @property
    def ranks(self) -> int:
        return self.config.learner.ranks

    @property
    def on_gpu(self) -> bool:
        return self.hardware.device == "gpu"

    @property
    def devices(self) -> int:
        return self.replicas * self.tensor_parallel + self.ranks

    @property
    def nodes(self) -> int:
        """Replicas and ranks fill nodes of their own if they need more than one. CPUs: one machine."""
        if not self.on_gpu or self.devices <= self.hardware.gpus_per_node:
            return 1
        return self.replica_nodes + math.ceil(self.ranks / self.hardware.gpus_per_node)

    @property
    def replica_nodes(self) -> int:
        each = self.hardware.gpus_per_node // self.tensor_parallel if self.on_gpu else self.replicas
        return math.ceil(self.replicas / max(each, 1))

    @property
    def is_synchronous(self) -> bool:
        return self.max_staleness == 0

    @property
    def rank_share(self) -> float:
        """Of a device that a rank has: a whole GPU, or as many of the cores as it has threads."""
        return 1.0 if self.on_gpu else self._core_share(self.config.learner.threads_per_rank)

    @property
    def replica_share(self) -> float:
        threads = self.config.rollout.engine.threads or max(self.hardware.cores // self.replicas, 1)
        return 1.0 if self.on_gpu else self._core_share(threads)

    def _core_share(self, threads: int) -> float:
        """Parts that work at a time share the cores: all of them in an asynchronous run, else those of one side."""
        engine, learner, cores = self.config.rollout.engine, self.config.learner, self.hardware.cores
        rollout = self.replicas * (engine.threads or max(cores // self.replicas, 1))
        train = learner.ranks * learner.threads_per_rank
        busy = max(rollout, train) if self.is_synchronous else rollout + train
        return threads / cores * min(1.0, cores / busy)


def check_setup(setup: Setup) -> None:
    """Raise InputError for what no machine of this kind can do, with the arithmetic."""
    parallel, shape, hardware = setup.tensor_parallel, setup.shape, setup.hardware
    if shape.heads % parallel:
        raise InputError(
            f"tensor parallelism {parallel} does not divide the model's {shape.heads} attention heads "
            f"({shape.heads} / {parallel} = {shape.heads / parallel:g})"
        )
    if max(parallel, shape.kv_heads) % min(parallel, shape.kv_heads):
        raise InputError(
            f"tensor parallelism {parallel} and the model's {shape.kv_heads} heads of keys and values do not divide "
            "each other"
        )
    if setup.on_gpu and parallel > hardware.gpus_per_node:
        raise InputError(
            f"a replica of {parallel} GPUs does not fit into a node of {hardware.gpus_per_node} "
            f"({parallel} > gpus_per_node): lower the tensor parallelism to {hardware.gpus_per_node} or less"
        )
    if setup.transport in ("nccl", "ipc") and not setup.on_gpu:
        raise InputError(f"transport {setup.transport} needs GPUs, {hardware.name} has none: use host, disk or gloo")


def problems(setup: Setup) -> list[str]:
    """What keeps this run from being started, but not from being planned."""
    found, hardware = [], setup.hardware
    if setup.transport in ("host", "ipc") and setup.nodes > 1:
        found.append(
            f"transport {setup.transport} reaches one node, and {setup.devices} GPUs = {setup.replicas} replica(s) x "
            f"{setup.tensor_parallel} + {setup.ranks} rank(s) take {setup.nodes} of {hardware.gpus_per_node}: use "
            "nccl, gloo or disk"
        )
    return found
