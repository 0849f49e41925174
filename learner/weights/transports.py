"""The publisher of each transport."""

from common.config.run import SyncConfig
from learner.weights.host import HostPublisher
from learner.weights.publisher import Publisher


def publisher(config: SyncConfig) -> Publisher:
    """For learner rank 0."""
    return HostPublisher()
