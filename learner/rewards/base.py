"""What every reward offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RewardItem:
    """One response to be rewarded. `response` is the committed text, without special tokens."""

    prompt_id: str
    prompt: str
    response: str
    answer: str


@dataclass(frozen=True, slots=True)
class Scores:
    """One reward for each item, in order; `timeouts` of them were not ready in time and are 0."""

    values: list[float]
    timeouts: int = 0


class Rewards(Protocol):
    """Scores responses without blocking the event loop; every item has a time limit."""

    async def start(self) -> None:
        """Make ready. Raises InputError if the reward can't be used, before anything else of a run starts."""
        ...

    async def score(self, items: Sequence[RewardItem]) -> Scores:
        """The items' rewards. Raises RewardError, naming the prompt, if one has none."""
        ...

    async def close(self) -> None:
        """Stop whatever `start` started. May be called twice, and after a `start` that failed."""
        ...


class RewardError(Exception):
    """A reward that is no finite number, or a function that raised."""


class UnusableAnswerError(ValueError):
    """A reference answer that no response can be compared with: every response gets 0, and a warning is logged."""
