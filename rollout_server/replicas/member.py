"""A replica in the pool, and what the pool knows of it."""

from dataclasses import dataclass, field

from rollout_server.replicas.replica import Replica
from rollout_server.replicas.use import EngineUse


@dataclass(slots=True)
class Member:
    """A replica in the pool. `error`: why it does not generate; null if it does.

    `version`, `checksum`: what it holds; without a checksum what it was started with, or after a failed sync nothing.
    `gave_up`: it died and is restarted no more. `non_finite_version`: of the last weights here whose logits were not
    finite. `use`: as it was when the replica was last probed.
    """

    number: int
    replica: Replica
    error: str | None = "is starting"
    responses: int = 0
    version: int = 0
    checksum: str | None = None
    sync_seconds: float = 0.0
    sync_bytes: int = 0
    sync_error: str | None = None
    synced: bool = False
    restarts: int = 0
    gave_up: bool = False
    non_finite_version: int | None = None
    use: EngineUse = field(default_factory=EngineUse)

    def __str__(self) -> str:
        return f"replica {self.number} {self.error or 'is ready'}"
