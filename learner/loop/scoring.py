"""Rewards responses as they finish, while the others of their step are still being generated."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from common import metrics as names
from common.packed import Group, PackedResponse, TokenArrays, committed
from common.trajectory import Prompt
from learner.environments.environment import Action, Environment, SingleTurn
from learner.environments.rewards import Rewards, Score, Tally
from learner.run.errors import PartError, part

Key = tuple[str, int]

FETCH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Scored:
    """Groups whose responses have their text and reward, and how many rewards of each are 0 as there was none."""

    groups: list[Group]
    tallies: list[Tally]

    @property
    def tally(self) -> Tally:
        """Of all groups."""
        return joined(self.tallies)

    def __str__(self) -> str:
        """What a line about the rewards ends with."""
        tally = self.tally
        texts = (
            f"; {tally.timeouts} rewards were not ready in time and are 0" if tally.timeouts else "",
            f"; {tally.errors} rewards failed and are 0" if tally.errors else "",
            f"; {tally.unusable_answers} rewards are 0 for want of a usable answer" if tally.unusable_answers else "",
        )
        return "".join(texts)


def joined(tallies: Sequence[Tally]) -> Tally:
    """The sum of tallies."""
    return Tally(
        responses=sum(tally.responses for tally in tallies),
        timeouts=sum(tally.timeouts for tally in tallies),
        errors=sum(tally.errors for tally in tallies),
        unusable_answers=sum(tally.unusable_answers for tally in tallies),
    )


def reward_metrics(tally: Tally) -> dict[str, int]:
    """How many rewards of a step are 0 because there was none."""
    return {
        names.REWARD_TIMEOUTS: tally.timeouts,
        names.REWARD_ERRORS: tally.errors,
        names.REWARD_UNUSABLE_ANSWERS: tally.unusable_answers,
    }


class Scoring:
    """The rewards of one rollout: `add` every response as it finishes, then `finish`.

    `judged`: the rewards that say whether so many fail that the run should end, which may be more than this rollout's.

    An asynchronous context manager: leaving it cancels what is still being scored.
    """

    def __init__(
        self,
        rewards: Rewards,
        prompts: Sequence[Prompt],
        judged: Tally,
        step: int,
    ) -> None:
        self._rewards = rewards
        self._environment: Environment = SingleTurn(rewards)
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._step = step
        self._scores: dict[Key, asyncio.Task[Score]] = {}
        self._judged = judged
        self._tallies: dict[str, Tally] = {}
        self._failure: PartError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._scores.values():
            task.cancel()
        await asyncio.gather(*self._scores.values(), return_exceptions=True)

    def add(self, response: PackedResponse) -> None:
        """Begin to score a response. Raises PartError if the rewards so far already end the run."""
        self._raise_failure()
        key = response.group_id, response.sample
        prompt = self._prompts.get(response.prompt_id)
        if prompt is None or key in self._scores:
            # Nobody asked for it; whoever collects the responses says so.
            return
        tally = self._tallies.setdefault(response.group_id, Tally(0))
        tally.responses += 1
        self._scores[key] = asyncio.create_task(self._score(prompt, response, tally))

    async def finish(self, groups: Sequence[Group]) -> Scored:
        """The groups, each response of which was added, with texts and rewards. Raises PartError if some have none."""
        pending = set(self._scores.values())
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            self._raise_failure()
        tallies = [self._tallies[group.trajectories[0].group_id] for group in groups]
        return Scored([self._rewarded(group) for group in groups], tallies)

    async def _score(self, prompt: Prompt, response: PackedResponse, tally: Tally) -> Score:
        try:
            with part("reward", self._step):
                episode = await self._environment.reset(prompt, response.sample)
                token_ids = await _token_ids(response) if self._rewards.reads_tokens else ()
                turn = await episode.step(Action(response.text, response.finish_reason, token_ids))
                if not turn.done:
                    raise RuntimeError(
                        f"prompt {prompt.id!r}: the environment expects another turn, of which none is made"
                    )
                score = await episode.score()
                tally.count(score)
                self._judged.count(score)
                self._rewards.judge(self._judged)
                return score
        except PartError as error:
            self._failure = self._failure or error
            raise

    def _rewarded(self, group: Group) -> Group:
        finished = [
            replace(response, reward=self._scores[response.group_id, response.sample].result().value)
            for response in group.trajectories
        ]
        # Nobody but the rewards reads the data set's other columns: they need not travel any further.
        return Group(prompt=group.prompt.model_copy(update={"columns": {}}), trajectories=finished)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


async def _token_ids(response: PackedResponse) -> NDArray[np.int32]:
    """The committed tokens. Raises TimeoutError if they don't arrive."""
    if response.tokens is not None:
        return response.token_ids
    try:
        async with asyncio.timeout(FETCH_SECONDS):
            tokens: TokenArrays = await response.reference
    except TimeoutError:
        raise TimeoutError(
            f"the tokens of response {response.sample} to prompt {response.prompt_id!r} did not arrive within "
            f"{FETCH_SECONDS:g} s"
        ) from None
    return committed(response.attempts, tokens.token_ids)
