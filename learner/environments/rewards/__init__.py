"""Rewards: a number for each response, from the chain task, `math-verify`, a task's own scorer or a user's function.

`make_rewards` is the seam: a further kind is a model in `common.config.data.Reward` and a branch there.
"""

from collections.abc import Collection
from functools import partial

from common.config.data import ChainReward, Data, MathReward, ReasoningGymData, ReasoningGymReward, Reward
from learner.environments.rewards.base import Reading, RewardError, RewardItem, Rewards, Score, Tally
from learner.environments.rewards.chain_steps import ChainRewards, check_prompt
from learner.environments.rewards.math_answers import check_answer, load_math
from learner.environments.rewards.own_scorer import load_scorer
from learner.environments.rewards.user_function import load_function
from learner.environments.rewards.worker_rewards import WorkerRewards
from learner.environments.rows import Check, accept

__all__ = [
    "ChainRewards",
    "Reading",
    "RewardError",
    "RewardItem",
    "Rewards",
    "Score",
    "Tally",
    "WorkerRewards",
    "make_rewards",
    "row_check",
]


def row_check(reward: Reward) -> Check:
    """What finds rows that the reward can't work with, before a run begins."""
    if isinstance(reward, ChainReward):
        return check_prompt
    return check_answer if isinstance(reward, MathReward) else accept


def make_rewards(reward: Reward, columns: Collection[str] | None = (), data: Data | None = None) -> Rewards:
    """The configured reward, not yet started.

    `columns`: those of the data set, which a user's function may ask for; None if they are not known. `data`: where
    the problems are from, for the reward that comes from the same place. Raises ValueError if that is another one.
    """
    if isinstance(reward, ChainReward):
        return ChainRewards()
    if isinstance(reward, MathReward):
        return WorkerRewards(load_math, "math-verify", reward)
    if isinstance(reward, ReasoningGymReward):
        if not isinstance(data, ReasoningGymData):
            raise ValueError("reward 'reasoning_gym' needs data of 'reasoning_gym'")
        return WorkerRewards(partial(load_scorer, data, reward), f"reasoning_gym ({data.name})", reward)
    known = None if columns is None else frozenset(columns)
    return WorkerRewards(partial(load_function, reward.function, known), reward.function, reward)
