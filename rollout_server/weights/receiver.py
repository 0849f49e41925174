"""What a transport's receiving side gives the engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class NotReachable(Exception):
    """The weights are where this replica can never reach them; the message says what to set."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Weights that are on this machine and are those that were sent.

    `update_info`: what vLLM's workers are told. `close` is called once they have loaded them, or will not.
    """

    update_info: dict[str, Any]
    checksum: str
    close: Callable[[], None] = lambda: None
