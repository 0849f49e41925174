"""What every reward offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RewardItem:
    """One response to be rewarded. `response` is the committed text, without special tokens.

    `token_ids` are the committed tokens, special ones included, for rewards that read them; `row` is the prompt's whole
    row in the data set.
    """

    prompt_id: str
    prompt: str
    response: str
    answer: str
    sample: int = 0
    finish_reason: str = "stop"
    token_ids: Sequence[int] | NDArray[np.int32] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reward reads: columns of the data set (None: all of them), and in `text` all of it, for people.

    `tokens`: whether it reads `RewardItem.token_ids`.
    """

    columns: frozenset[str] | None
    text: str
    tokens: bool = False


Failure = Literal["timeout", "error", "unusable_answer"]


@dataclass(frozen=True, slots=True)
class Score:
    """One response's reward, and why it is 0 if there was none; of an error also the `traceback`."""

    value: float
    failure: Failure | None = None
    message: str = ""
    traceback: str = ""


@dataclass(slots=True)
class Tally:
    """What became of the rewards so far of the `responses` of a step or an evaluation."""

    responses: int
    timeouts: int = 0
    errors: int = 0
    unusable_answers: int = 0
    last_error: Score | None = None

    def count(self, score: Score) -> None:
        """Take in one more reward."""
        self.timeouts += score.failure == "timeout"
        self.unusable_answers += score.failure == "unusable_answer"
        if score.failure == "error":
            self.errors += 1
            self.last_error = score


class Rewards(Protocol):
    """Scores responses without blocking the event loop; every call has a time limit."""

    @property
    def reads_tokens(self) -> bool:
        """Once started: whether items need `token_ids`."""
        ...

    async def start(self) -> Reading:
        """Make ready; returns what the reward reads.

        Raises InputError if the reward can't be used, before anything else of a run starts.
        """
        ...

    async def score(self, item: RewardItem) -> Score:
        """The response's reward. Many may be asked for at a time."""
        ...

    def judge(self, tally: Tally) -> None:
        """Raise RewardError, which names one failure, if so many rewards failed that a run should end."""
        ...

    async def close(self) -> None:
        """Stop whatever `start` started. May be called twice, and after a `start` that failed."""
        ...


class RewardError(Exception):
    """Too many rewards that failed or were not ready in time."""


class UnusableAnswerError(ValueError):
    """A reference answer that no response can be compared with: every response gets 0, and a warning is logged."""
