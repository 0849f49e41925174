"""The publisher of each transport."""

from pathlib import Path

from common.config.run import SyncConfig
from learner.weights.disk import DiskPublisher
from learner.weights.host import HostPublisher
from learner.weights.publisher import Publisher


def publisher(config: SyncConfig) -> Publisher:
    """For learner rank 0."""
    if config.transport == "disk":
        assert config.directory is not None
        return DiskPublisher(Path(config.directory))
    return HostPublisher()
