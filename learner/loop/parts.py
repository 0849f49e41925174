"""What a run is made of."""

from dataclasses import dataclass

from common.interfaces import Rollouts
from learner.environments.rewards import Rewards
from learner.policy.group import LearnerGroup


@dataclass(frozen=True, slots=True)
class Parts:
    """What the driver drives, not yet started (rewards are)."""

    rollouts: Rollouts
    learner: LearnerGroup
    rewards: Rewards
