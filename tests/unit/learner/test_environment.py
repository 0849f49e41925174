"""Data sets with a reward as environments of a single turn."""

import asyncio
from typing import Any

import pytest

from common.config.data import ChainReward
from common.trajectory import Prompt
from learner.environments.environment import Action, Environment, Observation, SingleTurn
from learner.environments.rewards import Score, make_rewards
from learner.environments.tasks import chain


def test_a_single_turn_is_scored_as_its_reward_scores_the_response():
    (problem,) = chain.generate(0, "train", 1, 3)
    prompt = Prompt(id="p", text=problem.prompt, token_ids=[1], answer=problem.solution)
    environment: Environment = SingleTurn(make_rewards(ChainReward()))

    async def episode(text: str) -> tuple[Observation, Score]:
        begun = await environment.reset(prompt, 0)
        turn = await begun.step(Action(text, "stop"))
        return turn, await begun.score()

    right, wrong = (asyncio.run(episode(text)) for text in (problem.solution, "a"))
    assert right == (Observation(done=True), Score(1.0))
    assert wrong == (Observation(done=True), Score(0.0))


def test_a_reward_sees_all_there_is_of_problem_and_response():
    seen: list[Any] = []

    class Seeing:
        reads_tokens = True

        async def score(self, item: Any) -> Score:
            seen.append(item)
            return Score(0.5)

    prompt = Prompt(id="p", text="question", token_ids=[1], answer="a", columns={"level": 3})

    async def episode() -> Score:
        begun = await SingleTurn(Seeing()).reset(prompt, 2)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="nothing was said yet"):
            await begun.score()
        await begun.step(Action("said", "length", [5, 6]))
        with pytest.raises(RuntimeError, match="only turn is over"):
            await begun.step(Action("more", "stop"))
        return await begun.score()

    assert asyncio.run(episode()).value == 0.5
    (item,) = seen
    assert (item.prompt_id, item.prompt, item.response, item.answer) == ("p", "question", "said", "a")
    assert (item.sample, item.finish_reason, item.token_ids, item.row) == (2, "length", [5, 6], {"level": 3})
