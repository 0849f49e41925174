"""What the driver expects of the rollout side, so that `learner` need not import `rollout_server`.

The driver loads the implementation by name (`ROLLOUTS`).
"""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from common.config.run import RunConfig
from common.packed import PackedResponse
from common.trajectory import ResponseRequest
from common.weights import SyncReport, WeightUpdate

ROLLOUTS = "rollout_server.replicas.rollouts:PoolRollouts"


class Rollouts(Protocol):
    """A pool of replicas that generates groups and receives weights. Every call has a deadline.

    A replica that is lost is restarted, and its responses go on from their last judged segments.
    """

    async def start(self, config: RunConfig, log_directory: Path) -> None:
        """Start the replicas of `config.rollout.engine` in the Ray cluster that is already connected."""
        ...

    def generate(self, groups: Sequence[Sequence[ResponseRequest]]) -> AsyncIterator[PackedResponse]:
        """Generate all responses of all groups; each is yielded as it finishes, in any order, with its text.

        Many calls may be under way. Raises only if responses cannot be generated any more: no replica is left.
        """
        ...

    async def sync(self, update: WeightUpdate, deadline_seconds: float) -> SyncReport:
        """Load `update` into every replica; `sync.in_flight` says what becomes of responses under way.

        A replica that does not then report the update's checksum serves nothing until it does. Raises if none does.
        """
        ...

    def take_counts(self) -> dict[str, int]:
        """Metrics by the names of `common.metrics`: what was counted since the last call."""
        ...

    async def state(self) -> list[Any]:
        """What replicas have learnt of the thresholds, as JSON-able values, for a checkpoint."""
        ...

    async def restore(self, state: list[Any]) -> None:
        """Take over what `state` gave; an empty list changes nothing."""
        ...

    async def close(self) -> None:
        """Stop the replicas; no error if some are dead already."""
        ...
