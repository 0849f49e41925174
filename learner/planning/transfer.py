"""Seconds of weight syncs, by transport, and of checkpoints."""

from dataclasses import dataclass

from learner.planning.assumptions import Assumptions
from learner.planning.memory import BYTES, CHECKPOINT_COPIES
from learner.planning.setup import Setup
from learner.planning.training import link_rate


@dataclass(frozen=True, slots=True)
class Sync:
    """From the learner to all replicas. `gather`: of stage 3's parts; `send`, `load`: of one copy, at a time or not."""

    bytes: float
    gather: float
    send: float
    load: float
    latency: float
    streams: bool

    @property
    def seconds(self) -> float:
        both = max(self.send, self.load) if self.streams else self.send + self.load
        return self.gather + both + self.latency


def sync(setup: Setup, assumptions: Assumptions) -> Sync:
    """`host` and `disk`: the file is whole before a replica reads it. The others load while they receive."""
    hardware, copies = setup.hardware, assumptions.copy_share
    size = float(setup.shape.parameters * BYTES[setup.config.model.dtype])
    gather = 0.0
    if setup.config.learner.zero_stage == 3 and setup.ranks > 1:
        gather = size * (setup.ranks - 1) / setup.ranks / link_rate(setup, assumptions, setup.ranks)
    pcie = hardware.pcie_gb_per_second * 1e9 * copies
    host = hardware.host_copy_gb_per_second * 1e9 * copies
    out = min(pcie, host) if setup.on_gpu else host
    load = size / (hardware.load_gb_per_second * 1e9)
    network = hardware.network_gb_per_second * 1e9 if setup.nodes > 1 else host / assumptions.gloo_share
    streams = setup.transport in ("gloo", "nccl", "ipc")
    if setup.transport == "host":
        send = size / out
    elif setup.transport == "disk":
        # A node reads a file once; its other replicas find it in the page cache.
        write = size / min(out, hardware.disk_write_gb_per_second * 1e9)
        send = write + size * setup.replica_nodes / (hardware.disk_read_gb_per_second * 1e9)
    elif setup.transport == "gloo":
        send = size / min(out, network * assumptions.gloo_share)
    elif setup.transport == "nccl":
        send, load = size / link_rate(setup, assumptions, setup.devices), 0.0
    else:
        send, load = size / (hardware.memory_gb_per_second * 1e9 * copies), 0.0
    return Sync(size, gather, send, load, assumptions.sync_latency_seconds, streams)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`write`: by all ranks together; `digest`: by the driver's node, which reads what was written."""

    bytes: float
    write: float
    digest: float

    @property
    def seconds(self) -> float:
        return self.write + self.digest


def checkpoint(setup: Setup) -> Checkpoint:
    hardware, dtype = setup.hardware, setup.config.model.dtype
    size = float(setup.shape.parameters * BYTES[dtype] * CHECKPOINT_COPIES[dtype])
    links = setup.ranks * hardware.pcie_gb_per_second if setup.on_gpu else hardware.host_copy_gb_per_second
    rate = min(hardware.disk_write_gb_per_second, links) * 1e9
    digest = min(hardware.digest_gb_per_second, hardware.disk_read_gb_per_second) * 1e9
    return Checkpoint(size, size / rate, size / digest)
