"""A replica in the pool, and what the pool knows of it."""

import time
from dataclasses import dataclass, field

from rollout_server.replicas.replica import Priors, Replica
from rollout_server.replicas.use import EngineUse


@dataclass(slots=True)
class Member:
    """A replica in the pool. `error`: why it does not generate; null if it does.

    `version`, `checksum`: what it holds; without a checksum what it was started with, or after a failed sync nothing.
    `unreachable`: the transport cannot bring weights to it. `gave_up`: it died and is restarted no more.
    `non_finite_version`: of the last weights here whose logits were not finite. `use`: as it was when the replica was
    last probed. `moved`, `progressed`: when its engine was last seen to have made a step, and when it finished a
    response, or had no reason to. `priors`: the statistics that it gave last.
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
    unreachable: bool = False
    synced: bool = False
    restarts: int = 0
    gave_up: bool = False
    non_finite_version: int | None = None
    use: EngineUse = field(default_factory=EngineUse)
    moved: float = field(default_factory=time.monotonic)
    progressed: float = field(default_factory=time.monotonic)
    priors: Priors | None = None

    def __str__(self) -> str:
        return f"replica {self.number} {self.error or 'is ready'}"

    def has_moved(self) -> None:
        """Nothing was to be expected of it until now."""
        self.moved = self.progressed = time.monotonic()
