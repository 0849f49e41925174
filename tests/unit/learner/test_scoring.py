"""Scoring: responses are rewarded while others are generated, and a failing reward ends the step at once."""

import asyncio
from dataclasses import replace

import pytest

from common import metrics as names
from common.packed import Group, PackedResponse, TokenArrays, pack
from common.trajectory import Attempt, Prompt
from learner.environments.rewards import Reading, RewardError, RewardItem, Score, Tally
from learner.loop import scoring as scoring_module
from learner.loop.scoring import Scored, Scoring, reward_metrics
from learner.run.errors import PartError
from tests.fake_parts import TOKENIZER
from tests.trajectories import attempt_of, trajectory


class GatedRewards:
    """Rewards by the sample's number, each once its gate is open."""

    def __init__(self, failing: bool = False, reads_tokens: bool = False) -> None:
        self.reads_tokens = reads_tokens
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


def text_attempt(sample: int) -> Attempt:
    return attempt_of(TOKENIZER.encode(f"text {sample}"), segment=0, start=0)


def responses(count: int) -> list[PackedResponse]:
    return [
        pack(trajectory([text_attempt(sample)], reward=None, sample=sample), text=f"text {sample}")
        for sample in range(count)
    ]


def test_a_response_is_scored_while_others_are_still_generated():
    async def run() -> list[RewardItem]:
        rewards = GatedRewards()
        async with Scoring(rewards, [PROMPT], Tally(2), 1) as scoring:
            scoring.add(responses(2)[0])
            await asyncio.sleep(0)
            return rewards.items

    (item,) = asyncio.run(run())
    assert (item.prompt, item.response, item.answer, item.sample) == ("the prompt", "text 0", "x", 0)
    assert len(item.token_ids) == 0
    assert item.row == {"level": 3}


def test_every_response_gets_its_own_reward_whatever_the_order_and_what_is_0_is_counted():
    async def run() -> Scored:
        rewards = GatedRewards()
        rewards.gate.set()
        given = responses(5)
        async with Scoring(rewards, [PROMPT], Tally(5), 1) as scoring:
            for response in reversed(given):
                scoring.add(response)
            return await scoring.finish([Group(prompt=PROMPT, trajectories=given)])

    scored = asyncio.run(run())
    (group,) = scored.groups
    assert [t.text for t in group.trajectories] == [f"text {n}" for n in range(5)]
    assert [t.reward for t in group.trajectories] == [0.5, 0.0, 0.0, 0.0, 4.5]
    assert reward_metrics(scored.tally) == {
        names.REWARD_TIMEOUTS: 1,
        names.REWARD_ERRORS: 1,
        names.REWARD_UNUSABLE_ANSWERS: 1,
    }
    assert "1 rewards failed" in str(scored)
    # The row travels no further than to the reward.
    assert group.prompt.columns == {}


def test_a_reward_that_reads_tokens_gets_the_committed_ones_wherever_they_are():
    async def run(response: PackedResponse) -> RewardItem:
        rewards = GatedRewards(reads_tokens=True)
        async with Scoring(rewards, [PROMPT], Tally(1), 1) as scoring:
            scoring.add(response)
            await asyncio.sleep(0.01)
            (item,) = rewards.items
            return item

    async def stored(tokens: TokenArrays) -> TokenArrays:
        return tokens

    erased = text_attempt(5).model_copy(update={"verdict": "erased"})
    response = pack(trajectory([erased, text_attempt(0)], reward=None), text="text 0")
    elsewhere = replace(response, tokens=None, reference=stored(response.arrays))
    for given in (response, elsewhere):
        assert list(asyncio.run(run(given)).token_ids) == TOKENIZER.encode("text 0")


def test_tokens_that_do_not_arrive_fail_the_reward_with_the_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring_module, "FETCH_SECONDS", 0.05)

    async def run() -> None:
        lost = replace(responses(1)[0], tokens=None, reference=asyncio.Event().wait())
        async with Scoring(GatedRewards(reads_tokens=True), [PROMPT], Tally(1), 1) as scoring:
            scoring.add(lost)
            await scoring.finish([])

    with pytest.raises(PartError, match=r"reward: step 1: the tokens of response 0 .* within 0\.05 s"):
        asyncio.run(run())


def test_too_many_failures_end_the_step_before_everything_is_generated():
    async def run() -> None:
        rewards = GatedRewards(failing=True)
        rewards.gate.set()
        async with Scoring(rewards, [PROMPT], Tally(5), 7) as scoring:
            scoring.add(responses(5)[2])
            await asyncio.sleep(0.01)
            scoring.add(responses(5)[3])

    with pytest.raises(PartError, match="reward: step 7: too many"):
        asyncio.run(run())


def test_leaving_cancels_what_is_still_scored():
    async def run(rewards: GatedRewards) -> None:
        async with Scoring(rewards, [PROMPT], Tally(5), 1) as scoring:
            for response in responses(3):
                scoring.add(response)
            await asyncio.sleep(0)
            raise RuntimeError("the rollout failed")

    rewards = GatedRewards()
    with pytest.raises(RuntimeError, match="the rollout failed"):
        asyncio.run(run(rewards))
    assert rewards.cancelled == 3
