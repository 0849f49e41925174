"""What a run is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.interfaces import Rollouts
from common.packed import Group
from learner.environments.rewards import Rewards
from learner.policy.group import LearnerGroup
from learner.run.trajectory_files import write_trajectories


@dataclass(frozen=True, slots=True)
class Parts:
    """What the driver drives, not yet started (rewards are). `write`: what writes a step's responses into a file."""

    rollouts: Rollouts
    learner: LearnerGroup
    rewards: Rewards
    write: Callable[[Path, int, Sequence[Group]], None] = write_trajectories
