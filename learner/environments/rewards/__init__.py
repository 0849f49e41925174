"""Rewards: a number for each response, from the chain task, from `math-verify` or from a user's function.

`make_rewards` is the seam: a further kind is a model in `common.config.data.Reward` and a branch there.
"""

from collections.abc import Collection
from functools import partial

from common.config.data import ChainReward, MathReward, Reward
from learner.environments.rewards.base import Reading, RewardError, RewardItem, Rewards, Score, Tally
from learner.environments.rewards.chain_steps import ChainRewards, check_prompt
from learner.environments.rewards.math_answers import check_answer, load_math
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


def make_rewards(reward: Reward, columns: Collection[str] | None = ()) -> Rewards:
    """The configured reward, not yet started.

    `columns`: those of the data set, which a user's function may ask for; None if they are not known.
    """
    if isinstance(reward, ChainReward):
        return ChainRewards()
    if isinstance(reward, MathReward):
        return WorkerRewards(load_math, "math-verify", reward)
    known = None if columns is None else frozenset(columns)
    return WorkerRewards(partial(load_function, reward.function, known), reward.function, reward)
