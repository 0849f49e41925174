"""Scoring: responses are rewarded while others are generated, and a failing reward ends the step at once."""

import asyncio

import pytest

from common import metrics as names
from common.trajectory import Group, Prompt, Trajectory
from learner.environments.rewards import Reading, RewardError, RewardItem, Score, Tally
from learner.loop.scoring import Scored, Scoring
from learner.run.errors import PartError
from tests.fake_parts import TOKENIZER
from tests.trajectories import attempt_of, trajectory


class GatedRewards:
    """Rewards by the sample's number, each once its gate is open."""

    def __init__(self, failing: bool = False) -> None:
        self.items: list[RewardItem] = []
        self.gate = asyncio.Event()
        self.failing = failing
        self.cancelled = 0

    async def start(self) -> Reading:
        return Reading(frozenset(), "")

    async def score(self, item: RewardItem) -> Score:
        self.items.append(item)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        kinds = {1: Score(0.0, "timeout"), 2: Score(0.0, "error", "failed"), 3: Score(0.0, "unusable_answer")}
        return kinds.get(item.sample, Score(item.sample + 0.5))

    def judge(self, tally: Tally) -> None:
        if self.failing and tally.errors:
            raise RewardError("too many")

    async def close(self) -> None:
        pass


PROMPT = Prompt(id="p0", text="the prompt", token_ids=[10, 20, 30, 40], answer="x", columns={"level": 3})


def responses(count: int) -> list[Trajectory]:
    return [
        trajectory([attempt_of(TOKENIZER.encode(f"text {sample}"), segment=0, start=0)], reward=None, sample=sample)
        for sample in range(count)
    ]


def test_a_response_is_scored_while_others_are_still_generated():
    async def run() -> list[RewardItem]:
        rewards = GatedRewards()
        async with Scoring(rewards, [PROMPT], 2, TOKENIZER, 1) as scoring:
            scoring.add(responses(2)[0])
            await asyncio.sleep(0)
            return rewards.items

    (item,) = asyncio.run(run())
    assert (item.prompt, item.response, item.answer, item.sample) == ("the prompt", "text 0", "x", 0)
    assert item.token_ids == TOKENIZER.encode("text 0")
    assert item.row == {"level": 3}


def test_every_response_gets_its_own_reward_whatever_the_order_and_what_is_0_is_counted():
    async def run() -> Scored:
        rewards = GatedRewards()
        rewards.gate.set()
        given = responses(5)
        async with Scoring(rewards, [PROMPT], 5, TOKENIZER, 1) as scoring:
            for response in reversed(given):
                scoring.add(response)
            return await scoring.finish([Group(prompt=PROMPT, trajectories=given)])

    scored = asyncio.run(run())
    (group,) = scored.groups
    assert [t.text for t in group.trajectories] == [f"text {n}" for n in range(5)]
    assert [t.reward for t in group.trajectories] == [0.5, 0.0, 0.0, 0.0, 4.5]
    assert scored.metrics == {names.REWARD_TIMEOUTS: 1, names.REWARD_ERRORS: 1, names.REWARD_UNUSABLE_ANSWERS: 1}
    assert "1 rewards failed" in str(scored)
    # The row travels no further than to the reward.
    assert group.prompt.columns == {}


def test_the_reward_sees_the_text_before_the_stop_string():
    async def run() -> list[RewardItem]:
        rewards = GatedRewards()
        async with Scoring(rewards, [PROMPT], 1, TOKENIZER, 1, ("xt",)) as scoring:
            scoring.add(responses(1)[0])
            await asyncio.sleep(0)
            return rewards.items

    (item,) = asyncio.run(run())
    assert item.response == "te"
    assert item.token_ids == TOKENIZER.encode("text 0")


def test_too_many_failures_end_the_step_before_everything_is_generated():
    async def run() -> None:
        rewards = GatedRewards(failing=True)
        rewards.gate.set()
        async with Scoring(rewards, [PROMPT], 5, TOKENIZER, 7) as scoring:
            scoring.add(responses(5)[2])
            await asyncio.sleep(0.01)
            scoring.add(responses(5)[3])

    with pytest.raises(PartError, match="reward: step 7: too many"):
        asyncio.run(run())


def test_leaving_cancels_what_is_still_scored():
    async def run(rewards: GatedRewards) -> None:
        async with Scoring(rewards, [PROMPT], 5, TOKENIZER, 1) as scoring:
            for response in responses(3):
                scoring.add(response)
            await asyncio.sleep(0)
            raise RuntimeError("the rollout failed")

    rewards = GatedRewards()
    with pytest.raises(RuntimeError, match="the rollout failed"):
        asyncio.run(run(rewards))
    assert rewards.cancelled == 3
