"""What a transport's receiving side gives the engine."""

from collections.abc import AsyncIterator, Callable
from typing import Any


class NotReachable(Exception):
    """The weights are where this replica can never reach them; the message says what to set."""


class Withdrawn(Exception):
    """The learner has given this version up, or a later one is everywhere; the message says which."""


class Arrived:
    """Weights that are on this machine and are those that were sent.

    `update_info`: what vLLM's workers are told. `close` is called once they have loaded them, or will not.
    """

    def __init__(self, update_info: dict[str, Any], checksum: str, close: Callable[[], None] = lambda: None) -> None:
        self.update_info = update_info
        self.checksum = checksum
        self.close = close

    async def parts(self) -> AsyncIterator[dict[str, Any]]:
        """What vLLM's workers are told, one after the other."""
        yield self.update_info

    def compare(self, received: list[str]) -> str:
        """The checksum of what was sent. `received`: of what each worker received by itself.

        Raises:
            DamagedWeights: that is not what was sent.
        """
        return self.checksum
