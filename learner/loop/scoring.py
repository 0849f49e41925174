"""Rewards responses as they finish, while the others of their step are still being generated."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from common import metrics as names
from common.stops import text_before_stop
from common.trajectory import Group, Prompt, Trajectory
from learner.environments.rewards import RewardItem, Rewards, Score, Tally
from learner.environments.step_checks import Decoder
from learner.run.errors import PartError, part

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Scored:
    """Groups whose responses have their text and reward, and how many rewards are 0 because there was none."""

    groups: list[Group]
    tally: Tally

    @property
    def metrics(self) -> dict[str, int]:
        return {
            names.REWARD_TIMEOUTS: self.tally.timeouts,
            names.REWARD_ERRORS: self.tally.errors,
            names.REWARD_UNUSABLE_ANSWERS: self.tally.unusable_answers,
        }

    def __str__(self) -> str:
        """What a line about the rewards ends with."""
        tally = self.tally
        texts = (
            f"; {tally.timeouts} rewards were not ready in time and are 0" if tally.timeouts else "",
            f"; {tally.errors} rewards failed and are 0" if tally.errors else "",
            f"; {tally.unusable_answers} rewards are 0 for want of a usable answer" if tally.unusable_answers else "",
        )
        return "".join(texts)


class Scoring:
    """The rewards of one rollout: `add` every response as it finishes, then `finish`.

    A response's text is the decoding of its committed tokens, special ones left out, up to the stop string that ended
    it.
    An asynchronous context manager: leaving it cancels what is still being scored.
    """

    def __init__(
        self,
        rewards: Rewards,
        prompts: Sequence[Prompt],
        responses: int,
        decoder: Decoder,
        step: int,
        stops: Sequence[str] = (),
    ) -> None:
        self._rewards = rewards
        self._prompts = {prompt.id: prompt for prompt in prompts}
        self._decoder = decoder
        self._step = step
        self._stops = stops
        self._texts: dict[Key, str] = {}
        self._scores: dict[Key, asyncio.Task[Score]] = {}
        self._tally = Tally(responses)
        self._failure: PartError | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._scores.values():
            task.cancel()
        await asyncio.gather(*self._scores.values(), return_exceptions=True)

    def add(self, trajectory: Trajectory) -> None:
        """Begin to score a response. Raises PartError if the rewards so far already end the run."""
        self._raise_failure()
        key = trajectory.group_id, trajectory.sample
        prompt = self._prompts.get(trajectory.prompt_id)
        if prompt is None or key in self._scores:
            # Nobody asked for it; whoever collects the responses says so.
            return
        (decoded,) = self._decoder.batch_decode([trajectory.token_ids], skip_special_tokens=True)
        text = text_before_stop(decoded, self._stops)
        item = RewardItem(
            prompt_id=prompt.id,
            prompt=prompt.text,
            response=text,
            answer=prompt.answer,
            sample=trajectory.sample,
            finish_reason=trajectory.finish_reason,
            token_ids=trajectory.token_ids,
            row=prompt.columns,
        )
        self._texts[key] = text
        self._scores[key] = asyncio.create_task(self._score(item))

    async def finish(self, groups: Sequence[Group]) -> Scored:
        """The groups, each response of which was added, with texts and rewards. Raises PartError if some have none."""
        pending = set(self._scores.values())
        while pending:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
            self._raise_failure()
        return Scored([self._rewarded(group) for group in groups], self._tally)

    async def _score(self, item: RewardItem) -> Score:
        try:
            with part("reward", self._step):
                score = await self._rewards.score(item)
                self._tally.count(score)
                self._rewards.judge(self._tally)
                return score
        except PartError as error:
            self._failure = self._failure or error
            raise

    def _rewarded(self, group: Group) -> Group:
        finished = []
        for trajectory in group.trajectories:
            key = trajectory.group_id, trajectory.sample
            found = {"text": self._texts[key], "reward": self._scores[key].result().value}
            finished.append(trajectory.model_copy(update=found))
        # Nobody but the rewards reads the data set's other columns: they need not travel any further.
        return Group(prompt=group.prompt.model_copy(update={"columns": {}}), trajectories=finished)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
