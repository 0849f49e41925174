"""What a response acts upon: `reset`, `step`, `score`. A data set with a reward is the case of a single turn.

The loop goes through this protocol with every response. An environment of several turns would be one more
implementation, and needs a producer that generates on after a step that is not `done`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.trajectory import FinishReason, Prompt
from learner.environments.rewards.base import RewardItem, Rewards, Score


@dataclass(frozen=True, slots=True)
class Action:
    """What the policy said in one turn: the committed text, and its tokens if the reward reads them."""

    text: str
    finish_reason: FinishReason
    token_ids: Sequence[int] | NDArray[np.int32] = ()


@dataclass(frozen=True, slots=True)
class Observation:
    """What the environment answers: whether the episode is over, and if not, what the next turn begins with."""

    done: bool
    text: str = ""


class Episode(Protocol):
    """One way through a problem. `step` until `done`, then `score`, each once at a time."""

    async def step(self, action: Action) -> Observation: ...

    async def score(self) -> Score:
        """The reward of the whole episode. Raises RuntimeError before it is done."""
        ...


class Environment(Protocol):
    """Makes episodes. Has what `rewards` has of a start, an end and limits."""

    async def reset(self, prompt: Prompt, sample: int) -> Episode:
        """A new episode of the problem; `sample`: which of its group's."""
        ...


class SingleTurn:
    """The prompt is the observation, the response the only action, its reward the score."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards = rewards

    async def reset(self, prompt: Prompt, sample: int) -> "SingleTurnEpisode":
        return SingleTurnEpisode(self._rewards, prompt, sample)


class SingleTurnEpisode:
    """See `SingleTurn`."""

    def __init__(self, rewards: Rewards, prompt: Prompt, sample: int) -> None:
        self._rewards = rewards
        self._prompt = prompt
        self._sample = sample
        self._action: Action | None = None

    async def step(self, action: Action) -> Observation:
        if self._action is not None:
            raise RuntimeError(f"prompt {self._prompt.id!r}, sample {self._sample}: the episode's only turn is over")
        self._action = action
        return Observation(done=True)

    async def score(self) -> Score:
        if self._action is None:
            raise RuntimeError(f"prompt {self._prompt.id!r}, sample {self._sample}: nothing was said yet")
        prompt, action = self._prompt, self._action
        return await self._rewards.score(
            RewardItem(
                prompt_id=prompt.id,
                prompt=prompt.text,
                response=action.text,
                answer=prompt.answer,
                sample=self._sample,
                finish_reason=action.finish_reason,
                token_ids=action.token_ids,
                row=prompt.columns,
            )
        )
