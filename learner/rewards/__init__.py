"""Rewards: a number for each response, from the chain task, from `math-verify` or from a user's function.

`make_rewards` is the seam: a further kind is a model in `common.config.data.Reward` and a branch there.
"""

from common.config.data import ChainReward, MathReward, Reward
from learner.rewards.base import RewardItem, Rewards, Scores
from learner.rewards.chain_steps import ChainRewards
from learner.rewards.worker_rewards import WorkerRewards, function_rewards, math_rewards

__all__ = ["ChainRewards", "RewardItem", "Rewards", "Scores", "WorkerRewards", "make_rewards"]


def make_rewards(reward: Reward) -> Rewards:
    """The configured reward, not yet started. Raises InputError if a user's function can't be named."""
    if isinstance(reward, ChainReward):
        return ChainRewards()
    if isinstance(reward, MathReward):
        return math_rewards(reward.timeout_seconds)
    return function_rewards(reward.function, reward.timeout_seconds)
