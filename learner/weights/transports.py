"""The publisher of each transport."""

from pathlib import Path

from common.config.run import SyncConfig
from learner.weights.disk import DiskPublisher
from learner.weights.gloo import GlooPublisher, address_of
from learner.weights.host import HostPublisher
from learner.weights.ipc import ipc_publisher
from learner.weights.nccl import nccl_publisher
from learner.weights.publisher import Publisher


def publisher(config: SyncConfig, replicas: int, address: str) -> Publisher:
    """For learner rank 0, which is on the machine with this address, if no interface is named."""
    match config.transport:
        case "host":
            return HostPublisher()
        case "disk":
            assert config.directory is not None
            return DiskPublisher(Path(config.directory))
        case "gloo":
            if config.network_interface is not None:
                address = address_of(config.network_interface)
            return GlooPublisher(address, replicas, config.packed_bytes, config.deadline_seconds)
        case "nccl":
            if config.network_interface is not None:
                address = address_of(config.network_interface)
            return nccl_publisher(address, replicas, config.packed_bytes, config.deadline_seconds)
        case "ipc":
            return ipc_publisher(replicas, config.packed_bytes, config.deadline_seconds)
