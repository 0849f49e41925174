"""One copy of the model, as the pool sees it: what it does, and how it fails."""

from dataclasses import dataclass
from typing import Protocol

from common.config.run import InFlight
from common.packed import PackedResponse
from common.trajectory import ResponseRequest, Trajectory
from common.weights import WeightUpdate
from rollout_server.engine.listener import Listener, PromptScores
from rollout_server.replicas.record import Record
from rollout_server.replicas.use import EngineUse

Priors = dict[str, list[list[float]]]
"""Statistics of earlier groups, by kind of response: mean and second moment of U at each segment index."""


class ReplicaLost(Exception):
    """The replica is dead, or did not answer; of what it was generating only what listeners heard is left."""


class NoWeights(Exception):
    """The replica's last sync failed, so it holds no complete weights."""


class RequestRefused(Exception):
    """The engine cannot do what a request asks for; the message is for the client."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a started engine says of itself. `defaults`: sampling parameters of the model's generation config.

    `sentinel_ids`: tokens that no monitored response can hold.
    """

    version: int
    max_length: int
    eos_token_ids: tuple[int, ...]
    vocabulary: int
    defaults: dict[str, float]
    sentinel_ids: tuple[int, ...] = ()


class Replica(Protocol):
    """One copy of the model. Every call but `generate` has a deadline; `generate` has the request's."""

    async def start(self) -> EngineFacts:
        """Start or, after a loss, restart."""
        ...

    async def generate(self, request: ResponseRequest, listener: Listener | None) -> Trajectory:
        """Generate one response; cancelling frees what it holds.

        Without a listener nothing is known of a response that is lost; with one, what was judged.

        Raises:
            ReplicaLost: the engine died.
            NoWeights: the last sync failed.
            GenerationAborted: the engine ended the response on purpose.
            RequestRefused: with the reason.
        """
        ...

    async def generate_packed(self, request: ResponseRequest, record: Record | None) -> PackedResponse:
        """As `generate`, for training: as arrays with its text, and ended by `request.stop`.

        `record` gets what is judged, in case that the replica is lost.
        """
        ...

    async def score(self, prompt_token_ids: list[int], top: int, cache_salt: str | None) -> PromptScores:
        """Log-probs and ranks of a prompt's tokens and of the `top` likeliest in their places."""
        ...

    async def probe(self) -> EngineUse:
        """What the engine is doing; raises unless it answers."""
        ...

    async def sync(self, update: WeightUpdate, deadline_seconds: float, in_flight: InFlight) -> str:
        """Load weights; the checksum of what is then held. What is paused stays so.

        `in_flight`: what becomes of responses under way, see `SyncConfig`; with `abort` their `generate` raises
        `GenerationAborted`.
        """
        ...

    async def priors(self) -> Priors:
        """Statistics of earlier groups."""
        ...

    async def restore_priors(self, priors: Priors) -> None:
        """Take over what `priors` gave."""
        ...

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; false while a request holds some."""
        ...

    async def pause(self, mode: str) -> None: ...

    async def resume(self) -> None: ...

    async def close(self) -> None: ...
